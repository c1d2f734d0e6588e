"""The stored formats that quantisation methods share, with what each keeps beside the values.

Source: the tensors that vllm@0.33.0:vllm/model_executor/layers/quantization/ creates to load each kind of checkpoint;
compressed-tensors; bitsandbytes.
"""

from __future__ import annotations

from ullage.units import WeightFormat

_INT_DTYPES = {2: "int2", 3: "int3", 4: "int4", 5: "int5", 6: "int6", 8: "int8"}


def int_dtype(bits: int) -> str | None:
    """Return the packed integer dtype of ``bits``, None for widths that no format packs."""
    return _INT_DTYPES.get(bits)


def fp8_block(rows: int = 128, columns: int = 128, *, scale_dtype: str = "float32") -> WeightFormat:
    """fp8 values, one scale per block; DeepSeek-V4 stores e8m0 scales, all before it fp32 (fp8.py)."""
    return WeightFormat(
        name=f"fp8 {rows}x{columns}", dtype="float8_e4m3", block=(rows, columns), scale_dtype=scale_dtype
    )


def fp8_per_tensor(*, static: bool = False) -> WeightFormat:
    """fp8 values, one fp32 scale, and one for the input when activations are scaled statically (fp8.py)."""
    return WeightFormat(name="fp8 per tensor", dtype="float8_e4m3", tensor_scales=2 if static else 1)


def fp8_per_row(scale_dtype: str = "float32") -> WeightFormat:
    """fp8 values, one scale per output row (fbgemm_fp8.py, compressed-tensors "channel")."""
    return WeightFormat(name="fp8 per row", dtype="float8_e4m3", block=(1, 0), scale_dtype=scale_dtype)


def nvfp4(group_size: int = 16, *, activations: bool = True) -> WeightFormat:
    """4-bit e2m1 values, an e4m3 scale per group, fp32 scales of weight and input (modelopt.py)."""
    return WeightFormat(
        name="nvfp4" if group_size == 16 else f"nvfp4 group {group_size}",
        dtype="float4_e2m1",
        block=(1, group_size),
        scale_dtype="float8_e4m3",
        tensor_scales=2 if activations else 1,
    )


def mxfp4(group_size: int = 32) -> WeightFormat:
    """4-bit e2m1 values, an e8m0 scale per 32 (OCP Microscaling Formats 1.0; mxfp4.py)."""
    return WeightFormat(name="mxfp4", dtype="float4_e2m1", block=(1, group_size), scale_dtype="float8_e8m0")


def mxfp8() -> WeightFormat:
    """fp8 values, an e8m0 scale per 32 (OCP Microscaling Formats 1.0)."""
    return WeightFormat(name="mxfp8", dtype="float8_e4m3", block=(1, 32), scale_dtype="float8_e8m0")


def awq(bits: int = 4, group_size: int = 128, *, zero_point: bool = True) -> WeightFormat:
    """Integers packed in int32, fp16 scale and packed zero point per group (auto_awq.py)."""
    dtype = _INT_DTYPES[bits]
    return WeightFormat(
        name=f"awq int{bits} group {group_size}",
        dtype=dtype,
        block=(1, max(group_size, 0)),
        scale_dtype="float16",
        zero_point_dtype=dtype if zero_point else None,
    )


def gptq(bits: int = 4, group_size: int = 128) -> WeightFormat:
    """As AWQ, and ``g_idx``: an int32 group number per input column, stored whatever desc_act says (auto_gptq.py)."""
    dtype = _INT_DTYPES[bits]
    return WeightFormat(
        name=f"gptq int{bits} group {group_size}",
        dtype=dtype,
        block=(1, max(group_size, 0)),
        scale_dtype="float16",
        zero_point_dtype=dtype,
        column_index_bytes=4,
    )


def int_packed(
    bits: int, group_size: int, *, symmetric: bool = True, reorder: bool = False, scale_dtype: str = "bfloat16"
) -> WeightFormat:
    """compressed-tensors "pack-quantized": integers in int32, scale per group, the shape as two int64.

    ``reorder``: activation order, stored as an int32 group number per column.
    """
    dtype = _INT_DTYPES[bits]
    return WeightFormat(
        name=f"int{bits} group {group_size}" if group_size > 0 else f"int{bits} per row",
        dtype=dtype,
        block=(1, max(group_size, 0)),
        scale_dtype=scale_dtype,
        zero_point_dtype=None if symmetric else dtype,
        tensor_scales=4,
        column_index_bytes=4 if reorder else 0,
    )


def w4afp8() -> WeightFormat:
    """Experts of SGLang's w4afp8: two 4-bit integers a byte, a bf16 scale per 128 once loaded, one for the input.

    Source: sglang@0.5.23:python/sglang/srt/layers/quantization/w4afp8.py:W4AFp8MoEMethod.create_weights,
        process_weights_after_loading.
    """
    return WeightFormat(name="w4afp8 group 128", dtype="int4", block=(1, 128), scale_dtype="bfloat16", tensor_scales=1)


def ternary() -> WeightFormat:
    """Weights of -1, 0 or 1, four to a byte, and one scale per tensor in the model's dtype (BitNet)."""
    return WeightFormat(name="bitnet ternary", dtype="int2", scale_dtype="bfloat16", tensor_scales=1)


def int8_per_row(scale_dtype: str = "bfloat16") -> WeightFormat:
    """int8 values, one scale per output row (compressed-tensors w8a8; bitsandbytes SCB is fp32)."""
    return WeightFormat(name="int8 per row", dtype="int8", block=(1, 0), scale_dtype=scale_dtype)


def bnb_4bit(kind: str = "nf4", *, double_quant: bool = True) -> WeightFormat:
    """4 bit of bitsandbytes: absmax per 64 values, fp32, or 8 bit with one fp32 per 256 of them; code tables.

    Formula: n/2 + n/64 x 4, or n/2 + n/64 + n/64/256 x 4 with double quantisation; code of 16 fp32, and with double
        quantisation one of 256 fp32 and an offset.
    Source: bitsandbytes:functional.py:quantize_4bit, QuantState; arXiv:2305.14314 sec. 3.
    """
    return WeightFormat(
        name=f"bnb {kind}" + (" double quant" if double_quant else ""),
        dtype="int4",
        block=(1, 64),
        scale_dtype="uint8" if double_quant else "float32",
        scales_per_scale=256 if double_quant else 0,
        tensor_scales=16 + 257 if double_quant else 16,
    )


def sparse(base: WeightFormat, kept: int, of: int) -> WeightFormat:
    """``base`` with ``kept`` values stored out of each ``of``, and where they stood.

    Storage of 2:4 (kept 2, of 4): half of the values, and 2 bits of position for each kept value, that is half a byte
    per group of four: a bf16 matrix takes 9/16 of its dense size (arXiv:2104.08378 sec. 3.1). 4:8 keeps half as well;
    a position takes 3 bits, so 8 values of bf16 take 8 + 1.5 bytes (19/32). Scales of a quantised base are unchanged.
    """
    return WeightFormat(
        name=f"{base.name} {kept}:{of} sparse",
        dtype=base.dtype,
        block=base.block,
        scale_dtype=base.scale_dtype,
        zero_point_dtype=base.zero_point_dtype,
        tensor_scales=base.tensor_scales,
        column_index_bytes=base.column_index_bytes,
        kept_of=(kept, of),
    )
