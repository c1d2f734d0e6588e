"""Edit a command line as little as possible: find a flag in any of its spellings, change its value, or add it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ullage.errors import InputError


def spell(word: str) -> str:
    """Return a flag's name in one spelling: ``--max-model-len`` and ``--max_model_len`` are ``max_model_len``."""
    return word.lstrip("-").replace("-", "_")


@dataclass(frozen=True, kw_only=True)
class Found:
    """A flag: where it stands, how it is written, and its value (empty for a switch)."""

    at: int
    word: str
    value: str
    joined: bool


class Words:
    """A command line. ``assignments``: whether ``name=value`` without dashes is a setting of the program."""

    def __init__(self, words: Sequence[str], *, assignments: bool = False) -> None:
        self.words = list(words)
        self.assignments = assignments

    def find(self, names: Iterable[str]) -> Found | None:
        """Return the last flag of one of these names: a later one wins."""
        wanted = set(names)
        for at in range(len(self.words) - 1, -1, -1):
            word = self.words[at]
            head, equals, value = word.partition("=")
            if equals and (head.startswith("-") or self.assignments) and _is(head, wanted):
                return Found(at=at, word=head, value=value, joined=True)
            if not equals and word.startswith("-") and _is(word, wanted):
                follows = self.words[at + 1] if at + 1 < len(self.words) else ""
                value = "" if follows.startswith("--") else follows
                return Found(at=at, word=word, value=value, joined=False)
        return None

    def text(self, names: Iterable[str]) -> str | None:
        """Return the value of a flag, None when it is not given."""
        found = self.find(names)
        return None if found is None else found.value

    def whole(self, names: Iterable[str]) -> int | None:
        """Return the value of a flag as a count (``32k`` too), None when it is not given or not one."""
        from ullage.units import parse_count

        text = self.text(names)
        try:
            return None if not text else parse_count(text)
        except InputError:
            return None

    def number(self, names: Iterable[str]) -> float | None:
        """Return the value of a flag as a number, None when it is not given or not one."""
        try:
            return float(self.text(names) or "")
        except ValueError:
            return None

    def put(self, names: Sequence[str], value: str, *, flag: str) -> None:
        """Set a flag: in the place and spelling in which it stands, else at the end as ``flag``; "" is a switch."""
        found = self.find(names)
        if found is None:
            self.words += flag.split("=", 1)[:1] if not value else _fresh(flag, value)
        elif not value:
            pass  # a switch that is on already
        elif found.joined:
            self.words[found.at] = f"{found.word}={value}"
        elif found.value:
            self.words[found.at + 1] = value
        else:
            self.words.insert(found.at + 1, value)

    def drop(self, names: Iterable[str]) -> None:
        """Take a flag and its value away."""
        found = self.find(names)
        if found is not None:
            end = found.at + 1 if found.joined or not found.value else found.at + 2
            del self.words[found.at : end]


def _is(word: str, wanted: set[str]) -> bool:
    short = word.startswith("-") and not word.startswith("--")
    return word in wanted if short else spell(word) in wanted


def _fresh(flag: str, value: str) -> list[str]:
    """Return the words of a new flag: ``--name`` takes two, ``name=`` (a setting without dashes) one."""
    return [f"{flag}{value}"] if flag.endswith("=") else [flag, value]
