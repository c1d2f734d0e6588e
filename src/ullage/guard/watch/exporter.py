"""PyTorch's counters of a training process, written for ``ullage watch`` to read.

    from ullage.guard.watch.exporter import Exporter
    exporter = Exporter()                # the folder that ``ullage run`` or ``ullage watch --counters`` names
    for step, batch in enumerate(loader):
        ...
        exporter.update(step)            # at most once a second; a few dictionary look-ups otherwise

One small file per process, replaced in one move: a reader never sees half of it, and what a killed process leaves is
known by its age and its process number. Source: torch@2.13.0:torch/cuda/memory.py:memory_stats.
"""

from __future__ import annotations

import json
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

FOLDER_VARIABLE = "ULLAGE_COUNTERS"
FORMAT = 1
MAX_FILE_BYTES = 1 << 16
_STATS = {
    "allocated_bytes": "allocated_bytes.all.current",
    "reserved_bytes": "reserved_bytes.all.current",
    "peak_allocated_bytes": "allocated_bytes.all.peak",
    "peak_reserved_bytes": "reserved_bytes.all.peak",
    "num_alloc_retries": "num_alloc_retries",
    "num_ooms": "num_ooms",
}


def default_folder() -> Path:
    """Return the folder of counters: what the environment names, else one of this user."""
    import tempfile

    named = os.environ.get(FOLDER_VARIABLE, "")
    user = os.getuid() if hasattr(os, "getuid") else 0
    return Path(named) if named else Path(tempfile.gettempdir()) / f"ullage-counters-{user}"


class Exporter:
    """Writes the counters of this process. Never raises into the training loop: ``error`` keeps what went wrong."""

    def __init__(self, folder: str | os.PathLike[str] | None = None, *, every_seconds: float = 1.0) -> None:
        self.folder = Path(folder) if folder is not None else default_folder()
        self.path = self.folder / f"{os.getpid()}.json"
        self.every_seconds, self.error = every_seconds, ""
        self._next = 0.0

    def update(self, step: int = -1) -> bool:
        """Write the counters when it is time; true when they were written."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.every_seconds
        try:
            self._write(step)
        except OSError as error:
            self.error = str(error)
            return False
        return True

    def _write(self, step: int) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        values = {
            "ullage_counters": FORMAT,
            "pid": os.getpid(),
            "rank": int(os.environ.get("RANK", "0") or 0),
            "time": time.time(),
            "step": step,
            "devices": device_counters(),
        }
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(values))
        temporary.replace(self.path)

    def close(self) -> None:
        """Take the file away."""
        with suppress(OSError):
            self.path.unlink(missing_ok=True)


def device_counters() -> list[dict[str, int]]:
    """Return the counters of each device that PyTorch has used in this process; none where torch is not loaded."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        stats = torch.cuda.memory_stats(index)
        values = {name: int(stats.get(key, 0)) for name, key in _STATS.items()}
        if values["peak_reserved_bytes"]:
            found.append({"device": physical_index(index), **values})
    return found


def physical_index(index: int) -> int:
    """Return the index that NVML uses for a device, through CUDA_VISIBLE_DEVICES; the same where that names none."""
    words = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    return int(words[index]) if index < len(words) and words[index].isdigit() else index
