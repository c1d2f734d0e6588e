"""``ullage inspect FILE|-``: why did it die, where is the memory, and which change is cheapest."""

from __future__ import annotations

import argparse
import sys

from ullage.errors import EXIT_OK
from ullage.i18n import _


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("file", metavar="FILE", help=_("a log, an error message or a snapshot; - reads the pipe"))
    parser.add_argument("--json", action="store_true", help=_("print JSON"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command; 0 when something was recognised."""
    from ullage.cli import print_json
    from ullage.observe.inspection import inspect_stream
    from ullage.observe.streams import open_source

    where = "" if arguments.file == "-" else arguments.file
    with open_source(arguments.file, sys.stdin.buffer) as stream:
        found = inspect_stream(stream, where)
    if arguments.json:
        from ullage.report.inspect_json import inspect_json

        print_json(inspect_json(found))
    else:
        from ullage.report.inspect_text import print_inspection

        print_inspection(found)
    return EXIT_OK
