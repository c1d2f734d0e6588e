"""What a command wrote, in bounded memory: the beginning (settings, sizes of the start) and the end (the death)."""

from __future__ import annotations

import re
from collections import deque

HEAD_BYTES = 1 << 20
TAIL_BYTES = 2 << 20
#: A line is cut here, as the readers of logs cut it.
MAX_LINE_BYTES = 16384
_ENDS = re.compile(rb"\r\n|\r|\n")
#: What the guard in the job logs when it goes on after a failure: messages before it are over.
_RECOVERED = re.compile(rb"^(?:[^\n]{0,120}\s)?plan \d{1,9}: [^\n]*$|: once more, unchanged$", re.MULTILINE)


class Tail:
    """Takes blocks of several streams, gives whole lines in the order in which they were finished."""

    def __init__(self, head_bytes: int = HEAD_BYTES, tail_bytes: int = TAIL_BYTES) -> None:
        self._head_bytes, self._tail_bytes = head_bytes, tail_bytes
        self._head: list[bytes] = []
        self._tail: deque[bytes] = deque()
        self._sizes = [0, 0]
        self._open: dict[int, bytes] = {}
        self.num_bytes = 0

    def take(self, stream: int, block: bytes) -> None:
        """Take what one stream wrote."""
        self.num_bytes += len(block)
        *lines, rest = _ENDS.split(self._open.get(stream, b"") + block)
        for line in lines:
            self._keep(line)
        if len(rest) > MAX_LINE_BYTES:
            self._keep(rest)
            rest = b""
        self._open[stream] = rest

    def _keep(self, line: bytes) -> None:
        line = line[:MAX_LINE_BYTES] + b"\n"
        if self._sizes[0] + len(line) <= self._head_bytes:
            self._head.append(line)
            self._sizes[0] += len(line)
            return
        self._head_bytes = 0  # nothing comes after the first line that found no room
        self._tail.append(line)
        self._sizes[1] += len(line)
        while self._sizes[1] > self._tail_bytes:
            self._sizes[1] -= len(self._tail.popleft())

    def finish(self) -> None:
        """Close the lines that are open."""
        for line in self._open.values():
            if line:
                self._keep(line)
        self._open.clear()

    def text(self) -> bytes:
        """Return what is kept."""
        return b"".join((*self._head, *self._tail))

    def last_words(self) -> bytes:
        """Return what is kept from the last recovery on: earlier messages are not what ended the command."""
        text = self.text()
        last = max((match.end() for match in _RECOVERED.finditer(text)), default=0)
        return text[last:]
