"""Kernel records: one kernel or small module of a benchmark table → its peak."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ullage.account.activations import kernels
from ullage.engines.serving import Amount
from ullage.i18n import _
from ullage.records import words
from ullage.records.compare import NotComparableError, Prediction
from ullage.records.schema import Record
from ullage.units import MiB, canonical_dtype, dtype_bytes

#: Streaming multiprocessors. Source: NVIDIA A100, H100, B200 and GeForce RTX data sheets.
MULTIPROCESSORS = {"A100": 108, "H100": 132, "B200": 148, "RTX3090": 82, "RTX4090": 128}
#: Two cuBLAS workspaces, main thread and backward thread; 32 MiB each from compute capability 9.0 on.
#: Source: torch@2.4.1:aten/src/ATen/cuda/CublasHandlePool.cpp:parseChosenWorkspaceSize.
SMALL_WORKSPACES, LARGE_WORKSPACES = 2 * (8 * MiB + 128 * 1024), 2 * 32 * MiB
#: Vocabularies of the models that benchmark tables name. Source: liger-kernel@0.8.0:benchmark/scripts/
#: benchmark_model_configs.py (the models' own configs).
VOCABULARIES = {
    "llama_2_7b": 32000,
    "llama_3_8b": 128256,
    "qwen2.5_7b": 152064,
    "qwen2.5_14b": 152064,
    "qwen2.5_72b": 152064,
    "deepseek_v2_lite": 102400,
    "deepseek_v3": 129280,
}
#: How far a count of live tensors may be off: blocks of 512 bytes, small statistics, one tensor more or less.
MARGIN = 0.03


def predict(record: Record) -> Prediction:
    """Predict a kernel record.

    Raises:
        NotComparableError: the kernel or its provider is not counted.
    """
    kernel, provider = str(record.job.get("kernel")), str(record.job.get("provider"))
    rule = RULES.get(kernel)
    params = record.job.get("params")
    if rule is None or not isinstance(params, dict) or not _known(kernel, provider):
        raise NotComparableError(_("no count of {kernel} by {provider}").format(kernel=kernel, provider=provider))
    value = rule(record, params, provider.startswith("liger"))
    if any(figure.value < value / 5 - MiB for figure in record.measured):
        raise NotComparableError(_("the figure is below the size of the kernel's own input"))
    margin = round(value * MARGIN) + MiB
    low = value - margin
    if kernel == "cross_entropy" and provider.startswith("liger"):
        low = value // 2 - margin  # the kept gradient may be the logits' own storage
    return Prediction(engine="kernels", figures={"max_allocated": Amount(value=value, low=low, high=value + margin)})


def _known(kernel: str, provider: str) -> bool:
    """Return whether a provider's kernel is counted: cuTile's cross entropy is not in place."""
    if provider in ("huggingface", "torch", "megatron", "deepspeed_tiled"):
        return True
    return provider.startswith("liger") and not (kernel == "cross_entropy" and "cutile" in provider)


def _tokens(record: Record, params: Mapping[str, Any]) -> int:
    """Return the rows a kernel works on: tokens, rows, or batch x sequence."""
    for key in ("tokens", "rows"):
        found = words.integer(params, key, record.where)
        if found:
            return found
    return _size(record, params, "seq") * (words.integer(params, "batch", record.where) or 1)


def _size(record: Record, params: Mapping[str, Any], key: str) -> int:
    found = words.integer(params, key, record.where)
    if not found:
        raise NotComparableError(_("{key} is not given").format(key=key))
    return found


def _width(params: Mapping[str, Any], default: str) -> int:
    return int(dtype_bytes(canonical_dtype(str(params.get("dtype") or default))))


def _workspaces(record: Record) -> int:
    gpu = str(record.job.get("gpu"))
    return LARGE_WORKSPACES if gpu.startswith(("H100", "H200", "B200")) else SMALL_WORKSPACES


def _multiprocessors(record: Record) -> int:
    gpu = str(record.job.get("gpu"))
    return next((count for name, count in MULTIPROCESSORS.items() if gpu.startswith(name)), 0)


def _cross_entropy(record: Record, params: Mapping[str, Any], liger: bool) -> int:
    tokens = _tokens(record, params)
    vocabulary = VOCABULARIES.get(str(params.get("model"))) or _size(record, params, "vocab")
    return kernels.cross_entropy_peak(tokens, vocabulary, in_place=liger)


def _linear_cross_entropy(record: Record, params: Mapping[str, Any], liger: bool) -> int:
    sizes = (_tokens(record, params), _size(record, params, "vocab"), _size(record, params, "hidden"))
    count = kernels.fused_linear_cross_entropy_peak if liger else kernels.linear_cross_entropy_peak
    return count(*sizes, element_bytes=_width(params, "bf16")) + _workspaces(record)


def _norm(record: Record, params: Mapping[str, Any], liger: bool) -> int:
    return kernels.norm_peak(
        _tokens(record, params),
        _size(record, params, "hidden"),
        element_bytes=_width(params, "bf16"),
        num_multiprocessors=_multiprocessors(record) if liger else 0,
    )


def _rms_norm(record: Record, params: Mapping[str, Any], liger: bool) -> int:
    return kernels.norm_peak(
        _tokens(record, params),
        _size(record, params, "hidden"),
        element_bytes=_width(params, "bf16"),
        num_multiprocessors=_multiprocessors(record) if liger else 0,
        vectors=1,
    )


def _fused_add_norm(record: Record, params: Mapping[str, Any], _liger: bool) -> int:
    provider = str(record.job.get("provider"))
    if not provider.endswith("fused_add_rms_norm"):
        raise NotComparableError(_("no count of {kernel} by {provider}").format(kernel="rms_norm", provider=provider))
    return kernels.fused_add_norm_peak(
        _tokens(record, params),
        _size(record, params, "hidden"),
        element_bytes=_width(params, "bf16"),
        num_multiprocessors=_multiprocessors(record),
    )


def _group_norm(record: Record, params: Mapping[str, Any], _liger: bool) -> int:
    if params.get("channels"):
        rows, size = (
            _size(record, params, "rows"),
            _size(record, params, "channels") * _size(record, params, "positions"),
        )
    else:
        rows, size = _tokens(record, params), _size(record, params, "hidden")
    return kernels.norm_peak(rows, size, element_bytes=_width(params, "bf16"), vectors=0)


def _softmax(record: Record, params: Mapping[str, Any], _liger: bool) -> int:
    sizes = (_tokens(record, params), _size(record, params, "hidden"))
    return kernels.norm_peak(*sizes, element_bytes=_width(params, "bf16"), vectors=0)


def _ffn_sizes(record: Record, params: Mapping[str, Any]) -> kernels.FfnSizes:
    tokens, width = _tokens(record, params), _width(params, "bf16")
    hidden, inner = _size(record, params, "hidden"), _size(record, params, "intermediate")
    return kernels.FfnSizes(
        hidden_bytes=tokens * hidden * width, inner_bytes=tokens * inner * width, weight_bytes=hidden * inner * width
    )


def _ffn(record: Record, params: Mapping[str, Any], liger: bool) -> int:
    mode, sizes = str(record.job.get("mode")), _ffn_sizes(record, params)
    if str(record.job.get("provider")).endswith("_tiled"):
        shards = _size(record, params, "num_shards")
        return kernels.tiled_ffn_peak(sizes, shards, fused=liger, mode=mode) + _workspaces(record)
    return kernels.ffn_peak(sizes, fused=liger, mode=mode) + _workspaces(record)


RULES: dict[str, Callable[[Record, Mapping[str, Any], bool], int]] = {
    "cross_entropy": _cross_entropy,
    "fused_linear_cross_entropy": _linear_cross_entropy,
    "layer_norm": _norm,
    "softmax": _softmax,
    "group_norm": _group_norm,
    "megatron_rms_norm": _rms_norm,
    "fused_add_rms_norm": _fused_add_norm,
    "swiglu": _ffn,
    "geglu": _ffn,
    "tiled_swiglu": _ffn,
    "tiled_geglu": _ffn,
}
