"""``ullage inspect FILE|-``: why it died, where the memory is, and which change is cheapest."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from ullage.errors import EXIT_DOES_NOT_FIT, EXIT_OK, InputError
from ullage.i18n import _

if TYPE_CHECKING:
    from ullage.observe.assertions import Assertion
    from ullage.observe.inspection import Inspection


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument(
        "file", metavar="FILE", help=_("a log, an error message, a snapshot, a trace or a recording; - reads the pipe")
    )
    parser.add_argument("--device", type=int, metavar="N", help=_("of several (the one with most events)"))
    parser.add_argument("--against", metavar="OTHER", help=_("a file of the same kind to compare with"))
    parser.add_argument("--job", metavar="JOBFILE", help=_("show the job's prediction beside it, and advise on it"))
    parser.add_argument(
        "--assert", dest="assertions", action="append", default=[], metavar="LIMIT",
        help=_("exit with 3 unless it holds, such as 'peak < 70GiB', 'leak < 1MiB/step'; several may be given"),
    )  # fmt: skip
    parser.add_argument("--html", metavar="PAGE", help=_("write a page with figures to this file (extra html)"))
    parser.add_argument("--json", action="store_true", help=_("print JSON"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 0 when something was recognised, 3 when a limit is not kept."""
    limits = _limits(arguments.assertions)
    found = _inspect(arguments)
    if arguments.job is not None:
        from pathlib import Path

        from ullage.observe.job_ledger import beside_job

        found = beside_job(found, Path(arguments.job))
    broken = _broken(limits, found)
    if arguments.html is not None:
        from ullage.report.inspect_html import write_inspection

        write_inspection(found, arguments.html, arguments.file)
    _print(found, as_json=arguments.json)
    for sentence in broken:
        print(f"ullage: {sentence}", file=sys.stderr)
    return EXIT_DOES_NOT_FIT if broken else EXIT_OK


def _inspect(arguments: argparse.Namespace) -> Inspection:
    if arguments.against is not None:
        if "-" in (arguments.file, arguments.against):
            raise InputError(_("two files are compared, and a pipe is none"), remedy=_("give the names of both"))
        from ullage.observe.compare import compare_files

        compared: Inspection = compare_files(arguments.file, arguments.against, arguments.device)
        return compared
    from ullage.observe.formats import inspect_source

    return inspect_source(arguments.file, sys.stdin.buffer, arguments.device)


def _limits(texts: list[str]) -> list[Assertion]:
    """Read the limits before anything else: a wrong one is told at once."""
    if not texts:
        return []
    from ullage.observe.assertions import MAX_ASSERTIONS, parse_assertion

    if len(texts) > MAX_ASSERTIONS:
        raise InputError(_("more than {count} limits").format(count=MAX_ASSERTIONS), where="--assert")
    return [parse_assertion(text) for text in texts]


def _broken(limits: list[Assertion], found: Inspection) -> list[str]:
    if not limits:
        return []
    from ullage.observe.assertions import failures

    return failures(limits, found)


def _print(found: Inspection, *, as_json: bool) -> None:
    if as_json:
        from ullage.cli import print_json
        from ullage.report.inspect_json import inspect_json

        print_json(inspect_json(found))
    else:
        from ullage.report.inspect_text import print_inspection

        print_inspection(found)
