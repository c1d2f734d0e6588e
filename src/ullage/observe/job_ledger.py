"""The ledger that a job was predicted to have beside the one that was measured, term by term.

Both sides are summed up into the parts that both can tell apart; a part is judged by whether the measured range and the
predicted one touch. What one side does not know is said, and is not counted as an error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.ledger import Ledger, Term, ranged
from ullage.observe.attribution_stacks import BACKWARD, FORWARD, OPTIMIZER, OTHER
from ullage.observe.engine_terms import rest_of_share, share_unknown
from ullage.observe.inspection import Inspection
from ullage.observe.measured import Cell, Listing
from ullage.units import format_bytes

if TYPE_CHECKING:
    from ullage.observe.snapshot_answer import Answer
    from ullage.spec.serving import ServingJob
    from ullage.spec.training import TrainingJob

#: Patterns of term names, the first that matches says the part; of predictions and of measurements alike.
_REST = "activations_and_temporaries"
_PARTS = (
    (_REST, r"temporar"),
    ("kv_cache", r"kv_cache|request_table|state_cache"),
    ("optimizer_states", r"optimizer|master_weights|adam|moment"),
    ("collectives", r"all_gather|unsharded|reduce_scatter|collectives|bucket"),
    ("gradients", r"^(main_|param\w*_)?grad"),
    ("cuda_graphs", r"cuda_graph(?:s|_pool)|graph_pools"),
    ("outside_pytorch", r"outside|cuda_context|nccl|non_torch|module|nvshmem|symmetric|kernel"),
    ("reserved_unused", r"reserved_overhead|reserved_unallocated|allocator_slack|^unused|releasable|pinned|awaiting"),
    ("weights", r"weights|rope_cache|rotary"),
    ("workspace", r"workspace"),
)
#: What is not a part of the memory used.
_NOT_USED = re.compile(r"^free|unexplained|other_processes|outside_or_others|cuda_graph_estimate")
#: Words in the names of the moments of a step, by the phase that was measured.
_MOMENTS = {
    FORWARD: ("forward", "loss"),
    BACKWARD: ("backward", "loss", "gradient"),
    OPTIMIZER: ("optimizer",),
}
#: Differences below this are rounding of segments and of prints.
SLACK_BYTES = 16 << 20


class Pair(Frozen):
    """One part on both sides: ``None`` where that side does not know it."""

    part: str
    measured: tuple[int, int, int] | None = None  # bytes, low, high
    predicted: tuple[int, int, int] | None = None

    @property
    def state(self) -> str:
        """``inside``, ``above`` or ``below`` the predicted range, ``unmeasured`` or ``unpredicted``."""
        if self.measured is None:
            return "unmeasured"
        if self.predicted is None:
            return "unpredicted" if self.measured[0] > SLACK_BYTES else "inside"
        if self.measured[1] > self.predicted[2] + SLACK_BYTES:
            return "above"
        return "below" if self.measured[2] < self.predicted[1] - SLACK_BYTES else "inside"

    @property
    def off_by(self) -> int:
        """How far outside of the range it is, in bytes."""
        if self.state == "above" and self.measured is not None and self.predicted is not None:
            return self.measured[1] - self.predicted[2]
        if self.state == "below" and self.measured is not None and self.predicted is not None:
            return self.predicted[1] - self.measured[2]
        return self.measured[0] if self.state == "unpredicted" and self.measured is not None else 0


def predicted_ledger(job: ServingJob | TrainingJob, phase: int = OTHER) -> Ledger:
    """Return the ledger of a job's fullest rank, as ``ullage fit JOBFILE`` has it: at its fullest moment.

    Args:
        job: what ran.
        phase: of training, when it was measured: then the fullest moment of that phase.

    Raises:
        InputError: a job that cannot be sized.
    """
    from ullage.spec.training import TrainingJob

    if isinstance(job, TrainingJob):
        from ullage.training_fit import fit_training

        moments = fit_training(job, advise=False).worst.moments
        of_phase = [ledger for ledger in moments if any(word in ledger.moment for word in _MOMENTS.get(phase, ()))]
        return max(of_phase or moments, key=lambda ledger: (ledger.device_used.bytes, ledger.allocated.bytes))
    from ullage.fitting import fit_serving

    return fit_serving(job, advise=False).ledger


def beside_job(found: Inspection, path: Path) -> Inspection:
    """Return an inspection with the predicted ledger beside the measured one, and the job's changes as advice.

    Raises:
        InputError: not a job file, or a job that cannot be sized.
    """
    from ullage.observe.advice_job import with_job_advice
    from ullage.read.job_file import read_job_file
    from ullage.spec.training import TrainingJob

    answer: Answer | None = found.detail
    job = read_job_file(path)
    ledger = predicted_ledger(job, OTHER if answer is None else answer.found.phase_at(answer.moment))
    measured = found.engine_terms or found.terms
    pairs = _only_allocated(ledger, measured) if _is_message(measured) else pairs_of(ledger.terms(), measured)
    left = sorted((pair for pair in pairs if pair.off_by), key=lambda pair: -pair.off_by)
    notes = tuple(_sentence(pair) for pair in left)
    if not any(pair.measured for pair in pairs):
        notes = (_("the text has no figures of the card that could be compared"),)
    elif not left:
        notes = (_("every part that was measured lies in its predicted range"),)
    if not isinstance(job, TrainingJob):
        found = _with_rest(found, job)
    found = replace(found, listings=(_listing(pairs, ledger), *found.listings), notes=(*notes, *found.notes))
    return found if answer is not None else with_job_advice(found, job)  # a snapshot has advice of its own replay


def _with_rest(found: Inspection, job: ServingJob) -> Inspection:
    """Add what the terms of a vLLM log leave of the engine's share, which the job knows where the log is silent."""
    if found.engine != "vllm" or not found.engine_terms:
        return found
    from ullage.fitting import device_total, fit_serving

    filled = fit_serving(job, advise=False).job
    if filled.memory_fraction is None or filled.engine != "vllm":
        return found
    total, share = device_total(filled), filled.memory_fraction
    whole = ranged("share", int(total.value * share), low=int(total.low * share), high=int(total.high * share))
    rest = rest_of_share(found.engine_terms, whole)
    if rest is None:
        return found
    terms = (*found.engine_terms, rest)
    notes = tuple(note for note in found.notes if note != share_unknown())
    return replace(
        found, engine_terms=terms, terms=terms if found.terms == found.engine_terms else found.terms, notes=notes
    )


def _is_message(measured: Iterable[Term]) -> bool:
    return any(term.name == "allocated" for term in measured)


def _only_allocated(ledger: Ledger, measured: Iterable[Term]) -> list[Pair]:
    """Return the pairs of a message: it knows the sums of PyTorch's allocator and no parts of them."""
    known = {term.name: _range(term) for term in measured}
    sides = (
        ("allocated", "allocated", ledger.allocated),
        ("reserved_unused", "reserved_unallocated", ledger.reserved_overhead),
        ("outside_pytorch", "outside_pytorch", ledger.outside),
    )
    return [Pair(part=part, measured=known.get(name), predicted=_range(predicted)) for part, name, predicted in sides]


def pairs_of(predicted: Iterable[Term], measured: Iterable[Term]) -> list[Pair]:
    """Sum both sides up into the parts that both can tell apart."""
    left, right = _sums(measured), _sums(predicted)
    order = [name for name, _pattern in _PARTS[1:]] + [_REST]
    return [
        Pair(part=name, measured=left.get(name), predicted=right.get(name))
        for name in order
        if left.get(name) or right.get(name)
    ]


def _sums(terms: Iterable[Term]) -> dict[str, tuple[int, int, int]]:
    sums: dict[str, tuple[int, int, int]] = {}
    for term in terms:
        if _NOT_USED.search(term.name):
            continue
        part = next((name for name, pattern in _PARTS if re.search(pattern, term.name)), _REST)
        size, low, high = sums.get(part, (0, 0, 0))
        sums[part] = (size + term.bytes, low + term.low_bytes, high + term.high_bytes)
    return sums


def _range(term: Term) -> tuple[int, int, int]:
    return term.bytes, term.low_bytes, term.high_bytes


def _sentence(pair: Pair) -> str:
    measured = format_bytes(pair.measured[0]) if pair.measured is not None else ""
    if pair.predicted is None:
        return _("{part}: {measured} measured, and nothing of it was predicted").format(
            part=pair.part, measured=measured
        )
    low, high = format_bytes(pair.predicted[1]), format_bytes(pair.predicted[2])
    words = _("{part} left its range: {measured} measured, {low} to {high} predicted")
    if low == high:
        words = _("{part} is not as predicted: {measured} measured, {low} predicted")
    return words.format(part=pair.part, measured=measured, low=low, high=high)


def _listing(pairs: list[Pair], ledger: Ledger) -> Listing:
    words = {
        "inside": _("in its range"), "above": _("above its range"), "below": _("below its range"),
        "unmeasured": _("not measured here"), "unpredicted": _("not predicted"),
    }  # fmt: skip
    rows: list[tuple[Cell, ...]] = []
    for pair in pairs:
        measured = pair.measured[0] if pair.measured is not None else None
        size, low, high = pair.predicted if pair.predicted is not None else (None, None, None)
        rows.append((pair.part, measured, size, low, high, words[pair.state]))
    return Listing(
        name="ledger",
        title=_("Measured and predicted (rank {rank}, {moment})").format(rank=ledger.rank, moment=ledger.moment),
        columns=("part", "measured_bytes", "predicted_bytes", "low_bytes", "high_bytes", "judged"),
        rows=tuple(rows),
    )
