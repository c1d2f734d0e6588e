"""An axolotl configuration (YAML) → a recipe.

Source: axolotl@0.19.0:src/axolotl/utils/schemas/ for names and defaults, utils/config/__init__.py for dtypes.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.axolotl_words import HARMLESS, NOT_FOLLOWED, PLUGINS, PREFIXES
from ullage.read.fsdp_words import axolotl_fsdp
from ullage.read.recipe_fields import Fields
from ullage.read.recipe_words import HARMLESS_PREFIXES, RecipeWords, attention_of, optimizer_of, parse_targets
from ullage.read.rlhf_recipe import HARMLESS as RLHF_HARMLESS
from ullage.read.rlhf_recipe import axolotl_rlhf
from ullage.spec.training import Evaluation, Lora

_SIZES = ("tensor_parallel_size", "expert_parallel_size")


def axolotl_recipe(fields: Fields, version: str = "") -> RecipeWords:
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
    micro, accumulated = _batch(fields)
    checkpointing = fields.raw("gradient_checkpointing")
    offloaded = fields.raw("activation_offloading") not in (None, False, "false")
    loss, kernels = _loss(fields)
    attention, like = _attention(fields)
    lora = (_llama_adapter(fields) if adapter == "llama-adapter" else _lora(fields)) if adapter else None
    words = RecipeWords(
        program="axolotl",
        micro_batch_size=micro,
        grad_accum=accumulated,
        seq_len=length,
        optimizer=optimizer,
        optimizer_impl=impl,
        recompute=checkpointing not in (None, False, "false"),
        activation_offload=str(checkpointing).startswith(("offload", "unsloth")) or offloaded,
        attention=attention,
        loss=loss,
        compile=str(fields.raw("torch_compile")).lower() in ("true", "auto"),
        packing=fields.flag("sample_packing"),
        precision=precision,
        compute=compute,
        lora=lora,
        rlhf=rlhf,
        base_quantization=_quantization(fields),
        said=(_("sequences of the full length, {length:,} tokens").format(length=length), *like),
    )
    return _spread(fields, words, adapter, kernels)


def _batch(fields: Fields) -> tuple[int, int]:
    """Return sequences per GPU and pass, and passes per step."""
    micro, total = fields.count("micro_batch_size") or 1, fields.count("batch_size")
    return micro, fields.count("gradient_accumulation_steps") or (max(1, total // micro) if total else 1)


def _spread(fields: Fields, words: RecipeWords, adapter: str | None, kernels: str | None) -> RecipeWords:
    """Return the words with how the job is spread and evaluated, its flags, and what is said of the rest."""
    context = fields.count("context_parallel_size") or fields.count("sequence_parallel_degree") or 1
    return replace(
        words,
        deepspeed=fields.raw("deepspeed") or None,
        fsdp=axolotl_fsdp(fields, mixed=fields.raw("bf16") != "full"),
        evaluation=_evaluation(fields, words.micro_batch_size),
        context=context,
        flags=_flags(fields, kernels, quantised=words.base_quantization is not None),
        said=(*words.said, *_said(fields, adapter, context)),
        unknown=fields.not_asked(
            (*HARMLESS, *RLHF_HARMLESS),
            (*HARMLESS_PREFIXES, *PREFIXES, *(() if adapter else ("lora_", "peft_"))),
        ),
    )


def _refuse(fields: Fields) -> None:
    for key in NOT_FOLLOWED:
        if fields.raw(key) not in (None, False, 0, [], {}):
            raise InputError(_("{key} is not followed").format(key=key), where=fields.where)
    for key in _SIZES:
        if (fields.count(key) or 1) > 1:
            raise InputError(_("{key} above 1 is not followed").format(key=key), where=fields.where)
    adapter = fields.word("adapter")
    if adapter not in (None, "lora", "qlora", "llama-adapter"):
        raise fields.wrong("adapter", "lora, qlora, llama-adapter")
    plugins = fields.raw("plugins")
    for name in plugins if isinstance(plugins, list) else []:
        if not any(known in str(name).lower() for known in PLUGINS):
            raise InputError(
                _("the plugin {name} is not followed").format(name=str(name)[:80]),
                where=fields.where,
                remedy=_("known are {known}").format(known=", ".join(PLUGINS)),
            )


def _said(fields: Fields, adapter: str | None, context: int) -> tuple[str, ...]:
    """Return what is taken for granted of settings that are followed in part."""
    found = []
    kernels = [fields.raw(f"lora_{part}_kernel") for part in ("mlp", "qkv", "o", "embedding")]
    by_itself = all(one is None for one in kernels) and not fields.raw("rl") and not fields.flag("load_in_8bit")
    by_itself = by_itself and not fields.flag("trust_remote_code")
    if adapter in ("lora", "qlora") and (any(kernels) or by_itself):
        # axolotl@0.19.0:axolotl/utils/schemas/config.py:check_auto_enable_lora_kernels
        found.append(_("axolotl's LoRA kernels are counted as PEFT's own layers, which keep more"))
    less = [key for key in ("tiled_mlp", "flash_attn_fuse_mlp") if fields.flag(key)]
    found += [_("{key}: counted as without it, which keeps more").format(key=key) for key in less]
    ways = ("use_scattermoe", "use_sonicmoe", "use_kernels", "experts_implementation")
    other = [key for key in ways if fields.raw(key) not in (None, False)]
    found += [_("{key}: experts are counted as transformers runs them").format(key=key) for key in other]
    if (fields.count("chunked_cross_entropy_num_chunks") or 8) != 8:
        found.append(_("the loss in 8 chunks"))
    if context > 1:
        found.append(
            _("a ring of {count} ranks: keys and values of one more part are not counted").format(count=context)
        )
    return tuple(found)


def _evaluation(fields: Fields, micro: int) -> Evaluation | None:
    """Return the evaluation between steps, as many sequences at a time as in training unless told; none without data.

    Source: axolotl@0.19.0:axolotl/utils/schemas/training.py (eval_batch_size), utils/config/__init__.py:
        normalize_config; integrations/cut_cross_entropy/ (no logits here either).
    """
    batch, length = fields.count("eval_batch_size") or micro, fields.count("eval_sequence_len")
    split = fields.raw("val_set_size") in (None, 0, 0.0, "0", "0.0")
    if (split and not fields.raw("test_datasets")) or fields.word("eval_strategy") == "no":
        return None
    cut = fields.flag("cut_cross_entropy", any("cut_cross_entropy" in name for name in fields.words("plugins")))
    return Evaluation(batch_size=batch, seq_len=length, spares_logits=cut)


def _flags(fields: Fields, kernels: str | None, *, quantised: bool) -> tuple[tuple[str, str], ...]:
    """Return what the job's rules take as flags: how checkpoints work, fused kernels, and how experts are stored.

    Source: axolotl@0.19.0:axolotl/utils/config/__init__.py:normalize_config (use_reentrant), utils/schemas/config.py
        (quantize_moe_experts, llama4_linearized_experts).
    """
    details = fields.raw("gradient_checkpointing_kwargs")
    reentrant = fields.raw("rl") is None
    if isinstance(details, dict):
        reentrant = details.get("use_reentrant") is True
    # axolotl@0.19.0:axolotl/loaders/patch_manager.py (hf_grad_checkpoint_offload_wrapper), "unsloth" by its older name
    if fields.raw("activation_offloading") == "legacy" or fields.raw("gradient_checkpointing") == "unsloth":
        found = [("use_reentrant", "true"), ("offload_under_way", "0")]
    else:
        found = [("use_reentrant", str(reentrant).lower())]
    linear, narrow = fields.flag("llama4_linearized_experts"), fields.flag("quantize_moe_experts")
    if quantised:
        found.append(("experts", "linear" if linear else "quantised" if narrow else "wide"))
    return tuple([*found, ("fused_kernels", kernels)] if kernels is not None else found)


def _precision(fields: Fields) -> tuple[str, str]:
    """Return recipe and compute dtype: parameters are loaded in the dtype that is computed in.

    Source: axolotl@0.19.0:src/axolotl/utils/config/__init__.py:resolve_dtype; ``auto`` is bf16 where the card has it.
    """
    value = fields.raw("bf16")
    if value in (True, "auto", "full", "true") or fields.raw("bfloat16") is True:
        fields.raw("fp16"), fields.raw("float16")
        return "bf16", "bfloat16"
    if fields.flag("load_in_8bit"):
        return "bf16", "float16"
    if fields.flag("fp16") or fields.raw("float16") is True:
        return "amp", "float16"
    return "fp32", "float32"


def _attention(fields: Fields) -> tuple[str | None, tuple[str, ...]]:
    """Return which kernel runs, and what is taken for granted: named as in transformers, or by one of the old switches.

    Source: axolotl@0.19.0:axolotl/utils/schemas/enums.py:LEGACY_ATTN_FLAG_TO_IMPL, in this order.
    """
    switches = {
        "xformers_attention": "xformers",
        "sage_attention": "sage",
        "flex_attention": "flex_attention",
        "flash_attention": "flash_attention_2",
        "sdp_attention": "sdpa",
        "eager_attention": "eager",
    }
    on = [kernel for key, kernel in switches.items() if fields.flag(key)]
    if fields.raw("attn_implementation") is None and on:
        return attention_of(Fields({"attn_implementation": on[0]}, fields.where))
    return attention_of(fields)


def _loss(fields: Fields) -> tuple[str | None, str | None]:
    """Return the loss that a plugin brings, and the kernels that are fused, each by a switch of its own.

    Source: axolotl@0.19.0:axolotl/integrations/liger/plugin.py:LigerPlugin.pre_model_load, integrations/
        cut_cross_entropy/, monkeypatch/loss/chunked.py.
    """
    liger = {
        "rms_norm": fields.flag("liger_rms_norm"),
        "rope": fields.flag("liger_rope"),
        "swiglu": fields.flag("liger_glu_activation") or fields.flag("liger_swiglu"),
    }
    kernels = ",".join(name for name, on in liger.items() if on)
    cut = fields.flag("cut_cross_entropy", any("cut_cross_entropy" in name for name in fields.words("plugins")))
    if fields.flag("liger_fused_linear_cross_entropy") or cut:
        return "liger", kernels
    if fields.flag("liger_cross_entropy") or fields.flag("flash_attn_cross_entropy"):
        return "fused", kernels or None
    return ("chunked" if fields.flag("chunked_cross_entropy") else None), kernels or None


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
    if fields.flag("gptq"):
        return "gptq"
    return "nf4" if four else "int8" if eight else None
