"""The state as JSON, as a line of text, and as the table of a terminal."""

from __future__ import annotations

import socket
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from ullage.guard.watch.sample import Sample
from ullage.guard.watch.watcher import State
from ullage.i18n import _
from ullage.units import format_bytes

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 1
MAX_PROCESSES = 5


def state_json(state: State) -> dict[str, Any]:
    """Return a state as plain values: the keys of ``ullage schema watch``."""
    return {
        "schema_version": SCHEMA_VERSION,
        "time": datetime.fromtimestamp(state.time, timezone.utc).isoformat(timespec="milliseconds"),
        "host": socket.gethostname(),
        "nvml_missing": state.nvml_missing,
        "devices": [_device(sample, state) for sample in state.samples],
    }


def _device(sample: Sample, state: State) -> dict[str, Any]:
    device, line = sample.device, state.line.line_bytes(sample.device)
    return {
        "index": device.index,
        "name": device.name,
        "kind": device.kind,
        "total_bytes": device.total_bytes,
        "used_bytes": sample.used_bytes,
        "line_bytes": line,
        "reserve_passed": sample.used_bytes > line,
        "growth_bytes_per_second": state.trend.bytes_per_second(device.index),
        "seconds_to_full": state.trend.seconds_to_full(sample),
        "allocated_bytes": sample.allocated_bytes,
        "reserved_bytes": sample.reserved_bytes,
        "num_alloc_retries": sample.num_alloc_retries,
        "num_ooms": sample.num_ooms,
        "processes": [{"pid": each.pid, "name": each.name, "used_bytes": each.used_bytes} for each in sample.processes],
        "error": sample.error,
    }


def line_of(state: State) -> str:
    """Return one line per state, for logs."""
    words = []
    for sample in state.samples:
        used, total = format_bytes(sample.used_bytes), format_bytes(sample.device.total_bytes)
        mark = " !" if sample.used_bytes > state.line.line_bytes(sample.device) else ""
        words.append(f"{sample.device.name}: {sample.error or f'{used} / {total} ({sample.share:.0%}){mark}'}")
    stamp = datetime.fromtimestamp(state.time).astimezone().isoformat(timespec="seconds")
    return f"{stamp}  " + "   ".join(words)


def table(state: State) -> Table:
    """Return the table of a terminal."""
    from rich.table import Table

    found = Table(title=_("memory now"), title_justify="left", expand=False)
    for heading in (_("device"), _("used"), _("share"), _("trend"), _("PyTorch"), _("largest processes")):
        found.add_column(heading, overflow="fold")
    for sample in state.samples:
        found.add_row(*_row(sample, state))
    return found


def _row(sample: Sample, state: State) -> list[Any]:
    from rich.text import Text

    device, line = sample.device, state.line.line_bytes(sample.device)
    name = f"{device.index} {device.name}" if device.kind == "gpu" else device.name
    if sample.error:
        return [Text(name), Text(sample.error, style="red"), "", "", "", ""]
    style = "red" if sample.used_bytes > line else "green"
    bar = "█" * round(20 * min(1.0, sample.share)) + "░" * (20 - round(20 * min(1.0, sample.share)))
    return [
        Text(name),
        Text(
            _("{used} of {total}").format(used=format_bytes(sample.used_bytes), total=format_bytes(device.total_bytes))
        ),
        Text(f"{bar} {sample.share:.0%}", style=style),
        Text(_trend(sample, state)),
        Text(_torch(sample)),
        Text(
            "\n".join(
                f"{each.pid} {each.name} {format_bytes(each.used_bytes)}" for each in sample.processes[:MAX_PROCESSES]
            )
        ),
    ]


def _trend(sample: Sample, state: State) -> str:
    slope = state.trend.bytes_per_second(sample.device.index)
    if slope is None:
        return ""
    words = _("{amount}/min").format(amount=format_bytes(slope * 60))
    left = state.trend.seconds_to_full(sample)
    if left is not None and left < 24 * 3600:
        words += "\n" + _("full in {minutes:,.0f} min").format(minutes=left / 60)
    return words


def _torch(sample: Sample) -> str:
    if not sample.counters:
        return ""
    words = _("{allocated} tensors\n{reserved} reserved").format(
        allocated=format_bytes(sample.allocated_bytes or 0), reserved=format_bytes(sample.reserved_bytes or 0)
    )
    if sample.num_alloc_retries or sample.num_ooms:
        words += "\n" + _("{retries} retries, {ooms} failed").format(
            retries=sample.num_alloc_retries, ooms=sample.num_ooms
        )
    return words
