"""The file that keeps the plan between attempts of a job: written whole or not at all, by one process at a time."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from ullage.errors import InputError
from ullage.files import set_aside, write_whole
from ullage.guard.plan import Plan
from ullage.i18n import _

#: ``ullage run`` gives its command the path of the store and the number of the attempt, from 1.
STORE_VARIABLE = "ULLAGE_PLAN_STORE"
ATTEMPT_VARIABLE = "ULLAGE_ATTEMPT"
MAX_BYTES = 1 << 20


class PlanStore:
    """Where a plan lives between attempts.

    ``save`` writes a temporary file, syncs it and renames it, under a lock; it refuses to go back a generation. A
    file that cannot be read is moved aside, never overwritten.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def from_environment(cls) -> PlanStore | None:
        """Return the store that ``ullage run`` named, or None outside of it."""
        path = os.environ.get(STORE_VARIABLE, "")
        return cls(path) if path else None

    def load(self) -> Plan | None:
        """Return the plan, or None where there is no file yet; a corrupt file is moved aside and named."""
        try:
            return self._read()
        except InputError as error:
            with self._lock():
                try:  # another process may have moved it, or written a good one, meanwhile
                    return self._read()
                except InputError:
                    kept = self._move_aside()
            raise InputError(
                _("the plan cannot be read ({why}); it is kept as {kept}").format(why=error.what, kept=kept),
                where=str(self.path),
                remedy=_("start again to begin with a new plan"),
            ) from error

    def save(self, plan: Plan) -> None:
        """Write the plan in one move; the older one stays when that fails, such as on a full disk."""
        with self._lock():
            try:
                current = self._read()
            except InputError as error:
                kept = self._move_aside()
                raise InputError(
                    _("the plan in the store cannot be read; it is kept as {kept}").format(kept=kept),
                    where=str(self.path),
                ) from error
            if current == plan:
                return
            if current is not None and current.generation >= plan.generation:
                raise InputError(
                    _("the store holds generation {held}, and generation {given} is not newer").format(
                        held=current.generation, given=plan.generation
                    ),
                    where=str(self.path),
                    remedy=_("load the plan and change that one"),
                )
            write_whole(self.path, plan.to_json() + "\n", make_folder=True)

    def _read(self) -> Plan | None:
        try:
            with self.path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._failed(error) from error
        if len(data) > MAX_BYTES:
            raise InputError(_("it is too large to be a plan"), where=str(self.path))
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            raise InputError(_("it is not text"), where=str(self.path)) from error
        return Plan.from_json(text, where=str(self.path))

    def _failed(self, error: OSError) -> InputError:
        return InputError(os.strerror(error.errno or errno.EIO), where=str(self.path))

    def _move_aside(self) -> Path:
        return (set_aside(self.path) if self.path.is_file() else None) or self.path

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = self.path.with_name(f"{self.path.name}.lock").open("a+b")
        except OSError as error:
            raise self._failed(error) from error
        with file:
            _take(file.fileno())
            yield  # closing the file gives the lock back, also when the process dies


def _take(descriptor: int) -> None:
    """Wait for the lock of the whole file; the system gives it back when the file is closed."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
