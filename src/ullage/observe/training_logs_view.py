"""Memory figures of a training log, judged: the peak by rank, growth from step to step, retries of the allocator."""

from __future__ import annotations

from dataclasses import replace

from ullage.i18n import _
from ullage.ledger import Certainty, Term, ranged
from ullage.observe.advice import Piece
from ullage.observe.inspection import Inspection
from ullage.observe.measured import Cell, Listing, Rise, Series, ranked, rise_of
from ullage.observe.oom import Size
from ullage.observe.training_logs import AMOUNTS, Collected, Rank
from ullage.units import format_bytes

_NAMES = {"megatron": "Megatron-LM", "torchtitan": "torchtitan", "deepspeed": "DeepSpeed", "hf_trainer": "HF Trainer"}
MAX_SERIES = 64
#: Amounts that are read for growth, the surest first: peaks since the last line, or of the whole run, only rise.
_GROWING = ("allocated", "reserved", "max_reserved", "max_allocated")


def with_training(found: Inspection, collected: Collected) -> Inspection:
    """Add the memory figures of a training log to the answer about its death or start."""
    if not collected.ranks:
        return found
    ranks = _ranks(collected)
    return replace(
        found,
        series=(*found.series, *_series(ranks)),
        listings=(*found.listings, _listing(ranks, collected)),
        notes=(*found.notes, *_warnings(collected)),
    )


def inspect_training(collected: Collected, num_lines: int) -> Inspection:
    """Return the answer about a training log without a death."""
    ranks = _ranks(collected)
    if not ranks:
        return _tracker(collected, num_lines)
    fullest = max(ranks, key=lambda rank: (_peak(rank), rank.peak("allocated")))
    leaking, rise = _leak(ranks)
    shown = leaking or fullest
    ooms = sum(collected.ooms.values())
    edge = ooms or (collected.retries and rise is None)
    return Inspection(
        kind="training_log",
        verdict=_verdict(ranks, fullest, leaking, rise, collected),
        cause="capacity" if edge else "leak" if rise else "none",
        confidence="unsure" if edge else "likely",
        why=_why(collected, ranks, rise, ooms),
        framework=shown.program,
        rank=shown.rank,
        sizes=_sizes(fullest, collected),
        printed=tuple((f"peak_{name.removeprefix('max_')}", size.text) for name, size in _printed(fullest)),
        terms=_terms(fullest, collected),
        total_bytes=_whole(fullest, collected),
        total_name=_("the card") if collected.capacity_bytes else _("peak"),
        advice=_advice(collected, rise, ooms),
        notes=(*_warnings(collected), *_notes(ranks)),
        metrics=_metrics(fullest, collected),
        series=_series(ranks),
        listings=(_listing(ranks, collected),),
        num_lines=num_lines,
    )


def _ranks(collected: Collected) -> list[Rank]:
    for rank in collected.ranks.values():
        rank.finish()
    return sorted(collected.ranks.values(), key=lambda rank: (rank.program, len(rank.rank), rank.rank))


def _peak(rank: Rank) -> int:
    return rank.peak("device_used") or rank.peak("max_reserved", "reserved") or rank.peak("max_allocated", "allocated")


def _leak(ranks: list[Rank]) -> tuple[Rank | None, Rise | None]:
    """Return the rank whose memory rises fastest, and how; peaks of the whole run rise by themselves: not those."""
    best: tuple[Rank | None, Rise | None] = (None, None)
    for rank in ranks:
        for key, curve in rank.curves.items():
            name = key.rpartition(": ")[2]
            steady = name in ("allocated", "reserved") or (rank.program == "torchtitan" and name == "max_reserved")
            rise = rise_of(curve.points()) if steady else None
            if rise is not None and (best[1] is None or rise.per_x > best[1].per_x):
                best = (rank, rise)
    return best


def _who(rank: Rank) -> str:
    name = _NAMES[rank.program]
    return _("{program}, rank {rank}").format(program=name, rank=rank.rank) if rank.rank else name


def _verdict(ranks: list[Rank], fullest: Rank, leaking: Rank | None, rise: Rise | None, collected: Collected) -> str:
    parts = []
    if allocated := fullest.peak("max_allocated", "allocated"):
        parts.append(_("{size} allocated").format(size=format_bytes(allocated)))
    if reserved := fullest.peak("max_reserved", "reserved"):
        parts.append(_("{size} reserved").format(size=format_bytes(reserved)))
    peak = _("peak {sizes}").format(sizes=", ".join(parts))
    if ooms := sum(collected.ooms.values()):
        return _("{who}: {count:,} allocations were refused; {peak}").format(who=_who(fullest), count=ooms, peak=peak)
    if rise is not None and leaking is not None:
        return _("{who}: memory grows by {size} per step; {peak}").format(
            who=_who(leaking), size=format_bytes(rise.per_x), peak=peak
        )
    if collected.retries:
        return _("{who}: the job runs at the edge of the card; {peak}").format(who=_who(fullest), peak=peak)
    return f"{_who(fullest)}: {peak}"


def _why(collected: Collected, ranks: list[Rank], rise: Rise | None, ooms: int) -> str:
    steps = max(rank.last_step for rank in ranks)
    parts = [_("memory lines of {count} ranks, up to step {step:,}").format(count=len(ranks), step=steps)]
    if rise is not None:
        parts.append(_("the floor rose by {size} over the steps").format(size=format_bytes(rise.total)))
    if ooms:
        parts.append(_("the program went on after them, and the log has no message of their own"))
    return "; ".join(parts)


def _printed(rank: Rank) -> list[tuple[str, Size]]:
    found: list[tuple[str, Size]] = []
    for names in (("max_allocated", "allocated"), ("max_reserved", "reserved"), ("device_used",)):
        sizes = [(name, rank.sizes[name]) for name in names if name in rank.sizes]
        if sizes:
            found.append(max(sizes, key=lambda pair: pair[1].bytes))
    return found


def _sizes(rank: Rank, collected: Collected) -> tuple[tuple[str, int], ...]:
    sizes = {"capacity": collected.capacity_bytes} if collected.capacity_bytes else {}
    for name, size in _printed(rank):
        sizes[f"peak_{name.removeprefix('max_')}"] = size.bytes
    if collected.model_bytes:
        sizes["model_reserved"] = collected.model_bytes
    return tuple(sizes.items())


def _whole(rank: Rank, collected: Collected) -> int:
    return collected.capacity_bytes or _peak(rank)


def _terms(rank: Rank, collected: Collected) -> tuple[Term, ...]:
    """Return the books at the peaks: amounts of different lines, so their differences are approximate."""
    sizes = {name.removeprefix("max_"): size for name, size in _printed(rank)}
    source = _("log of {program}").format(program=_NAMES[rank.program])
    allocated, reserved, used = sizes.get("allocated"), sizes.get("reserved"), sizes.get("device_used")
    rows: list[tuple[str, Size, Size | None, str]] = []
    if allocated is not None:
        rows.append(("allocated", allocated, None, allocated.text))
    if reserved is not None and allocated is not None:
        rows.append(("reserved_unallocated", reserved, allocated, "max reserved - max allocated"))
    elif reserved is not None:
        rows.append(("reserved", reserved, None, reserved.text))
    if used is not None and reserved is not None:
        rows.append(("outside_pytorch", used, reserved, "device used - max reserved"))
    top = used or reserved or allocated
    if collected.capacity_bytes and top is not None:
        whole = Size(bytes=collected.capacity_bytes, text="", half_step_bytes=0)
        rows.append(("free", whole, top, "capacity - peak"))
    return tuple(_term(name, size, less, words, source) for name, size, less, words in rows)


def _term(name: str, size: Size, less: Size | None, words: str, source: str) -> Term:
    value = max(0, size.bytes - (less.bytes if less else 0))
    slack = size.half_step_bytes + (less.half_step_bytes if less else 0)
    return ranged(
        name, value, low=max(0, value - slack), high=value + slack, formula=words, source=source,
        certainty=Certainty.MEASURED,
    )  # fmt: skip


def _advice(collected: Collected, rise: Rise | None, ooms: int) -> tuple[Piece, ...]:
    found = []
    if rise is not None:
        change = _(
            "find who keeps tensors of earlier steps: losses that are summed up undetached, caches, logged outputs"
        )
        found.append(Piece(change=change, flags="torch.cuda.memory._record_memory_history()", gain_bytes=rise.total))
    if ooms or collected.retries:
        conf = _("let segments grow, so that pieces join")
        found.append(Piece(change=conf, flags="PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"))
        change = _("a smaller micro-batch, with gradient accumulation so that the global batch stays")
        found.append(Piece(change=change, cost=_("smaller kernels, somewhat slower")))
    return tuple(found)


def _warnings(collected: Collected) -> tuple[str, ...]:
    notes = []
    for rank, count in sorted(collected.retries.items(), key=lambda pair: -pair[1])[:4]:
        where = _("rank {rank}: ").format(rank=rank) if rank else ""
        notes.append(
            _("{where}{count:,} allocations were only had after giving the cache back: the card is at its edge").format(
                where=where, count=count
            )
        )
    if len(collected.retries) > 4:
        notes.append(_("retries on {count} ranks in all").format(count=len(collected.retries)))
    return tuple(notes)


def _notes(ranks: list[Rank]) -> tuple[str, ...]:
    notes = []
    if any(rank.program == "torchtitan" for rank in ranks):
        notes.append(_("torchtitan prints the largest reserved since the last line; allocated is not in its log"))
    if any(rank.program == "megatron" and rank.num_points == 1 for rank in ranks):
        notes.append(_("Megatron prints memory once by default: growth cannot be told (--log-memory-interval N)"))
    if any(rank.program == "megatron" for rank in ranks):
        notes.append(_("Megatron prints the first data-parallel rank of each group only"))
    if any(rank.program == "deepspeed" and "max_reserved" in rank.sizes for rank in ranks):
        notes.append(_("DeepSpeed rounds Max_CA to whole GiB and resets the peaks with every line"))
    restarts = max(rank.num_restarts for rank in ranks)
    if restarts:
        notes.append(
            _("the run was started anew {count} times; growth is judged since the last start").format(count=restarts)
        )
    if any(not rank.rank and rank.num_points > 1 for rank in ranks) and len(ranks) == 1:
        notes.append(_("the lines do not say which rank speaks; of several at one step the largest counts"))
    return tuple(notes)


def _metrics(rank: Rank, collected: Collected) -> tuple[tuple[str, float], ...]:
    metrics: dict[str, float] = {}
    allocated, reserved = rank.peak("max_allocated", "allocated"), rank.peak("max_reserved", "reserved")
    if allocated and reserved:
        metrics["fragmentation_rate"] = max(0.0, (reserved - allocated) / reserved)
    if collected.capacity_bytes:
        metrics["used_share"] = _peak(rank) / collected.capacity_bytes
    return tuple(metrics.items())


def _series(ranks: list[Rank]) -> tuple[Series, ...]:
    found = []
    for rank in ranks:
        for key, curve in rank.curves.items():
            series, _mark, name = key.rpartition(": ")
            words = f"rank {rank.rank} " if rank.rank else ""
            found.append(curve.series(f"{words}{series + ' ' if series else ''}{name}_bytes", "step"))
    return tuple(found[:MAX_SERIES])


def _listing(ranks: list[Rank], collected: Collected) -> Listing:
    rows: list[tuple[Cell, ...]] = [
        (
            rank.rank or "?", _NAMES[rank.program], *(rank.peak(name) or None for name in AMOUNTS), rank.last_step,
            collected.retries.get(rank.rank, 0), collected.ooms.get(rank.rank, 0), rank.num_points,
        )
        for rank in ranks
    ]  # fmt: skip
    columns = (
        "rank", "program", *(f"{name}_bytes" for name in AMOUNTS), "last_step", "retries", "ooms", "lines",
    )  # fmt: skip
    return Listing(name="ranks", title=_("Ranks, the largest of each amount"), columns=columns, rows=ranked(rows, 5))


def _tracker(collected: Collected, num_lines: int) -> Inspection:
    """Return the answer about figures of the Trainer's memory tracker.

    Formula: peak = before + sum of alloc deltas so far + peaked delta.
    Source: transformers@5.23.0:trainer_pt_utils.py:log_metrics (what the deltas mean).
    """
    known = collected.tracked
    level = known.get("before_init_mem_gpu", 0) + known.get("init_mem_gpu_alloc_delta", 0)
    rows: list[tuple[Cell, ...]] = []
    peak = level + known.get("init_mem_gpu_peaked_delta", 0)
    for stage in ("train", "eval", "test"):
        alloc, peaked = (known.get(f"{stage}_mem_gpu_{word}_delta") for word in ("alloc", "peaked"))
        if alloc is None and peaked is None:
            continue
        level += alloc or 0
        rows.append((stage, level, level + (peaked or 0)))
        peak = max(peak, level + (peaked or 0))
    peak = max(0, peak)
    return Inspection(
        kind="training_log",
        verdict=_("{program}: peak {sizes}").format(program="HF Trainer", sizes=format_bytes(peak)),
        cause="none",
        confidence="likely",
        framework="hf_trainer",
        sizes=(("peak_allocated", peak), ("left_at_end", max(0, level))),
        notes=(_("the Trainer's tracker sees what PyTorch allocates on its own rank, not what the pool reserves"),),
        listings=(
            Listing(name="stages", title=_("Stages"), columns=("stage", "after_bytes", "peak_bytes"), rows=tuple(rows)),
        ),
        num_lines=num_lines,
    )
