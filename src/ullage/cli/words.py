"""What a command line most likely meant: the nearest option or word, loaded only on the way to an error."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Mapping
from typing import Any

from ullage.errors import InputError
from ullage.i18n import _

_CHOICE = re.compile(r"(argument (?P<where>\S+): )?invalid choice: '?(?P<word>[^' ]*)'? \(choose from (?P<known>.*)\)")
_NO_VALUE = re.compile(r"argument (?P<where>\S+): expected (one|at least one) argument")


def nearest_word(word: str, known: Iterable[str]) -> str:
    """Return the word of ``known`` that ``word`` is most likely a slip of; nothing where none is near."""
    from difflib import get_close_matches

    return next(iter(get_close_matches(word.lower(), list(known), n=1, cutoff=0.6)), "")


def unknown_argument(parser: argparse.ArgumentParser, extras: list[str]) -> InputError:
    """Return the error for what a command does not take; of options, the nearest are named."""
    help_line = _("see {program} --help").format(program=parser.prog)
    option = next((word for word in extras if word.startswith("-")), None)
    if option is None:
        return InputError(_("{word!r} is one word too many").format(word=extras[0][:60]), remedy=help_line)
    name = option.split("=", 1)[0]
    shown = {flag for action in parser._actions if action.help != argparse.SUPPRESS for flag in action.option_strings}
    near = nearest_word(name, sorted(flag for flag in shown if flag.startswith("--")))
    remedy = _("did you mean {name}?").format(name=near) if near else help_line
    return InputError(_("there is no option {name}").format(name=name[:60]), remedy=remedy)


def usage_error(parser: argparse.ArgumentParser, message: str) -> InputError:
    """Return the error for a message of argparse, with the nearest of the choices where one was misspelt."""
    help_line = _("see {program} --help").format(program=parser.prog)
    if found := _CHOICE.match(message):
        known = re.findall(r"[\w.-]+", found["known"])
        near = nearest_word(found["word"], known)
        remedy = _("known are {known}").format(known=", ".join(known)) + f"; {help_line}"
        remedy = _("did you mean {name}?").format(name=near) if near else remedy
        what = _("{word!r} is not known").format(word=found["word"][:60])
        return InputError(what, where=found["where"] or "", remedy=remedy)
    if found := _NO_VALUE.match(message):
        first = found["where"].split("/")[0]
        return InputError(
            _("a value is missing"),
            where=found["where"],
            remedy=_("one that begins with a dash is written {option}=VALUE").format(option=first),
        )
    return InputError(message, remedy=help_line)


def other_names(group: Any, names: Mapping[str, str], types: Mapping[str, Any]) -> None:
    """Take the engines' own names of options as well, unlisted: what advice tells to type can be typed here, too.

    ``names``: the other name -> the field that it fills; ``types``: how the value of a field is read, None: a switch.
    """
    for flag, field in names.items():
        if types[field] is None:
            group.add_argument(flag, dest=field, action="store_true", default=None, help=argparse.SUPPRESS)
        else:
            group.add_argument(flag, dest=field, type=types[field], help=argparse.SUPPRESS, metavar="N")
