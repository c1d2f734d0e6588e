"""What ended an attempt: memory of the device, of the host or of an engine's pool, a cascade, silence, or an error.

The words of messages are read by :mod:`ullage.observe`; here they are weighed against the exit code, the kernel's
counters and the plan store.
"""

from __future__ import annotations

import io
import re
import signal
from dataclasses import dataclass, replace

from ullage.errors import InputError
from ullage.guard import CANNOT_FIT_EXIT_CODE, RESTART_EXIT_CODE
from ullage.guard.run.child import Ended
from ullage.i18n import _
from ullage.observe.inspection import Inspection, inspect_stream
from ullage.observe.scan import scan

#: A message further from the end than this is not what ended the command: it went on writing.
WINDOW_BYTES = 512 << 10
#: Kinds of death that a smaller plan may mend, those that come and go, and those that a restart repeats.
OF_MEMORY = ("device_oom", "library_oom", "kv_pool", "start_budget", "host_oom")
TRANSIENT = ("killed", "host_killed", "cascade", "stall")
ORDINARY = ("crash", "disk_full")
#: Facts of ``observe`` → kinds here.
_KINDS = {
    "device_oom": "device_oom", "xla_oom": "device_oom", "buffer_oom": "device_oom", "kv_pool": "kv_pool",
    "pool_full": "kv_pool", "start_budget": "start_budget", "profile_moved": "start_budget",
    "library_oom": "library_oom", "host_kill": "host_killed", "host_oom": "host_oom", "killed": "killed",
    "timeout": "cascade",
}  # fmt: skip
_EXIT_CODES = re.compile(rb"exitcode\s*:\s*(-?\d{1,6})\s*\(pid:?\s*(\d{1,9})\)|exitcode: (-?\d{1,6})\) local_rank")
_PIDS = re.compile(rb"\bpid:?\s*(\d{1,9})\)")
_ROOT_CAUSE = b"Root Cause (first observed failure)"
_DISK_FULL = re.compile(rb"No space left on device|Disk quota exceeded|File too large|ENOSPC|EDQUOT|the disk is full")
_CANNOT_FIT = re.compile(rb"cannot fit|does not fit", re.IGNORECASE)
#: What ranks say when another one is gone: gloo, NCCL, the store, torchrun's agents.
_LOST_PEER = re.compile(
    r"onnection (?:closed|reset|refused)|Broken pipe|[Ss]ocket [Tt]imeout|DistNetworkError|DistBackendError"
    r"|DistStoreError|Timed out waiting|RendezvousConnectionError|remote process exited|Gloo|NCCL error"
)
_OF_LAUNCHERS = re.compile(r"^(?:\w+\.)*(?:ChildFailedError|SignalException)\b")
#: Errors at the end of a log that are looked at: one per rank of a large job.
MAX_ERRORS = 512
_LAST_ERROR = re.compile(
    rb"^(?:\[[^\]\n]{1,40}\]:\s?)?((?:[A-Za-z_][\w.]*\.)?[A-Z]\w*(?:Error|Exception|Exit|Interrupt)\b[^\n]{0,400})",
    re.MULTILINE,
)
_NUMBERS = re.compile(r"0x[0-9a-f]+|\d+(?:\.\d+)?")


@dataclass(frozen=True, kw_only=True)
class Death:
    """What ended an attempt.

    Attributes:
        kind: ``none`` (it succeeded), ``restart`` (the job saved a smaller plan and asks to be started again),
            ``cannot_fit`` (the job says so), ``device_oom``, ``library_oom``, ``kv_pool``, ``start_budget``,
            ``host_oom`` (an allocation on the host failed), ``host_killed`` (by the kernel), ``killed`` (by nobody
            known), ``cascade`` (ranks waited), ``stall``, ``disk_full``, ``crash``, ``not_started``, ``signal``.
        sentence: for people. ``signature`` is equal for failures that are the same.
        found: the inspection of the log, where it says something. ``worker_code``: of the first worker that failed.
    """

    kind: str
    sentence: str
    signature: str = ""
    found: Inspection | None = None
    worker_code: int | None = None


def judge(ended: Ended, *, num_kills: int = 0, killed_pids: tuple[int, ...] = ()) -> Death:
    """Return what ended an attempt.

    Args:
        ended: the attempt.
        num_kills: what the cgroup counted meanwhile.
        killed_pids: what the kernel's log names; it counts where the command or a worker is among them.
    """
    if ended.errno:
        return Death(kind="not_started", sentence=_("the command could not be started"), signature="not_started")
    if ended.exit_code == 0 and ended.by == "command":
        return Death(kind="none", sentence=_("it ended well"))
    if ended.by == "signal":
        name = signal.Signals(ended.asked_to_end).name
        return Death(kind="signal", sentence=_("ended on request ({name})").format(name=name))
    words = ended.tail.last_words()
    worker = worker_exit_code(words)
    asked = _asked(ended, worker, words)
    own = {ended.pid, *(int(pid) for pid in _PIDS.findall(words))}
    ours = tuple(pid for pid in killed_pids if pid in own)
    return asked or _failed(ended, words, worker, num_kills, ours)


def worker_exit_code(words: bytes) -> int | None:
    """Return the exit code of the first worker that failed, as torchrun lists it; -9 means signal 9."""
    place = words.rfind(_ROOT_CAUSE)
    match = _EXIT_CODES.search(words, place) if place >= 0 else None
    if match is None:
        match = _EXIT_CODES.search(words)
    return int(match.group(1) or match.group(3)) if match else None


def _asked(ended: Ended, worker: int | None, words: bytes) -> Death | None:
    """Return what the guard in the job asks for; any rank may say it, the others fail because of it."""
    codes = {ended.exit_code, *(int(match.group(1) or match.group(3)) for match in _EXIT_CODES.finditer(words))}
    if RESTART_EXIT_CODE in codes:
        sentence = _("the job asks to be started again with its smaller plan (exit code {code})")
        return Death(
            kind="restart", sentence=sentence.format(code=RESTART_EXIT_CODE), signature="restart", worker_code=worker
        )
    if CANNOT_FIT_EXIT_CODE in codes and _CANNOT_FIT.search(words):
        sentence = _("the job says that its smallest plan does not fit")
        return Death(kind="cannot_fit", sentence=sentence, signature="cannot_fit", worker_code=worker)
    return None


def _failed(ended: Ended, words: bytes, worker: int | None, num_kills: int, killed_pids: tuple[int, ...]) -> Death:
    found = _inspected(words)
    root = found.facts[0] if found is not None and found.facts else None
    kind = _KINDS.get(root.kind, "") if root is not None else ""
    if found is not None and kind in OF_MEMORY:
        size = next((size for name, size in found.sizes if name == "requested"), 0)
        same = f"{kind} {found.framework} {found.phase} {size}"
        sentence = _("{verdict}: {why}").format(verdict=found.verdict, why=found.why)
        return Death(kind=kind, sentence=sentence, signature=same, found=found, worker_code=worker)
    if num_kills > 0 or killed_pids or kind == "host_killed":
        which = ", ".join(map(str, killed_pids[:8]))
        sentence = _("the kernel killed for the host's memory (processes {which})").format(which=which or "?")
        return Death(kind="host_killed", sentence=sentence, signature="host_killed", found=found, worker_code=worker)
    if ended.by == "stall":
        sentence = _("no output and no heartbeat for too long")
        return Death(kind="stall", sentence=sentence, signature="stall", found=found, worker_code=worker)
    if ended.signal == signal.SIGKILL or worker == -signal.SIGKILL or (ended.exit_code == 137 and kind == "killed"):
        sentence = _("killed by SIGKILL, and the kernel does not say that memory was the reason")
        return Death(kind="killed", sentence=sentence, signature="killed", found=found, worker_code=worker)
    if kind == "cascade":
        assert found is not None
        return Death(kind=kind, sentence=found.why, signature=kind, found=found, worker_code=worker)
    return _ordinary(ended, words, worker, found)


def _inspected(words: bytes) -> Inspection | None:
    """Inspect the end of a log; the settings that an engine printed at its start count too."""
    try:
        found = inspect_stream(io.BytesIO(words[-WINDOW_BYTES:])) if words else None
    except InputError:
        return None
    if found is not None and len(words) > WINDOW_BYTES:
        settings = {**scan(io.BytesIO(words[:-WINDOW_BYTES])).collected.settings, **dict(found.settings)}
        found = replace(found, settings=tuple(sorted(settings.items())))
    return found


def _ordinary(ended: Ended, words: bytes, worker: int | None, found: Inspection | None) -> Death:
    words = words[-WINDOW_BYTES:]
    error = _first_error(words)
    if match := _DISK_FULL.search(words):
        sentence = _("the disk is full: {words}").format(words=match.group(0).decode())
        return Death(kind="disk_full", sentence=sentence, signature="disk_full", found=found, worker_code=worker)
    if _LOST_PEER.search(error) or (not error and worker == -signal.SIGTERM):
        sentence = _("a rank lost its peers, and none says why: {error}").format(error=error)
        return Death(kind="cascade", sentence=sentence, signature="cascade", found=found, worker_code=worker)
    if ended.signal:
        error = error or signal.Signals(ended.signal).name
    sentence = _("an ordinary error (exit code {code}): {error}").format(
        code=ended.exit_code, error=error or _("the log names none")
    )
    same = f"crash {ended.exit_code} {_NUMBERS.sub('#', error)}"
    return Death(kind="crash", sentence=sentence, signature=same, found=found, worker_code=worker)


def _first_error(words: bytes) -> str:
    """Return the error that the log names at its end: of the rank that failed, not of those that lost it.

    What launchers print is left out; where every rank only lost its peers, the last of those errors is returned.
    """
    errors = [
        " ".join(match.group(1).decode("utf-8", "replace").split())[:200] for match in _LAST_ERROR.finditer(words)
    ]
    errors = [error for error in errors[-MAX_ERRORS:] if not _OF_LAUNCHERS.search(error)]
    own = [error for error in errors if not _LOST_PEER.search(error)]
    return next(reversed(own or errors), "")
