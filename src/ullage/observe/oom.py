"""OOM messages as typed facts: who failed, what was asked for, and every size that the message prints.

A message may be wrapped over lines, repeated by every process that passes the exception on, cut by a web page, and
mixed with the lines of other ranks. Lines of one speaker are gathered into windows, and windows are matched as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction

from ullage.frozen import Frozen, field
from ullage.units import GiB, KiB, MiB, TiB

_UNITS = {
    "bytes": 1, "byte": 1, "b": 1, "kib": KiB, "mib": MiB, "gib": GiB, "tib": TiB,
    "k": KiB, "m": MiB, "g": GiB, "t": TiB, "kb": KiB, "mb": MiB, "gb": GiB, "tb": TiB,
}  # fmt: skip
#: A size as programs print it. PyTorch, vLLM, SGLang and the kernel mean powers of two, whatever letters they use.
SIZE = r"-?\d[\d,]{0,24}(?:\.\d{1,20})?\s{0,8}(?:bytes?|[KMGT]i?B|[KMGT]B?|B)\b"
_SIZE = re.compile(r"(-?\d[\d,]{0,24}(?:\.\d{1,20})?)\s{0,8}([A-Za-z]*)")
#: A window ends after this many lines, or characters, since the last line that looked like a message.
WINDOW_LINES = 16
WINDOW_CHARACTERS = 16384
MAX_FACTS = 1000
#: Speakers whose messages are gathered at the same time.
MAX_WINDOWS = 4096


class Size(Frozen):
    """An amount as it was printed: ``text`` keeps the digits and the unit, ``bytes`` is their exact value.

    ``half_step_bytes``: half of the last digit, by which the printed amount may miss the true one.
    """

    bytes: int
    text: str
    half_step_bytes: int = 0


class Fact(Frozen):
    """One message of a death (or of what follows from one).

    Attributes:
        kind: ``device_oom``, ``kv_pool``, ``start_budget``, ``library_oom``, ``buffer_oom``, ``xla_oom``,
            ``host_kill``, ``host_oom``, ``killed``, ``timeout``, ``hint``.
        framework: who wrote the message.
        versions: the versions whose words these are, as far as the words tell.
        sizes: (name, amount); names are listed in docs/inspect.md.
        counts: (name, number): tokens, ranks, process numbers.
        processes: (process number, amount) of processes on the same GPU that are not this one for certain.
        details: (name, words) such as the device, the buffer or the collective.
        rank, line, times: who, where first, and how often the same was printed.
        text: the words themselves, shortened.
        partial: the message is cut.
    """

    kind: str
    framework: str
    versions: str = ""
    sizes: tuple[tuple[str, Size], ...] = ()
    counts: tuple[tuple[str, int], ...] = ()
    processes: tuple[tuple[int, Size], ...] = ()
    details: tuple[tuple[str, str], ...] = ()
    rank: str = ""
    line: int = 0
    times: int = 1
    text: str = ""
    partial: bool = False

    def size(self, name: str) -> int | None:
        """Return the bytes of a size, ``None`` when it was not printed."""
        return next((size.bytes for key, size in self.sizes if key == name), None)

    def count(self, name: str) -> int | None:
        """Return a number, ``None`` when it was not printed."""
        return next((value for key, value in self.counts if key == name), None)

    def detail(self, name: str) -> str:
        """Return words, empty when there are none."""
        return next((value for key, value in self.details if key == name), "")


Matcher = Callable[[str], Iterable[Fact]]


def read_size(text: str, unit: str = "") -> Size:
    """Read an amount: ``781.59 MiB``, ``0 bytes``, ``14.49GiB``, ``-1.44 GiB``, ``2,048 kB``."""
    match = _SIZE.match(text.strip())
    if match is None:
        raise ValueError(text)
    digits = match.group(1).replace(",", "")
    factor = _UNITS.get((match.group(2) or unit or "b").lower(), 1)
    places = len(digits.partition(".")[2])
    value = Fraction(digits) * factor
    half = Fraction(factor, 2 * 10**places) if factor > 1 else Fraction(0)
    shown = " ".join(f"{match.group(1)} {match.group(2) or unit}".split())
    return Size(bytes=round(value), text=shown, half_step_bytes=int(half))


def sizes(match: re.Match[str], units: dict[str, str] | None = None) -> tuple[tuple[str, Size], ...]:
    """Return the named groups of a match that hold amounts; ``units`` gives the unit where the words print none."""
    found = []
    for name, text in match.groupdict().items():
        if text is not None and not name.startswith("_"):
            found.append((name, read_size(text, (units or {}).get(name, ""))))
    return tuple(found)


def excerpt(text: str, limit: int = 400) -> str:
    """Return words on one line, shortened."""
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "…"


def flatten(text: str) -> str:
    """Return a window as one line of words: wrapped messages become whole, escaped line ends too."""
    return " ".join(text.replace("\\n", "\n").split())


class _Window:
    """Lines of one speaker, from the first that looked like a message."""

    __slots__ = ("characters", "first", "left", "lines")

    def __init__(self, first: int) -> None:
        self.first, self.left, self.characters = first, WINDOW_LINES, 0
        self.lines: list[str] = []

    def add(self, text: str, *, trigger: bool) -> bool:
        """Take a line; true when the window is full."""
        self.lines.append(text)
        self.characters += len(text)
        self.left = WINDOW_LINES if trigger else self.left - 1
        return self.left <= 0 or self.characters > WINDOW_CHARACTERS


class Gatherer:
    """Takes lines, gives facts."""

    def __init__(self, triggers: Iterable[str], matcher: Matcher) -> None:
        self._triggers, self._matcher = tuple(triggers), matcher
        self._windows: dict[str, _Window] = {}
        self._facts: dict[tuple[object, ...], Fact] = {}
        self.num_dropped = 0

    def take(self, number: int, speaker: str, rank: str, text: str, *, marked: bool = True) -> None:
        """Look at a line; one that is not ``marked`` holds no trigger."""
        trigger = marked and any(map(text.__contains__, self._triggers))
        window = self._windows.get(speaker)
        if window is None:
            if not trigger:
                return
            if len(self._windows) >= MAX_WINDOWS:
                self._close(next(iter(self._windows)), rank)
            window = self._windows[speaker] = _Window(number)
        if window.add(text, trigger=trigger):
            self._close(speaker, rank)

    def _close(self, speaker: str, rank: str) -> None:
        window = self._windows.pop(speaker)
        for fact in self._matcher("\n".join(window.lines)):
            self._keep(fact, window.first, fact.rank or rank)

    def _keep(self, fact: Fact, line: int, rank: str) -> None:
        key = (fact.kind, fact.framework, fact.sizes, fact.counts, fact.details, rank)
        known = self._facts.get(key)
        if known is None and len(self._facts) >= MAX_FACTS:
            self.num_dropped += 1
            return
        values = {name: getattr(fact, name) for name in fact.__dataclass_fields__}
        times = 1 if known is None else known.times + 1
        first = line if known is None else known.line
        self._facts[key] = Fact(**(values | {"rank": rank, "line": first, "times": times}))

    def finish(self, rank_of: Callable[[str], str]) -> list[Fact]:
        """Close all windows and return the facts in the order of the log."""
        for speaker in list(self._windows):
            self._close(speaker, rank_of(speaker))
        return sorted(self._facts.values(), key=lambda fact: fact.line)


def spans(pattern: re.Pattern[str], text: str) -> Iterator[tuple[re.Match[str], str]]:
    """Yield each match with the text from it to the next one."""
    matches = list(pattern.finditer(text))
    for index, match in enumerate(matches):
        end = matches[index + 1].start() if index + 1 < len(matches) else len(text)
        yield match, text[match.start() : end]


__all__ = [
    "SIZE", "Fact", "Gatherer", "Matcher", "Size", "excerpt", "field", "flatten", "read_size", "sizes", "spans",
]  # fmt: skip
