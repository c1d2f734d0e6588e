"""Differences side by side: what one change of a job did to memory, measured and predicted → ``docs/ablations.md``.

python tools/make_ablations.py RECORDS.jsonl ...          print the page
python tools/make_ablations.py RECORDS.jsonl ... --all    print every pair
"""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from ullage.records.compare import Comparison
from ullage.records.schema import Record
from ullage.records.store import read_records
from ullage.records.validate import judge
from ullage.units import format_bytes

#: A difference below this share of the larger figure is "none": it may be noise of the run.
LEAST_SHARE = 0.01
#: ... and it must be this many times what the publication rounded away.
LEAST_ROUNDINGS = 5
PAIRS_SHOWN = 6
_CACHED = (
    "the device figure holds cached blocks, whose share changes the other way; allocated bytes of the same pairs have "
    "the right sign in every case"
)
_OTHER_BATCH = "recorded with batches of 4 where the scripts say 8 (docs/training.md)"
_PSOFT = "mostly psoft, whose record leaves open which of its decompositions was used"
OTHER_METHOD = "another method of adapters"
#: Where signs are wrong, and why: (change, source, quantity) -> (how many at most, reason).
WRONG = {
    ("loss", "fms-acceleration", "device_used"): (11, _CACHED),
    ("base quantisation", "fms-acceleration", "device_used"): (2, _CACHED),
    ("data parallel", "fms-acceleration", "device_used"): (1, _CACHED),
    ("base quantisation", "litgpt-config-hub", "max_allocated"): (1, "a difference of 2 %; not explained"),
    ("precision", "ms-swift-examples", "device_used"): (1, "one pair, read off the driver; not explained"),
    ("compile", "rasbt-llms-from-scratch", "max_reserved"): (1, _OTHER_BATCH),
    (OTHER_METHOD, "peft-method-comparison", "allocated_after_step"): (2, _PSOFT),
    (OTHER_METHOD, "peft-method-comparison", "max_reserved"): (21, _PSOFT + "; else differences of a few percent"),
}
#: Where the median error of the difference is above 10 %, and why: (change, quantity) -> reason.
NOT_MET = {
    ("loss", "device_used"): _CACHED,
    ("optimizer", "allocated_after_step"): "one pair, Muon sharded and not, 49 MiB in 1 GiB: not explained",
    ("optimizer", "max_allocated"): "the same pair",
    ("ZeRO, FSDP", "max_reserved"): "one pair, FSDP1 against DDP, 1.3 GiB in 22 GiB: not explained",
    ("sequence parallel", "max_allocated"): "two pairs of T5, 16 MiB in 3 GiB: not explained",
    ("data parallel", "device_used"): _CACHED,
    ("data parallel", "max_reserved"): "torchtitan from 8 to 128 GPUs, 3 GiB in 82 GiB: not explained",
    ("base quantisation", "device_used"): _CACHED,
    ("LoRA", "device_used"): "the device figure holds cached blocks",
    ("LoRA", "max_reserved"): "of these runs the longest sample is known, not the batch of the peak",
    (OTHER_METHOD, "max_reserved"): "of these runs a bound of the length is known, not the batch of the peak",
    ("precision", "device_used"): "one pair (see wrong signs)",
    (
        "precision",
        "max_allocated",
    ): "one pair, 2.5 GiB of a step with fp32 masters: not explained",
    ("precision", "max_reserved"): _OTHER_BATCH,
    ("micro-batch", "max_reserved"): "FSDP1 with QLoRA, up to 21 % of the difference: not explained",
    ("sequence length", "device_used"): "LLaMA-Factory's figures are whole gigabytes, and differ by one or two",
    ("compile", "max_reserved"): f"torchtitan, 1 GiB in 82 GiB; and a plain loop {_OTHER_BATCH}",
    ("attention", "max_reserved"): _OTHER_BATCH,
}
_NOT_THERE = (
    "Not there: a published pair that differs in recompute alone, or in the ZeRO stage alone. Those differences are "
    "held by hand counts (tests/unit) and by the laws in tests/property/test_training_properties.py."
)
_NATIVE = "native.megatron_args."
#: Several sizes of a layout at once: what one of them did cannot be told apart.
_SIZES = (
    "parallel.tp",
    "parallel.pp",
    "parallel.cp",
    "parallel.ep",
    f"{_NATIVE}tensor-model",
    f"{_NATIVE}pipeline-model",
)
#: change -> (keys of the job of which one differs, keys that may differ with it).
CHANGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "recompute": (("recompute", f"{_NATIVE}recompute"), ("gpu",)),
    "loss": (("loss", f"{_NATIVE}cross-entropy"), ()),
    "optimizer": (("optimizer", f"{_NATIVE}optimizer"), ("precision.moments", "parallel.zero")),
    "ZeRO, FSDP": (("parallel.zero", "parallel.fsdp", f"{_NATIVE}use-distributed-optimizer"), ("engine",)),
    "tensor parallel": (
        ("parallel.tp", f"{_NATIVE}tensor-model-parallel-size"),
        ("parallel.dp", "grad_accum", "parallel.sp"),
    ),
    "sequence parallel": (("parallel.sp", f"{_NATIVE}sequence-parallel"), ()),
    "pipeline parallel": (
        ("parallel.pp", "parallel.vpp", f"{_NATIVE}pipeline-model-parallel-size", f"{_NATIVE}num-layers-per-virtual"),
        ("parallel.dp", "grad_accum", "parallel.schedule"),
    ),
    "context parallel": (
        ("parallel.cp", f"{_NATIVE}context-parallel-size"),
        ("parallel.dp", "grad_accum"),
    ),
    "expert parallel": (
        ("parallel.ep", "parallel.etp", f"{_NATIVE}expert-model-parallel-size", f"{_NATIVE}expert-tensor-parallel"),
        ("parallel.dp", "grad_accum"),
    ),
    "data parallel": (("parallel.dp", "num_gpus"), ("grad_accum",)),
    "base quantisation": (("base_quantization",), ("precision.params", "precision.compute", "method")),
    "LoRA": (("lora", "method"), ()),
    OTHER_METHOD: ((), ()),
    "precision": (("precision",), (f"{_NATIVE}fp8",)),
    "offload": (("offload",), ()),
    "micro-batch": (("micro_batch_size",), ("grad_accum",)),
    "sequence length": (("seq_len",), ()),
    "compile": (("compile",), ()),
    "attention": (("attention",), ()),
    "depth": (("model_overrides.num_hidden_layers",), ()),
    "layout": (_SIZES, ("parallel.dp", "grad_accum", "parallel.schedule", "parallel.sp", "parallel.etp")),
}


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Two records of a group that differ in one thing, one quantity of both, in bytes."""

    change: str
    group: str
    quantity: str
    what: str
    first: str
    second: str
    url: str
    measured: tuple[float, float]
    predicted: tuple[float, float]
    resolution: float

    @property
    def measured_change(self) -> float:
        """What was measured."""
        return self.measured[1] - self.measured[0]

    @property
    def predicted_change(self) -> float:
        """What is predicted."""
        return self.predicted[1] - self.predicted[0]

    @property
    def is_none(self) -> bool:
        """Nothing was measured that is above noise and rounding."""
        return abs(self.measured_change) < max(LEAST_SHARE * max(self.measured), LEAST_ROUNDINGS * self.resolution)

    @property
    def right_sign(self) -> bool:
        """The prediction goes the same way."""
        return self.predicted_change * self.measured_change > 0

    @property
    def error(self) -> float:
        """Signed relative error of the difference."""
        return (self.predicted_change - self.measured_change) / abs(self.measured_change)


def differences(paths: Iterable[Path]) -> list[Difference]:
    """Return every pair of the files, judged ones only."""
    groups: dict[str, list[tuple[Record, dict[str, str]]]] = defaultdict(list)
    for path in paths:
        for record in read_records(path):
            if record.completeness != "partial" and record.kind == "train":
                groups[record.group].append((record, _flat(record.job)))
    rows: dict[str, dict[tuple[str, str | None], Comparison]] = {}
    found = []
    for records in groups.values():
        for (one, first), (two, second) in combinations(records, 2):
            change = _change(first, second)
            if change is None or not _known(one, two, _differing(first, second)):
                continue
            for record in (one, two):
                if record.record_id not in rows:
                    rows[record.record_id] = _rows(record)
            found += _compared(change, (one, first), (two, second), rows)
    return found


def _rows(record: Record) -> dict[tuple[str, str | None], Comparison]:
    judged, _verdict = judge(record)  # an internal error is raised, not skipped
    return {(row.quantity, row.rank): row for row in judged if row.predicted is not None and row.is_bytes}


def _compared(
    change: str,
    one: tuple[Record, Mapping[str, str]],
    two: tuple[Record, Mapping[str, str]],
    rows: Mapping[str, Mapping[tuple[str, str | None], Comparison]],
) -> Iterator[Difference]:
    first, second = rows[one[0].record_id], rows[two[0].record_id]
    rounded = {figure.quantity: figure.high - figure.low for figure in (*one[0].measured, *two[0].measured)}
    for key in first.keys() & second.keys():
        a, b = first[key], second[key]
        assert a.predicted is not None and b.predicted is not None
        yield Difference(
            change=change,
            group=one[0].group,
            quantity=key[0],
            what=_what(one[1], two[1]),
            first=one[0].record_id,
            second=two[0].record_id,
            url=two[0].source_url,
            measured=(a.measured, b.measured),
            predicted=(a.predicted, b.predicted),
            resolution=rounded[key[0]],
        )


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, Mapping):
        found: dict[str, str] = {}
        for key, item in value.items():
            if not (name == "" and key == "unknown"):
                found |= _flat(item, f"{name}.{key}" if name else str(key))
        return found
    return {} if value is None else {name: json.dumps(value, sort_keys=True)}


def _differing(first: Mapping[str, str], second: Mapping[str, str]) -> list[str]:
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


def _change(first: Mapping[str, str], second: Mapping[str, str]) -> str | None:
    """Return the one thing in which two jobs differ, or None where it is nothing or more than one thing."""
    keys = _differing(first, second)
    for change, (own, along) in CHANGES.items():
        if any(key.startswith(own) for key in keys) and all(key.startswith((*own, *along)) for key in keys):
            return OTHER_METHOD if change == "LoRA" and _of_two_methods(first, second) else change
    return None


def _of_two_methods(first: Mapping[str, str], second: Mapping[str, str]) -> bool:
    """Tell two methods of adapters, where more than the adapter differs, from more or less of one, or none."""
    kinds = {job.get("method", '"full"').strip('"') for job in (first, second)}
    return not kinds <= {"full", "lora", "qlora"} and len(kinds) > 1


def _known(one: Record, two: Record, keys: Iterable[str]) -> bool:
    """Say whether both records state what they differ in: a field that is missing is not known."""
    fields = {key.partition(".")[0] for key in keys} - {"lora", "base_quantization", "native", "model_overrides"}
    return all(field in record.job for record in (one, two) for field in fields)


def _what(first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """Return what changes, in the words of the jobs."""
    keys = [key for key in _differing(first, second) if not key.startswith("native")]
    told = [f"{key} {first.get(key, '–')} → {second.get(key, '–')}".replace('"', "") for key in keys]
    return "; ".join(told)[:120]


# ------------------------------------------------------------------------------------------------------------ the page


def summary(found: Iterable[Difference]) -> list[tuple[str, str, int, int, int, float | None]]:
    """Return (change, quantity, pairs, differences, right signs, median error) by change and quantity."""
    sets: dict[tuple[str, str], list[Difference]] = defaultdict(list)
    for one in found:
        sets[(one.change, one.quantity)].append(one)
    order = {name: at for at, name in enumerate(CHANGES)}
    lines = []
    for (change, quantity), ones in sorted(sets.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        real = [one for one in ones if not one.is_none]
        errors = [abs(one.error) for one in real]
        right = sum(one.right_sign for one in real)
        lines.append((change, quantity, len(ones), len(real), right, statistics.median(errors) if errors else None))
    return lines


def markdown(found: list[Difference], *, everything: bool = False) -> str:
    """Return the page."""
    real = [one for one in found if not one.is_none]
    still = [one for one in found if one.is_none]
    quiet = [
        one for one in still if abs(one.predicted_change) < max(3 * LEAST_SHARE * max(one.measured), one.resolution)
    ]
    lines = [
        "# Ablations",
        "",
        "Made by `python tools/make_ablations.py` from published runs: pairs of one source that differ in one",
        "thing. The measured difference stands beside the predicted one, because a total can be right for the wrong",
        "reason and a difference hardly. A measured difference below 1 % of the figure, or lost in the digits,",
        "counts as none. Of many pairs of one source, some are shown, spread from the smallest error to the largest.",
        "",
        f"{len(found):,} pairs, {len(real):,} with a difference; the sign is right in "
        f"{sum(one.right_sign for one in real):,} of them ({percent(_share(real))}); the median error of the "
        f"difference is {percent(statistics.median(abs(one.error) for one in real))}. Where nothing was measured, "
        f"{len(quiet):,} of {len(still):,} predictions say so too (less than 3 % of the figure).",
        "",
        "## By change",
        "",
        "| change | quantity | pairs | with a difference | right sign | median error |",
        "|---|---|---|---|---|---|",
    ]
    for change, quantity, pairs, number, right, median in summary(found):
        share = "" if not number else f"{right}/{number}"
        lines.append(f"| {change} | {quantity} | {pairs} | {number} | {share} | {percent(median)} |")
    lines += ["", "## Wrong signs", "", *_wrong(real), ""]
    lines += ["## Median above 10 %", "", "| change | quantity | why |", "|---|---|---|"]
    lines += [f"| {change} | {quantity} | {why} |" for (change, quantity), why in NOT_MET.items()]
    lines += ["", _NOT_THERE, ""]
    for change in CHANGES:
        ones = [one for one in real if one.change == change]
        if ones:
            lines += [f"## {change[0].upper()}{change[1:]}", "", *_table(ones, everything=everything), ""]
    return "\n".join(lines)


def wrong_signs(found: Iterable[Difference]) -> dict[tuple[str, str, str], list[Difference]]:
    """Return the pairs whose predicted difference goes the other way, by change, source and quantity."""
    sets: dict[tuple[str, str, str], list[Difference]] = defaultdict(list)
    for one in found:
        if not one.is_none and not one.right_sign:
            sets[(one.change, one.group, one.quantity)].append(one)
    return sets


def _wrong(real: list[Difference]) -> Iterator[str]:
    for key, ones in sorted(wrong_signs(real).items()):
        reason = WRONG.get(key, (0, "not explained"))[1]
        yield f"{key[0]}, {key[1]}, {key[2]} ({len(ones)}): {reason}."
        yield ""
        yield from _head()
        for one in sorted(ones, key=lambda one: (one.first, one.second)):
            yield _row(one)
        yield ""


def _table(ones: list[Difference], *, everything: bool) -> Iterator[str]:
    """Yield the pairs, or per source and quantity some of them, spread from the smallest error to the largest."""
    yield from _head()
    sets: dict[tuple[str, str], list[Difference]] = defaultdict(list)
    for one in ones:
        sets[(one.group, one.quantity)].append(one)
    for key in sorted(sets):
        rows = sorted(sets[key], key=lambda one: (abs(one.error), one.first, one.second))
        if not everything and len(rows) > PAIRS_SHOWN:
            rows = [rows[at * (len(rows) - 1) // (PAIRS_SHOWN - 1)] for at in range(PAIRS_SHOWN)]
        for row in rows:
            yield _row(row)


def _head() -> tuple[str, str]:
    return "| source | change | quantity | measured | difference | predicted | error |", "|---|---|---|---|---|---|---|"


def _row(one: Difference) -> str:
    cells = (
        f"[{one.group}]({one.url})" if one.url else one.group,
        one.what.replace("|", "/"),
        one.quantity,
        f"{format_bytes(one.measured[0])} → {format_bytes(one.measured[1])}",
        _signed(one.measured_change),
        _signed(one.predicted_change),
        f"{100 * one.error:+.1f} %",
    )
    return "| " + " | ".join(cells) + " |"


def _signed(size: float) -> str:
    return ("+" if size > 0 else "−" if size < 0 else "") + format_bytes(abs(size))


def _share(real: list[Difference]) -> float | None:
    return sum(one.right_sign for one in real) / len(real) if real else None


def percent(value: float | None) -> str:
    """Return a share for reading."""
    return "" if value is None else f"{100 * value:.1f} %"


def main() -> int:
    """Print the page."""
    words = sys.argv[1:]
    found = differences(Path(word) for word in words if word != "--all")
    print(markdown(found, everything="--all" in words))
    return 0


if __name__ == "__main__":
    sys.exit(main())
