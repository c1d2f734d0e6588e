"""The pool configurators: how the bytes that are left become tokens, and what a token really costs.

``cell`` is what the configurator counts for a token, ``real`` what the buffers hold for it. The two differ where a
release forgot something, and then the pool grows into the slack.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from fractions import Fraction

from ullage.account import kv_cache
from ullage.engines.sglang import pool_v4
from ullage.engines.sglang.defaults import Settings
from ullage.engines.sglang.poolspec import Pool, Window
from ullage.frozen import Frozen
from ullage.spec import model as spec


class Rows(Frozen):
    """Bytes per token of a stage, by what the rules tell apart. ``buffers``: of each buffer, for the segments."""

    full: Fraction
    window: Fraction
    latent: Fraction
    indexer: Fraction
    num_full: int
    num_window: int
    windows: tuple[Window, ...]
    buffers: tuple[Fraction, ...]


def rows_of(settings: Settings, layers: Iterable[spec.Layer]) -> Rows:
    """Return the rows of a stage's layers.

    Raises:
        LayoutError: the KV heads cannot be spread over the attention ranks.
    """
    full = window = latent = indexer = Fraction(0)
    num_full = num_window = 0
    windows: dict[int, Fraction] = {}
    buffers: list[Fraction] = []
    for mixer in _caching(layers):
        rows = kv_cache.mixer_rows(mixer, settings.row_format, attention_tp=settings.attention_tp)
        if isinstance(mixer, spec.LatentAttention):
            row, *index = (row.bytes_per_token for row in rows)
            full += row
            indexer += sum(index, Fraction(0))
            latent += (mixer.kv_lora_rank + mixer.qk_rope_head_dim) * kv_cache.element_bytes(settings.kv_dtype)
            buffers += [row, *index]
            num_full += 1
            continue
        row = sum((row.bytes_per_token for row in rows), Fraction(0))
        buffers += [part.count * part.each_bytes for found in rows for part in found.parts]
        limit = mixer.window or mixer.chunk if isinstance(mixer, spec.Attention) else None
        if limit:
            window, num_window = window + row, num_window + 1
            windows[limit] = windows.get(limit, Fraction(0)) + row
        else:
            full, num_full = full + row, num_full + 1
    return Rows(
        full=full,
        window=window,
        latent=latent,
        indexer=indexer,
        num_full=num_full,
        num_window=num_window,
        windows=tuple(Window(tokens=tokens, bytes_per_token=row) for tokens, row in windows.items()),
        buffers=tuple(buffers),
    )


def _caching(layers: Iterable[spec.Layer]) -> Iterator[spec.Mixer]:
    for layer in layers:
        for mixer in layer.mixers:
            if isinstance(mixer, spec.LatentAttention) or (
                isinstance(mixer, spec.Attention) and not mixer.shared_kv and not mixer.cross
            ):
                yield mixer


def pool_of(settings: Settings, layers: tuple[spec.Layer, ...], available: int) -> Pool:
    """Return the pool rules of a stage that has ``available`` bytes for its cache.

    Source: sglang@0.5.23:srt/model_executor/pool_configurator.py:create_memory_pool_configurator.
    """
    if settings.traits.v4:
        return pool_v4.pool_of(settings, layers, available)
    rows = rows_of(settings, layers)
    pool = _hybrid(settings, rows) if _is_hybrid(settings, rows) else _default(settings, rows)
    return _with_draft(settings, pool, rows)


def _is_hybrid(settings: Settings, rows: Rows) -> bool:
    """Tell whether window layers have a pool of their own.

    Source: sglang@0.5.3:srt/model_executor/model_runner.py:initialize;
        sglang@0.5.23:srt/configs/model_config.py:is_hybrid_swa_model.
    """
    models = settings.release.rule("hybrid_swa")["models"]
    if not rows.num_window or settings.flags.on("disable_hybrid_swa_memory") or models == "none":
        return False
    if models == "windows":
        return "Llama4" not in settings.job.model.architecture
    return settings.job.model.architecture in models


def _default(settings: Settings, rows: Rows) -> Pool:
    """Rules of models whose layers all cache every token.

    Formula: cell = sum of rows; tokens = available // cell, rounded down to pages.
    Source: sglang@0.5.23:srt/model_executor/pool_configurator.py:DefaultPoolConfigurator; before 0.5.12
        srt/model_executor/model_runner.py:profile_max_num_token, which counts the plain latent for sparse attention
        and, before PR 11309, no indexer.
    """
    shards = settings.job.parallel.decode_context_parallel_size
    real = rows.full / shards + rows.window / shards + rows.indexer
    cell = real
    if settings.traits.dsa:
        kind = settings.release.rule("dsa")["sized_row"]
        cell = {"latent": rows.latent, "latent+indexer": rows.latent + rows.indexer}.get(kind, real)
    return Pool(
        cell=cell,
        real=real,
        page=settings.page,
        slope=real,
        windows=(),
        buffers=rows.buffers,
        formula=f"{float(cell):,.0f} B per token",
        source=settings.release.source("dsa") if settings.traits.dsa else "sglang:DefaultPoolConfigurator",
    )


def _hybrid(settings: Settings, rows: Rows) -> Pool:
    """Rules of models with a pool of their own for window layers.

    Formula: cell = full + ratio x window (a model with window layers only: window); tokens = available // cell.
    Symbols: full, window: bytes per token of the two kinds of layers; ratio swa_full_tokens_ratio.
    Source: sglang@0.5.23:srt/model_executor/pool_configurator.py:HybridSWAPoolConfigurator,
        SWARequestCapPoolConfigurator; sglang@0.5.3:srt/model_executor/model_runner.py:set_num_token_hybrid.
    """
    ratio = Fraction(
        str(settings.flags.number("swa_full_tokens_ratio") or settings.release.rule("hybrid_swa")["ratio"])
    )
    if rows.num_full == 0:
        ratio = Fraction(1)
    cell = rows.full + ratio * rows.window
    fixed = 0
    capped = (
        settings.release.rule("v4")["request_cap"]
        and settings.max_running is not None
        and settings.flags.on("disable_radix_cache")
        and rows.num_full > 0
    )
    if capped:
        largest = max(window.tokens for window in rows.windows)
        fixed = math.ceil(pool_v4.request_cap(settings, largest) * rows.window)
        cell = rows.full
    return Pool(
        cell=cell,
        real=cell,
        fixed=fixed,
        page=settings.page,
        slope=rows.full,
        windows=rows.windows,
        swa_ratio=ratio,
        buffers=rows.buffers,
        formula=f"{float(rows.full):,.0f} + {float(ratio):.2f} x {float(rows.window):,.0f} B per token",
        source="sglang@0.5.23:srt/model_executor/pool_configurator.py:HybridSWAPoolConfigurator",
    )


def draft_layers(settings: Settings) -> int:
    """Return how many layers of draft cache there are: one MTP layer, or those of the draft model."""
    if settings.draft_tokens == 0:
        return 0
    draft = settings.job.draft_model
    return len(draft.layers) if draft is not None else 1


def _with_draft(settings: Settings, pool: Pool, rows: Rows) -> Pool:
    """Count a draft's cache as the release does: in the cell, or beside the pool.

    Formula: in the cell: cell x (L + D) / L; beside: D rows for every token, out of the slack.
    Source: sglang@0.5.15:srt/model_executor/pool_configurator.py:DefaultPoolConfigurator;
        sglang@0.5.3:srt/model_executor/model_runner.py:init_memory_pool.
    """
    layers, caching = draft_layers(settings), rows.num_full + rows.num_window
    if not layers or not caching:
        return pool
    one = (rows.full + rows.indexer) / max(rows.num_full, 1) if rows.num_full else rows.window / rows.num_window
    if settings.release.rule("draft")["pool"] == "in_cell":
        return replace(pool, cell=pool.cell + layers * one, draft=layers * one)
    return replace(pool, draft=layers * one)
