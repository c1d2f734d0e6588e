"""Stacks, each distinct one kept once: millions of events share a few thousand."""

from __future__ import annotations

from collections.abc import Iterable

#: (function, file, line), as a snapshot has it.
Frame = tuple[str, str, int]
#: The innermost frame first.
Stack = tuple[Frame, ...]

#: The number of the empty stack, in every table.
NO_STACK = 0


class Stacks:
    """Frames and stacks, numbered in the order in which they are met."""

    __slots__ = ("_frame_numbers", "_numbers", "_rows", "frames")

    def __init__(self) -> None:
        self.frames: list[Frame] = []
        self._frame_numbers: dict[Frame, int] = {}
        self._rows: list[tuple[int, ...]] = [()]
        self._numbers: dict[tuple[int, ...], int] = {(): NO_STACK}

    def __len__(self) -> int:
        return len(self._rows)

    def frame_number(self, frame: Frame) -> int:
        """Return the number of a frame, a new one when it is new."""
        found = self._frame_numbers.get(frame)
        if found is None:
            found = self._frame_numbers[frame] = len(self.frames)
            self.frames.append(frame)
        return found

    def number_of_row(self, row: tuple[int, ...]) -> int:
        """Return the number of the stack with the frames of these numbers."""
        found = self._numbers.get(row)
        if found is None:
            found = self._numbers[row] = len(self._rows)
            self._rows.append(row)
        return found

    def number(self, frames: Iterable[Frame]) -> int:
        """Return the number of a stack, a new one when it is new."""
        return self.number_of_row(tuple(map(self.frame_number, frames)))

    def row(self, number: int) -> tuple[int, ...]:
        """Return the numbers of the frames of a stack."""
        return self._rows[number]

    def stack(self, number: int) -> Stack:
        """Return a stack by its number."""
        return tuple(self.frames[at] for at in self._rows[number])
