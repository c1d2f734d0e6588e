"""``ullage bench train``: idle, full load up to the break point, changing load; each in processes of their own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ullage.bench import loads
from ullage.bench.curves import Sample, StepRow, median, quantile, stability
from ullage.bench.outcome import BenchResult, Phase, RankMemory
from ullage.bench.ranks import Ranks
from ullage.bench.search import BreakPoint, Try, break_point
from ullage.bench.target import Target, check, read_config
from ullage.bench.tries import Outcome, run_order
from ullage.bench.worker import Order
from ullage.errors import InputError
from ullage.i18n import _

#: Of the host memory that is available, what a bench on the CPU may take when nothing is said.
CPU_SHARE = 0.5
STEPS_PER_TRY = 3
MAX_CHANGING_TRIES = 4


@dataclass(frozen=True, kw_only=True)
class TrainBench:
    """What is asked.

    Attributes:
        first_batch: where the search starts, and the micro-batch when ``search`` is off.
        max_batch: no larger micro-batch is tried.
        steps: of the full-load phase.
        idle_seconds: of the idle phase.
        timeout: seconds of one try.
    """

    target: Target
    device: str
    seq: int
    first_batch: int = 1
    max_batch: int = 4096
    search: bool = True
    steps: int = 10
    idle_seconds: float = 2.0
    timeout: float = 600.0
    memory_limit_bytes: int | None = None


def bench_train(asked: TrainBench, ranks: Ranks, progress: Callable[[str], None]) -> BenchResult:
    """Run the three phases; every rank returns the whole result.

    Raises:
        InputError: the target cannot be built, or its step fails for another reason than memory.
    """
    check(asked.target)
    warnings = []
    limit = asked.memory_limit_bytes
    if limit is None and asked.device == "cpu":
        limit = ranks.from_first(int(available_bytes() * CPU_SHARE) // ranks.world_size)
        warnings.append(
            _("the memory limit of a process was taken as {size:,} bytes, half of what is available").format(size=limit)
        )
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")

    def run(script: list[loads.ScriptStep]) -> Outcome:
        order = Order(target=asked.target, device=asked.device, script=tuple(script), memory_limit_bytes=limit)
        outcome = run_order(order, ranks, asked.timeout)
        if outcome.died and outcome.died["cause"] == "input":
            raise InputError(outcome.died["detail"])
        if outcome.died and outcome.died["cause"] == "error":
            raise InputError(
                _("the step failed, and not of memory: {detail}").format(detail=outcome.died["detail"]),
                where=asked.target.what[:200],
            )
        return outcome

    phases, found, notes = _phases(asked, run, progress)
    warnings += notes
    machine: dict[str, Any] = next(
        (answer["device"] for phase in phases for answer in phase[1].answers if answer.get("device")), {}
    )
    changing = next((one for name, one in phases if name == "changing_load"), None)
    return BenchResult(
        kind="train",
        started=started,
        memory="cuda" if asked.device == "cuda" else "rss",
        job=_job(asked, limit),
        machine={**machine, "num_ranks": ranks.world_size},
        phases=tuple(_phase(name, outcome) for name, outcome in phases),
        break_point=found,
        stability=stability(_rows(changing)) if changing is not None else None,
        warnings=tuple(warnings),
    )


def _phases(
    asked: TrainBench, run: Callable[[list[loads.ScriptStep]], Outcome], progress: Callable[[str], None]
) -> tuple[list[tuple[str, Outcome]], BreakPoint | None, list[str]]:
    """Run the phases in order; later ones are left out when not even the smallest micro-batch lives."""
    progress(_("idle"))
    done = [("idle", run(loads.idle_script(asked.first_batch, asked.seq, asked.idle_seconds)))]
    largest, found = asked.first_batch, None

    def attempt(size: int) -> Try:
        progress(_("full load: trying a micro-batch of {size}").format(size=size))
        outcome = run(loads.steady_script(size, asked.seq, STEPS_PER_TRY))
        died = outcome.died or {}
        return Try(
            size=size,
            lives=outcome.died is None,
            cause=died.get("cause", ""),
            detail=died.get("detail", ""),
            seconds=round(outcome.seconds, 2),
            peak_bytes=outcome.peak_used_bytes,
        )

    if asked.search:
        found = break_point(attempt, unit="micro_batch", first=asked.first_batch, cap=asked.max_batch, tolerance=0.02)
        largest = found.largest
    if largest < 1:
        return done, found, []
    progress(_("full load: {steps} steps of {size}").format(steps=asked.steps, size=largest))
    done.append(("full_load", run(loads.steady_script(largest, asked.seq, asked.steps))))
    changing, notes = _changing(largest, lambda size: run(loads.changing_script(size, asked.seq)), progress)
    return [*done, ("changing_load", changing)], found, notes


def _changing(
    largest: int, run: Callable[[int], Outcome], progress: Callable[[str], None]
) -> tuple[Outcome, list[str]]:
    """Run the changing load; what lives at full load may die of changes, and then an eighth less is tried."""
    notes: list[str] = []
    size, outcome = largest, None
    for _number in range(MAX_CHANGING_TRIES):
        progress(_("changing load: up to {size}").format(size=size))
        outcome = run(size)
        if outcome.died is None or size == 1:
            break
        sentence = _("at a micro-batch of {size} the changing load died ({cause})")
        notes.append(sentence.format(size=size, cause=outcome.died["cause"]))
        size = max(1, min(size - 1, size * 7 // 8))
    assert outcome is not None
    return outcome, notes


def _job(asked: TrainBench, limit: int | None) -> dict[str, Any]:
    target = asked.target
    return {
        **{name: value for name, value in vars(target).items() if name != "overrides"},
        "overrides": dict(target.overrides),
        "config": None if target.is_function else read_config(target),
        "seq": asked.seq,
        "device": asked.device,
        "memory_limit_bytes": limit,
        "alloc_conf": os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or "",
    }


def _rows(outcome: Outcome) -> list[StepRow]:
    first = outcome.answers[0]["rows"]
    return [StepRow(**{**row, "after": Sample(**row["after"]) if row["after"] else None}) for row in first]


def _phase(name: str, outcome: Outcome) -> Phase:
    rows = _rows(outcome)
    ends = [row.t + row.seconds for row in rows]
    curves = [answer["curve"] for answer in outcome.answers if answer["curve"]]
    return Phase(
        name=name,
        seconds=round(max([0.0, *ends, *(curve[-1]["t"] for curve in curves)]), 3),
        ranks=tuple(_memory(answer) for answer in outcome.answers if answer.get("peaks")),
        steps=tuple(rows),
        figures=_figures(rows),
        died=outcome.died,
    )


def _figures(rows: list[StepRow]) -> dict[str, float | int | None]:
    """Return step times and tokens a second; the first step makes states and is left out where there are others."""
    timed = rows[1:] or rows
    seconds = [row.seconds for row in timed]
    tokens = sum(row.micro_batch * row.seq for row in timed)
    return {
        "num_steps": len(rows),
        "largest_micro_batch": max((row.micro_batch for row in rows), default=None),
        "step_seconds_p50": median(seconds) if seconds else None,
        "step_seconds_p95": quantile(seconds, 0.95) if seconds else None,
        "tokens_per_second": tokens / sum(seconds) if sum(seconds) else None,
    }


def _memory(answer: dict[str, Any]) -> RankMemory:
    peaks, counters = answer["peaks"], answer["counters"]
    return RankMemory(
        rank=answer["rank"],
        curve=tuple(Sample(**one) for one in answer["curve"]),
        peak_used_bytes=peaks["used_bytes"],
        peak_allocated_bytes=peaks["allocated_bytes"],
        peak_reserved_bytes=peaks["reserved_bytes"],
        num_alloc_retries=counters.get("num_alloc_retries", 0),
        num_ooms=counters.get("num_ooms", 0),
        marks=tuple((name, Sample(**one)) for name, one in answer["marks"].items()),
    )


def available_bytes() -> int:
    """Return the host memory that can still be taken: the kernel's estimate, or the control group's if that is less."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            free = int(line.split()[1]) * 1024
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        free = min(free, max(0, int(limit[0]) - int(used[0])))
    return free


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="ascii").splitlines()
    except OSError:
        return []
