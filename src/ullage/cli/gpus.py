"""``ullage gpus [NAME]``: the accelerators known by name, with what the runtime reports as their memory."""

from __future__ import annotations

import argparse
from typing import Any

from ullage.errors import EXIT_OK
from ullage.i18n import _


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("gpu", nargs="?", metavar="NAME", help=_("show this one, with its sources"))
    parser.add_argument("--json", action="store_true", help=_("print JSON"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ullage.catalog.gpus import entries

    chosen = entries() if arguments.gpu is None else [_named(arguments.gpu)]
    if arguments.json:
        from ullage.cli import print_json

        print_json([_sourced(entry) for entry in chosen])
    else:
        from ullage.report.lists import print_gpus

        print_gpus(chosen, sources=arguments.gpu is not None)
    return EXIT_OK


def _named(text: str) -> dict[str, Any]:
    from ullage.catalog.gpus import entries
    from ullage.read.machine import parse_gpu

    gpu = parse_gpu(text)
    known = {entry["name"]: entry for entry in entries()}
    if gpu.name in known:
        return known[gpu.name]
    total = {"value": gpu.total_bytes, "low": gpu.total_low_bytes, "high": gpu.total_high_bytes, "unit": "bytes"}
    return {"name": gpu.name, "vendor": gpu.vendor, "total": {**total, "source_text": gpu.source}}


def _sourced(entry: dict[str, Any]) -> dict[str, Any]:
    """Return an entry with every source key written out."""
    from ullage.catalog.gpus import source_text

    def fill(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        filled = {key: fill(item) for key, item in value.items()}
        if isinstance(value.get("source"), str):
            filled["source"] = source_text(value["source"])
        return filled

    return {key: fill(value) for key, value in entry.items()}
