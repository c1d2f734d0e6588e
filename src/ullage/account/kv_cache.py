"""What one cached token costs in each kind of layer, before an engine's blocks and rounding.

A :class:`Row` is one token's entry in one layer on one rank, written out part by part, so that a sum such as 656 can be
read: 512 fp8 values, 4 scales, 64 rotary values in bf16. Fixed costs (windows, states) are the engines' and
:mod:`ullage.account.state`'s.
"""

from __future__ import annotations

from fractions import Fraction

from ullage.account.gguf_types import BY_NAME
from ullage.account.sharding import units_per_rank
from ullage.errors import LayoutError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec import model as spec
from ullage.units import dtype_bytes


class Part(Frozen):
    """``count`` values of ``each_bytes`` bytes in a row."""

    what: str
    count: int
    each_bytes: Fraction


class Row(Frozen):
    """One token's entry in one layer on one rank.

    ``tokens_per_row``: tokens that share the row (V4 compression); 1 otherwise.
    """

    parts: tuple[Part, ...] = ()
    tokens_per_row: int = 1
    source: str = ""

    @property
    def row_bytes(self) -> Fraction:
        """Bytes of the row; a whole number in every layout but GGUF's blocks."""
        return sum((part.count * part.each_bytes for part in self.parts), Fraction(0))

    @property
    def bytes_per_token(self) -> Fraction:
        """Bytes that one more token costs."""
        return self.row_bytes / self.tokens_per_row

    @property
    def formula(self) -> str:
        """The sum as people write it: ``512 x 1 latent + 4 x 4 scales + 64 x 2 rope``."""
        text = " + ".join(f"{part.count} x {part.each_bytes} {part.what}" for part in self.parts)
        return f"({text}) / {self.tokens_per_row}" if self.tokens_per_row > 1 else text


NO_ROW = Row()


def element_bytes(dtype: str) -> Fraction:
    """Return the bytes of one cached element: a plain dtype, or a GGUF type such as ``q8_0`` (34/32).

    Raises:
        InputError: the name is neither.
    """
    kind = BY_NAME.get(dtype.upper())
    if kind is not None and kind.block_size > 1:
        return Fraction(kind.block_bytes, kind.block_size)
    return dtype_bytes(dtype)


def attention_row(part: spec.Attention, dtype: str, *, attention_tp: int = 1) -> Row:
    """Return the row of multi-head, grouped-query or multi-query attention.

    Formula: max(1, K / t) x (D + Dv) x e; nothing for layers that reuse another layer's keys and values, nor for
        cross attention, whose entries are the image's and not the tokens'.
    Symbols: K num_kv_heads, t attention_tp, D head_dim, Dv v_head_dim, e bytes of an element.
    Source: vllm@0.33.0:vllm/v1/kv_cache_interface.py:FullAttentionSpec;
        sglang@0.5.23:srt/model_executor/pool_configurator.py:DefaultPoolConfigurator.

    Raises:
        LayoutError: the KV heads cannot be spread over the ranks.
    """
    if part.shared_kv or part.cross:
        return NO_ROW
    heads = units_per_rank(part.num_kv_heads, attention_tp, where=_("{prefix}, KV heads").format(prefix=part.prefix))
    each = element_bytes(dtype)
    return Row(
        parts=(
            Part(what="key", count=heads * part.head_dim, each_bytes=each),
            Part(what="value", count=heads * (part.v_head_dim or part.head_dim), each_bytes=each),
        ),
        source="vllm@0.33.0:vllm/v1/kv_cache_interface.py:FullAttentionSpec",
    )


def index_key_row(part: spec.Attention, dtype: str = "bfloat16") -> Row:
    """Return the row of the key by which attention chooses blocks: one head, on every rank, in the model's dtype.

    Formula: d x e.
    Symbols: d index_key_dim, e bytes of an element.
    Source: vllm@0.33.0:vllm/models/minimax_m3/common/indexer.py:MiniMaxM3IndexerCache (bf16 unless asked for fp8);
        sglang@0.5.23:srt/mem_cache/memory_pool.py:get_minimax_sparse_index_dtype.
    """
    if not part.index_key_dim or part.shared_kv or part.cross:
        return NO_ROW
    key = Part(what="index key", count=part.index_key_dim, each_bytes=element_bytes(dtype))
    return Row(parts=(key,), source="vllm@0.33.0:vllm/models/minimax_m3/common/indexer.py:MiniMaxM3IndexerCache")


_FLASHMLA = "vllm@0.33.0:vllm/v1/attention/backends/mla/flashmla_sparse.py"


def latent_row(part: spec.LatentAttention, dtype: str) -> Row:
    """Return the row of multi-head latent attention, replicated on every tensor-parallel rank.

    Formula: (r + d) x e. ``fp8_ds_mla``: r fp8 + r/128 fp32 scales + d bf16 (512 + 4*4 + 64*2 = 656).
        ``nvfp4_ds_mla``: r/2 + d fp8 + r/16 fp8 scales (256 + 64 + 32 = 352).
    Symbols: r kv_lora_rank, d qk_rope_head_dim, e bytes of an element.
    Source: arXiv:2405.04434 sec. 2.1.2; vllm@0.33.0:vllm/v1/attention/backends/mla/flashmla_sparse.py, its head note.
        The ``fp8_ds_mla`` layout keeps 64 rope values even where the model has none (same file, GLM without rope).
    """
    rank, rope = part.kv_lora_rank, part.qk_rope_head_dim
    if dtype == "fp8_ds_mla":
        return Row(
            parts=(
                Part(what="latent fp8", count=rank, each_bytes=Fraction(1)),
                Part(what="scales fp32", count=-(-rank // 128), each_bytes=Fraction(4)),
                Part(what="rope bf16", count=rope or 64, each_bytes=Fraction(2)),
            ),
            source=_FLASHMLA,
        )
    if dtype == "nvfp4_ds_mla":
        return Row(
            parts=(
                Part(what="latent e2m1", count=rank, each_bytes=Fraction(1, 2)),
                Part(what="rope fp8", count=rope, each_bytes=Fraction(1)),
                Part(what="scales fp8", count=-(-rank // 16), each_bytes=Fraction(1)),
            ),
            source=_FLASHMLA,
        )
    each = element_bytes(dtype)
    return Row(
        parts=(
            Part(what="latent", count=rank, each_bytes=each),
            Part(what="rope", count=rope, each_bytes=each),
        ),
        source="arXiv:2405.04434 sec. 2.1.2",
    )


def indexer_row(part: spec.Indexer, dtype: str = "fp8") -> Row:
    """Return the row of the lightning indexer's key, one for all index heads.

    Formula: fp8: d + 4 (one fp32 scale per 128 values; 132 for d = 128); mxfp4: d/2 + d/32 (68); else d x e.
    Symbols: d index_head_dim.
    Source: vllm@0.33.0:vllm/v1/attention/backends/mla/indexer.py; DeepSeek-V3.2-Exp inference/model.py:Indexer.
    """
    dim = part.head_dim
    source = "vllm@0.33.0:vllm/v1/attention/backends/mla/indexer.py"
    if dtype == "fp8":
        scales = Part(what="scale fp32", count=-(-dim // 128), each_bytes=Fraction(4))
        return Row(parts=(Part(what="index key fp8", count=dim, each_bytes=Fraction(1)), scales), source=source)
    if dtype == "mxfp4":
        scales = Part(what="scales e8m0", count=-(-dim // 32), each_bytes=Fraction(1))
        return Row(parts=(Part(what="index key e2m1", count=dim, each_bytes=Fraction(1, 2)), scales), source=source)
    return Row(parts=(Part(what="index key", count=dim, each_bytes=element_bytes(dtype)),), source=source)


def compressed_entry(part: spec.CompressedAttention, dtype: str) -> Row:
    """Return one raw entry of V4 attention (the window holds such entries; so does each compressed position).

    Formula: D x e. ``fp8_ds_mla``: (D - d) fp8 + d bf16 + (D - d)/64 ue8m0 scales, rounded up to 8 bytes
        (448 + 128 + 7 + 1 = 584).
    Symbols: D head_dim, d qk_rope_head_dim.
    Source: vllm@0.33.0:vllm/v1/attention/backends/mla/flashmla_sparse.py, its head note.
    """
    if dtype != "fp8_ds_mla":
        entry = Part(what="entry", count=part.head_dim, each_bytes=element_bytes(dtype))
        return Row(parts=(entry,), source="DeepSeek-V4 inference/model.py")
    plain = part.head_dim - part.qk_rope_head_dim
    scales = -(-plain // 64)
    return Row(
        parts=(
            Part(what="entry fp8", count=plain, each_bytes=Fraction(1)),
            Part(what="rope bf16", count=part.qk_rope_head_dim, each_bytes=Fraction(2)),
            Part(what="scales ue8m0", count=scales, each_bytes=Fraction(1)),
            Part(what="pad", count=-scales % 8, each_bytes=Fraction(1)),
        ),
        source=_FLASHMLA,
    )


def compressed_rows(part: spec.CompressedAttention, dtype: str, indexer_dtype: str = "fp8") -> tuple[Row, ...]:
    """Return the rows that grow with the context: one entry, and one index key, per ``compress_ratio`` tokens.

    Formula: row / m + indexer row / m; nothing for m = 0 (window only).
    Symbols: m compress_ratio.
    Source: DeepSeek-V4 inference/model.py:Compressor; sglang@0.5.23:srt/model_executor/pool_configurator.py:
        DSV4PoolConfigurator.
    """
    if part.compress_ratio == 0:
        return ()
    rows = [compressed_entry(part, dtype)]
    if part.indexer is not None:
        rows.append(indexer_row(part.indexer, indexer_dtype))
    return tuple(Row(parts=row.parts, tokens_per_row=part.compress_ratio, source=row.source) for row in rows)


def mixer_rows(
    part: spec.Mixer, dtype: str, *, attention_tp: int = 1, indexer_dtype: str = "fp8", windows: bool = True
) -> tuple[Row, ...]:
    """Return the rows that one token adds in one mixer on one rank; none for state layers.

    ``windows`` False leaves out layers with a sliding window or chunk, whose rows stop growing at the window.

    Raises:
        LayoutError: the KV heads cannot be spread, or a packed MLA layout is asked for another kind of attention.
    """
    if isinstance(part, spec.LatentAttention):
        rows = [latent_row(part, dtype)]
        if part.indexer is not None:
            rows.append(indexer_row(part.indexer, indexer_dtype))
        return tuple(rows)
    if isinstance(part, spec.CompressedAttention):
        return compressed_rows(part, dtype, indexer_dtype)
    if isinstance(part, spec.Attention):
        if dtype.endswith("_ds_mla"):
            raise LayoutError(
                _("the cache format {dtype} is for latent attention").format(dtype=dtype),
                where=part.prefix,
                remedy=_("use auto, bfloat16 or fp8"),
            )
        if not windows and (part.window or part.chunk):
            return ()
        found = (attention_row(part, dtype, attention_tp=attention_tp), index_key_row(part))
        return tuple(row for row in found if row.parts)
    return ()


def bytes_per_token(
    model: spec.Model,
    dtype: str,
    *,
    attention_tp: int = 1,
    indexer_dtype: str = "fp8",
    layers: tuple[int, int] | None = None,
    windows: bool = True,
) -> Fraction:
    """Return what one more token of one request costs on one rank, over ``layers`` (all by default).

    Formula: sum over layers of row / tokens_per_row; an exact fraction.
    Source: the rows (see :func:`mixer_rows`).

    Raises:
        LayoutError: see :func:`mixer_rows`.
    """
    kinds: dict[int, tuple[spec.Layer, int]] = {}
    for index in range(*(layers or (0, len(model.layers)))):
        layer = model.layers[index]
        kinds[id(layer)] = (layer, kinds.get(id(layer), (layer, 0))[1] + 1)
    total = Fraction(0)
    for layer, times in kinds.values():
        for mixer in layer.mixers:
            rows = mixer_rows(mixer, dtype, attention_tp=attention_tp, indexer_dtype=indexer_dtype, windows=windows)
            total += times * sum((row.bytes_per_token for row in rows), Fraction(0))
    return total
