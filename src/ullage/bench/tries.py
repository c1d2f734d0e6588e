"""Running one order on every rank, each in a process of its own, and saying what became of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ullage.bench.ranks import Ranks, free_port
from ullage.bench.worker import Order
from ullage.i18n import _

POLL_SECONDS = 0.05
#: What torchrun tells its children; the processes of a try make a group of their own.
_ELASTIC = ("TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RUN_ID", "GROUP_RANK", "ROLE_RANK")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Answers of all ranks; ``died`` is the first reason that stopped one, memory before the others."""

    answers: tuple[dict[str, Any], ...]
    died: dict[str, str] | None
    seconds: float

    @property
    def peak_used_bytes(self) -> int | None:
        """The most used on any rank that answered."""
        return max((answer["peaks"]["used_bytes"] for answer in self.answers if answer.get("peaks")), default=None)


def run_order(order: Order, ranks: Ranks, timeout: float, *, environment: Mapping[str, str] | None = None) -> Outcome:
    """Run ``order`` on every rank; one rank that dies ends the try for all. ``environment`` is laid over our own."""
    begun = time.monotonic()
    order = replace(
        order,
        rank=ranks.rank,
        local_rank=ranks.local_rank,
        world_size=ranks.world_size,
        master_port=ranks.from_first(free_port()),
    )
    with tempfile.TemporaryDirectory(prefix="ullage-bench-") as folder:
        answer = _one_process(order, ranks, Path(folder), timeout, environment or {})
    answers = ranks.gather(answer)
    reasons = [one["died"] for one in answers if one["died"]]
    first = {"memory": 0, "killed": 1, "error": 2, "timeout": 3, "stopped": 4}
    died = min(reasons, key=lambda reason: first.get(reason["cause"], 2), default=None)
    return Outcome(answers=tuple(answers), died=died, seconds=time.monotonic() - begun)


def _one_process(
    order: Order, ranks: Ranks, folder: Path, timeout: float, environment: Mapping[str, str]
) -> dict[str, Any]:
    (folder / "order.json").write_text(order.to_json(), encoding="utf-8")
    words = [sys.executable, "-m", "ullage.bench.worker", str(folder / "order.json"), str(folder / "answer.json")]
    with (folder / "stderr").open("wb") as complaints:
        process = subprocess.Popen(
            words, stdout=complaints, stderr=complaints, env={**_environment(), **environment}, start_new_session=True
        )
        try:
            stopped = _wait(process, ranks, folder / "answer.json", timeout)
        finally:
            _end(process)
    return _answer(process.returncode, folder, stopped)


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _ELASTIC}


def _wait(process: subprocess.Popen[bytes], ranks: Ranks, answer: Path, timeout: float) -> str:
    """Wait until every rank has finished; return why this one was stopped, empty when it ended by itself."""
    deadline = time.monotonic() + timeout
    while True:
        finished = process.poll() is not None
        late = not finished and time.monotonic() > deadline
        dead = late or (finished and (process.returncode != 0 or _died(answer)))
        all_finished, any_dead = ranks.agree(finished=finished, dead=dead)
        if late:
            return "timeout"
        if all_finished or any_dead:
            return "" if finished else "stopped"
        time.sleep(POLL_SECONDS)


def _died(answer: Path) -> bool:
    try:
        return json.loads(answer.read_text(encoding="utf-8"))["died"] is not None
    except (OSError, ValueError, KeyError):
        return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process that this try started, and what that started."""
    if process.poll() is None:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            process.kill()
        process.wait()


def _answer(code: int, folder: Path, stopped: str) -> dict[str, Any]:
    path = folder / "answer.json"
    if path.is_file():
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return found
    return {"died": _reason(code, folder / "stderr", stopped), "peaks": None, "rows": [], "curve": [], "marks": {}}


def _reason(code: int, complaints: Path, stopped: str) -> dict[str, str]:
    if stopped == "timeout":
        return {"cause": "timeout", "detail": _("did not end in time")}
    if stopped:
        return {"cause": "stopped", "detail": _("ended because another rank died")}
    if code in (-signal.SIGKILL, 128 + signal.SIGKILL):
        return {"cause": "killed", "detail": _("killed, as the kernel does when the host runs out of memory")}
    lines = [line for line in complaints.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1].strip()[:300] if lines else ""
    return {"cause": "error", "detail": _("exit code {code}: {last}").format(code=code, last=last)}
