"""Write a recording: one JSON line per sample and event, in bounded space.

The first line says what is recorded (``{"ullage_recording": 1, "started", "host", "devices", ...}``), samples are
``{"t", "device", "used_bytes", ...}``, events ``{"t", "event", "text"}``. Each line is written whole, so that a
killed recorder leaves at most its last line cut. When the file is full it becomes ``NAME.1`` (older ones ``.2`` ...)
and a new one with the same first line begins; the oldest is dropped.
"""

from __future__ import annotations

import itertools
import json
import os
import socket
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ullage.errors import InputError
from ullage.guard.watch.sample import Device, Sample
from ullage.i18n import _

FORMAT = 1
DEFAULT_MAX_BYTES = 64 << 20
DEFAULT_NUM_FILES = 4
MAX_PROCESSES = 8
MAX_TEXT = 2000


class Recorder:
    """An open recording. A disk that is full ends it: ``error`` says so, and the watched job goes on."""

    def __init__(
        self,
        path: str | os.PathLike[str],
        devices: Sequence[Device],
        *,
        max_bytes: int = DEFAULT_MAX_BYTES,
        num_files: int = DEFAULT_NUM_FILES,
        details: dict[str, Any] | None = None,
    ) -> None:
        self.path, self.max_bytes, self.num_files = Path(path), max_bytes, max(1, num_files)
        self.error = ""
        self._start = time.monotonic()
        self._host_index = 1 + max((each.index for each in devices), default=-1)
        self._head = {
            "ullage_recording": FORMAT,
            "started": datetime.now(timezone.utc).isoformat(timespec="milliseconds"),
            "host": socket.gethostname(),
            "devices": [
                {"index": self._index(each), "name": each.name, "total_bytes": each.total_bytes, "kind": each.kind}
                for each in devices
            ],
            **(details or {}),
        }
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self.path.exists() and self.path.stat().st_size:
                self._rotate()
            self._open()
        except OSError as error:
            raise InputError(
                _("the recording cannot be written: {why}").format(why=error.strerror or error), where=str(self.path)
            ) from None

    def _index(self, device: Device) -> int:
        """Return the number of a device in the recording: the host comes after the GPUs."""
        return device.index if device.index >= 0 else self._host_index

    def _open(self) -> None:
        self._descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        self._size = 0
        self._write(self._head)

    def _rotate(self) -> None:
        """Move NAME to NAME.1, NAME.1 to NAME.2 ...; the oldest goes."""
        names = [self.path, *(self.path.with_name(f"{self.path.name}.{at}") for at in range(1, self.num_files))]
        if self.num_files == 1:
            self.path.unlink()
            return
        for old, new in reversed(list(itertools.pairwise(names))):
            if old.exists():
                old.replace(new)

    def _write(self, values: dict[str, Any]) -> None:
        line = json.dumps(values, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"
        os.write(self._descriptor, line)
        self._size += len(line)

    def _put(self, values: dict[str, Any]) -> None:
        if self.error:
            return
        try:
            if self._size >= self.max_bytes:
                os.close(self._descriptor)
                self._rotate()
                self._open()
            self._write(values)
        except OSError as error:
            self.error = error.strerror or str(error)

    def seconds(self) -> float:
        """Return the time of the recording."""
        return round(time.monotonic() - self._start, 3)

    def samples(self, samples: Sequence[Sample]) -> None:
        """Write the samples of a moment."""
        moment = self.seconds()
        for sample in samples:
            if not sample.error:
                self._put({"t": moment, "device": self._index(sample.device), **_values(sample)})

    def event(self, event: str, text: str = "", **more: Any) -> None:
        """Write an event."""
        self._put({"t": self.seconds(), "event": event, "text": text[:MAX_TEXT], **more})

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _values(sample: Sample) -> dict[str, Any]:
    found: dict[str, Any] = {"used_bytes": sample.used_bytes}
    for name in ("allocated_bytes", "reserved_bytes", "num_alloc_retries", "num_ooms"):
        value = getattr(sample, name)
        if value is not None:
            found[name] = value
    if sample.processes:
        found["processes"] = [
            {"pid": each.pid, "used_bytes": each.used_bytes} for each in sample.processes[:MAX_PROCESSES]
        ]
    return found
