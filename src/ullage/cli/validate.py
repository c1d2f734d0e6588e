"""``ullage validate RECORDS.jsonl``: judge the predictions by measured runs."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ullage.errors import EXIT_INTERNAL, EXIT_OK
from ullage.i18n import _
from ullage.records.summary import to_json
from ullage.records.validate import SHIPPED, ValidationReport, validate_files


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "records",
        nargs="*",
        type=Path,
        metavar="RECORDS.jsonl",
        help=_("files of measured runs; without any, the published runs that ullage ships"),
    )
    parser.add_argument("--json", action="store_true", help=_("print JSON"))
    parser.add_argument("--markdown", action="store_true", help=_("print the scoreboard as Markdown"))
    parser.add_argument(
        "--include-partial", action="store_true", help=_("also judge records that miss a field that matters")
    )


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 0, or 1 when a record made the program fail inside (the report is still printed)."""
    with _progress() as step:
        report = validate_files(
            arguments.records or [SHIPPED], include_partial=arguments.include_partial, progress=step
        )
    for sentence in (*report.warnings, *report.internal_errors):
        print(sentence, file=sys.stderr)
    if arguments.json:
        print(json.dumps(to_json(report), indent=2))
    elif arguments.markdown:
        from ullage.records.scoreboard import markdown

        print(markdown(report), end="")
    else:
        _print_text(report)
    return EXIT_INTERNAL if report.internal_errors else EXIT_OK


def _print_text(report: ValidationReport) -> None:
    from ullage.records.table import print_report

    print_report(report)


@contextmanager
def _progress() -> Iterator[Callable[[int], None] | None]:
    """Show the number of records done on a terminal's stderr; elsewhere nothing."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    console = Console(stderr=True)
    with console.status(_("reading records")) as status:
        yield lambda done: status.update(_("{count} records").format(count=done))
