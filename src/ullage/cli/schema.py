"""``ullage schema NAME``: the JSON Schema of an output."""

from __future__ import annotations

import argparse
from pathlib import Path

from ullage.errors import EXIT_OK, InputError
from ullage.i18n import _

FOLDER = Path(__file__).parents[1] / "schema"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("name", nargs="?", metavar="NAME", help=_("such as fit; without it, the names are listed"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    if arguments.name is None:
        print("\n".join(names))
        return EXIT_OK
    if arguments.name not in names:
        raise InputError(
            _("there is no schema {name!r}").format(name=arguments.name[:60]),
            remedy=_("known are {known}").format(known=", ".join(names)),
        )
    print((FOLDER / f"{arguments.name}.json").read_text(encoding="utf-8"), end="")
    return EXIT_OK
