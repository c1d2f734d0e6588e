"""Arguments of the Hugging Face Trainer (YAML, JSON, or a command line) → a recipe.

Source: transformers@5.23.0:training_args.py:TrainingArguments; trl@1.16.0:trainer/sft_config.py:SFTConfig,
trainer/model_config.py:ModelConfig for models, adapters and lengths.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.fsdp_words import trainer_fsdp
from ullage.read.recipe_fields import Fields
from ullage.read.recipe_line import accelerate_of
from ullage.read.recipe_words import (
    HARMLESS_PREFIXES,
    RecipeWords,
    attention_of,
    evaluation,
    optimizer_of,
    parse_targets,
)
from ullage.read.rlhf_recipe import HARMLESS as RLHF_HARMLESS
from ullage.read.rlhf_recipe import trl_rlhf
from ullage.spec.rlhf import ON_POLICY, Rlhf
from ullage.spec.training import Lora

_HARMLESS = (
    "auto_find_batch_size", "model_revision", "dataset_name", "dataset_config", "torch_empty_cache_steps",
    "dataloader_num_workers", "bf16_full_eval", "fp16_full_eval", "bnb_4bit_quant_type", "use_bnb_nested_quant",
    "lora_task_type", "bnb_4bit_quant_storage", "eos_token", "pad_token", "completion_only_loss", "assistant_only_loss",
    "fp16_opt_level", "half_precision_backend", "length_column_name", "ddp_find_unused_parameters", "use_cache",
    "loss_type", "padding_free", "packing_strategy", "model_init_kwargs", "benchmarks", "callbacks", "hub_", "code_",
    "use_mps_device", "do_eval", "liger_kernel_config", "no_remove_unused_columns",
    "lazy_preprocess", "system_prompt", "task", "ignore_bias_buffers", "trackio_space_id", "router_aux_loss_coef",
)  # fmt: skip
#: Settings that change the memory in ways that are not followed: better refused than left out.
_NOT_FOLLOWED = (
    "lora_target_parameters", "use_kernels", "tp_size", "use_lora", "q_lora", "optim_target_modules", "mp_parameters",
    "sharded_ddp", "deepcompile", "cast_lm_head_to_fp32", "use_liger_loss", "use_transformers_paged",
)  # fmt: skip
_TRL_LENGTH = 1024
_DTYPES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "auto": "bf16"}
#: From here TRL's loss of next tokens makes no logits; before 1.15 in chunks of its own.
#: Source: trl@1.16.0:trainer/sft_trainer.py:SFTTrainer.__init__ (add_fused_lm_head); @f2cd5771 (1.10.0.dev0):
#: trainer/sft_config.py:SFTConfig (loss_type chunked_nll by default), against @v1.9.0.
_TILED_SINCE, _TILES_SINCE = (1, 10), (1, 15)


def trainer_recipe(fields: Fields, version: str = "") -> RecipeWords:
    """Read the Trainer's own arguments; which model and adapters a script makes of them, they do not say.

    Raises:
        InputError: a value that its argument cannot have.
    """
    length = fields.count("model_max_length") or fields.count("block_size")
    fsdp_version = 1 if re.match(r"[234]\.", version) else 2
    loss = _liger(fields)
    return _recipe(fields, "", length=length, precision=_precision(fields), loss=loss, fsdp_version=fsdp_version)


def trl_recipe(fields: Fields, version: str = "") -> RecipeWords:
    """Read the arguments of TRL's scripts, whose defaults differ from the Trainer's.

    Raises:
        InputError: a value that its argument cannot have.
    """
    _take_model_kwargs(fields)
    rlhf, length = trl_rlhf(fields)
    if rlhf is None or rlhf.kind not in ON_POLICY:
        length = None if "max_length" in fields.values and fields.raw("max_length") is None else _TRL_LENGTH
    loss = _liger(fields) if rlhf is not None else _trl_loss(fields, version)
    return _recipe(fields, "trl", length=length, precision=_trl_precision(fields), loss=loss, rlhf=rlhf)


def _recipe(
    fields: Fields,
    program: str,
    *,
    length: int | None,
    precision: tuple[str, str, tuple[str, ...]],
    loss: tuple[str | None, str | None, tuple[str, ...]],
    rlhf: Rlhf | None = None,
    fsdp_version: int = 2,
) -> RecipeWords:
    _refuse(fields)
    optimizer, impl = optimizer_of(fields, "optim", "adamw_torch_fused")
    four, eight = fields.flag("load_in_4bit"), fields.flag("load_in_8bit")
    recompute, every = _checkpointing(fields, program == "trl")
    attention, like = attention_of(fields)
    lengths = (fields.count("max_length"), fields.count("max_seq_length"))
    words = RecipeWords(
        program=program,
        micro_batch_size=fields.count("per_device_train_batch_size") or 8,
        grad_accum=fields.count("gradient_accumulation_steps") or 1,
        seq_len=lengths[0] or lengths[1] or length,
        optimizer=optimizer,
        optimizer_impl=impl,
        recompute=recompute,
        recompute_every=every,
        attention=attention,
        loss=loss[0],
        compile=_compiles(fields),
        packing=fields.flag("packing"),
        precision=precision[0],
        compute=precision[1],
        lora=_lora(fields),
        rlhf=rlhf,
        base_quantization="nf4" if four else "int8" if eight else None,
        activation_offload=fields.flag("activation_offloading"),
        evaluation=evaluation(fields, spares_logits=loss[0] == "tiled"),
        flags=_flags(fields, loss[1]),
        said=(*precision[2], *like, *loss[2]),
    )
    return replace(
        words,
        deepspeed=fields.raw("deepspeed") or None,
        accelerate=accelerate_of(fields),
        fsdp=trainer_fsdp(fields, version=fsdp_version, mixed=fields.flag("bf16", program == "trl") or _half(fields)),
        unknown=fields.not_asked((*_HARMLESS, *RLHF_HARMLESS, "model_name_or_path"), HARMLESS_PREFIXES),
    )


def _refuse(fields: Fields) -> None:
    for key in _NOT_FOLLOWED:
        if str(fields.raw(key)).lower() not in ("none", "false", "0", "1", "", "[]"):
            raise InputError(
                _("{key} is not followed").format(key=key),
                where=fields.where,
                remedy=_(
                    "write --use_peft --lora_r 64 ... : which adapters a script makes by itself is not in its line"
                )
                if key in ("use_lora", "q_lora")
                else "",
            )
    smoothing = fields.raw("label_smoothing_factor")
    if smoothing not in (None, 0, 0.0, "0", "0.0"):  # transformers@5.23.0:trainer_pt_utils.py:LabelSmoother
        raise InputError(_("{key} is not followed").format(key="label_smoothing_factor"), where=fields.where)


def _compiles(fields: Fields) -> bool:
    """Source: transformers@5.23.0:training_args.py:TrainingArguments.__post_init__ (a backend or mode asks for it)."""
    named = [fields.raw(f"torch_compile_{what}") is not None for what in ("backend", "mode")]
    return fields.flag("torch_compile") or any(named)


def _half(fields: Fields) -> bool:
    return fields.flag("fp16")


def _take_model_kwargs(fields: Fields) -> None:
    """Take what ``model_init_kwargs`` hands on to ``from_pretrained`` as if it stood beside the other settings."""
    given = fields.raw("model_init_kwargs")
    for key in ("dtype", "torch_dtype", "attn_implementation", "use_kernels"):
        if isinstance(given, dict) and given.get(key) is not None:
            fields.values.setdefault(key, given[key])


def _flags(fields: Fields, kernels: str | None) -> tuple[tuple[str, str], ...]:
    """Return what the job's rules take as flags: how checkpoints work, and which kernels are fused."""
    details = fields.raw("gradient_checkpointing_kwargs")
    reentrant = details.get("use_reentrant") if isinstance(details, dict) else None
    found = [("use_reentrant", str(reentrant).lower())] if isinstance(reentrant, bool) else []
    return tuple([*found, ("fused_kernels", kernels)] if kernels is not None else found)


def _liger(fields: Fields) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Return the loss, the kernels that are fused where the loss does not say it, and what is taken for granted.

    Source: transformers@5.23.0:integrations/liger.py:apply_liger_kernel (liger_kernel_config);
        liger-kernel@0.6.3:transformers/monkey_patch.py:apply_liger_kernel_to_llama.
    """
    liger = (fields.flag("use_liger_kernel"), fields.flag("use_liger"))
    if not any(liger):
        return None, None, ()
    config = fields.raw("liger_kernel_config")
    parts: dict[str, Any] = config if isinstance(config, dict) else {}
    kernels = [name for name in ("rms_norm", "rope", "swiglu") if parts.get(name, True)]
    fused = bool(parts.get("fused_linear_cross_entropy", True))
    return "liger" if fused else None, None if fused and len(kernels) == 3 else ",".join(kernels), ()


def _trl_loss(fields: Fields, version: str) -> tuple[str | None, str | None, tuple[str, ...]]:
    """Return the same of TRL's next-token loss, which makes no logits of all tokens.

    Source: trl@1.16.0:trainer/sft_trainer.py:SFTTrainer.__init__ (add_fused_lm_head; of Liger the layers' kernels
        alone), compute_loss; trainer/utils.py:add_fused_lm_head.
    """
    found = re.match(r"(\d{1,3})\.(\d{1,3})", version)
    stated = (int(found.group(1)), int(found.group(2))) if found else None
    if stated is not None and stated < _TILED_SINCE and fields.word("loss_type") != "chunked_nll":
        return _liger(fields)
    liger, kernels, _said = _liger(fields)
    said: tuple[str, ...] = ()
    if stated is None:
        said = (_("the loss of TRL {version}: no logits of all tokens").format(version="1.16"),)
    elif stated < _TILES_SINCE:
        if liger is not None:
            return liger, kernels, ()
        said = (_("chunks of the logits as in TRL {version}").format(version="1.16"),)
    return "tiled", "rms_norm,rope,swiglu" if liger is not None and kernels is None else kernels, said


def _checkpointing(fields: Fields, default: bool) -> tuple[bool, int]:
    """Return whether layers are recomputed, and every how many; the old name of the switch counts too.

    Source: transformers@5.23.0:training_args.py:TrainingArguments.__post_init__ (deprecated aliases).
    """
    on = fields.flag("activation_checkpointing", fields.flag("gradient_checkpointing", default))
    details = fields.raw("activation_checkpointing_kwargs")
    every = Fields(details, fields.where).count("every_n_layers") if isinstance(details, dict) else None
    return on, every or 1


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


def _lora(fields: Fields) -> Lora | None:
    """Return the adapters; without targets PEFT takes those of the model's kind."""
    rank, dropout = fields.count("lora_r") or 16, fields.fraction("lora_dropout", 0.05)
    targets, dora, modules = (
        fields.words("lora_target_modules"), fields.flag("use_dora"), fields.words("lora_modules_to_save"),
    )  # fmt: skip
    if not fields.flag("use_peft"):
        return None
    found = parse_targets(targets) if targets else ()
    return Lora(rank=rank, targets=found, dropout=dropout, dora=dora, trained_modules=modules)
