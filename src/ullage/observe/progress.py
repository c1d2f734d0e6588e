"""A bar for files that take more than a second to read: on a terminal's stderr only."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from ullage.i18n import _
from ullage.observe.streams import Readable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_AFTER_SECONDS = 1.0


class Watched:
    """A stream whose reading is shown; ``total`` is its length in bytes, None for a pipe."""

    def __init__(self, stream: Readable, total: int | None) -> None:
        self._stream, self._total = stream, total
        self._began = time.monotonic()
        self._read, self._wanted = 0, sys.stderr.isatty()
        self._shown: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Watched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None:
        if self._shown is not None:
            self._shown[0].stop()

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes."""
        block = self._stream.read(size)
        self._read += len(block)
        if self._shown is not None:
            self._shown[0].update(self._shown[1], completed=self._read)
        elif self._wanted and time.monotonic() - self._began > _AFTER_SECONDS:
            self._show()
        return block

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

        bar = Progress(
            "{task.description}", BarColumn(), DownloadColumn(binary_units=True), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        bar.start()
        self._shown = (bar, bar.add_task(_("reading"), total=self._total, completed=self._read))
