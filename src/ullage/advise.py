"""The cheapest next change: run the engine's start again with one field changed, and see what it gives."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from itertools import combinations

from ullage.engines.serving import EngineStart
from ullage.errors import InputError
from ullage.fitting import DEFAULT_RESERVE, ELASTIC_POOLS, Advice, FitResult, as_int, judge, parse_reserve
from ullage.i18n import _
from ullage.launch import launch_line, model_word
from ullage.plan.advice.serving import Change, candidates, machine_text, shell
from ullage.spec.serving import ServingJob
from ullage.units import format_bytes

__all__ = ["Change", "advice", "candidates", "fit_line", "gain_text", "launch_line", "next_command"]

_RANK = {"fits": 0, "tight": 1, "does_not_fit": 2}
#: Where all is well, the answer comes before further advice: a few changes that are known to win much (the share of the
#: device, the attention layout, the formats of cache and weights).
ROOMY = ("memory_fraction", "dp_attention", "kv_cache_dtype", "quantization")
MAX_TRIED_WHEN_IT_FITS = 3
#: Changes from which pairs are made when none mends it alone, and pairs that are tried.
IN_PAIRS, MOST_PAIRS = 6, 10


def advice(
    result: FitResult, *, reserve: str, starter: Callable[[ServingJob], EngineStart], limit: int = 3
) -> tuple[Advice, ...]:
    """Return the changes that help: those that mend the verdict, the cheapest first, then those that gain most.

    Where no single change makes it fit, pairs are tried. When the job fits, only ``limit`` changes that give noticeably
    more room (1 % of the device) are named.
    """
    changes = sorted(candidates(result), key=lambda change: change.price)
    if result.verdict == "fits":
        changes = _roomy(changes)[:MAX_TRIED_WHEN_IT_FITS]
    found = _helpful(changes, result, reserve, starter)
    if result.verdict != "fits" and not any(rank == 0 for rank, _change, _item in found):
        best = min((rank for rank, _change, _item in found), default=_rank(result))
        pairs = _helpful(_pairs(found), result, reserve, starter)
        found += [pair for pair in pairs if pair[0] < best][:2]
    mended = _rank(result)
    found.sort(key=lambda one: (one[0], one[1].price) if one[0] < mended else (mended, -_worth(one)))
    return tuple(item for _rank, _change, item in found)[: limit if result.verdict == "fits" else None]


def _worth(one: tuple[float, Change, Advice]) -> float:
    return one[2].gain_bytes / one[1].price


def _roomy(changes: list[Change]) -> list[Change]:
    """Return the changes for a job that fits: of several sizes of one, the largest."""
    kept = {change.key: change for change in changes if change.key in ROOMY}
    return list(kept.values())


def _helpful(
    changes: list[Change], result: FitResult, reserve: str, starter: Callable[[ServingJob], EngineStart]
) -> list[tuple[float, Change, Advice]]:
    """Return the changes that help, one of each kind: the mildest of those with the best verdict."""
    found: dict[str, tuple[float, Change, Advice]] = {}
    for change in changes:
        tried = _try(change, result, reserve, starter)
        if tried is None:
            continue
        item, rank = tried
        now = _rank(result)
        wins = item.gain_bytes >= result.total_bytes.value / 100
        wins = item.gain_bytes > 0 and (wins or item.max_concurrency >= max(1.1 * result.max_concurrency.value, 1))
        if rank > now or not (wins or rank < now):
            continue
        other = found.get(change.key)
        stronger = rank >= _RANK["does_not_fit"] and other is not None and item.gain_bytes > other[2].gain_bytes
        if other is None or rank < other[0] or stronger:
            found[change.key] = (rank, change, item)
    return sorted(found.values(), key=lambda one: (one[0], one[1].price))


def _pairs(found: list[tuple[float, Change, Advice]]) -> list[Change]:
    """Return pairs of what helps a little, the cheapest first."""
    best = sorted(found, key=lambda one: -_worth(one))[:IN_PAIRS]
    pairs = [
        Change(
            key=f"{one.key}+{two.key}",
            price=one.price + two.price,
            change=_(" and ").join((one.change, two.change)),
            cost="; ".join(dict.fromkeys((one.cost, two.cost))),
            flags=f"{one.flags} {two.flags}" if one.flags and two.flags else "",
            typed=f"{one.typed} {two.typed}".strip(),
            given=one.given,
            fields=(*one.fields, *two.fields),
            context=one.context or two.context,
            concurrency=one.concurrency or two.concurrency,
        )
        for one, two in combinations((change for _rank, change, _item in best), 2)
        if not dict(one.fields).keys() & dict(two.fields).keys()
    ]
    return sorted(pairs, key=lambda pair: pair.price)[:MOST_PAIRS]


def _try(
    change: Change, result: FitResult, reserve: str, starter: Callable[[ServingJob], EngineStart]
) -> tuple[Advice, float] | None:
    try:
        engine = starter(change.job)
        tokens = change.context or result.context
        after = judge(
            engine,
            asked=change.job,
            context=tokens,
            concurrency=change.concurrency or result.concurrency,
            reserve=reserve,
            counts=result.counts,
        )
    except InputError:
        return None  # the engine refuses this setting for this model
    item = Advice(
        change=change.change,
        gain_bytes=_gain(result, after),
        cost=change.cost,
        flags=change.flags,
        typed=change.typed,
        key=change.key,
        verdict=after.verdict,
        max_concurrency=as_int(after.max_concurrency.value) or 0,
        max_context=after.max_context,
    )
    return item, _rank(after)


def _rank(result: FitResult) -> float:
    """Return the place of a verdict, the best first; of two that are tight, the one that is expected to start."""
    return _RANK[result.verdict] + (0.0 if result.engine.starts else 0.5)


def _gain(before: FitResult, after: FitResult) -> int:
    """Return the room won per GPU: by needing less on the device, or by a larger share of the pool being free."""
    less = before.need.value - after.need.value
    if after.engine.starts:
        free = [result.pool.value - result.need.kv_cache_bytes for result in (before, after)]
        less = max(less, free[1] - free[0])
    return int(less)


def next_command(result: FitResult, words: str = "") -> str:
    """Return what to type next: the launch line when it fits, else the fit again with the first advice.

    ``words``: the fit as it was typed, when it was.
    """
    if result.verdict == "fits":
        return launch_line(result)
    if result.advice and result.advice[0].flags and result.advice[0].verdict != "does_not_fit":
        return merge_flags(words or fit_line(result), result.advice[0].flags)
    return f"ullage explain {_largest(result)} {(words or fit_line(result)).removeprefix('ullage ')}"


def _largest(result: FitResult) -> str:
    terms = [term for term in result.ledger.terms() if term.name != "kv_cache"]
    return max(terms, key=lambda term: term.bytes).name if terms else "weights"


def fit_line(result: FitResult) -> str:
    """Return this fit as a command line."""
    job, asked, machine = result.job, result.asked, result.job.machine
    parts = [f"ullage fit serve {model_word(job.model)} --on {machine_text(machine)}"]
    parts.append(f"--engine {job.engine}@{shell(job.engine_version)}")
    if job.engine in ELASTIC_POOLS:
        parts += _layout_flags(asked)
    given = {
        "--quantization": asked.quantization and shlex.quote(asked.quantization),
        "--kv-dtype": asked.kv_cache_dtype,
        "--dtype": asked.weights_dtype,
        "--max-num-seqs": asked.max_num_seqs,
        "--max-batched-tokens": asked.max_num_batched_tokens,
        "--memory-fraction": asked.memory_fraction,
        "--block-size": asked.block_size,
        "--mtp": asked.num_speculative_tokens if asked.speculative == "mtp" else None,
        "--redundant-experts": asked.redundant_experts or None,
        "--cpu-offload": f"{asked.cpu_offload_bytes}B" if asked.cpu_offload_bytes else None,
        "--reserve": _reserve_word(result),
    }
    parts += [f"{flag} {value}" for flag, value in given.items() if value is not None]
    parts += ["--enforce-eager"] if asked.enforce_eager else []
    parts.append(f"--context {result.context} --concurrency {result.concurrency}")
    return " ".join(parts)


def _layout_flags(asked: ServingJob) -> list[str]:
    parallel, sglang = asked.parallel, asked.engine == "sglang"
    sizes = {"--pp": parallel.pipeline_parallel_size, "--dp": parallel.data_parallel_size}
    words = [f"--tp {parallel.tensor_parallel_size}"]
    words += [f"{flag} {size}" for flag, size in sizes.items() if size > 1]
    words += ["--dp-attention"] if parallel.dp_attention and sglang else []
    words += ["--ep"] if parallel.expert_parallel else []
    dcp = parallel.decode_context_parallel_size
    return [*words, f"--dcp {dcp}"] if dcp > 1 else words


def _reserve_word(result: FitResult) -> str | None:
    total, size = int(result.total_bytes.value), result.reserve_bytes
    if size == parse_reserve(DEFAULT_RESERVE, total):
        return None
    share = f"{100 * size / total:.6g}%" if total else "0"
    return share if parse_reserve(share, total) == size else f"{size}B"


def merge_flags(line: str, flags: str) -> str:
    """Return a command line with ``flags`` (name and value in turn) in place of what it said for them."""
    words, new = shlex.split(line), shlex.split(flags)
    for name in (word for word in new if word.startswith("--")):
        while name in words:
            at = words.index(name)
            valued = at + 1 < len(words) and not words[at + 1].startswith("-")
            del words[at : at + (2 if valued else 1)]
    return shlex.join(words + new)


def gain_text(item: Advice) -> str:
    """Return the gain of an advice for reading."""
    return _("{size} more room per GPU").format(size=format_bytes(item.gain_bytes))
