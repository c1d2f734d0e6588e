"""Arguments of the Hugging Face Trainer (YAML, JSON, or a command line) → a recipe.

Source: transformers@5.23.0:training_args.py:TrainingArguments; trl@1.16.0:trainer/sft_config.py:SFTConfig,
trainer/model_config.py:ModelConfig for models, adapters and lengths.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.recipe_fields import Fields
from ullage.read.recipe_words import (
    ATTENTION,
    HARMLESS_PREFIXES,
    RecipeWords,
    optimizer_of,
    parse_targets,
)
from ullage.read.rlhf_recipe import HARMLESS as RLHF_HARMLESS
from ullage.read.rlhf_recipe import trl_rlhf
from ullage.spec.rlhf import ON_POLICY
from ullage.spec.training import Lora

_HARMLESS = (
    "auto_find_batch_size", "model_revision", "dataset_name", "dataset_config", "gradient_checkpointing_kwargs",
    "torch_empty_cache_steps", "dataloader_num_workers", "bf16_full_eval", "fp16_full_eval", "fsdp_config",
    "torch_compile_backend", "torch_compile_mode", "liger_kernel_config", "bnb_4bit_quant_type", "use_bnb_nested_quant",
    "lora_task_type", "bnb_4bit_quant_storage", "eos_token", "pad_token", "completion_only_loss", "assistant_only_loss",
    "fp16_opt_level", "half_precision_backend", "length_column_name", "ddp_find_unused_parameters", "use_cache",
)  # fmt: skip
_TRL_LENGTH = 1024
#: Which of TRL's scripts a line runs: ``trl dpo``, or a copy of its file.
_SCRIPT = re.compile(
    r"\btrl\s+(sft|dpo|kto|reward|grpo|rloo)\b|\b(sft|dpo|kto|reward_modeling|reward|grpo|rloo|ppo|orpo|cpo)\.py\b"
)
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "auto": "bf16"}


def fields_of_line(line: str, where: str) -> Fields:
    """Return the ``--name value`` and ``--name=value`` pairs of a command line as settings; a bare flag is true."""
    try:
        words = shlex.split(line.replace("\\\n", " "), comments=True)
    except ValueError as error:
        raise InputError(_("is no command line ({reason})").format(reason=error), where=where) from None
    values: dict[str, object] = {}
    script = _SCRIPT.search(line)
    if script:
        values["script"] = script.group(1) or script.group(2)
    name = None
    for word in words:
        flag = re.fullmatch(r"--([A-Za-z][\w-]*)(?:=(.*))?", word, re.DOTALL)
        if flag:
            name = flag.group(1).replace("-", "_")
            values[name] = True if flag.group(2) is None else flag.group(2)
        elif name is not None:
            before = values[name]
            values[name] = word if before is True else f"{before},{word}"
    return Fields(values, where)


def trainer_recipe(fields: Fields) -> RecipeWords:
    """Read the Trainer's own arguments; which model and adapters a script makes of them, they do not say.

    Raises:
        InputError: a value that its argument cannot have.
    """
    return _recipe(fields, checkpointing=False, length=None, precision=_precision(fields))


def trl_recipe(fields: Fields) -> RecipeWords:
    """Read the arguments of TRL's scripts, whose defaults differ from the Trainer's.

    Raises:
        InputError: a value that its argument cannot have.
    """
    rlhf, length = trl_rlhf(fields)
    if rlhf is None or rlhf.kind not in ON_POLICY:
        length = _TRL_LENGTH
    words = _recipe(fields, checkpointing=True, length=length, precision=_trl_precision(fields))
    return replace(words, rlhf=rlhf)


def _recipe(
    fields: Fields, *, checkpointing: bool, length: int | None, precision: tuple[str, str, tuple[str, ...]]
) -> RecipeWords:
    optimizer, impl = optimizer_of(fields, "optim", "adamw_torch_fused")
    four, eight = fields.flag("load_in_4bit"), fields.flag("load_in_8bit")
    liger = (fields.flag("use_liger_kernel"), fields.flag("use_liger"))
    lora, said = _lora(fields)
    recompute, every = _checkpointing(fields, checkpointing)
    lengths = (fields.count("max_length"), fields.count("max_seq_length"))
    return RecipeWords(
        micro_batch_size=fields.count("per_device_train_batch_size") or 8,
        grad_accum=fields.count("gradient_accumulation_steps") or 1,
        seq_len=lengths[0] or lengths[1] or length,
        optimizer=optimizer,
        optimizer_impl=impl,
        recompute=recompute,
        recompute_every=every,
        attention=fields.choice("attn_implementation", ATTENTION),
        loss="liger" if any(liger) else None,
        compile=fields.flag("torch_compile"),
        packing=fields.flag("packing"),
        precision=precision[0],
        compute=precision[1],
        lora=lora,
        base_quantization="nf4" if four else "int8" if eight else None,
        deepspeed=fields.raw("deepspeed") or None,
        fsdp=_fsdp(fields),
        fsdp_offload="offload" in str(fields.raw("fsdp") or ""),
        activation_offload=fields.flag("activation_offloading"),
        said=(*precision[2], *said, *_evaluation(fields)),
        unknown=fields.not_asked((*_HARMLESS, *RLHF_HARMLESS, "model_name_or_path"), HARMLESS_PREFIXES),
    )


def _checkpointing(fields: Fields, default: bool) -> tuple[bool, int]:
    """Return whether layers are recomputed, and every how many; the old name of the switch counts too.

    Source: transformers@5.23.0:training_args.py:TrainingArguments.__post_init__ (deprecated aliases).
    """
    on = fields.flag("activation_checkpointing", fields.flag("gradient_checkpointing", default))
    details = fields.raw("activation_checkpointing_kwargs")
    every = Fields(details, fields.where).count("every_n_layers") if isinstance(details, dict) else None
    return on, every or 1


def _evaluation(fields: Fields) -> tuple[str, ...]:
    batch, when = fields.count("per_device_eval_batch_size"), fields.word("eval_strategy")
    if batch is None or when in (None, "no"):
        return ()
    return (_("evaluation, {count} sequences at a time, is not counted").format(count=batch),)


def _precision(fields: Fields) -> tuple[str, str, tuple[str, ...]]:
    """Return recipe, compute dtype and what was taken for granted.

    From 5.0 on ``from_pretrained`` keeps the checkpoint's dtype (transformers@5.23.0:modeling_utils.py); mixed
    precision then casts nothing. Gradients in float16 cannot be unscaled, so that fp16 has fp32 parameters.
    """
    half, dtype = fields.flag("fp16"), _dtype(fields)
    fields.flag("bf16")
    if dtype:
        return _mixed(dtype, fields.flag("bf16"), half), "float16" if half else "bfloat16", ()
    if half:
        return "amp", "float16", (_("parameters in float32 under autocast, which fp16 needs"),)
    return "bf16", "bfloat16", (_("parameters in bfloat16, as transformers 5 loads them: the file does not say"),)


def _trl_precision(fields: Fields) -> tuple[str, str, tuple[str, ...]]:
    """Return the same under TRL's defaults: fp32 parameters, and bf16 unless fp16 is asked for.

    Source: trl@1.16.0:trainer/model_config.py (dtype), trainer/base_config.py (bf16).
    """
    half = fields.flag("fp16")
    return _mixed(_dtype(fields) or "fp32", fields.flag("bf16", not half), half), "float16" if half else "bfloat16", ()


def _dtype(fields: Fields) -> str | None:
    new: str | None = fields.choice("dtype", _DTYPES)
    old: str | None = fields.choice("torch_dtype", _DTYPES)
    return new or old


def _mixed(dtype: str, bf16: bool, half: bool) -> str:
    if dtype == "fp32":
        return "amp" if bf16 or half else "fp32"
    return "bf16"


def _fsdp(fields: Fields) -> bool:
    """Return whether FSDP shards; a text such as ``full_shard auto_wrap``, a list, or a switch."""
    value = fields.raw("fsdp")
    if value in (None, "", False, []):
        return False
    text = " ".join(value) if isinstance(value, list) and all(isinstance(one, str) for one in value) else str(value)
    if text.lower() != "true" and "full_shard" not in text:
        raise fields.wrong("fsdp", _("full_shard: no other way of sharding is followed under the Trainer"))
    return True


def _lora(fields: Fields) -> tuple[Lora | None, tuple[str, ...]]:
    """Return the adapters; without targets PEFT takes those of the model's kind, for most the queries and values.

    Source: peft@0.21.2:utils/constants.py:TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.
    """
    rank, dropout = fields.count("lora_r") or 16, fields.fraction("lora_dropout", 0.05)
    targets, dora, modules = (
        fields.words("lora_target_modules"), fields.flag("use_dora"), fields.words("lora_modules_to_save"),
    )  # fmt: skip
    if not fields.flag("use_peft"):
        return None, ()
    said = () if targets else (_("LoRA on q_proj and v_proj, PEFT's choice for most models"),)
    found = parse_targets(targets) if targets else ("q_proj", "v_proj")
    return Lora(rank=rank, targets=found, dropout=dropout, dora=dora, trained_modules=modules), said
