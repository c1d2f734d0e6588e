"""The guard's own light checkpoint: model, optimizer, scheduler, scaler, random state, position; on disk or in memory.

Each rank writes its own part (``PATH.rank-N``) beside the last one; only when every rank has written do all rename,
so that a full disk on one leaves the old set whole on all. A rank that is killed between these renames leaves parts of
two steps: until all have renamed the one before is kept (``PATH.rank-N.before``), and the newest step that all ranks
have is restored.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ullage.errors import InputError
from ullage.guard.state import random_state, set_random_state
from ullage.guard.votes import OK, SHRINK, Votes
from ullage.i18n import _

FORMAT = 1
_LOCAL = "ullage_local_shard"


class Checkpoint:
    """Save every ``every`` optimizer steps; ``position()`` says where the data loader stands, in plain values.

    ``path=None`` keeps one checkpoint in host memory: it outlives a failed optimizer step, not the process.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        every: int = 100,
        position: Callable[[], Any] | None = None,
    ) -> None:
        if every < 1:
            raise InputError(_("{name} must be at least {least}").format(name="every", least=1))
        self.path = Path(path) if path is not None else None
        self.every, self.position = every, position
        self._memory: bytes = b""

    def exists(self, votes: Votes) -> bool:
        """True where every rank has its part."""
        mine = bool(self._memory) if self.path is None else any(each.exists() for each in self._files(votes))
        return all(votes.exchange(mine))

    def save(self, votes: Votes, step: int, parts: Mapping[str, Any]) -> str:
        """Write a checkpoint; return a sentence where it could not be written and the old one is kept."""
        import torch

        state = {name: _localized(part.state_dict()) for name, part in parts.items() if part is not None}
        where = self.position() if self.position else None
        whole = {"format": FORMAT, "step": step, "state": state, "random": _plain(random_state()), "position": where}
        if self.path is None:
            buffer = io.BytesIO()
            torch.save(whole, buffer)
            self._memory = buffer.getvalue()
            return ""
        return self._write(votes, whole)

    def _write(self, votes: Votes, whole: Any) -> str:
        import torch

        target, before = self._files(votes)
        temporary = target.with_name(f".{target.name}.tmp")
        problem = ""
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            torch.save(whole, temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        except (OSError, RuntimeError) as error:  # torch's writer raises RuntimeError on a full disk
            number = getattr(error, "errno", None)
            problem = _("the disk is full") if number in (errno.ENOSPC, errno.EDQUOT) else str(error)[:200]
        agreed = votes.vote(SHRINK if problem else OK)
        if agreed.code == OK:
            if target.exists():
                target.replace(before)
            temporary.replace(target)
            votes.exchange(True)  # all have the new part: only now the old one may go
            before.unlink(missing_ok=True)
            return ""
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        why = problem or _("another rank could not write its part")
        return _("{path}: the checkpoint cannot be written ({why}); the old one is kept").format(path=target, why=why)

    def restore(self, votes: Votes, parts: Mapping[str, Any]) -> tuple[int, Any]:
        """Load the last checkpoint on every rank; return its step and position."""
        whole = self._read(votes)
        common = min(votes.exchange(whole["step"]))
        if whole["step"] != common and self.path is not None and self._files(votes)[1].exists():
            whole = self._read(votes, before=True)
        steps = set(votes.exchange(whole["step"]))
        if len(steps) != 1:
            raise InputError(
                _("the parts of the checkpoint are of different steps: {steps}").format(steps=sorted(steps)),
                where=str(self.path),
            )
        for name, part in parts.items():
            if part is None:
                continue
            if name not in whole["state"]:
                raise InputError(_("the checkpoint has no {name}").format(name=name), where=str(self.path))
            part.load_state_dict(_restored(whole["state"][name], part.state_dict(), part))
        set_random_state(_unplain(whole["random"]))
        return int(whole["step"]), whole["position"]

    def _read(self, votes: Votes, *, before: bool = False) -> Any:
        import torch

        if self.path is None:
            if not self._memory:
                raise InputError(_("there is no checkpoint yet"))
            return torch.load(io.BytesIO(self._memory), weights_only=True)
        newest, older = self._files(votes)
        target = newest if newest.exists() and not before else older
        try:
            whole = torch.load(target, weights_only=True, map_location="cpu")
        except Exception as error:
            raise InputError(
                _("the checkpoint cannot be read ({why})").format(why=type(error).__name__), where=str(target)
            ) from error
        if not isinstance(whole, dict) or whole.get("format") != FORMAT:
            raise InputError(_("this is no checkpoint of the guard"), where=str(target))
        return whole

    def _files(self, votes: Votes) -> tuple[Path, Path]:
        """Return this rank's part and the one before it."""
        assert self.path is not None
        name = f"{self.path.name}.rank-{votes.rank}"
        return self.path.with_name(name), self.path.with_name(f"{name}.before")


def _localized(value: Any) -> Any:
    """Return a state without DTensors: the local shard of each."""
    if hasattr(value, "to_local"):
        return {_LOCAL: value.to_local()}
    if isinstance(value, Mapping):
        return {key: _localized(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_localized(each) for each in value]
    return value


def _restored(kept: Any, now: Any, part: Any) -> Any:
    """Return the kept state with its shards made DTensors again, laid out as the parameters are."""
    layouts = _layouts(part)

    def walk(value: Any, like: Any, key: Any) -> Any:
        if isinstance(value, dict) and _LOCAL in value:
            return _sharded(value[_LOCAL], like if hasattr(like, "to_local") else layouts.get(key))
        if isinstance(value, dict):
            known = like if isinstance(like, Mapping) else {}
            return {
                name: walk(each, known.get(name), name if isinstance(name, int) else key)
                for name, each in value.items()
            }
        return value

    return walk(kept, now, None)


def _layouts(part: Any) -> dict[int, Any]:
    """Return the parameter of each number in an optimizer's state."""
    groups = getattr(part, "param_groups", None) or []
    return dict(enumerate(parameter for group in groups for parameter in group["params"]))


def _sharded(local: Any, like: Any) -> Any:
    from torch.distributed.tensor import DTensor

    if like is None:
        raise InputError(_("a shard of the checkpoint belongs to no parameter of the optimizer"))
    return DTensor.from_local(
        local.to(like.device),
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def _plain(state: tuple[Any, ...]) -> list[Any]:
    """Return the random state in values that a safe loader accepts."""
    cpu, device, python, numpy = state
    if numpy is not None:
        numpy = [numpy[0], [int(each) for each in numpy[1]], *numpy[2:]]
    return [cpu, device, [python[0], list(python[1]), python[2]], numpy]


def _unplain(state: list[Any]) -> tuple[Any, ...]:
    cpu, device, python, numpy = state
    if numpy is not None:
        numpy = tuple(numpy)
    return cpu, device, (python[0], tuple(python[1]), python[2]), numpy
