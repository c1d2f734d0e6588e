"""What each block of a recording was for: weights, gradients, optimizer states, activations and the rest.

Evidence, the strongest first: what the stack names by itself (a KV cache, a workspace, loading a model); the phase in
which the stack asked, together with when the block was given back; and for blocks that are older than the recording,
whether they ever were. Each block carries how sure that is: ``certain`` where stack and life agree, ``likely`` where
one of them speaks, ``unsure`` where neither does. Where PyTorch's own profiler is asked while the job runs it knows
tensors and not only blocks (pytorch@2.13.0:torch/profiler/_memory_profiler.py:MemoryProfile); a file has no tensors.

    in forward,  alive when backward begins       activations          in forward, freed before       temporaries
    in backward, alive when the step goes on      gradients            in backward, freed before      temporaries
    in a step of the optimizer, alive after it    optimizer states     freed in it                    temporaries
    in forward,  alive after the whole step       kept                 recomputed in backward         activations
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from ullage.allocator.events import DEFAULT_POOL
from ullage.observe.attribution_lives import NEVER, Lives
from ullage.observe.attribution_stacks import (
    BACKWARD,
    BUILD,
    COLLECTIVE,
    FORWARD,
    KV_CACHE,
    LOAD,
    OPTIMIZER,
    OTHER,
    RECOMPUTE,
    REDUCER,
    SILENT,
    WORKSPACE,
    StackReader,
)
from ullage.observe.snapshot import DeviceMemory

#: In the order in which they are shown.
CATEGORIES = (
    "weights", "optimizer_states", "gradients", "activations", "temporaries", "kv_cache", "workspace", "collectives",
    "graph_pools", "kept", "other", "unknown",
)  # fmt: skip
CODES = {name: code for code, name in enumerate(CATEGORIES)}
CERTAIN, LIKELY, UNSURE = range(3)
LEVELS = ("certain", "likely", "unsure")
#: Signs that are a category by themselves.
_NAMED = {
    LOAD: (CODES["weights"], CERTAIN),
    KV_CACHE: (CODES["kv_cache"], CERTAIN),
    WORKSPACE: (CODES["workspace"], CERTAIN),
    COLLECTIVE: (CODES["collectives"], CERTAIN),
    REDUCER: (CODES["gradients"], LIKELY),
}


@dataclass(kw_only=True)
class Run:
    """A stretch of events in one phase."""

    phase: int
    first: int
    last: int


@dataclass(kw_only=True)
class Attribution:
    """What each block was for.

    Attributes:
        categories, levels: of each block, numbers of :data:`CATEGORIES` and :data:`LEVELS`.
        kinds: what each stack speaks of. ``runs``: the phases one after the other.
        trains: whether the recording shows a backward pass or an optimizer.
    """

    lives: Lives
    reader: StackReader
    kinds: bytearray
    runs: list[Run] = field(default_factory=list)
    trains: bool = False
    categories: bytearray = field(default_factory=bytearray)
    levels: bytearray = field(default_factory=bytearray)

    def sums_at(self, event: int) -> dict[str, list[int]]:
        """Return category -> bytes that are certain, likely, unsure, of what was alive after an event."""
        return self.sums_of(self.lives.alive_at(event))

    def sums_of(self, blocks: list[int]) -> dict[str, list[int]]:
        """Return category -> bytes that are certain, likely, unsure."""
        sums = [[0, 0, 0] for _name in CATEGORIES]
        for each in blocks:
            sums[self.categories[each]][self.levels[each]] += self.lives.sizes[each]
        return {name: amounts for name, amounts in zip(CATEGORIES, sums, strict=True) if any(amounts)}

    def phase_at(self, event: int) -> int:
        """Return the phase at an event, :data:`OTHER` where none is known."""
        run = self.run_at(event)
        return self.runs[run].phase if run >= 0 else OTHER

    def run_at(self, event: int) -> int:
        """Return the number of the stretch that an event lies in, or that went before; -1 when none did."""
        low, high = 0, len(self.runs)
        while low < high:
            middle = (low + high) // 2
            if self.runs[middle].first <= event:
                low = middle + 1
            else:
                high = middle
        return low - 1


def attribute(memory: DeviceMemory, lives: Lives) -> Attribution:
    """Say of each block what it was for."""
    reader = StackReader(memory.recording.known_stacks)
    result = Attribution(lives=lives, reader=reader, kinds=reader.kinds())
    used = {result.kinds[number] for number in set(lives.stacks)}
    result.trains = bool(used & {BACKWARD, OPTIMIZER, RECOMPUTE})
    result.runs, members = _phases(lives, result, silent_is_backward=result.trains and not reader.has_native_frames())
    _judge_recorded(memory, result, members)
    _judge_older(result)
    return result


def _phases(lives: Lives, result: Attribution, *, silent_is_backward: bool) -> tuple[list[Run], array[int]]:
    """Return the phases, and in which of them each block of the recording was allocated (one more than its number).

    With Python frames only, the threads of autograd have no frames: after a forward pass, silence is backward.
    """
    phase_of = {FORWARD: FORWARD, BACKWARD: BACKWARD, RECOMPUTE: BACKWARD, REDUCER: BACKWARD, OPTIMIZER: OPTIMIZER}
    table = [phase_of.get(kind, -1) for kind in range(BUILD + 1)]
    kinds, runs, members = result.kinds, [], array("I")
    current: Run | None = None
    for start, stack in zip(lives.starts[lives.num_older :], lives.stacks[lives.num_older :], strict=True):
        kind = kinds[stack]
        phase = table[kind]
        if kind == SILENT and silent_is_backward and current is not None and current.phase != OPTIMIZER:
            phase = BACKWARD
        if phase >= 0:
            if current is None or current.phase != phase:
                current = Run(phase=phase, first=start, last=start)
                runs.append(current)
            else:
                current.last = start
        members.append(len(runs))
    return runs, members


def _judge_recorded(memory: DeviceMemory, result: Attribution, members: array[int]) -> None:
    """Judge the blocks that the recording allocated."""
    lives, older = result.lives, result.lives.num_older
    private = _private_places(memory)
    result.categories, result.levels = bytearray(len(lives.sizes)), bytearray(len(lives.sizes))
    returning = {stack for stack, member in zip(lives.stacks[older:], members, strict=True) if member}
    fixed = [_NAMED.get(kind) for kind in result.kinds]
    tables: dict[tuple[int, int], tuple[list[int], list[tuple[int, int]]]] = {}
    judge, kinds, categories, levels = _Judge(result), result.kinds, result.categories, result.levels
    columns = (members, lives.stacks[older:], lives.ends[older:], lives.places[older:])
    for each, (member, stack, end, place) in enumerate(zip(*columns, strict=True), older):
        found = fixed[stack]
        if found is None and place in private:
            found = (CODES["graph_pools"], CERTAIN)
        if found is None:
            key = (member, stack if member == 0 else -kinds[stack])
            table = tables.get(key)
            if table is None:
                table = tables[key] = judge.table(kinds[stack], member, returns=stack in returning)
            found = table[1][bisect_left(table[0], end)]
        categories[each], levels[each] = found


def _private_places(memory: DeviceMemory) -> set[int]:
    places = memory.recording.known_places.places
    return {number for number, place in enumerate(places) if place.pool_id != DEFAULT_POOL}


class _Judge:
    """Judges by phase and life."""

    def __init__(self, result: Attribution) -> None:
        self._runs, self._trains = result.runs, result.trains
        self._first = self._runs[0].first if self._runs else NEVER
        self._after: list[int] = []  # of each stretch: where the next but one of the same phase begins
        last: dict[int, int] = {}
        for number in range(len(self._runs) - 1, -1, -1):
            run = self._runs[number]
            self._after.append(last.get(run.phase, NEVER))
            last[run.phase] = run.first
        self._after.reverse()

    def table(self, kind: int, member: int, *, returns: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """Return :meth:`by_life` of all ends: up to which ends it is the same, and what it is up to there."""
        edges = {NEVER - 1, NEVER}
        if member:
            run, following = self._runs[member - 1], self._runs[member : member + 1]
            edges |= {run.last, self._after[member - 1], *(edge for one in following for edge in (one.first, one.last))}
        ends = sorted(edges)
        return ends, [self.by_life(kind, end, member, returns=returns) for end in ends]

    def by_life(self, kind: int, end: int, member: int, *, returns: bool) -> tuple[int, int]:
        """Return category and level of a block that was allocated in the stretch before number ``member``.

        ``returns``: its stack asks again in a later phase, so it is no part of the setting up.
        """
        if member == 0:
            if kind == SILENT:
                return CODES["weights" if end == NEVER and self._runs else "unknown"], UNSURE
            built = kind == BUILD and end == NEVER and not returns and bool(self._runs)
            return (CODES["weights"], LIKELY) if built else (CODES["other"], UNSURE)
        number = member - 1
        run = self._runs[number]
        leaves = self._runs[number + 1].first if number + 1 < len(self._runs) else NEVER
        if kind == SILENT and run.phase != BACKWARD:
            return CODES["unknown"], UNSURE
        level = LIKELY if kind == SILENT else CERTAIN
        if kind in (RECOMPUTE, FORWARD):
            return self._forward(kind, end, number, leaves)
        if kind == OPTIMIZER:
            return (CODES["optimizer_states"] if end > leaves or end == NEVER else CODES["temporaries"]), CERTAIN
        if kind in (BACKWARD, SILENT):
            if end > leaves:
                return CODES["gradients"], level
            return (CODES["gradients"] if end > run.last else CODES["temporaries"]), max(level, LIKELY)
        return self._by_others(end, number)

    def _forward(self, kind: int, end: int, number: int, leaves: int) -> tuple[int, int]:
        if kind == RECOMPUTE:
            return CODES["activations"], CERTAIN
        if not self._trains:
            return CODES["activations"], LIKELY
        if end > self._after[number] and end == NEVER and self._after[number] != NEVER:
            return CODES["kept"], LIKELY
        if end > leaves:
            return CODES["activations"], CERTAIN
        if end == NEVER:  # the recording ends within the forward pass
            return CODES["activations"], LIKELY
        return CODES["temporaries"], CERTAIN

    def _by_others(self, end: int, number: int) -> tuple[int, int]:
        """Judge what was allocated outside modules: inputs, losses, what is computed from outputs."""
        if end == NEVER and number == 0 and self._after[0] != NEVER:
            return CODES["kept"], UNSURE
        if end != NEVER and self._runs[number].phase == FORWARD and number + 1 < len(self._runs):
            following = self._runs[number + 1]
            if following.phase == BACKWARD and following.first < end <= following.last:
                return CODES["activations"], LIKELY
        return CODES["other"], LIKELY


def _judge_older(result: Attribution) -> None:
    """Judge the blocks that are older than the recording: by their stack if one is known, else by what else is."""
    lives = result.lives
    gradients = Counter(
        lives.requested[each]
        for each in range(lives.num_older, len(lives.sizes))
        if result.categories[each] == CODES["gradients"]
    )
    makes_states = any(
        category == CODES["optimizer_states"] for category in memoryview(result.categories)[lives.num_older :]
    )
    weights_left = Counter(_once(gradients, result))
    for each in range(lives.num_older):
        kind = result.kinds[lives.stacks[each]]
        found = _NAMED.get(kind) or _older_by_stack(kind)
        if found is None:
            found = _older_by_life(result, lives.ends[each], lives.requested[each], weights_left, makes_states)
        result.categories[each], result.levels[each] = found


def _once(gradients: Counter[int], result: Attribution) -> dict[int, int]:
    """Return how many gradients of each size one step has: those of all steps over the number of backward passes."""
    passes = max(1, sum(run.phase == OPTIMIZER for run in result.runs))
    return {size: max(1, round(count / passes)) for size, count in gradients.items()}


def _older_by_stack(kind: int) -> tuple[int, int] | None:
    names = {OPTIMIZER: "optimizer_states", BACKWARD: "gradients", FORWARD: "activations", RECOMPUTE: "activations"}
    if kind in names:
        return CODES[names[kind]], LIKELY
    if kind == BUILD:
        return CODES["weights"], UNSURE
    return (CODES["other"], UNSURE) if kind == OTHER else None


def _older_by_life(
    result: Attribution, end: int, size: int, weights_left: Counter[int], makes_states: bool
) -> tuple[int, int]:
    """Judge a block of which only the size and the end are known.

    Each weight that is trained has a gradient of its size. What else of that size stays for ever is a state of the
    optimizer, unless the recording shows the optimizer making its states.
    """
    if end != NEVER:
        if not result.trains:
            return CODES["unknown"], UNSURE
        phase = result.phase_at(end)
        if phase == BACKWARD:
            return CODES["activations"], LIKELY
        first = result.runs[0].first if result.runs else 0
        return (CODES["gradients"] if end < first or phase == OPTIMIZER else CODES["other"]), UNSURE
    if not result.runs:
        return CODES["unknown"], UNSURE
    if not result.trains or makes_states:
        return CODES["weights"], LIKELY
    if weights_left[size] > 0:
        weights_left[size] -= 1
        return CODES["weights"], LIKELY
    if size in weights_left or (size % 2 == 0 and size // 2 in weights_left):
        return CODES["optimizer_states"], LIKELY if size in weights_left else UNSURE
    return CODES["weights"], UNSURE
