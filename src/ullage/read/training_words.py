"""The words of ``ullage fit train`` → the typed parts of a :class:`~ullage.spec.training.TrainingJob`."""

from __future__ import annotations

import re
from dataclasses import replace

from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.training import Lora, Precision, Recompute, TrainingParallel

#: Number formats by recipe: compute, params, grads, master, moments.
#: bf16-mixed: Megatron-LM's (megatron-lm@core_r0.14:megatron/training/arguments.py:validate_args: fp32 main gradients
#: and master weights); amp: fp32 parameters under autocast or an FSDP policy; bf16: all in bf16; fp8: as bf16-mixed,
#: products in fp8; bf16-master: ZeRO's, gradients in the model's dtype
#: (deepspeed@0.17.0:deepspeed/runtime/engine.py:get_data_types); fp8-deepseek: bf16 moments too
#: (arXiv:2412.19437 sec. 3.3.3); tf32: fp32 in memory, rounded inside products.
RECIPES = {
    "bf16-mixed": Precision(grads="float32", master="float32"),
    "amp": Precision(params="float32", grads="float32"),
    "bf16-master": Precision(master="float32"),
    "bf16": Precision(moments="bfloat16"),
    "fp16-mixed": Precision(compute="float16", params="float16", grads="float16", master="float32"),
    "fp16": Precision(compute="float16", params="float16", grads="float16", moments="float16"),
    "fp32": Precision(compute="float32", params="float32", grads="float32"),
    "tf32": Precision(compute="float32", params="float32", grads="float32"),
    "fp64": Precision(compute="float64", params="float64", grads="float64", moments="float64"),
    "fp8": Precision(grads="float32", master="float32", fp8_recipe="blockwise"),
    "fp8-deepseek": Precision(grads="float32", master="float32", moments="bfloat16", fp8_recipe="blockwise"),
    "mxfp8": Precision(grads="float32", master="float32", fp8_recipe="mxfp8"),
    "nvfp4": Precision(grads="float32", master="float32", fp8_recipe="nvfp4"),
}
#: The same words where a framework means something else: torchtitan keeps fp32 parameters, and scales by tensor.
OWN_RECIPES = {
    ("torchtitan", "fp8"): replace(RECIPES["amp"], fp8_recipe="tensorwise"),
    ("torchtitan", "mxfp8"): replace(RECIPES["amp"], fp8_recipe="mxfp8"),
}
#: What a framework's users run when they say nothing.
DEFAULT_RECIPES = {
    "megatron": "bf16-mixed", "deepspeed": "bf16-master", "hf_trainer": "bf16", "single": "bf16", "unsloth": "bf16",
    "torchtune": "bf16", "litgpt": "bf16",
}  # fmt: skip


def parse_precision(text: str | None, engine: str) -> tuple[Precision, tuple[str, ...]]:
    """Return the recipe by name; without one, the framework's usual, and the sentence that says so."""
    if text is None:
        name = DEFAULT_RECIPES.get(engine, "amp")
        return RECIPES[name], (_("precision: {name}, usual with {engine}").format(name=name, engine=engine),)
    if text not in RECIPES:
        raise InputError(
            _("unknown precision recipe {text!r}").format(text=text[:40]),
            where="--precision",
            remedy=_("known are {known}").format(known=", ".join(RECIPES)),
        )
    return OWN_RECIPES.get((engine, text), RECIPES[text]), ()


def parse_recompute(text: str | None) -> Recompute:
    """Parse ``none``, ``full``, ``selective``, ``every=4`` or names such as ``mlp,layernorm``; None: not given."""
    if text is None:
        return Recompute(given=False)
    word = text.strip()
    if word in ("none", "full", "selective"):
        return Recompute(kind=word)  # type: ignore[arg-type]
    match = re.fullmatch(r"every=(\d{1,4})", word)
    if match and int(match.group(1)) > 0:
        return Recompute(kind="full", every=int(match.group(1)))
    names = tuple(name for name in word.split(",") if re.fullmatch(r"[A-Za-z_][\w.]*", name))
    if not names or ",".join(names) != word:
        raise InputError(
            _("{text!r} is not a kind of recompute").format(text=text[:60]),
            where="--recompute",
            remedy=_("write none, full, selective, every=4 or module names such as mlp,layernorm"),
        )
    return Recompute(kind="modules", modules=names)


def parse_lora(text: str) -> Lora:
    """Parse ``r=16`` or ``r=16,targets=q_proj+v_proj,dropout=0.05``; without targets, all linear layers."""
    from ullage.read.adapter_words import parse_adapters

    found, _method = parse_adapters("lora", text)
    assert found is not None
    return found


def filled_pipeline(parallel: TrainingParallel) -> int:
    """Return the fewest micro-batches of a step that fill the pipeline: one per stage, two where both ends feed it."""
    both_ends = parallel.schedule in ("dualpipe", "dualpipev")
    return parallel.pipeline_parallel_size * (2 if both_ends else 1)
