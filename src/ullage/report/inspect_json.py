"""An inspection as JSON: the keys of ``ullage schema inspect``."""

from __future__ import annotations

from typing import Any

from ullage.observe.engine_logs import Figure
from ullage.observe.inspection import Inspection
from ullage.observe.oom import Fact
from ullage.report.json import term_json
from ullage.report.measured import measured_json

SCHEMA_VERSION = 1
MAX_EVENTS = 100


def inspect_json(found: Inspection) -> dict[str, Any]:
    """Return an inspection as plain values; sizes are integers in bytes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": found.kind,
        "verdict": found.verdict,
        "cause": found.cause,
        "confidence": found.confidence,
        "why": found.why,
        "partial": found.partial,
        "framework": found.framework,
        "allocator": found.allocator,
        "versions": found.versions,
        "rank": found.rank,
        "phase": found.phase,
        "sizes": dict(found.sizes),
        "printed": dict(found.printed),
        "total_bytes": found.total_bytes,
        "terms": [term_json(term) for term in found.terms],
        "advice": [
            {"change": piece.change, "flags": piece.flags, "gain_bytes": piece.gain_bytes, "cost": piece.cost}
            for piece in found.advice
        ],
        "events": [_event(fact) for fact in found.facts[:MAX_EVENTS]],
        "engine": {
            "name": found.engine,
            "settings": dict(found.settings),
            "figures": [_figure(figure) for figure in found.figures],
            "terms": [term_json(term) for term in found.engine_terms],
        },
        "notes": list(found.notes),
        "total_name": found.total_name,
        **measured_json(found),
        "num_lines": found.num_lines,
        "next_command": found.next_command,
    }


def _event(fact: Fact) -> dict[str, Any]:
    return {
        "kind": fact.kind,
        "framework": fact.framework,
        "rank": fact.rank,
        "line": fact.line,
        "times": fact.times,
        "sizes": {name: size.bytes for name, size in fact.sizes},
        "counts": dict(fact.counts),
        "details": dict(fact.details),
        "processes": [{"pid": number, "bytes": size.bytes} for number, size in fact.processes],
        "text": fact.text,
    }


def _figure(figure: Figure) -> dict[str, Any]:
    return {
        "quantity": figure.quantity,
        "place": figure.place,
        "line": figure.line,
        "bytes": figure.size.bytes if figure.size is not None else None,
        "value": None if figure.size is not None else figure.value,
        "printed": figure.size.text if figure.size is not None else "",
    }
