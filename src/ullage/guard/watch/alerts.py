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
    """Return the rules. ``minutes``: how far ahead "full soon" looks."""
    place = "{{ $labels.instance }} device {{ $labels.device }}"
    soon = f"predict_linear(ullage_device_used_bytes[15m], {60 * minutes}) > ullage_device_total_bytes"
    rows = (
        ("UllageOutOfMemory", _risen("ullage_torch_ooms_total"), "0m", "critical", _("{place}: an allocation failed")),
        (
            "UllageAllocRetries",
            _risen("ullage_torch_alloc_retries_total"),
            "0m",
            "warning",
            _("{place}: the allocator emptied its cache to go on; the job is at the edge"),
        ),
        (
            "UllageReservePassed",
            "ullage_device_used_bytes > ullage_device_reserve_line_bytes",
            "2m",
            "warning",
            _("{place}: the reserve is used"),
        ),
        (
            "UllageFullSoon",
            f"{soon} and ullage_device_growth_bytes_per_second > 0",
            "5m",
            "warning",
            _("{place}: full within {minutes} minutes if it goes on like this"),
        ),
        ("UllageDeviceSilent", "ullage_device_up == 0", "2m", "warning", _("{place}: the device does not answer")),
        ("UllageWatchAbsent", "absent(ullage_device_up)", "5m", "warning", _("no ullage watch is scraped")),
    )
    return tuple(
        Alert(name=name, query=query, hold=hold, severity=severity, summary=words.format(place=place, minutes=minutes))
        for name, query, hold, severity, words in rows
    )


def _risen(counter: str) -> str:
    """Return a query for a rise; a counter that appears above 0 has no earlier value to rise from."""
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
