"""Which SGLang release is meant, and which rule it follows.

Rules are looked up in ``catalog/engines/sglang.json``: the last entry of a name whose ``since`` is not newer.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from ullage.catalog import load
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _

CATALOG = "engines/sglang.json"
Key = tuple[int, int, int, int]

_VERSION = re.compile(r"v?(\d+)\.(\d+)(?:\.(\d+))?(?:\.?(post|rc|dev)(\d+))?(?:[-+].*)?", re.IGNORECASE)
_DATE = re.compile(r"(20\d\d)-(\d\d)(?:-(\d\d))?")


def version_key(text: str) -> Key | None:
    """Return ``0.5.1.post3`` as a key that sorts, or None; ``rc`` and ``dev`` come before the release."""
    match = _VERSION.fullmatch(text.strip())
    if match is None:
        return None
    stage = {None: 0, "post": 1, "rc": -1, "dev": -1}[match.group(4).lower() if match.group(4) else None]
    last = stage * (int(match.group(5)) + 1) if stage > 0 else stage * (1000 - int(match.group(5) or 0))
    return int(match.group(1)), int(match.group(2)), int(match.group(3) or 0), last


@lru_cache(maxsize=1)
def releases() -> tuple[tuple[str, str], ...]:
    """Return (version, date) of the releases whose sources were read, oldest first."""
    return tuple((entry["version"], entry["date"]) for entry in load(CATALOG)["releases"])


VERSIONS = tuple(version for version, _date in releases())


class Release(Frozen):
    """The release whose rules are used. ``assumed`` says how it was found, empty where it was read itself."""

    version: str
    key: Key
    assumed: str = ""

    def rule(self, name: str) -> Any:
        """Return the value of the rule ``name`` for this release (the oldest known one for older releases)."""
        return _rule(name, self.key)["value"]

    def source(self, name: str) -> str:
        """Return where the rule ``name`` was read."""
        text: str = _rule(name, self.key)["source"]
        return text


@lru_cache(maxsize=512)
def _rule(name: str, key: Key) -> dict[str, Any]:
    entries = _rules()[name]
    found = entries[0][1]
    for since, entry in entries:
        if since <= key:
            found = entry
    return found


@lru_cache(maxsize=1)
def _rules() -> dict[str, list[tuple[Key, dict[str, Any]]]]:
    found: dict[str, list[tuple[Key, dict[str, Any]]]] = {}
    for entry in load(CATALOG)["defaults"]:
        since = version_key(entry["since"])
        assert since is not None, entry
        found.setdefault(entry["name"], []).append((since, entry))
    return found


@lru_cache(maxsize=256)
def resolve(text: str) -> Release:
    """Return the release that ``text`` means.

    ``0.5.3``: itself, also where only its neighbours were read. A date, or words with a date: the last release that
    was out by then; ``PR n, date`` is a build that has the change, so the first release after it.

    Raises:
        InputError: neither a version nor a date.
    """
    text = text.strip()
    newest = VERSIONS[-1]
    if text in ("", "latest", "main"):
        return _release(newest, _("SGLang version not given: {version} taken").format(version=newest))
    key = version_key(text)
    if key is not None:
        return _of_version(text, key)
    date = _DATE.search(text)
    if date is None:
        raise InputError(
            _("{text!r} is not an SGLang version").format(text=text[:80]),
            remedy=_("write for example {version}, or a date such as 2025-10-07").format(version=newest),
        )
    return _of_date(text, date)


def _release(version: str, assumed: str = "") -> Release:
    key = version_key(version)
    assert key is not None
    return Release(version=version, key=key, assumed=assumed)


def _of_version(text: str, key: Key) -> Release:
    newest = version_key(VERSIONS[-1])
    assert newest is not None
    if key > newest:
        sentence = _("SGLang {text} is newer than {known}, the newest whose rules are known: those are used")
        return Release(version=text, key=key, assumed=sentence.format(text=text, known=VERSIONS[-1]))
    if key < (0, 4, 1, 0):
        sentence = _("SGLang {text} is older than {known}, the oldest whose rules are known: those are used")
        return Release(version=text, key=key, assumed=sentence.format(text=text, known=VERSIONS[0]))
    return Release(version=text, key=key)


def _of_date(text: str, date: re.Match[str]) -> Release:
    day = f"{date.group(1)}-{date.group(2)}-{date.group(3) or '15'}"
    out = [version for version, released in releases() if released <= day]
    after = [version for version, released in releases() if released > day]
    holds_the_change = bool(re.match(r"PR\b", text) and after)
    version = after[0] if holds_the_change else (out or [VERSIONS[0]])[-1]
    sentence = _("SGLang version given as {text!r}: the rules of {version} are used")
    return _release(version, sentence.format(text=text, version=version))
