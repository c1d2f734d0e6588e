"""``ullage engines [NAME]``: the engines and the versions whose rules are mirrored."""

from __future__ import annotations

import argparse
from importlib import import_module
from typing import Any

from ullage.errors import EXIT_OK, InputError
from ullage.i18n import _


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the command."""
    parser.add_argument("engine", nargs="?", metavar="NAME", help=_("show this one"))
    parser.add_argument("--json", action="store_true", help=_("print JSON"))


def run(arguments: argparse.Namespace) -> int:
    """Run the command."""
    from ullage.cli import print_json

    found = [*engines(), *training_engines()]
    if arguments.engine is not None:
        names = [engine["name"] for engine in found]
        found = [engine for engine in found if engine["name"] == arguments.engine.lower()]
        if not found:
            raise InputError(
                _("unknown engine {engine!r}").format(engine=arguments.engine[:40]),
                remedy=_("known are {known}").format(known=", ".join(names)),
            )
    if arguments.json:
        print_json(found)
    else:
        from ullage.report.lists import print_engines

        print_engines(found)
    return EXIT_OK


def engines() -> list[dict[str, Any]]:
    """Return name, versions and the newest of every serving engine."""
    from ullage.engines.serving import SERVING_ENGINES
    from ullage.request import newest_version

    found = []
    for name, module in SERVING_ENGINES.items():
        everything = list(import_module(module).VERSIONS)
        versions = [version for version in everything if version.split()[0] == name] or everything
        found.append({"name": name, "kind": "serve", "newest": newest_version(name), "versions": versions})
    return found


def training_engines() -> list[dict[str, Any]]:
    """Return name and versions of every framework of training; some have one set of rules, without a version."""
    from ullage.engines.training import TRAINING_ENGINES

    found = []
    for name, module in TRAINING_ENGINES.items():
        versions = list(getattr(import_module(module), "VERSIONS", ()))
        found.append({"name": name, "kind": "train", "newest": versions[-1] if versions else "", "versions": versions})
    return found
