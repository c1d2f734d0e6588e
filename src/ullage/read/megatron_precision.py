"""Number formats of a Megatron-LM job: weights, gradients, master weights, moments, FP8.

Source: Megatron-LM@d98e8a6:megatron/training/arguments.py:validate_args.
"""

from __future__ import annotations

from typing import Literal

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.megatron_words import Arguments
from ullage.spec.training import Precision

_SHORT = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "float8_e4m3"}
Fp8Recipe = Literal["blockwise", "delayed", "tensorwise", "mxfp8", "nvfp4"]
_RECIPES: dict[str, Fp8Recipe] = {
    "blockwise": "blockwise",
    "delayed": "delayed",
    "tensorwise": "tensorwise",
    "mxfp8": "mxfp8",
    "nvfp4": "nvfp4",
}


def precision_of(args: Arguments) -> Precision:
    """Weights, gradients and states as Megatron-LM chooses them: bf16 reduces gradients in fp32, fp16 does not."""
    compute = "float16" if args.on("fp16") else "bfloat16" if args.on("bf16") else "float32"
    precise = args.on("use-precision-aware-optimizer")
    grads = "float32"
    if args.on("fp16") and not args.on("accumulate-allreduce-grads-in-fp32"):
        grads = "float16"
    if args.on("grad-reduce-in-bf16"):
        grads = "bfloat16"
    if precise:
        grads = _SHORT.get(args.get("main-grads-dtype"), grads)
    master: str | None = _SHORT.get(args.get("main-params-dtype"), "float32") if precise else "float32"
    if args.on("use-megatron-fsdp"):
        grads, master = _fsdp_formats(args, compute, grads, master)
    return Precision(
        compute=compute,
        params=compute,
        grads=grads,
        master=None if compute == "float32" else master,
        moments=_SHORT.get(args.get("exp-avg-dtype"), "float32") if precise else "float32",
        fp8_recipe=_fp8_recipe(args),
    )


def _fsdp_formats(args: Arguments, compute: str, grads: str, master: str | None) -> tuple[str, str | None]:
    """Gradients and master weights of Megatron-FSDP: ``auto`` is the parameters' own format.

    Source: Megatron-LM@d98e8a6:megatron/core/distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py:
        _resolve_group_grad_dtype. Known error: where the flag is not given versions differ; fp32 gradients are taken.
    """
    grads_text, params_text = args.get("megatron-fsdp-main-grads-dtype"), args.get("megatron-fsdp-main-params-dtype")
    if grads_text:
        grads = _SHORT.get(grads_text, compute)
    if params_text:
        master = _SHORT.get(params_text)
    return grads, None if master == compute else master


def _fp8_recipe(args: Arguments) -> Fp8Recipe | None:
    """Return the recipe of FP8 or FP4 training, None without.

    Raises:
        InputError: a recipe that is not known.
    """
    if args.stated("fp4-format"):
        return "nvfp4"
    if not (args.stated("fp8-format") or args.stated("fp8")):
        return None
    name = args.get("fp8-recipe") or "delayed"
    if name not in _RECIPES:
        raise InputError(
            _("the FP8 recipe {name!r} is not followed").format(name=name[:40]),
            where="--fp8-recipe",
            remedy=_("known are {known}").format(known=", ".join(_RECIPES)),
        )
    return _RECIPES[name]
