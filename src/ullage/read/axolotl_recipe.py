"""An axolotl configuration (YAML) → a recipe.

Source: axolotl@0.19.0:src/axolotl/utils/schemas/ for names and defaults, utils/config/__init__.py for dtypes.
"""

from __future__ import annotations

from typing import Any

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.recipe_fields import Fields
from ullage.read.recipe_words import ATTENTION, HARMLESS_PREFIXES, RecipeWords, optimizer_of, parse_targets
from ullage.read.rlhf_recipe import HARMLESS as RLHF_HARMLESS
from ullage.read.rlhf_recipe import axolotl_rlhf
from ullage.spec.training import Lora

_HARMLESS = (
    "base_model", "base_model_config", "model_type", "tokenizer_type", "sequence_len", "pad_to_sequence_len", "strict",
    "lora_fan_in_fan_out", "lora_model_dir", "group_by_length", "train_on_inputs", "lr_scheduler", "plugins", "tokens",
    "datasets", "rl", "special_tokens", "sample_packing_eff_est", "eval_sample_packing", "revision_of_model",
    "gradient_checkpointing_kwargs", "liger_rope", "liger_rms_norm", "liger_glu_activation", "liger_layer_norm",
    "bnb_config_kwargs", "experimental_skip_move_to_device", "resize_token_embeddings_to_32x",
    "shuffle_merged_datasets",
    "cut_cross_entropy", "torch_dtype", "bfloat16", "float16", "fsdp_version", "xformers_attention", "type_of_model",
    "tf32", "local_rank", "use_tensorboard", "roles_to_train", "unfrozen_parameters", "hf_use_auth_token",
)  # fmt: skip
_NOT_FOLLOWED = (
    "unsloth_lora_qkv", "unsloth_lora_mlp", "unsloth_lora_o", "unsloth_cross_entropy_loss", "lisa_n_layers", "relora",
    "qat", "fp8", "process_reward_model", "llmcompressor", "layer_offloading", "gptq", "s2_attention",
    "unfrozen_parameters",
)  # fmt: skip
_SIZES = ("tensor_parallel_size", "context_parallel_size", "sequence_parallel_degree", "dp_shard_size")


def axolotl_recipe(fields: Fields) -> RecipeWords:
    """Read a configuration of ``axolotl train``.

    Raises:
        InputError: a value that its setting cannot have, or a method that is not followed.
    """
    _refuse(fields)
    optimizer, impl = optimizer_of(fields, "optimizer", "adamw_torch_fused")
    length = fields.count("sequence_len") or 512
    adapter = fields.word("adapter")
    rlhf = axolotl_rlhf(fields, adapted=bool(adapter))
    length += (rlhf.completion_len or 0) if rlhf else 0  # of generated rows sequence_len bounds the prompt
    precision, compute = _precision(fields)
    micro = fields.count("micro_batch_size") or 1
    total = fields.count("batch_size")
    accumulated = fields.count("gradient_accumulation_steps") or (max(1, total // micro) if total else 1)
    checkpointing = fields.raw("gradient_checkpointing")
    fsdp, config = fields.raw("fsdp"), fields.raw("fsdp_config")
    return RecipeWords(
        micro_batch_size=micro,
        grad_accum=accumulated,
        seq_len=length,
        optimizer=optimizer,
        optimizer_impl=impl,
        recompute=checkpointing not in (None, False, "false"),
        activation_offload=checkpointing == "offload" or fields.flag("activation_offloading"),
        attention=_attention(fields),
        loss=_loss(fields),
        compile=fields.raw("torch_compile") is True,
        packing=fields.flag("sample_packing"),
        precision=precision,
        compute=compute,
        lora=(_llama_adapter(fields) if adapter == "llama-adapter" else _lora(fields)) if adapter else None,
        rlhf=rlhf,
        base_quantization=_quantization(fields),
        deepspeed=fields.raw("deepspeed") or None,
        fsdp=bool(fsdp or config),
        fsdp_offload=_offloads(config),
        said=(_("sequences of the full length, {length:,} tokens").format(length=length),),
        unknown=fields.not_asked((*_HARMLESS, *RLHF_HARMLESS), HARMLESS_PREFIXES),
    )


def _refuse(fields: Fields) -> None:
    for key in _NOT_FOLLOWED:
        if fields.raw(key) not in (None, False, 0, [], {}):
            raise InputError(_("{key} is not followed").format(key=key), where=fields.where)
    for key in _SIZES:
        if (fields.count(key) or 1) > 1:
            raise InputError(_("{key} above 1 is not followed").format(key=key), where=fields.where)
    adapter = fields.word("adapter")
    if adapter not in (None, "lora", "qlora", "llama-adapter"):
        raise fields.wrong("adapter", "lora, qlora, llama-adapter")


def _precision(fields: Fields) -> tuple[str, str]:
    """Return recipe and compute dtype: parameters are loaded in the dtype that is computed in.

    Source: axolotl@0.19.0:src/axolotl/utils/config/__init__.py:resolve_dtype; ``auto`` is bf16 where the card has it.
    """
    value = fields.raw("bf16")
    if value in (True, "auto", "full", "true") or fields.raw("bfloat16") is True:
        return "bf16", "bfloat16"
    if fields.flag("fp16") or fields.raw("float16") is True:
        return "amp", "float16"
    return "fp32", "float32"


def _attention(fields: Fields) -> Any:
    """Return which kernel runs: named as in transformers, or by one of axolotl's switches."""
    named = fields.choice("attn_implementation", ATTENTION)
    switches = (("flash_attention", "flash"), ("sdp_attention", "sdpa"), ("eager_attention", "eager"))
    on = [kernel for key, kernel in switches if fields.flag(key)]
    return named or (on[0] if on else None)


def _loss(fields: Fields) -> str | None:
    """Return the loss that a plugin brings: Liger's, or Apple's cut cross entropy.

    Source: axolotl@0.19.0:src/axolotl/integrations/liger/, integrations/cut_cross_entropy/.
    """
    if fields.flag("liger_fused_linear_cross_entropy") or fields.flag("cut_cross_entropy"):
        return "liger"
    if any("cut_cross_entropy" in name for name in fields.words("plugins")):
        return "liger"
    return "chunked" if fields.flag("chunked_cross_entropy") else None


def _llama_adapter(fields: Fields) -> Lora:
    """Return prompts that layers attend to; 10 tokens in 30 layers unless told.

    Source: axolotl@0.19.0:src/axolotl/loaders/adapter.py:load_llama_adapter (``peft_adapter``: layers, len).
    """
    section = fields.section("peft_adapter")
    layers = (section.count("layers") if section else None) or 30
    length = (section.count("len") if section else None) or 10
    return Lora(
        kind="adaption_prompt", rank=0, targets=(), options=(("adapter_len", length), ("adapter_layers", layers))
    )


def _lora(fields: Fields) -> Lora:
    linear, targets = fields.flag("lora_target_linear"), fields.words("lora_target_modules")
    if not linear and not targets:
        raise InputError(
            _("no targets of the adapters are given"), where=fields.where, remedy=_("write lora_target_linear: true")
        )
    return Lora(
        rank=fields.count("lora_r") or 8,
        targets=("all-linear",) if linear else parse_targets(targets),
        dropout=fields.fraction("lora_dropout"),
        dtype=None if fields.flag("peft_autocast_adapter_dtype", True) else _precision(fields)[1],
        dora=fields.flag("peft_use_dora"),
        trained_modules=fields.words("lora_modules_to_save"),
    )


def _quantization(fields: Fields) -> str | None:
    four, eight = fields.flag("load_in_4bit"), fields.flag("load_in_8bit")
    return "nf4" if four else "int8" if eight else None


def _offloads(config: Any) -> bool:
    """Return whether FSDP keeps parameters on the host (``offload_params``, with the old prefix or without)."""
    section = config if isinstance(config, dict) else {}
    return any(section.get(key) is True for key in ("offload_params", "fsdp_offload_params"))
