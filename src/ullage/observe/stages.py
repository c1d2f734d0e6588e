"""Says what is being done to a large file: a bar on a terminal's stderr, and only after a second."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from ullage.i18n import _

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_AFTER_SECONDS = 1.0


class Stages:
    """The stages of one piece of work: reading, then others that know no length."""

    def __init__(self, *, wanted: bool | None = None) -> None:
        self._wanted = sys.stderr.isatty() if wanted is None else wanted
        self._began = time.monotonic()
        self._bar: tuple[Progress, TaskID] | None = None

    def __enter__(self) -> Stages:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, place: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar[0].stop()

    def reading(self, done: int, total: int) -> None:
        """Say how much of a file is read."""
        self._show(_("reading"), done, total)

    def __call__(self, stage: str) -> None:
        """Say what is done next."""
        self._show(stage, 0, None)

    def _show(self, stage: str, done: int, total: int | None) -> None:
        if self._bar is None:
            if not self._wanted or time.monotonic() - self._began < _AFTER_SECONDS:
                return
            self._bar = _new_bar()
        self._bar[0].update(self._bar[1], description=stage, completed=done, total=total)


def _new_bar() -> tuple[Progress, TaskID]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeElapsedColumn

    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    bar = Progress(*columns, console=Console(stderr=True), transient=True)
    bar.start()
    return bar, bar.add_task("", total=None)
