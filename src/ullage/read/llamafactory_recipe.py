"""A LLaMA-Factory configuration (YAML or command line) → a recipe.

Source: llamafactory@0.9.5:hparams/model_args.py, data_args.py, finetuning_args.py, parser.py for names and defaults.
"""

from __future__ import annotations

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.recipe_fields import Fields
from ullage.read.recipe_words import HARMLESS_PREFIXES, RecipeWords, optimizer_of, parse_targets
from ullage.read.rlhf_recipe import HARMLESS as RLHF_HARMLESS
from ullage.read.rlhf_recipe import llamafactory_rlhf
from ullage.spec.training import Lora

#: Source: llamafactory@0.9.5:extras/constants.py:AttentionFunction; "auto" is the model's own default.
_ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash", "fa3": "flash"}
_HARMLESS = (
    "stage", "finetuning_type", "cache_dir", "adapter_name_or_path", "max_samples", "trust_remote_code", "template",
    "plot_loss", "print_param_status", "rope_scaling", "double_quantization", "low_cpu_mem_usage", "infer_backend",
    "resize_vocab", "flash_attn", "create_new_adapter", "loraplus_lr_ratio", "mask_history", "enable_thinking",
    "use_reentrant_gc", "model_name_or_path",
)  # fmt: skip
#: Settings that change the memory in ways that are not followed: better refused than left out.
_NOT_FOLLOWED = (
    "use_unsloth", "use_unsloth_gc", "use_galore", "use_apollo", "use_badam", "use_llama_pro", "shift_attn", "use_kt",
    "mixture_of_depths", "use_adam_mini", "use_ray", "upcast_lmhead_output", "use_v1_kernels",
)  # fmt: skip
_DEFAULT_LENGTH, _DEFAULT_RANK = 2048, 8


def llamafactory_recipe(fields: Fields) -> RecipeWords:
    """Read a configuration of ``llamafactory-cli train``.

    Gradient checkpointing is on unless it is switched off, and trained parameters are made fp32 unless ``pure_bf16``
    (llamafactory@0.9.5:model/model_utils/checkpointing.py, model/adapter.py:init_adapter).

    Raises:
        InputError: a value that its setting cannot have, or a method that is not followed.
    """
    for key in _NOT_FOLLOWED:
        if fields.raw(key) not in (None, False, "false"):
            raise InputError(_("{key} is not followed").format(key=key), where=fields.where)
    _refuse_layers(fields)
    optimizer, impl = optimizer_of(fields, "optim", "adamw_torch_fused")
    lora = _lora(fields)
    precision, compute = _precision(fields, adapted=lora is not None)
    packing = fields.flag("packing", fields.word("stage") == "pt") or fields.flag("neat_packing")
    length = fields.count("cutoff_len") or _DEFAULT_LENGTH
    return RecipeWords(
        micro_batch_size=fields.count("per_device_train_batch_size") or 8,
        grad_accum=fields.count("gradient_accumulation_steps") or 1,
        seq_len=length,
        optimizer=optimizer,
        optimizer_impl=impl,
        recompute=not fields.flag("disable_gradient_checkpointing"),
        attention=fields.choice("flash_attn", _ATTENTION),
        loss="liger" if fields.flag("enable_liger_kernel") else None,
        compile=fields.flag("torch_compile"),
        packing=packing,
        precision=precision,
        compute=compute,
        lora=lora,
        rlhf=llamafactory_rlhf(fields, adapted=lora is not None),
        base_quantization=_quantization(fields),
        deepspeed=fields.raw("deepspeed") or None,
        fsdp=fields.raw("fsdp") not in (None, "", False),
        said=(_("sequences of the cut-off length, {length:,} tokens").format(length=length),),
        unknown=fields.not_asked((*_HARMLESS, *RLHF_HARMLESS), HARMLESS_PREFIXES),
    )


def _refuse_layers(fields: Fields) -> None:
    """Refuse layers chosen one by one."""
    kind = fields.word("finetuning_type") or "lora"
    if kind not in ("lora", "oft", "full"):
        raise InputError(
            _("finetuning_type {kind!r} is not followed").format(kind=kind[:20]),
            where=fields.where,
            remedy=_("known are {known}").format(known="lora, oft, full"),
        )


def _precision(fields: Fields, *, adapted: bool) -> tuple[str, str]:
    """Return recipe and compute dtype.

    Source: llamafactory@0.9.5:model/adapter.py:init_adapter (fp32 for what is trained, but under ZeRO-3, which keeps
        its own master copy), hparams/parser.py (compute_dtype: bf16, then fp16, else the checkpoint's).
    """
    pure, half = fields.flag("pure_bf16"), fields.flag("fp16")
    fields.flag("bf16")
    compute = "float16" if half and not pure else "bfloat16"
    return ("bf16" if pure or adapted else "amp"), compute


def _lora(fields: Fields) -> Lora | None:
    """Return the adapters; LoRA is the default way, on all linear layers."""
    rank, dropout = fields.count("lora_rank") or _DEFAULT_RANK, fields.fraction("lora_dropout")
    targets = parse_targets(fields.words("lora_target"))
    dora, modules = fields.flag("use_dora"), fields.words("additional_target")
    kind = fields.word("finetuning_type") or "lora"
    if kind == "oft":
        return _oft(fields, modules)
    if kind != "lora":
        return None
    return Lora(rank=rank, targets=targets, dropout=dropout, dora=dora, trained_modules=modules)


def _oft(fields: Fields, modules: tuple[str, ...]) -> Lora:
    """Return orthogonal fine-tuning: a rank is the number of blocks, and wins over their size.

    Source: llamafactory@0.9.5:hparams/finetuning_args.py:OFTArguments, model/adapter.py:_setup_lora_tuning.
    """
    rank = fields.raw("oft_rank")
    options = (("oft_block_size", fields.count("oft_block_size") or 32),)
    return Lora(
        kind="oft",
        rank=(fields.count("oft_rank") or 0) if rank not in (None, 0, "0") else 0,
        targets=parse_targets(fields.words("oft_target")),
        options=options,
        trained_modules=modules,
    )


def _quantization(fields: Fields) -> str | None:
    bits, method = fields.count("quantization_bit"), fields.word("quantization_method") or "bnb"
    if bits is None:
        return None
    if method not in ("bnb", "bitsandbytes") or bits not in (4, 8):
        raise fields.wrong("quantization_bit", _("4 or 8, of bitsandbytes"))
    kind = fields.word("quantization_type") or "nf4"
    return ("nf4" if kind == "nf4" else "fp4") if bits == 4 else "int8"
