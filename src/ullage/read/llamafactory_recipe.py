"""A LLaMA-Factory configuration (YAML or command line) → a recipe.

Source: llamafactory@0.9.5:hparams/model_args.py, data_args.py, finetuning_args.py, parser.py for names and defaults.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.fsdp_words import trainer_fsdp
from ullage.read.recipe_fields import Fields
from ullage.read.recipe_line import accelerate_of
from ullage.read.recipe_words import HARMLESS_PREFIXES, RecipeWords, evaluation, optimizer_of, parse_targets
from ullage.read.rlhf_recipe import HARMLESS as RLHF_HARMLESS
from ullage.read.rlhf_recipe import llamafactory_rlhf
from ullage.spec.training import Lora

#: Source: llamafactory@0.9.5:extras/constants.py:AttentionFunction; "auto" is the model's own default.
_ATTENTION = {"auto": None, "disabled": "eager", "sdpa": "sdpa", "fa2": "flash", "fa3": "flash"}
_HARMLESS = (
    "stage",
    "finetuning_type",
    "cache_dir",
    "adapter_name_or_path",
    "max_samples",
    "trust_remote_code",
    "template",
    "plot_loss",
    "print_param_status",
    "rope_scaling",
    "double_quantization",
    "low_cpu_mem_usage",
    "infer_backend",
    "resize_vocab",
    "flash_attn",
    "create_new_adapter",
    "loraplus_lr_ratio",
    "mask_history",
    "enable_thinking",
    "model_name_or_path",
    "gradient_checkpointing",
    "gradient_checkpointing_kwargs",
    "num_train_epochs",
    "buffer_size",
    "interleave_probs",
    "packing",
    "use_fast_tokenizer",
    "train_from_scratch",
    "moe_aux_loss_coef",
    "use_swanlab",
    "use_rslora",
    "use_kv_cache",
    "offload_folder",
    "ignore_pad_token_for_loss",
    "tool_format",
    "default_system",
    "preserve_thinking",
    "compute_accuracy",
    "disable_shuffling",
    "quantization_device_map",
    "block_diag_attn",
    "fsdp_transformer_layer_cls_to_wrap",
    "ray_num_workers",
    "do_sample",
    "max_new_tokens",
    "model_revision",
    "fp8_backend",
    "fp8_enable_fsdp_float8_all_gather",
    "use_dft_loss",
    "use_eaft_loss",
    "freeze_vision_tower",
    "freeze_multi_modal_projector",
    "freeze_language_model",
    "use_audio_in_video",
    "crop_to_patches",
    "ref_model",
)
#: Settings of parts that are off, or that say nothing of memory, by how they begin.
_PREFIXES = (
    "image_", "video_", "audio_", "export_", "vllm_", "sglang_", "infer_", "hf_hub", "ms_hub", "om_hub", "kt_",
    "badam_", "galore_", "apollo_", "ppo_", "profile", "add_", "new_special", "init_special", "split_special",
    "pissa_", "loraplus_", "oft_", "lora_", "freeze_trainable", "freeze_extra", "eaft_", "asft_", "include_effective",
    "enable_torch_profiler", "reward_model", "ray_",
)  # fmt: skip
#: Settings that change the memory in ways that are not followed: better refused than left out.
_NOT_FOLLOWED = (
    "use_galore",
    "use_apollo",
    "use_badam",
    "use_llama_pro",
    "shift_attn",
    "use_kt",
    "mixture_of_depths",
    "use_adam_mini",
    "use_ray",
    "upcast_lmhead_output",
    "upcast_layernorm",
    "fp8",
    "use_asft_loss",
    "use_mca",
    "use_hyper_parallel",
    "create_new_adapter_model",
    "label_smoothing_factor",
)
#: Settings that only a configuration of its newer trainers has.
#: Source: llamafactory@0.9.5:v1/config/{model_args,data_args,training_args}.py.
_OF_V1 = ("dist_config", "train_dataset", "kernel_config", "peft_config", "quant_config", "sample_backend")  # fmt: skip
_DEFAULT_LENGTH, _DEFAULT_RANK = 2048, 8


def llamafactory_recipe(fields: Fields, version: str = "") -> RecipeWords:
    """Read a configuration of ``llamafactory-cli train``.

    Gradient checkpointing is on unless it is switched off, and trained parameters are made fp32 unless ``pure_bf16``
    (llamafactory@0.9.5:model/model_utils/checkpointing.py, model/adapter.py:init_adapter).

    Raises:
        InputError: a value that its setting cannot have, or a method that is not followed.
    """
    for key in _NOT_FOLLOWED:
        if fields.raw(key) not in (None, False, "false"):
            raise InputError(_("{key} is not followed").format(key=key), where=fields.where)
    _refuse_v1(fields)
    _refuse_layers(fields)
    optimizer, impl = optimizer_of(fields, "optim", "adamw_torch_fused")
    if fields.flag("use_muon"):  # llamafactory@0.9.5:train/trainer_utils.py:_create_muon_optimizer
        optimizer, impl = "muon", None
    lora = _lora(fields)
    precision, compute = _precision(fields, adapted=lora is not None)
    packing = fields.flag("packing", fields.word("stage") == "pt") or fields.flag("neat_packing")
    length = fields.count("cutoff_len") or _DEFAULT_LENGTH
    unsloth = fields.flag("use_unsloth")
    on_host = fields.flag("use_unsloth_gc") and not fields.flag("disable_gradient_checkpointing")
    words = RecipeWords(
        program="llamafactory with unsloth" if unsloth else "llamafactory",
        micro_batch_size=fields.count("per_device_train_batch_size") or 8,
        grad_accum=fields.count("gradient_accumulation_steps") or 1,
        seq_len=length,
        optimizer=optimizer,
        optimizer_impl=impl,
        recompute=not fields.flag("disable_gradient_checkpointing") or unsloth,
        activation_offload=unsloth or on_host,
        attention=fields.choice("flash_attn", _ATTENTION),
        loss="liger" if fields.flag("enable_liger_kernel") else None,
        compile=fields.flag("torch_compile"),
        packing=packing,
        precision=precision,
        compute=compute,
        lora=lora,
        rlhf=llamafactory_rlhf(fields, adapted=lora is not None),
        base_quantization=_quantization(fields),
    )
    return _spread(fields, words, length, on_host=on_host)


def _spread(fields: Fields, words: RecipeWords, length: int, *, on_host: bool) -> RecipeWords:
    """Return the words with how the job is launched and evaluated, its flags, and what is said of the rest."""
    return replace(
        words,
        deepspeed=fields.raw("deepspeed") or None,
        accelerate=accelerate_of(fields),
        fsdp=trainer_fsdp(fields, version=2, mixed=not fields.flag("pure_bf16")),
        evaluation=evaluation(fields),
        flags=_checkpoint_flags(fields, on_host=on_host),
        said=(_("sequences of the cut-off length, {length:,} tokens").format(length=length), *_said(fields)),
        unknown=fields.not_asked((*_HARMLESS, *RLHF_HARMLESS), (*HARMLESS_PREFIXES, *_PREFIXES)),
    )


def _checkpoint_flags(fields: Fields, *, on_host: bool) -> tuple[tuple[str, str], ...]:
    """Return how checkpoints work; those after Unsloth's (``use_unsloth_gc``) leave none on the GPU.

    Unsloth itself (``use_unsloth``) is asked for checkpoints on the host whatever the file says.
    Source: llamafactory@0.9.5:model/model_utils/checkpointing.py:get_unsloth_gradient_checkpointing_func,
        model/model_utils/unsloth.py:get_unsloth_peft_model.
    """
    reentrant = fields.flag("use_reentrant_gc", True)
    if on_host:
        return (("use_reentrant", "true"), ("offload_under_way", "0"))
    return (("use_reentrant", str(reentrant).lower()),)


def _said(fields: Fields) -> tuple[str, ...]:
    """Return what is taken for granted of settings that are followed in part."""
    found = []
    # llamafactory@0.9.5:train/trainer_utils.py:dft_loss_func, eaft_loss_func
    losses = [key for key in ("use_dft_loss", "use_eaft_loss") if fields.flag(key)]
    found += [_("{key}: counted as the plain cross entropy").format(key=key) for key in losses]
    if fields.raw("use_v1_kernels") not in (None, False, "false"):
        # llamafactory@0.9.5:v1/plugins/model_plugins/kernels/ops/mlp/cuda_fused_moe.py, the only one on NVIDIA's cards
        found.append(_("use_v1_kernels: experts are counted as transformers runs them"))
    return tuple(found)


def _refuse_v1(fields: Fields) -> None:
    """Refuse a configuration of the newer trainers, whose settings have other names and defaults."""
    if fields.raw("model_name_or_path") is None and any(key in fields.values for key in _OF_V1):
        raise InputError(
            _("is a configuration of LLaMA-Factory's v1 trainers (USE_V1), which is not read"),
            where=fields.where,
            remedy=_("write it as trainer: settings, or with the options of ullage fit train"),
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
    if fields.flag("resize_vocab") and not modules:  # llamafactory@0.9.5:model/adapter.py:_setup_lora_tuning
        modules = ("embed_tokens", "lm_head")
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
