"""Memory timelines of torch.profiler: bytes by category over time.

Two forms: raw events ``[[time in ns, action, bytes, category], ...]`` (``*.raw.json.gz``), and curves that are summed
up already, ``[[times in us], [[0, bytes per category ...], ...]]`` (``*.json``).
Source: pytorch@2.13.0:torch/profiler/_memory_profiler.py:MemoryProfileTimeline.export_memory_timeline_raw and
export_memory_timeline; actions are PREEXISTING 1, CREATE 2, INCREMENT_VERSION 3 (once minus the old and once plus the
new version), DESTROY 4, whose bytes carry their sign.
"""

from __future__ import annotations

from ullage.errors import InputError
from ullage.i18n import _
from ullage.ledger import Certainty, ranged
from ullage.observe.inspection import Inspection
from ullage.observe.measured import Curve, Listing, rise_of
from ullage.observe.profiler_stream import Document
from ullage.observe.streams import Readable
from ullage.units import format_bytes

CATEGORIES = (
    "parameters", "optimizer_states", "inputs", "temporaries", "activations", "gradients", "autograd_details",
    "unknown",
)  # fmt: skip
_ACTIONS = (1, 2, 3, 4)
_SOURCE = "torch.profiler memory timeline"
_MAX_SIZE = 1 << 60


class _Books:
    """The running sums per category, their curves, and the sums when the total was largest."""

    def __init__(self) -> None:
        self.now = [0] * len(CATEGORIES)
        self.total = 0
        self.peak, self.peak_time = 0, 0.0
        self.at_peak = tuple(self.now)
        self.peaks = list(self.now)
        self.curve = Curve()
        self.floors: list[tuple[float, int]] = []
        self.curves = [Curve() for _name in CATEGORIES]
        self.begin: float | None = None
        self.num_events = 0
        self.num_bad = 0

    def put(self, seconds: float | None) -> None:
        """Take note of the sums as they are now; ``None`` is before the recording."""
        self.total = sum(self.now)
        if seconds is not None and self.begin is None:
            self.begin = seconds
        place = 0.0 if seconds is None or self.begin is None else seconds - self.begin
        self.curve.add(place, self.total)
        for at, size in enumerate(self.now):
            self.peaks[at] = max(self.peaks[at], size)
            self.curves[at].add(place, size)
        if self.total > self.peak:
            self.peak, self.peak_time, self.at_peak = self.total, place, tuple(self.now)
        self.num_events += 1


def inspect_timeline(stream: Readable, where: str = "") -> Inspection:
    """Inspect a memory timeline of either form.

    Raises:
        InputError: it is none.
    """
    document, books = Document(stream), _Books()
    times: list[object] | None = None
    for number, (_key, item) in enumerate(document.items("")):
        if number == 0 and isinstance(item, list) and not _is_event(item):
            times = item
        elif times is not None:
            _take_curves(books, times, item)
            break
        elif _is_event(item):
            time, _action, size, category = item
            books.now[category] += size
            books.put(time / 1e9 if time >= 0 else None)
        else:
            books.num_bad += 1
    if not books.num_events:
        raise InputError(_("this is no memory timeline of torch.profiler"), where=where)
    return _answer(books, partial=document.truncated or books.num_bad > 0 or document.num_broken > 0)


def _is_event(item: object) -> bool:
    return (
        isinstance(item, list)
        and len(item) == 4
        and all(isinstance(each, int) and not isinstance(each, bool) and abs(each) < _MAX_SIZE * 2 for each in item)
        and item[1] in _ACTIONS
        and 0 <= item[3] < len(CATEGORIES)
    )


def _take_curves(books: _Books, times: list[object], rows: object) -> None:
    """Take times in microseconds and one row of sums per time; the first column of a row is always 0."""
    if not isinstance(rows, list):
        return
    for time, row in zip(times, rows, strict=False):
        sane = isinstance(row, list) and len(row) == len(CATEGORIES) + 1 and all(_is_size(each) for each in row)
        if not sane or not isinstance(time, int | float):
            books.num_bad += 1
            continue
        books.now = list(row[1:])
        books.put(time / 1e6 if abs(time) < _MAX_SIZE else None)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _MAX_SIZE


def _answer(books: _Books, *, partial: bool) -> Inspection:
    rise = rise_of(books.curve.points()) if _settles(books) else None
    terms = tuple(
        ranged(name, size, low=size, high=size, formula=_("alive at the peak"), source=_SOURCE,
               certainty=Certainty.MEASURED)
        for name, size in zip(CATEGORIES, books.at_peak, strict=True)
        if size
    )  # fmt: skip
    largest = max(zip(books.at_peak, CATEGORIES, strict=True))
    rows = tuple(
        (name, at_peak, peak, end)
        for name, at_peak, peak, end in zip(CATEGORIES, books.at_peak, books.peaks, books.now, strict=True)
        if peak
    )
    curves = [books.curve.series("allocated_bytes")]
    curves += [
        curve.series(f"{name}_bytes") for name, curve, peak in zip(CATEGORIES, books.curves, books.peaks, strict=True)
        if peak
    ]  # fmt: skip
    notes = [_("sizes of tensors by category: where they lie, and what the pool reserves, is not in it")]
    if partial:
        notes.insert(0, _("the timeline is cut or broken in places: this is a partial answer"))
    if rise is not None:
        notes.append(
            _(
                "the floor rises by {size} over the recording: a leak, or a first step that still fills its states"
            ).format(size=format_bytes(rise.total))
        )
    share = books.at_peak[0] / books.peak if books.peak else 0.0
    return Inspection(
        kind="memory_timeline",
        verdict=_("peak {peak} allocated; the largest part is {name}").format(
            peak=format_bytes(books.peak), name=largest[1]
        ),
        cause="none",
        confidence="certain",
        why=_("the peak came {seconds:.3f} s after the beginning").format(seconds=books.peak_time),
        framework="pytorch",
        allocator="pytorch",
        sizes=(("peak_allocated", books.peak), ("left_at_end", books.total)),
        terms=terms,
        total_bytes=books.peak,
        total_name=_("peak allocated"),
        partial=partial,
        notes=tuple(notes),
        metrics=(("parameter_memory_share", share),),
        series=tuple(curves),
        listings=(
            Listing(
                name="categories",
                title=_("Categories"),
                columns=("category", "at_peak_bytes", "peak_bytes", "end_bytes"),
                rows=rows,
            ),
        ),
    )


def _settles(books: _Books) -> bool:
    """Return whether there is enough of a curve to speak of a floor."""
    return books.num_events >= 1000
