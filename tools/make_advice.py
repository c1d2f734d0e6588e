"""Known cures: is what helped among the first three pieces of advice, and was its gain foretold? → ``docs/advice.md``.

python tools/make_advice.py SHARED                   print the tables (SHARED: the folder of truth/ and configs/)
python tools/make_advice.py SHARED docs/advice.md    put them into the page

A case of training is a pair of published runs of which the larger is put on a card that it does not fit and the
smaller does, its margin of error included where that is less than the difference: the cure is what the two differ in.
Of each kind of change and each source, the pairs that are one entry of the catalogue are sorted by name, and the first
is taken: none is chosen by its outcome.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

from ullage.engines.training import step
from ullage.errors import UllageError
from ullage.fitting import FitResult, fit_serving
from ullage.observe.inspection import inspect_stream
from ullage.plan.advice.change import Change
from ullage.plan.advice.training import changes_of_training
from ullage.records import serving, training
from ullage.records.schema import Record
from ullage.records.store import read_records
from ullage.spec.training import TrainingJob
from ullage.training_fit import TrainingFit, fit_training
from ullage.training_fit import judge as judge_training
from ullage.units import format_bytes

FIRST = 3
WITHIN = 0.25
#: Quantities that a gain is measured by, the one that advice speaks of first.
QUANTITIES = ("device_used", "max_reserved", "max_allocated")
#: A measured difference below this share of the figure is none.
LEAST_SHARE = 0.02
#: Flags of Megatron-LM that say what fields of the job say, or nothing about memory.
MIRRORED = re.compile(
    r"parallel|micro-batch|distributed-optimizer|cross-entropy-loss-fusion|num-layers-per-virtual|pipeline-model|save|"
    r"load|log|train-iters|eval|seed|tensorboard|wandb|ckpt|data-|split|lr-|min-lr|weight-decay|clip-grad|exit"
)
#: Serving records: (did not start, what started, key of the change that was made).
SERVING = (
    ("spark-396-minimax-m27-80", "spark-396-minimax-m27-85", "memory_fraction"),
    ("llmd-llama33-70b-fp8-tp1", "llmd-llama33-70b-fp8-tp2", "more_gpus"),
    ("vllm-10517-llama31-29k", "vllm-10517-llama31-20k", "max_model_len"),
)
#: Messages whose thread tells what helped or was advised: hash of the words -> (the cure, words of ours that say it).
MESSAGES = {
    "9f949e139126": ("a smaller batch, accumulated", ("micro-batch",)),
    "a74ab8f4e155": ("fused attention", ("flash or fused attention",)),
    "a569e78a33bb": ("other processes off the card", ("who holds the card",)),
    "e5e63c2ad941": (
        "enforce_eager, or a larger share",
        ("--gpu-memory-utilization", "--enforce-eager"),
    ),
    "21364d7f0d18": ("a larger gpu_memory_utilization", ("--gpu-memory-utilization",)),
    "7d49046ad66a": ("max-model-len 100000", ("--max-model-len",)),
    "d3916c50b2f3": ("a smaller batch", ("micro-batch",)),
}


#: What is not met, and why: (what failed, place or gain) -> the reason.
NOT_MET: dict[tuple[str, str], str] = {
    ("mlm-a100-gpt-gpt3_mcore_te_tp1_pp4_vp1_resume_torch_dist_calculate_per_token_loss", "place"): (
        "a pipeline that idles 40 % more is dear: five changes that cost less time free as much"
    ),
    ("mlm-a100-gpt-gpt3_mcore_te_tp2_pp1_cp2_nondeterministic", "place"): (
        "the model is so small that the communicators of a second group of ranks take more than a stage gives"
    ),
    ("titan-202412-8b-128gpu-0", "place"): (
        "its gain is half of the margin of error of the prediction, and changes that fit for certain come first"
    ),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One known cure: ``place`` among the advice from 1 (0: not told), gains in bytes where they are known."""

    kind: str
    source: str
    url: str
    failed: str
    cure: str
    place: int
    worked: str = ""
    predicted: float | None = None
    measured: float | None = None
    quantity: str = ""

    @property
    def told(self) -> bool:
        """The cure is among the first three."""
        return 0 < self.place <= FIRST

    @property
    def missed(self) -> tuple[str, ...]:
        """What is not met: ``place``, ``gain``."""
        far = self.error is not None and abs(self.error) > WITHIN
        return (*(() if self.told else ("place",)), *(("gain",) if far else ()))

    @property
    def error(self) -> float | None:
        """Relative error of the gain."""
        if self.predicted is None or not self.measured:
            return None
        return (self.predicted - self.measured) / self.measured


# ------------------------------------------------------------------------------------------------------------ training


def training_cases(paths: list[Path]) -> Iterator[Case]:
    """Yield a case for each kind of change and source."""
    groups: dict[str, list[tuple[Record, TrainingJob]]] = {}
    for path in paths:
        for record in read_records(path):
            if record.kind != "train" or record.completeness == "partial":
                continue
            try:
                job, left_out = training.record_job(record)
            except UllageError:
                continue
            if not left_out:
                groups.setdefault(record.group, []).append((record, job))
    for group in sorted(groups):
        kinds: set[str] = set()
        found = sorted(groups[group], key=lambda one: one[0].record_id)
        for (large, job), (small, aim) in permutations(found, 2):
            change = _change(job, aim)
            if change is None or change.key in kinds:
                continue
            case = _training_case(large, job, small, change)
            if case is not None:
                kinds.add(change.key)
                yield case


def _change(job: TrainingJob, aim: TrainingJob) -> Change | None:
    """Return the entry of the catalogue that makes one job the other."""
    if job.model != aim.model or job.engine != aim.engine:
        return None
    target = _plain(aim)
    for change in changes_of_training(job, 1):
        if _plain(change.apply(job)) == target:
            return change
    return None


def _plain(job: TrainingJob) -> TrainingJob:
    """Return a job without what does not bear on the pair: names, and what follows from the rest."""
    precision = replace(job.precision, params="", compute="") if job.base_quantization else job.precision
    compute = "" if job.lora is not None else precision.compute
    precision = replace(precision, params="" if job.lora is not None else precision.params, compute=compute)
    parallel = replace(job.parallel, schedule=None)
    flags = tuple((name, value) for name, value in sorted(job.flags) if not MIRRORED.search(name))
    return replace(job, native="", assumed=(), flags=flags, grad_accum=1, precision=precision, parallel=parallel)


def _training_case(large: Record, job: TrainingJob, small: Record, change: Change) -> Case | None:
    one, two = ({figure.quantity: figure.value for figure in record.measured} for record in (large, small))
    quantity = next((name for name in QUANTITIES if name in one and name in two), None)
    if quantity is None or one[quantity] - two[quantity] < LEAST_SHARE * one[quantity]:
        return None
    before, after = judge_training(step(job), "0"), judge_training(step(change.apply(job)), "0")
    ranks = [
        next(figure.rank for figure in record.measured if figure.quantity == quantity) for record in (large, small)
    ]
    if not all(_is_fullest(rank, fit) for rank, fit in zip(ranks, (before, after), strict=True)):
        return None  # another rank was measured than the one that advice speaks of
    needs = [_used(fit) for fit in (before, after)]
    if needs[0] <= needs[1]:
        place = 0
    else:
        high = after.ledger.device_used.high_bytes
        capped = _on_a_card_of(job, high if high < needs[0] else sum(needs) // 2)
        fit = fit_training(capped, reserve="0", calibrated=False)
        places = [at for at, item in enumerate(fit.advice, 1) if change.key in item.key.split("+")]
        place = places[0] if places else 0
    return Case(
        kind=change.key,
        source=large.group,
        url=large.source_url,
        failed=large.record_id,
        worked=small.record_id,
        cure=change.change,
        place=place,
        predicted=float(_figure(before, quantity) - _figure(after, quantity)),
        measured=one[quantity] - two[quantity],
        quantity=quantity,
    )


def _is_fullest(rank: str | None, fit: TrainingFit) -> bool:
    if rank in (None, "max", "all"):
        return True
    if rank == "last":
        return fit.worst.pp_rank == max(other.pp_rank for other in fit.step.ranks)
    return rank == str(fit.worst.rank)


def _figure(fit: TrainingFit, quantity: str) -> int:
    """Return the predicted figure of the quantity that was measured."""
    ledgers = [ledger for rank in fit.step.ranks for ledger in rank.moments if rank is fit.worst]
    terms = {"max_allocated": "allocated", "max_reserved": "reserved", "device_used": "device_used"}
    return max(int(getattr(ledger, terms[quantity]).bytes) for ledger in ledgers)


def _used(fit: TrainingFit) -> int:
    return int(fit.ledger.device_used.bytes)


def _on_a_card_of(job: TrainingJob, size: int) -> TrainingJob:
    gpu = replace(job.machine.gpu, total_bytes=size, total_low_bytes=size, total_high_bytes=size)
    return replace(job, machine=replace(job.machine, gpu=gpu))


# ------------------------------------------------------------------------------------------------------------- serving


def serving_cases(path: Path) -> Iterator[Case]:
    """Yield the cases of starts that failed and of what made them start."""
    records = {record.record_id: record for record in read_records(path)}
    for failed, started, key in SERVING:
        one, two = records[failed], records[started]
        fits = [_fit(record) for record in (one, two)]
        keys = [item.key for item in fits[0].advice]
        measured = [next(f.value for f in record.measured if f.quantity == "kv_cache") for record in (one, two)]
        named = next((item for item in fits[0].advice if item.key == key), None)
        # the length of the record is not the one that is advised: then the pools of both lengths
        exact = key != "max_model_len" and named is not None
        yield Case(
            kind=key,
            source=one.group,
            url=one.source_url,
            failed=failed,
            worked=started,
            cure=named.change if named is not None else key,
            place=keys.index(key) + 1 if key in keys else 0,
            predicted=float(named.gain_bytes) if exact and named else fits[1].pool.value - fits[0].pool.value,
            measured=measured[1] - measured[0],
            quantity="kv_cache",
        )


def _fit(record: Record) -> FitResult:
    job, _left_out = serving.record_job(record, "vllm")
    return fit_serving(job, reserve="0", calibrated=False)


# ------------------------------------------------------------------------------------------------------------ messages


def message_cases(path: Path) -> Iterator[Case]:
    """Yield the cases of messages whose thread tells a cure."""
    found: dict[str, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        message = json.loads(line)
        key = hashlib.sha256(message["text"].encode()).hexdigest()[:12]
        if key in MESSAGES and (key not in found or "fix" in (message["context"] or {})):
            found[key] = message  # of several with the same words, the thread that tells what helped
    for key, message in found.items():
        cure, words = MESSAGES[key]
        pieces = [f"{item.change} {item.flags}" for item in inspect_stream(io.BytesIO(message["text"].encode())).advice]
        places = [next((at for at, piece in enumerate(pieces, 1) if word in piece), 0) for word in words]
        yield Case(
            kind="message",
            source=message["framework"],
            url=message["source_url"],
            failed=f"message {key}",
            cure=cure,
            place=0 if 0 in places else max(places),
        )


# ------------------------------------------------------------------------------------------------------------ the page


def cases(shared: Path) -> list[Case]:
    """Return all cases."""
    truth = shared / "truth"
    return [
        *training_cases([truth / "training.jsonl", truth / "megatron.jsonl"]),
        *serving_cases(truth / "serving.jsonl"),
        *message_cases(shared / "configs" / "oom_messages.jsonl"),
    ]


def counts(found: list[Case]) -> str:
    """Return the sentence that counts."""
    known = [case for case in found if case.error is not None]
    near = sum(abs(case.error or 0) <= WITHIN for case in known)
    told = sum(case.told for case in found)
    return (
        f"{len(found)} cases: the cure is among the first three in {told}; of {len(known)} gains that were measured, "
        f"{near} are foretold within {WITHIN:.0%}."
    )


def rows(found: list[Case]) -> list[str]:
    """Return the rows of the table."""
    return [_row(case) for case in found]


def _row(case: Case) -> str:
    gains = ["", "", ""]
    if case.error is not None and case.predicted is not None and case.measured is not None:
        gains = [f"{format_bytes(case.measured)} ({case.quantity})", format_bytes(case.predicted)]
        gains.append(f"{100 * case.error:+.0f} %")
    place = str(case.place) if case.place else "not told"
    failed = f"{case.failed} → {case.worked}" if case.worked else case.failed
    return f"| [{case.source}]({case.url}) | {failed} | {case.cure} | {place} | {' | '.join(gains)} |"


def table(found: list[Case]) -> Iterator[str]:
    """Yield the tables."""
    yield counts(found)
    yield ""
    for case in found:
        for what in case.missed:
            yield f"- {case.failed}, {what}: {NOT_MET.get((case.failed, what), 'not explained')}."
    sections: tuple[tuple[str, Callable[[Case], bool]], ...] = (
        ("Training and serving", lambda case: case.kind != "message"),
        ("Messages", lambda case: case.kind == "message"),
    )
    for title, chosen in sections:
        yield f"\n### {title}\n"
        yield "| source | what failed | what helped | place | gain measured | foretold | error |"
        yield "|---|---|---|---|---|---|---|"
        yield from rows([case for case in found if chosen(case)])


def main() -> int:
    """Print the tables, or put them in the place of the page's own."""
    text = "\n".join(table(cases(Path(sys.argv[1]))))
    if len(sys.argv) < 3:
        print(text)
        return 0
    page = Path(sys.argv[2])
    before, _old = re.split(r"^\d+ cases:", page.read_text(encoding="utf-8"), maxsplit=1, flags=re.MULTILINE)
    page.write_text(before + text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
