"""What one request keeps in cache over a whole model: *fixed + slope x tokens*, before an engine's blocks and rounding.

Rows that grow are :mod:`ullage.account.kv_cache`'s, recurrent states :mod:`ullage.account.state`'s; here they are
summed, with what sliding windows and V4's compressors keep.
"""

from __future__ import annotations

from fractions import Fraction

from ullage.account.kv_cache import bytes_per_token, compressed_entry, mixer_rows
from ullage.account.state import state_tensors
from ullage.frozen import Frozen
from ullage.spec import model as spec
from ullage.units import dtype_bytes

#: Both engines hold the compressors' running values and gates in fp32.
COMPRESSOR_STATE_BYTES = 4


class CacheCost(Frozen):
    """Bytes of one request of ``n`` tokens, beyond its windows: ``fixed_bytes + bytes_per_token * n``."""

    fixed_bytes: int
    bytes_per_token: Fraction


def window_bytes(part: spec.Mixer, dtype: str) -> int:
    """Return what a full sliding window or chunk keeps in one layer; 0 for layers without one.

    Formula: w x row.
    Symbols: w window or chunk in tokens, row bytes of one raw entry.
    Source: as the rows; V4: transformers@5.23.0:models/deepseek_v4/modeling_deepseek_v4.py:DeepseekV4HCACache.
    """
    if isinstance(part, spec.CompressedAttention):
        return int(part.window * compressed_entry(part, dtype).row_bytes)
    width = (part.window or part.chunk or 0) if isinstance(part, spec.Attention) else 0
    return int(width * sum((row.row_bytes for row in mixer_rows(part, dtype)), Fraction(0))) if width else 0


def compressor_state_bytes(part: spec.Mixer) -> int:
    """Return what a V4 compressor holds of the tokens that are not folded into an entry yet; 0 for other layers.

    Formula: r' x 2 x (D' + d') x 4, with r' = 2r, D' = 2D, d' = 2d where windows overlap (the projections are twice as
        wide and the previous window is kept), else r' = r, D' = D; d' only for layers with an indexer.
    Symbols: r compress_ratio, D head_dim, d index head_dim; values and gates (the 2), fp32 (the 4).
    Source: transformers@5.23.0:models/deepseek_v4/modeling_deepseek_v4.py:DeepseekV4CSACompressor, DeepseekV4Indexer;
        vllm@0.33.0:vllm/models/deepseek_v4/compressor.py:CompressorStateCache (the same sizes, in pages).
    """
    if not isinstance(part, spec.CompressedAttention) or not part.compress_ratio:
        return 0
    twice = 2 if part.overlap else 1
    width = part.head_dim + (part.indexer.head_dim if part.indexer else 0)
    return twice * part.compress_ratio * 2 * twice * width * COMPRESSOR_STATE_BYTES


def recurrent_state_bytes(part: spec.Mixer, dtype: str) -> int:
    """Return what a linear-attention or state-space layer keeps; ``dtype`` where the layer fixes none of its own."""
    return sum(int(tensor.num_elements * dtype_bytes(tensor.dtype or dtype)) for tensor in state_tensors(part))


def cache_cost(model: spec.Model, dtype: str, *, indexer_dtype: str = "fp8") -> CacheCost:
    """Return fixed bytes and slope of one request over all layers of ``model``, unsharded.

    Raises:
        LayoutError: the cache format is not one for this kind of attention.
    """
    fixed = 0
    for layer in model.layers:
        for mixer in layer.mixers:
            fixed += window_bytes(mixer, dtype) + compressor_state_bytes(mixer)
            fixed += recurrent_state_bytes(mixer, model.dtype)
    slope = bytes_per_token(model, dtype, indexer_dtype=indexer_dtype, windows=False)
    return CacheCost(fixed_bytes=fixed, bytes_per_token=slope)
