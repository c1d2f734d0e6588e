"""Alarm rules for Prometheus, as YAML text."""

from __future__ import annotations

import json
from dataclasses import dataclass

from ullage.i18n import _

DEFAULT_MINUTES = 30


@dataclass(frozen=True, kw_only=True)
class Alert:
    """A rule: its name, its query, how long it must hold, and what it says."""

    name: str
    query: str
    hold: str
    severity: str
    summary: str


def alerts(minutes: int = DEFAULT_MINUTES) -> tuple[Alert, ...]:
    """Return the rules. ``minutes``: how far ahead "full soon" looks.

    A counter that appears with a value above 0 has no earlier value to rise from: that case is asked for by itself.
    """
    place = "{{ $labels.instance }} device {{ $labels.device }}"
    return (
        Alert(
            name="UllageOutOfMemory",
            query=_risen("ullage_torch_ooms_total"),
            hold="0m",
            severity="critical",
            summary=_("{place}: an allocation failed").format(place=place),
        ),
        Alert(
            name="UllageAllocRetries",
            query=_risen("ullage_torch_alloc_retries_total"),
            hold="0m",
            severity="warning",
            summary=_("{place}: the allocator emptied its cache to go on; the job is at the edge").format(place=place),
        ),
        Alert(
            name="UllageReservePassed",
            query="ullage_device_used_bytes > ullage_device_reserve_line_bytes",
            hold="2m",
            severity="warning",
            summary=_("{place}: the reserve is used").format(place=place),
        ),
        Alert(
            name="UllageFullSoon",
            query=f"predict_linear(ullage_device_used_bytes[15m], {60 * minutes}) > ullage_device_total_bytes"
            " and ullage_device_growth_bytes_per_second > 0",
            hold="5m",
            severity="warning",
            summary=_("{place}: full within {minutes} minutes if it goes on like this").format(
                place=place, minutes=minutes
            ),
        ),
        Alert(
            name="UllageDeviceSilent",
            query="ullage_device_up == 0",
            hold="2m",
            severity="warning",
            summary=_("{place}: the device does not answer").format(place=place),
        ),
        Alert(
            name="UllageWatchAbsent",
            query="absent(ullage_device_up)",
            hold="5m",
            severity="warning",
            summary=_("no ullage watch is scraped"),
        ),
    )


def _risen(counter: str) -> str:
    return f"increase({counter}[10m]) > 0 or ({counter} > 0 unless {counter} offset 10m)"


def alerts_yaml(minutes: int = DEFAULT_MINUTES) -> str:
    """Return the rules as Prometheus reads them. Strings are JSON strings, which are YAML too."""
    lines = ["groups:", "  - name: ullage", "    rules:"]
    for alert in alerts(minutes):
        lines += [
            f"      - alert: {alert.name}",
            f"        expr: {json.dumps(alert.query)}",
            f"        for: {alert.hold}",
            "        labels:",
            f"          severity: {alert.severity}",
            "        annotations:",
            f"          summary: {json.dumps(alert.summary, ensure_ascii=False)}",
        ]
    return "\n".join(lines) + "\n"
