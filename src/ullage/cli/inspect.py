"""``ullage inspect FILE|-``: why did it die, where is the memory, and which change is cheapest."""

from __future__ import annotations

import argparse
import sys

from ullage.errors import EXIT_OK
from ullage.i18n import _


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("file", metavar="FILE", help=_("a log, an error message or a snapshot; - reads the pipe"))
    parser.add_argument("--device", type=int, metavar="N", help=_("of a snapshot (the one with most events)"))
    parser.add_argument("--json", action="store_true", help=_("print JSON"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 0 when something was recognised."""
    from ullage.cli import print_json
    from ullage.observe.formats import inspect_source

    found = inspect_source(arguments.file, sys.stdin.buffer, arguments.device)
    if arguments.json:
        from ullage.report.inspect_json import inspect_json

        print_json(inspect_json(found))
    else:
        from ullage.report.inspect_text import print_inspection

        print_inspection(found)
    return EXIT_OK
