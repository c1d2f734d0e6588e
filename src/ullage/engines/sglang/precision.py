"""How weights are held when ``--quantization`` asks for something else than the checkpoint stores."""

from __future__ import annotations

import re
from functools import lru_cache

from ullage.errors import InputError
from ullage.i18n import _
from ullage.spec.model import Quantization, QuantRule
from ullage.spec.serving import ServingJob
from ullage.units import WeightFormat

_KEPT = QuantRule(pattern=r"(^|\.)(lm_head|embed_tokens)\b", format=None)
_FORMATS = {
    "fp8": WeightFormat(name="fp8 per tensor", dtype="float8_e4m3", tensor_scales=1),
    "fp8_block": WeightFormat(name="fp8 128x128", dtype="float8_e4m3", block=(128, 128)),
    "fp8_channel": WeightFormat(name="fp8 per channel", dtype="float8_e4m3", block=(1, 0)),
    "int8": WeightFormat(name="int8 per channel", dtype="int8", block=(1, 0)),
    "int4": WeightFormat(
        name="int4, groups of 128", dtype="int4", block=(1, 128), scale_dtype="float16", zero_point_dtype="int4"
    ),
    "mxfp4": WeightFormat(name="mxfp4", dtype="float4_e2m1", block=(1, 32), scale_dtype="float8_e8m0"),
    "nvfp4": WeightFormat(name="nvfp4", dtype="float4_e2m1", block=(1, 16), scale_dtype="float8_e4m3", tensor_scales=1),
}
_NAMES = (
    (r"fp8.*block|block.*fp8", "fp8_block"),
    (r"w8a8_fp8", "fp8_channel"),
    (r"nvfp4|modelopt_fp4|petit_nvfp4", "nvfp4"),
    (r"mxfp4", "mxfp4"),
    (r"fp8", "fp8"),
    (r"int8|w8a8", "int8"),
    (r"awq|gptq|int4|w4a|marlin|auto.?round|compressed.tensors", "int4"),
)
_NONE = ("", "none", "bf16", "bfloat16", "fp16", "float16", "auto", "unquant")


def held_quantization(job: ServingJob) -> Quantization | None:
    """Return the rules weights are held by: the checkpoint's own, or what the job asks of an unquantised one.

    A checkpoint that is quantised stays as it is: SGLang takes the method from it.
    Source: sglang@0.5.23:srt/configs/model_config.py:_verify_quantization.

    Raises:
        InputError: a method that is not known.
    """
    if job.model.quantization is not None:
        return job.model.quantization
    return _asked((job.quantization or "").strip().lower())


@lru_cache(maxsize=64)
def _asked(name: str) -> Quantization | None:
    if name in _NONE:
        return None
    for pattern, kind in _NAMES:
        if re.search(pattern, name):
            rules = (_KEPT, QuantRule(pattern="", format=_FORMATS[kind]))
            return Quantization(method=name, rules=rules)
    raise InputError(
        _("how {name!r} stores weights is not known").format(name=name[:40]),
        where="--quantization",
        remedy=_("known are {known}").format(known=", ".join(sorted(_FORMATS))),
    )
