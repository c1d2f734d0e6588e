"""Memory figures that training programs print, by rank and step.

Source: NVIDIA/Megatron-LM@00caa53:megatron/training/utils.py:report_memory (MB is 2**20);
pytorch/torchtitan@00fbaaf:torchtitan/components/metrics.py:MetricsProcessor.log and DeviceMemoryMonitor.get_peak_stats
(the largest reserved since the last line); deepspeedai/DeepSpeed:deepspeed/runtime/utils.py:see_memory_usage and
utils/timer.py:ThroughputTimer (GB is 2**30; Max_CA is rounded to whole GB); transformers@5.23.0:trainer_utils.py:
TrainerMemoryTracker (MB is 2**20 in print, bytes in JSON).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from ullage.observe.measured import Curve
from ullage.observe.oom import Size, read_size

#: Words of which one stands in every line that is read here.
WORDS = (
    "memory (MB)", "Max_MA", "see_memory_usage", "MemAllocated=", "GiB(", "memory allocation retries",
    "OOM errors thrown", "_mem_gpu", "GiB memory",
)  # fmt: skip
MAX_RANKS = 4096
AMOUNTS = ("allocated", "max_allocated", "reserved", "max_reserved", "device_used")
_N = r"(\d{1,15}(?:\.\d{1,20})?)"
_PAIR = re.compile(rf"\s{{0,4}}\|\s{{0,4}}([a-z][a-z ]{{1,40}}):\s{{0,4}}{_N}")
_MEGATRON_NAMES = {
    "allocated": "allocated",
    "max allocated": "max_allocated",
    "reserved": "reserved",
    "max reserved": "max_reserved",
    "total device memory used": "device_used",
}
_RANK = re.compile(r"\[Rank (\d{1,7})\]")
_AFTER = re.compile(r"after (\d{1,12}) iterations")
_STEP = re.compile(r"\bstep:\s{0,8}(\d{1,12})\b")
_TITAN = re.compile(rf"\bmemory:\s{{0,8}}{_N}GiB\({_N}%\)")
_MODEL = re.compile(rf"memory usage for model: {_N}GiB\({_N}%\)")
_CAPACITY = re.compile(rf"capacity: (.{{1,80}}?)(?: \(\d{{1,4}}\))? with {_N}GiB memory")
_RETRIES = re.compile(r"\b(\d{1,12}) \w{1,12} memory allocation retries")
_OOMS = re.compile(r"\b(\d{1,12}) \w{1,12} OOM errors thrown")
_SEEN = re.compile(rf"\bMA {_N} GB\s{{1,16}}Max_MA {_N} GB\s{{1,16}}CA {_N} GB\s{{1,16}}Max_CA {_N} GB")
_LABEL = re.compile(r"see_memory_usage\]\s{0,4}(?!MA \d)(\S.{0,119})")
_TIMER = re.compile(rf"\bMemAllocated={_N} ?GB, MaxMemAllocated={_N} ?GB")
_GLOBAL_STEP = re.compile(r"global_step=(\d{1,12})")
_TRACKED = re.compile(
    r"\b(before_init_mem_gpu|(?:init|train|eval|test)_mem_gpu_(?:alloc|peaked)_delta)\"?\s{0,30}[=:]\s{0,30}"
    r"(-?\d{1,18})(MB)?"
)
_DIGITS = re.compile(r"\d+")


class Rank:
    """What one rank printed. ``sizes`` are the largest of each amount, with the rounding of the print."""

    def __init__(self, program: str, rank: str) -> None:
        self.program, self.rank = program, rank
        self.curves: dict[str, Curve] = {}
        self.sizes: dict[str, Size] = {}
        self.first_line = self.num_points = 0
        self.last_step = -1
        self.num_restarts = 0
        self._open: dict[str, tuple[int, int]] = {}

    def put(self, line: int, step: int, amounts: dict[str, Size], series: str = "") -> None:
        """Take the amounts that were printed at a step; of several at the same step the largest counts."""
        self.first_line = self.first_line or line
        self.num_points += 1
        if step + 1 < self.last_step:  # started anew from a checkpoint
            self.num_restarts += 1
            self.curves, self._open = {}, {}
        self.last_step = step
        for name, size in amounts.items():
            if name not in self.sizes or size.bytes > self.sizes[name].bytes:
                self.sizes[name] = size
            key = f"{series}{name}"
            if key not in self._open and len(self._open) >= 64:
                continue
            known = self._open.get(key)
            if known is not None and known[0] == step:
                self._open[key] = (step, max(known[1], size.bytes))
                continue
            if known is not None:
                self.curves.setdefault(key, Curve()).add(*known)
            self._open[key] = (step, size.bytes)

    def finish(self) -> None:
        """Take in the last points."""
        for key, point in self._open.items():
            self.curves.setdefault(key, Curve()).add(*point)
        self._open = {}

    def peak(self, *names: str) -> int:
        """Return the largest of the amounts, 0 where none was printed."""
        return max((self.sizes[name].bytes for name in names if name in self.sizes), default=0)


class Collected:
    """The memory figures of a log."""

    def __init__(self) -> None:
        self.ranks: dict[tuple[str, str], Rank] = {}
        self.retries: dict[str, int] = {}
        self.ooms: dict[str, int] = {}
        self.capacity_bytes = 0
        self.card = ""
        self.tracked: dict[str, int] = {}  # of the Trainer, in bytes
        self.model_bytes = 0
        self._labels: dict[str, str] = {}
        self._turns: dict[tuple[str, str], int] = {}

    def any(self) -> bool:
        """Return whether a figure was found."""
        return bool(self.ranks or self.tracked)

    def take(self, number: int, rank: str, text: str) -> None:
        """Look at a line."""
        for program, owner, step, amounts, series in self._figures(rank, text):
            key = (program, owner)
            if key not in self.ranks:
                if len(self.ranks) >= MAX_RANKS:
                    continue
                self.ranks[key] = Rank(program, owner)
            self.ranks[key].put(number, step, amounts, series)
        self._events(rank, text)

    def _figures(self, rank: str, text: str) -> Iterator[tuple[str, str, int, dict[str, Size], str]]:
        """Yield (program, rank, step, amounts, series) of a line; a line may hold those of several ranks."""
        place = text.find("memory (MB)")
        while place >= 0:
            amounts, end = _pairs(text, place + len("memory (MB)"))
            if amounts:
                before = text[max(0, place - 160) : place]
                owner = [*_RANK.findall(before)][-1:] or [rank]
                steps = _AFTER.findall(before)[-1:]
                yield "megatron", owner[0], int(steps[0]) if steps else 0, amounts, ""
            place = text.find("memory (MB)", end)
        if "GiB(" in text and (step := _STEP.search(text)) and (found := _TITAN.search(text)):
            yield "torchtitan", rank, int(step.group(1)), {"max_reserved": _gib(found.group(1))}, ""
            self._share(found.group(1), found.group(2))
        if "MA " in text or "see_memory_usage" in text or "MemAllocated=" in text:
            yield from self._deepspeed(rank, text)

    def _deepspeed(self, rank: str, text: str) -> Iterator[tuple[str, str, int, dict[str, Size], str]]:
        if found := _SEEN.search(text):
            label = self._labels.pop(rank, "")
            series = _DIGITS.sub("#", label)
            turn = self._turns[rank, series] = self._turns.get((rank, series), -1) + 1
            if len(self._turns) > MAX_RANKS * 4:
                self._turns.clear()
            names = ("allocated", "max_allocated", "reserved", "max_reserved")
            amounts = {name: _gib(found.group(at)) for at, name in enumerate(names, 1)}
            amounts["max_reserved"] = _unrounded(amounts["reserved"], amounts["max_reserved"])
            yield "deepspeed", rank, turn, amounts, f"{series}: " if series else ""
        elif found := _LABEL.search(text):
            if len(self._labels) < MAX_RANKS:
                self._labels[rank] = found.group(1).strip()
        elif found := _TIMER.search(text):
            step = _GLOBAL_STEP.search(text)
            amounts = {"allocated": _gib(found.group(1)), "max_allocated": _gib(found.group(2))}
            turn = self._turns[rank, "timer"] = self._turns.get((rank, "timer"), -1) + 1
            yield "deepspeed", rank, int(step.group(1)) if step else turn, amounts, "timer: "

    def _events(self, rank: str, text: str) -> None:
        if "thrown" in text or "retries" in text:
            for pattern, counts in ((_RETRIES, self.retries), (_OOMS, self.ooms)):
                if (found := pattern.search(text)) and (rank in counts or len(counts) < MAX_RANKS):
                    counts[rank] = max(counts.get(rank, 0), int(found.group(1)))
        if "GiB memory" in text and (found := _CAPACITY.search(text)):
            self.card, self.capacity_bytes = found.group(1), _gib(found.group(2)).bytes
        if "usage for model" in text and (found := _MODEL.search(text)):
            self.model_bytes = max(self.model_bytes, _gib(found.group(1)).bytes)
        if "_mem_gpu" in text:
            for name, digits, unit in _TRACKED.findall(text):
                self.tracked[name] = int(digits) << 20 if unit else int(digits)

    def _share(self, gib: str, percent: str) -> None:
        """Take the capacity from an amount and its share, where the log does not print it."""
        if not self.capacity_bytes and float(percent) >= 1.0:
            self.capacity_bytes = int(_gib(gib).bytes / float(percent) * 100)
            self.card = ""


def _pairs(text: str, place: int) -> tuple[dict[str, Size], int]:
    """Read ``| allocated: 1.5 | max allocated: 2`` from a place on; return where it ends."""
    amounts: dict[str, Size] = {}
    while found := _PAIR.match(text, place):
        place = found.end()
        name = _MEGATRON_NAMES.get(found.group(1).strip())
        if name is not None:
            amounts[name] = read_size(f"{found.group(2)} MiB")
    return amounts, place


@lru_cache(maxsize=4096)
def _gib(digits: str) -> Size:
    return read_size(f"{digits} GiB")


def _unrounded(now: Size, largest: Size) -> Size:
    """Return the largest reserved: what is reserved now, where that rounds to the whole GiB that is printed."""
    return largest if largest.bytes > now.bytes + largest.half_step_bytes else now
