"""The same work under other settings: which need less memory, which call the driver less, and which die."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from ullage.allocator.constants import DEFAULT_LARGE_SEGMENT_BYTES
from ullage.allocator.events import Workload
from ullage.allocator.keys import DEFAULT_VERSION
from ullage.allocator.run import Outcome, run_workload
from ullage.allocator.settings import AllocatorSettings, parse_settings, split_entries
from ullage.errors import InputError
from ullage.i18n import _

#: What is tried. Every text is legal in the newest version; those that an older version refuses are left out.
CANDIDATES = (
    "expandable_segments:True",
    "max_split_size_mb:32",
    "max_split_size_mb:128",
    "max_split_size_mb:512",
    "roundup_power2_divisions:4",
    "roundup_power2_divisions:16",
    "roundup_power2_divisions:[256:1,512:2,1024:4,>:8]",
    "large_segment_size_mb:64",
    "large_segment_size_mb:256",
    "expandable_segments:True,large_segment_size_mb:64",
    "expandable_segments:True,roundup_power2_divisions:8",
    "",
)
#: Tried when the device's memory is known: without a fraction the collector never runs.
FRACTION_CANDIDATES = (
    "garbage_collection_threshold:0.6,per_process_memory_fraction:0.95",
    "garbage_collection_threshold:0.8,per_process_memory_fraction:0.95",
    "max_split_size_mb:128,garbage_collection_threshold:0.8,per_process_memory_fraction:0.95",
)
#: A gain below this share of the peak is not worth a change of settings that also costs time.
LEAST_SHARE = 0.01


@dataclass(kw_only=True)
class Comparison:
    """Other settings, best first, and the recorded ones run the same way.

    Attributes:
        baseline: the recorded settings, everything allocated afresh: what the others are compared with.
        disturbance_bytes: how much starting afresh alone moves the peak: gains within it prove nothing.
        capacity_bytes: what the driver can give; ``None``: no limit.
        better: those of the outcomes that are worth a change.
    """

    baseline: Outcome
    disturbance_bytes: int
    capacity_bytes: int | None = None
    outcomes: list[Outcome] = field(default_factory=list)
    better: list[Outcome] = field(default_factory=list)

    def gain_bytes(self, outcome: Outcome) -> int:
        """Return how much less would be reserved at the peak."""
        return self.baseline.peak_reserved_bytes - outcome.peak_reserved_bytes


def compare(
    work: Workload,
    recorded: AllocatorSettings,
    kept: Outcome,
    *,
    capacity_bytes: int | None = None,
    total_bytes: int | None = None,
    version: tuple[int, int] = DEFAULT_VERSION,
    candidates: Sequence[str] = CANDIDATES,
    stage: Callable[[str], None] = lambda _stage: None,
) -> Comparison:
    """Run the work under each candidate.

    Args:
        work: what to do.
        recorded: the settings of the recording.
        kept: the work under them from the recorded beginning.
        capacity_bytes: what the driver can give.
        total_bytes: the device's memory.
        version: of PyTorch; candidates that it refuses are left out.
        candidates: settings to try.
        stage: called with what is done next.
    """

    def run(settings: AllocatorSettings) -> Outcome:
        stage(_("trying {settings}").format(settings=settings.text or _("the defaults")))
        return run_workload(work, settings, afresh=True, capacity_bytes=capacity_bytes, total_bytes=total_bytes)

    baseline = run(recorded)
    result = Comparison(
        baseline=baseline,
        disturbance_bytes=abs(baseline.peak_reserved_bytes - kept.peak_reserved_bytes),
        capacity_bytes=capacity_bytes,
    )
    with_fraction = FRACTION_CANDIDATES if total_bytes or capacity_bytes else ()
    for text in [*candidates, *with_fraction]:
        settings = _legal(text, version)
        if settings is not None and not _same(settings, recorded):
            result.outcomes.append(
                run(replace(settings, padding_bytes=recorded.padding_bytes, alignment_bytes=recorded.alignment_bytes))
            )
    result.outcomes.sort(key=_rank)
    result.better = [outcome for outcome in result.outcomes if _worth_it(result, outcome)]
    return result


def _legal(text: str, version: tuple[int, int]) -> AllocatorSettings | None:
    """Return the settings, ``None`` when a version does not take them."""
    try:
        return parse_settings(text, version=version)
    except InputError:
        return None


def _same(settings: AllocatorSettings, recorded: AllocatorSettings) -> bool:
    """Tell whether two settings do the same, however they are written."""
    return replace(settings, text="", padding_bytes=0, alignment_bytes=0) == replace(
        recorded, text="", padding_bytes=0, alignment_bytes=0
    )


def _rank(outcome: Outcome) -> tuple[bool, int, int, int, int]:
    """Order: those that live, the least reserved, the fewest settings and calls; of the dead, who came furthest."""
    step = -outcome.death.step if outcome.death else 0
    num_settings = len(split_entries(outcome.settings.text))
    calls = outcome.counters.num_driver_calls
    return outcome.death is not None, step, outcome.peak_reserved_bytes, num_settings, calls


def _worth_it(result: Comparison, outcome: Outcome) -> bool:
    """Tell whether a change is worth making: it saves a job, or more than chance and one segment could explain."""
    if outcome.death is not None:
        return False
    if result.baseline.death is not None:
        return True
    gain = result.gain_bytes(outcome)
    least = max(
        result.disturbance_bytes + DEFAULT_LARGE_SEGMENT_BYTES, LEAST_SHARE * result.baseline.peak_reserved_bytes
    )
    return gain > least
