"""A line or file of ``swift sft``, ``swift pt`` or ``swift rlhf`` (ms-swift) → a recipe.

Source: ms-swift@3602360a:swift/arguments/{sft,rlhf,tuner}_args.py, arguments/base_args/, trainers/arguments.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.fsdp_words import FsdpWords, trainer_fsdp
from ullage.read.recipe_fields import Fields
from ullage.read.recipe_line import accelerate_of
from ullage.read.recipe_words import HARMLESS_PREFIXES, RecipeWords, attention_of, optimizer_of, parse_targets
from ullage.read.rlhf_recipe import HARMLESS as RLHF_HARMLESS
from ullage.read.rlhf_words import kind_of
from ullage.spec.rlhf import ON_POLICY, Reference, Rlhf, Rollout
from ullage.spec.training import Evaluation, Lora

_HARMLESS = (
    "model", "model_type", "model_author", "model_name", "model_revision", "system", "template", "script", "adapters",
    "external_plugins", "callbacks", "enable_thinking", "columns", "use_chat_template", "stop_words", "stream",
    "use_hf",
    "agent_template", "infer_backend", "vit_gradient_checkpointing", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
    "bnb_4bit_compute_dtype", "bnb_4bit_quant_storage", "init_weights", "tuner_backend", "acc_strategy", "num_labels",
    "problem_type", "vit_lr", "aligner_lr", "safe_serialization", "check_model", "add_version", "lorap_lr_ratio",
    "response_prefix", "max_new_tokens", "use_rslora", "lora_bias", "ddp_backend", "rope_scaling", "strict",
    "norm_bbox",
    "new_special_tokens", "freeze_vit", "freeze_aligner", "padding_side", "tools_prompt", "async_generate",
    "val_dataset",
    "multi_turn_scheduler", "max_turns", "use_gym_env", "gym_env", "kl_in_reward", "advantage_estimator", "custom_",
    "ref_model_type", "reward_model_type", "reward_template", "reward_model_plugin", "label_names", "dynamic_sample",
    "max_resample_times", "log_entropy", "move_model_batches", "padding_free", "max_model_len", "truncation_strategy",
    "cached_dataset", "cached_val_dataset", "to_cached_dataset", "result_path", "logprobs", "use_logits_to_keep",
    "write_batch_size", "is_binary_loss_scale", "loss_scale", "interleave_prob", "packing_length", "packing_num_proc",
    "enable_dft_loss", "router_aux_loss_coef", "gradient_checkpointing_kwargs", "deepspeed", "lora_rank", "lmbda",
    "sft_alpha", "create_checkpoint_symlink", "predict_with_generate", "load_args", "load_data_args", "max_pixels",
)  # fmt: skip
_PREFIXES = (
    "vllm_", "sglang_", "reward_", "rollout_", "galore_", "lisa_step", "lora_ga", "adalora_", "vera_", "boft_",
    "fourier_", "reft_", "adapter_", "llamapro_", "dataset", "split_dataset", "load_from", "lazy_", "streaming",
    "shuffle", "mrl_", "early_stop", "swanlab", "overlong", "soft_", "num_iter", "top_", "log_", "temperature",
    "completion_length", "teacher_", "offload_", "train_dataloader", "metric_warmup", "channel_", "stopping", "eval",
)  # fmt: skip
_NOT_FOLLOWED = (
    "use_galore", "lisa_activated_layers", "freeze_parameters", "freeze_parameters_regex", "freeze_parameters_ratio",
    "trainable_parameters", "trainable_parameters_regex", "freeze_llm", "target_parameters", "device_map", "max_memory",
    "deepspeed_autotp_size", "zero_hpz_partition_size", "optimizer", "teacher_model", "label_smoothing_factor",
    "enable_channel_loss", "use_ray", "activation_cpu_offload", "use_unsloth",
)  # fmt: skip
_OF_MEGATRON = ("micro_batch_size", "global_batch_size", "tensor_model_parallel_size", "pipeline_model_parallel_size")
_ZERO_12 = {"allgather_bucket_size": 200_000_000, "reduce_bucket_size": 200_000_000, "overlap_comm": False}
_ZERO_3 = {
    "stage": 3, "overlap_comm": False, "sub_group_size": 10**9, "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto", "stage3_param_persistence_threshold": "auto",
}  # fmt: skip
_CPU: dict[str, Any] = {"offload_optimizer": {"device": "cpu"}}
#: What its names of DeepSpeed's configurations stand for. Source: ms-swift@3602360a:swift/config/.
_ZERO: dict[str, dict[str, Any]] = {
    "zero0": {"stage": 0, **_ZERO_12},
    "zero1": {"stage": 1, **_ZERO_12},
    "zero2": {"stage": 2, **_ZERO_12},
    "zero2_offload": {"stage": 2, **_ZERO_12, **_CPU},
    "zero3": _ZERO_3,
    "zero3_offload": {**_ZERO_3, **_CPU, "offload_param": {"device": "cpu"}},
}
_DTYPES = {"float32": "float32", "float16": "float16", "bfloat16": "bfloat16"}


def swift_recipe(fields: Fields, version: str = "") -> RecipeWords:
    """Read the arguments of ms-swift's training commands: LoRA on all linear layers and checkpointing by default.

    Raises:
        InputError: a value that its argument cannot have, or a method that is not followed.
    """
    _refuse(fields)
    lora = _lora(fields)
    precision, compute = _precision(fields, adapted=lora is not None)
    optimizer, impl = optimizer_of(fields, "optim", "adamw_torch_fused")
    attention, like = attention_of(_named_kernel(fields))
    rlhf, length = _rlhf(fields, adapted=lora is not None)
    deepspeed, fsdp = _deepspeed(fields), _fsdp(fields)
    micro = fields.count("per_device_train_batch_size") or 1
    return RecipeWords(
        program="ms-swift",
        micro_batch_size=micro,
        grad_accum=fields.count("gradient_accumulation_steps") or 1,
        seq_len=length,
        optimizer=optimizer,
        optimizer_impl=impl,
        recompute=fields.flag("gradient_checkpointing", True) and not (fsdp and fsdp.checkpoint),
        attention=attention,
        loss="liger" if fields.flag("use_liger_kernel") else None,
        compile=fields.flag("torch_compile"),
        packing=fields.flag("packing") or fields.flag("padding_free"),
        precision=precision,
        compute=compute,
        lora=lora,
        rlhf=rlhf,
        base_quantization=_quantization(fields),
        deepspeed=deepspeed,
        accelerate=accelerate_of(fields),
        fsdp=fsdp,
        evaluation=_evaluation(fields),
        context=fields.count("sequence_parallel_size") or 1,
        flags=_flags(fields),
        said=(*like, *_said(fields, length, rlhf)),
        unknown=fields.not_asked((*_HARMLESS, *RLHF_HARMLESS), (*HARMLESS_PREFIXES, *_PREFIXES)),
    )


def _refuse(fields: Fields) -> None:
    for key in _NOT_FOLLOWED:
        if str(fields.raw(key)).lower() not in ("none", "false", "0", "0.0", "", "[]"):
            raise InputError(_("{key} is not followed").format(key=key), where=fields.where)
    if any(key in fields.values for key in _OF_MEGATRON):
        raise InputError(
            _("a line of megatron sft is not read as one of swift"),
            where=fields.where,
            remedy=_("write --from megatron:FILE"),
        )
    task = fields.word("task_type")
    if task not in (None, "causal_lm"):
        raise InputError(
            _("task_type {task!r} is not followed").format(task=task[:30]),
            where=fields.where,
            remedy=_("known are {known}").format(known="causal_lm"),
        )
    kind = fields.word("tuner_type") or fields.word("train_type") or "lora"
    if kind not in ("lora", "full"):
        raise InputError(
            _("tuner_type {kind!r} is not followed").format(kind=kind[:20]),
            where=fields.where,
            remedy=_("known are {known}").format(known="lora, full"),
        )


def _said(fields: Fields, length: int | None, rlhf: Rlhf | None) -> tuple[str, ...]:
    """Return what is taken for granted of settings that are followed in part."""
    found = []
    if length is None:
        found.append(_("max_length is not given: rows of the length that --seq gives"))
    elif rlhf is None:
        found.append(
            _("sequences of the full length, {length:,} tokens, and a label on every token").format(length=length)
        )
    if fields.count("gradient_accumulation_steps") is None:
        found.append(_("one pass per step: gradient_accumulation_steps is not given"))
    if fields.raw("experts_impl") is not None:
        found.append(_("{key}: experts are counted as transformers runs them").format(key="experts_impl"))
    if fields.flag("enable_dft_loss"):
        found.append(_("{key}: counted as the plain cross entropy").format(key="enable_dft_loss"))
    return tuple(found)


def _named_kernel(fields: Fields) -> Fields:
    name = fields.word("attn_impl")
    names = {"flash_attn": "flash_attention_2", "flash_attention": "flash_attention_2"}
    return Fields({} if name is None else {"attn_implementation": names.get(name, name)}, fields.where)


def _precision(fields: Fields, *, adapted: bool) -> tuple[str, str]:
    """Return recipe and compute dtype: bf16 weights train in bf16, others under fp16, for which they are made fp32.

    Source: ms-swift@3602360a:swift/arguments/base_args/model_args.py:ModelArguments._init_mixed_precision.
    """
    dtype = fields.choice("torch_dtype", _DTYPES) or "bfloat16"
    half, wide = fields.flag("fp16", dtype != "bfloat16"), dtype == "float32"
    fields.flag("bf16", dtype == "bfloat16")
    if wide and not half and not fields.flag("bf16"):
        return "fp32", "float32"
    compute = "float16" if half else "bfloat16"
    return ("amp" if wide or (half and not adapted) else "bf16"), compute


def _lora(fields: Fields) -> Lora | None:
    rank, dropout = fields.count("lora_rank") or 8, fields.fraction("lora_dropout", 0.05)
    targets, pattern = fields.words("target_modules"), fields.word("target_regex")
    dora, modules, dtype = (
        fields.flag("use_dora"), fields.words("modules_to_save"), fields.choice("lora_dtype", _DTYPES),
    )  # fmt: skip
    if (fields.word("tuner_type") or fields.word("train_type") or "lora") != "lora":
        return None
    found = (pattern,) if pattern else parse_targets(targets)
    return Lora(rank=rank, targets=found, dropout=dropout, dora=dora, trained_modules=modules, dtype=dtype)


def _quantization(fields: Fields) -> str | None:
    method, bits = fields.word("quant_method"), fields.count("quant_bits")
    if method is None and bits is None:
        return None
    if method not in (None, "bnb") or bits not in (4, 8):
        raise fields.wrong("quant_bits", _("4 or 8, of bitsandbytes"))
    kind = fields.word("bnb_4bit_quant_type") or "nf4"
    return kind if bits == 4 else "int8"


def _deepspeed(fields: Fields) -> Any:
    """Return the configuration that a name stands for, or the file."""
    value = fields.raw("deepspeed")
    if not isinstance(value, str) or value not in _ZERO:
        return value or None
    both = {"fp16": {"enabled": "auto"}, "bf16": {"enabled": "auto"}}
    return {**both, "zero_optimization": _ZERO[value]}


def _fsdp(fields: Fields) -> FsdpWords | None:
    if fields.raw("fsdp") == "fsdp2":  # swift/config/fsdp2.json
        return FsdpWords(version=2, checkpoint=True)
    return trainer_fsdp(fields, version=2, mixed=True)


def _flags(fields: Fields) -> tuple[tuple[str, str], ...]:
    """Return how checkpoints work: reentrant, but under plain DDP.

    Source: ms-swift@3602360a:swift/trainers/mixin.py:SwiftMixin._fix_gradient_checkpointing.
    """
    details = fields.raw("gradient_checkpointing_kwargs")
    spread = fields.raw("deepspeed") or fields.raw("fsdp")
    stated = "false" in str(details).lower() if details is not None else not spread
    return (("use_reentrant", str(not stated).lower()),)


def _evaluation(fields: Fields) -> Evaluation | None:
    """Return the evaluation between steps, which there is where data is kept apart for it.

    Source: ms-swift@3602360a:swift/arguments/sft_args.py:SftArguments._init_eval_strategy, __post_init__.
    """
    batch = fields.count("per_device_eval_batch_size") or 1
    split, own = fields.raw("split_dataset_ratio"), fields.raw("val_dataset")
    if (split in (None, 0, 0.0, "0", "0.0") and own is None) or fields.word("eval_strategy") == "no":
        return None
    return Evaluation(batch_size=batch)


def _rlhf(fields: Fields, *, adapted: bool) -> tuple[Rlhf | None, int | None]:
    """Return what ``swift rlhf`` trains, and the length of a row: of generated rows ``max_length`` bounds the prompt.

    Source: ms-swift@3602360a:swift/arguments/rlhf_args.py:RLHFArguments._init_grpo, rlhf_trainers/args_mixin.py:
        VllmArguments, RolloutTrainerArgumentsMixin.
    """
    length, word = fields.count("max_length"), fields.word("rlhf_type")
    if word is None and fields.word("script") != "rlhf":
        return None, length
    kind = kind_of(word or "dpo", fields.where)
    if kind not in ON_POLICY:
        own = fields.raw("ref_model") is not None
        reference: Reference | None = "copy" if own and kind in ("dpo", "kto") else None
        return Rlhf(kind=kind, reference=reference), length
    completion = fields.count("max_completion_length") or fields.count("response_length") or 512
    beta = fields.raw("beta")
    none = beta is not None and str(beta) in ("0", "0.0", "0.00")
    found = Rlhf(
        kind=kind,
        reference="none" if none else "adapter" if adapted else "copy",
        completion_len=completion,
        steps_per_generation=fields.count("steps_per_generation"),
        rollout=_rollout(fields),
        reward_model=fields.raw("reward_model") is not None,
    )
    whole = fields.count("vllm_max_model_len")  # bounds prompt and completion together
    if length is None and whole is not None and whole <= completion:
        found = replace(found, completion_len=max(1, whole - 1))
    return found, length + completion if length else whole


def _rollout(fields: Fields) -> Rollout:
    fraction = fields.fraction("vllm_gpu_memory_utilization", 0.9)
    sleeps = str(fields.raw("sleep_level") or 0) != "0"
    alone = fields.flag("offload_model") and fields.flag("offload_optimizer")
    if not fields.flag("use_vllm"):
        return Rollout()
    if fields.word("vllm_mode") != "colocate":
        return Rollout(engine="server")
    return Rollout(engine="vllm", memory_fraction=fraction, sleeps=sleeps, alone=alone)
