"""The pool of DeepSeek-V4: windows, compressed entries and compressor states in one budget."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from ullage.account import kv_cache
from ullage.engines.sglang.defaults import Settings
from ullage.engines.sglang.poolspec import Pool, Window
from ullage.frozen import Frozen
from ullage.spec import model as spec
from ullage.units import round_up

#: A page of the FlashMLA layout is padded to this.
#: Source: sglang@0.5.23:srt/mem_cache/deepseek_v4_memory_pool.py:DeepSeekV4SingleKVPool.create_buffer.
_PAGE_BYTES_MULTIPLE = 576
_EVICTION_INTERVAL = 128  # sglang@0.5.23:srt/environ.py:SGLANG_SWA_EVICTION_INTERVAL
_STATE_BYTES = 4  # sglang@0.5.23:srt/environ.py:SGLANG_DSV4_COMPRESS_STATE_DTYPE, float32


class _Layers(Frozen):
    parts: tuple[spec.CompressedAttention, ...]

    def of(self, ratio: int) -> int:
        return sum(part.compress_ratio == ratio for part in self.parts)


def request_cap(settings: Settings, window: int) -> int:
    """Return the window tokens that the running requests can hold at worst.

    Formula: R (w + 128 t + p + a) + chunks x c + p, up to a page.
    Symbols: R requests, w window, t draft tokens (1 without), p page, a page (2 x drafts in pages with speculation), c
        chunked prefill size, chunks 2 with overlapped scheduling.
    Source: sglang@0.5.23:srt/model_executor/pool_configurator.py:compute_swa_request_cap.
    """
    page, requests = settings.page, settings.max_running or 1
    drafts = max(settings.draft_tokens, 1)
    decode = page if not settings.draft_tokens else 2 * round_up(drafts, page)
    each = window + _EVICTION_INTERVAL * drafts + page + decode
    chunks = 1 if settings.flags.on("disable_overlap_schedule") else 2
    return round_up(each * requests + chunks * settings.chunk + page, page)


def pool_of(settings: Settings, layers: tuple[spec.Layer, ...], available: int) -> Pool:
    """Return the rules of V4's pool.

    Formula: cell = r S + n4 (K4/4 + I/4) + n128 K128/128; S = K L + 8/q (4 D + 4 d) 4 n4; times (L+1)/L with a draft.
        fixed = c128 states of all requests; in V4.1 with a request limit S moves from the cell into fixed.
    Symbols: r window tokens per token (0.1), K entry bytes (584, with page padding), I index key bytes, q page (window
        in older releases), D head_dim, d index head size, n4, n128, L layers.
    Source: sglang@0.5.23:srt/model_executor/pool_configurator.py:DSV4PoolConfigurator; older coefficients
        sglang@0.5.12, sglang@0.5.15, same class.
    Known error: unified and trtllm layouts have no page padding and other rows.
    """
    held = _Layers(parts=tuple(m for layer in layers for m in layer.mixers if isinstance(m, spec.CompressedAttention)))
    rule = settings.release.rule("v4")
    window = max(part.window for part in held.parts)
    per_window, growing = _per_window_token(settings, held, rule), _growing(settings, held, bool(rule["page_padding"]))
    ratio = Fraction(str(settings.flags.number("swa_full_tokens_ratio") or rule["swa_ratio"]))
    capped = _is_capped(settings, held)
    inflation = Fraction(len(layers) + 1, len(layers)) if settings.draft_tokens else Fraction(1)
    cell = (growing + (0 if capped else ratio * per_window)) * inflation
    fixed = 0
    if capped:
        tokens = round_up(request_cap(settings, window) + _kept_prefixes(settings, window), settings.page)
        fixed += math.ceil(tokens * per_window * inflation)
    state = _CompressorStates(held.of(128), _ring(128, settings), max(part.head_dim for part in held.parts))
    if rule["c128_state"] == "per_request":
        requests = settings.max_running or _requests(settings, available, cell)
        fixed += state.num_bytes(requests)
    return Pool(
        cell=cell,
        real=cell,
        fixed=fixed,
        page=settings.page,
        slope=growing,
        windows=(Window(tokens=window, bytes_per_token=per_window),),
        request_bytes=state.num_bytes(1) - state.num_bytes(0),
        swa_ratio=ratio,
        buffers=(),
        formula=f"{float(cell):,.2f} B per token + {fixed:,} B",
        source=settings.release.source("v4"),
    )


def _is_capped(settings: Settings, held: _Layers) -> bool:
    """Tell whether the window pool follows the request limit: V4.1 (layers of ratio 1 or 2), unless a ratio is given.

    Source: sglang@0.5.23:srt/arg_groups/model_overrides/deepseek_v4.py (V4 itself keeps 0.1).
    """
    given = settings.flags.text("swa_full_tokens_ratio")
    low_ratio = held.of(1) + held.of(2) > 0
    rule = settings.release.rule("v4")["request_cap"]
    return bool(rule and low_ratio and settings.max_running is not None and not given)


def _entry(part: spec.CompressedAttention, settings: Settings, page: int, padded: bool) -> Fraction:
    row = kv_cache.compressed_entry(part, settings.row_format).row_bytes
    if not padded or settings.row_format != "fp8_ds_mla":
        return row
    return Fraction(round_up(math.ceil(row * page), _PAGE_BYTES_MULTIPLE), page)


def _growing(settings: Settings, held: _Layers, padded: bool) -> Fraction:
    """Bytes per token of the compressed entries and their index keys."""
    total = Fraction(0)
    for part in held.parts:
        ratio = part.compress_ratio
        if ratio == 0:
            continue
        total += _entry(part, settings, max(settings.page // ratio, 1), padded) / ratio
        if part.indexer is not None:
            total += kv_cache.indexer_row(part.indexer).row_bytes / ratio
    return total


def _per_window_token(settings: Settings, held: _Layers, rule: dict[str, object]) -> Fraction:
    """Bytes per token of the window: one raw entry per layer, and the compressor states that follow it."""
    page = settings.page if rule["state_per"] == "page" else max(part.window for part in held.parts)
    padded = bool(rule["page_padding"])
    total = sum((_entry(part, settings, settings.page, padded) for part in held.parts), Fraction(0))
    for part in held.parts:
        if part.compress_ratio == 4:
            index = part.indexer.head_dim if part.indexer else 0
            total += Fraction(_ring(4, settings), page) * 4 * (part.head_dim + index) * _STATE_BYTES
        elif part.compress_ratio == 128 and rule["c128_state"] == "per_window_token":
            total += Fraction(_ring(128, settings), page) * 2 * part.head_dim * _STATE_BYTES
    return total


def _ring(ratio: int, settings: Settings) -> int:
    """Rows of a compressor's ring. Source: sglang@0.5.23:deepseek_v4_memory_pool.py:get_compress_state_ring_size."""
    return {4: 8, 128: 128}[ratio] * (2 if settings.draft_tokens else 1)


@dataclass(frozen=True)
class _CompressorStates:
    """States of the 128-to-1 compressors: a ring of rows for every request slot."""

    count: int
    ring: int
    head_dim: int

    def num_bytes(self, requests: int) -> int:
        """Return the bytes for ``requests`` requests."""
        rows = round_up((requests + 1) * self.ring + self.ring + 1, 128)
        return rows * 2 * self.head_dim * _STATE_BYTES * self.count


def _kept_prefixes(settings: Settings, window: int) -> int:
    """Window tokens kept for cached prefixes. Source: DSV4PoolConfigurator._resolve_swa_prefix_tails."""
    given = settings.flags.integer("swa_prefix_tails")
    if given is None:
        given = 0 if settings.flags.on("disable_radix_cache") else 4 * (settings.max_running or 0)
    return given * (window + settings.page)


def _requests(settings: Settings, available: int, cell: Fraction) -> int:
    """Requests assumed for the fixed states. Source: DSV4PoolConfigurator._resolve_max_running_requests_per_worker."""
    tokens = max(math.floor(available / cell), 0)
    estimated = max(min(tokens * 512 // settings.context, 4096), 2048)
    return min(estimated, tokens // 2)
