"""A log or message inspected: the death that came first, its cause, where the memory was, and what to change."""

from __future__ import annotations

from typing import Any

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.ledger import Term
from ullage.observe.advice import Case, Piece, advise
from ullage.observe.books import books_of, terms_of
from ullage.observe.engine_logs import Figure
from ullage.observe.engine_terms import engine_terms, figures_sentence
from ullage.observe.measured import Listing, Series
from ullage.observe.oom import Fact
from ullage.observe.scan import Scan, scan
from ullage.observe.streams import Readable
from ullage.observe.verdict import Finding, judge
from ullage.units import format_bytes

#: Deaths that can be the first of a chain, what a launcher reports later, what waits for others, and what only warns.
_ROOTS = (
    (
        "device_oom", "kv_pool", "pool_full", "start_budget", "profile_moved", "xla_oom", "buffer_oom", "library_oom",
        "host_kill", "host_oom",
    ),
    ("killed",),
    ("library_odd",),
    ("timeout",),
    ("follows",),
    ("hint", "pressure"),
)  # fmt: skip


class Inspection(Frozen):
    """The answer.

    Attributes:
        kind: ``death`` (a message was found) or ``engine_log`` (a start, and no death) or ``snapshot``.
        verdict: one sentence. ``cause``, ``confidence``, ``why``: see :mod:`ullage.observe.verdict`.
        framework: the program that ran, or who wrote the message; ``allocator`` and ``versions`` of the message.
        phase: what the traceback says was being done.
        terms: where the card's memory was; ``total_bytes`` is what they add up to, 0 when it is not known.
        facts: all messages; the first is the root. ``figures``: what the engine printed about its start.
        partial: the text is cut, or leaves open what a verdict needs; ``notes`` say what.
        total_name: what ``total_bytes`` is, where it is not the card; ``metrics``, ``series``, ``listings``: what
            recordings hold (see :mod:`ullage.observe.measured`).
        detail: of a snapshot, all that is known (:class:`ullage.observe.snapshot_answer.Answer`).
        next_command: what to type next.
    """

    kind: str
    verdict: str
    cause: str
    confidence: str
    why: str = ""
    framework: str = ""
    allocator: str = ""
    versions: str = ""
    rank: str = ""
    phase: str = ""
    sizes: tuple[tuple[str, int], ...] = ()
    printed: tuple[tuple[str, str], ...] = ()
    terms: tuple[Term, ...] = ()
    total_bytes: int = 0
    advice: tuple[Piece, ...] = ()
    facts: tuple[Fact, ...] = ()
    figures: tuple[Figure, ...] = ()
    engine_terms: tuple[Term, ...] = ()
    engine: str = ""
    settings: tuple[tuple[str, str], ...] = ()
    partial: bool = False
    notes: tuple[str, ...] = ()
    num_lines: int = 0
    total_name: str = ""
    metrics: tuple[tuple[str, float], ...] = ()
    series: tuple[Series, ...] = ()
    listings: tuple[Listing, ...] = ()
    detail: Any = None
    next_command: str = ""


def looked_for() -> str:
    """Return what an inspection understands, for people whose text was not understood."""
    return _(
        "looked for out-of-memory messages of PyTorch, JAX, vLLM, SGLang, TensorRT-LLM, llama.cpp, ollama, NCCL, "
        "cuBLAS and the Linux kernel, for start-up logs of vLLM, SGLang, llama.cpp, TensorRT-LLM and ollama, for "
        "memory lines of Megatron-LM, torchtitan, DeepSpeed and the HF Trainer, for memory snapshots, profiler traces "
        "and memory timelines of PyTorch, for SQLite exports of Nsight Systems, and for recordings of ullage watch"
    )


def inspect_stream(stream: Readable, where: str = "") -> Inspection:
    """Inspect a log or message.

    Raises:
        InputError: nothing in it is understood.
    """
    found = scan(stream)
    from ullage.observe.training_logs_view import inspect_training, with_training

    root = _root(found.facts)
    if root is not None and root.kind == "pressure" and found.training.any():
        return inspect_training(found.training, found.num_lines)  # it knows the ranks, and what grows
    if root is not None:
        return with_training(_death(found, root), found.training)
    if found.collected.all():
        return with_training(_start(found), found.training)
    if found.training.any():
        return inspect_training(found.training, found.num_lines)
    if not found.num_lines and not found.first_words:
        what = _("nothing is recognised in it")
    else:
        what = _("nothing is recognised in {count:,} lines that begin with {words!r}").format(
            count=found.num_lines, words=found.first_words[:60]
        )
    raise InputError(what, where=where, remedy=looked_for())


def _root(facts: tuple[Fact, ...]) -> Fact | None:
    for kinds in _ROOTS:
        for fact in facts:
            if fact.kind in kinds:
                return fact
    return None


def _death(found: Scan, root: Fact) -> Inspection:
    finding = judge(root)
    program, phase = found.program(), root.detail("phase") or found.phase(root.rank)
    settings = dict(found.collected.settings)
    case = Case(fact=root, finding=finding, program=program, phase=phase, settings=settings)
    books = books_of(root) if root.kind == "device_oom" else None
    terms, rest = engine_terms(found.collected)
    why = finding.why
    sentence = figures_sentence(found.collected) if finding.cause == "kv_pool" else ""
    notes = _notes(found, root, finding, rest)
    return Inspection(
        kind="death",
        verdict=_verdict(root, finding, program),
        cause=finding.cause,
        confidence=finding.confidence,
        why=f"{why}; {sentence}" if sentence else why,
        framework=program or root.framework,
        allocator=root.framework,
        versions=root.versions,
        rank=root.rank,
        phase=phase,
        sizes=tuple((name, size.bytes) for name, size in root.sizes) + _gap(finding),
        printed=tuple((name, size.text) for name, size in root.sizes),
        terms=terms_of(root, books) if books is not None else terms,
        total_bytes=(books.capacity or 0) if books is not None else 0,
        advice=advise(case),
        facts=(root, *(fact for fact in found.facts if fact is not root)),
        figures=tuple(found.collected.all()),
        engine_terms=terms,
        engine=found.collected.engine(),
        settings=tuple(sorted(settings.items())),
        partial=_is_partial(root),
        notes=notes,
        num_lines=found.num_lines,
    )


def _gap(finding: Finding) -> tuple[tuple[str, int], ...]:
    return () if finding.gap_bytes is None else (("gap", finding.gap_bytes),)


def _is_partial(root: Fact) -> bool:
    return root.partial or (root.kind == "device_oom" and root.size("capacity") is None and root.size("limit") is None)


def _verdict(root: Fact, finding: Finding, program: str) -> str:
    """Return the sentence that comes first."""
    causes = {
        "capacity": _("the card is too small for what is alive"),
        "fragmentation": _("the memory is there, in pieces"),
        "waiting": _("the memory was there, but not at that moment"),
        "other_process": _("another process holds the card"),
        "cap": _("the process's own limit is reached"),
        "outside": _("memory outside PyTorch ran out"),
        "host": _("the host's memory ran out, not the GPU's"),
        "kv_pool": _("the KV cache is too small"),
        "start_budget": _("the engine asks for more than is free at its start"),
        "cascade": _("another rank failed first; this one only waited"),
    }
    who = program or root.framework
    return f"{who}: {causes[finding.cause]}" if who else causes[finding.cause]


def _notes(found: Scan, root: Fact, finding: Finding, rest: str) -> tuple[str, ...]:
    notes = []
    if _is_partial(root):
        notes.append(_("the message is cut: this is a partial answer"))
    if root.kind == "device_oom" and root.size("process_used") is None and books_of(root).own is not None:
        notes.append(
            _("one of the processes listed is taken to be this one: the smallest that holds what PyTorch has reserved")
        )
    ranks = sorted({fact.rank for fact in found.facts if fact.kind == root.kind and fact.rank})
    if len(ranks) > 1:
        notes.append(
            _("the same was said by ranks {ranks}; first by {rank}").format(ranks=", ".join(ranks[:16]), rank=root.rank)
        )
    waiting = {fact.rank for fact in found.facts if fact.kind == "timeout"}
    if waiting and root.kind != "timeout":
        notes.append(_("{count} ranks ran into a NCCL timeout because of it").format(count=len(waiting)))
    elif waiting - {""}:
        notes.append(_("waiting: ranks {ranks}").format(ranks=", ".join(sorted(waiting - {""}, key=_as_number)[:32])))
    if any(fact.kind == "killed" for fact in found.facts) and root.kind not in ("killed", "host_kill"):
        notes.append(_("processes were killed after it; that is the launcher tidying up"))
    if (
        root.size("allocated")
        and (root.size("capacity") or 0)
        and (root.size("allocated") or 0) > (root.size("capacity") or 0)
    ):
        notes.append(_("more is allocated than the card has: Windows or WSL lent host memory, which is slow"))
    if root.size("private_pools"):
        notes.append(
            _("{size} lie in private pools (CUDA graphs) that others cannot use").format(
                size=format_bytes(root.size("private_pools") or 0)
            )
        )
    if found.num_dropped:
        notes.append(_("{count:,} further messages were not kept").format(count=found.num_dropped))
    told = rest and "weights" in found.collected.fullest() and finding.cause in ("kv_pool", "start_budget")
    return (*notes, rest) if told else tuple(notes)


def _as_number(rank: str) -> tuple[int, str]:
    return (int(rank) if rank.isdigit() else 1 << 30, rank)


def _start(found: Scan) -> Inspection:
    terms, rest = engine_terms(found.collected)
    engine = found.collected.engine()
    fullest = found.collected.fullest()
    weights, cache = fullest.get("weights"), fullest.get("kv_cache")
    parts = []
    if weights is not None and weights.size is not None:
        parts.append(_("{size} of weights").format(size=format_bytes(weights.size.bytes)))
    if cache is not None and cache.size is not None:
        parts.append(_("{size} of KV cache").format(size=format_bytes(cache.size.bytes)))
    tokens = fullest.get("kv_cache_tokens")
    if tokens is not None:
        parts.append(_("{count:,} tokens").format(count=int(tokens.value)))
    verdict = _("{engine} started: no death is in the log").format(engine=engine)
    notes = [rest] if rest else []
    if not {"weights", "kv_cache"} <= fullest.keys():
        notes.append(_("the log does not show weights and KV cache both: this is a partial answer"))
    return Inspection(
        kind="engine_log",
        verdict=f"{verdict}: {', '.join(parts)}" if parts else verdict,
        cause="none",
        confidence="likely",
        framework=engine,
        sizes=tuple((name, figure.size.bytes) for name, figure in fullest.items() if figure.size is not None),
        printed=tuple((name, figure.size.text) for name, figure in fullest.items() if figure.size is not None),
        terms=terms,
        figures=tuple(found.collected.all()),
        engine_terms=terms,
        engine=engine,
        settings=tuple(sorted(found.collected.settings.items())),
        partial=not {"weights", "kv_cache"} <= fullest.keys(),
        notes=tuple(notes),
        num_lines=found.num_lines,
    )
