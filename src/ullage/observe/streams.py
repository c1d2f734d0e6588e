"""Logs as lines: of any length, from a file or a pipe, of one process or of many that write through each other.

Nothing is kept but one block and one line at a time, so that a log of many gigabytes costs time and no memory. Blocks
that hold none of the words that are looked for are not cut into lines at all.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _

BLOCK_BYTES = 1 << 20
#: A line is cut here; what is looked for stands near the beginning of a line.
MAX_LINE_BYTES = 16384
#: Lines that are read after one that holds a word: a message has up to 16 lines, of each of many ranks in turn.
LINES_AFTER = 2000
#: Colours and cursor movements of terminals (ECMA-48 CSI sequences, and titles set by OSC).
_CONTROL = re.compile(
    r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]"
)
_LOST_COLOUR = re.compile(r"\[\d{1,3}(?:;\d{1,3})*m")
#: The time that containers and clusters put before every line.
_STAMP = re.compile(r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[\d.]{0,20}(?:Z|[+-]\d\d:?\d\d)?\s{1,8}(?:std(?:out|err) F )?")
#: What stands before the words of a process when many write into one log; the group is who speaks. The first ones
#: stand before every line, the last ones before the first line of a record only.
_PREFIXES = (
    re.compile(r"\s{0,8}([\w.-]{1,64}-\d{1,20})\s{1,8}\|\s"),  # docker compose: "vllm-1  | "
    re.compile(r"\s{0,8}\[(?:default|rank)(\d{1,6})\]:\s?", re.IGNORECASE),  # torchrun, torch's own logging
    re.compile(r"\s{0,8}\(((?:[A-Za-z]\w{0,40})[^()\n]{0,40}\bpid=\d{1,20}[^()\n]{0,60})\)\s?"),  # vLLM, Ray
    re.compile(r"\s{0,8}([\w.-]{1,64}:\d{1,20}:\d{1,20} \[\d{1,20}\])\s"),  # NCCL: host:pid:tid [device]
    re.compile(r"\s{0,8}\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d((?: (?:DP|PP|TP|EP|CP|ATTN_TP)\d{1,20})+)\]\s?"),  # SGLang
    re.compile(r"\s{0,8}\[[\d/:-]{15,24}\] \[(TRT-LLM\] \[RANK \d{1,20})\]\s?"),  # TensorRT-LLM
)
_OF_RECORDS = _PREFIXES[-2:]
#: A line that begins a record of its own.
_FRESH = re.compile(r"\s{0,8}\[?(?:\d{4}-\d\d-\d\d|\d\d/\d\d/\d{4}|(?:INFO|WARNING|ERROR|DEBUG|CRITICAL)\b)")
_RANK_WORDS = re.compile(r"\[?Rank (\d{1,20})\]?", re.IGNORECASE)
_RANK_FIELD = re.compile(r"\brank=(\d{1,20})")
_UNDER_SCORED = re.compile(r"(?:Worker|EngineCore)_?((?:(?:DP|PP|TP|EP)\d{1,20}_?)+)")


class Readable(Protocol):
    """Anything that gives bytes."""

    def read(self, size: int, /) -> bytes:
        """Return up to ``size`` bytes, none at the end."""


class Line(Frozen):
    """One line of a log: its ``number`` from 1, who speaks, the words; ``marked``: one of those looked for is in it."""

    number: int
    speaker: str = ""
    text: str
    marked: bool = True


def open_source(name: str, stdin: BinaryIO) -> BinaryIO:
    """Open a file for reading bytes; ``-`` is the pipe.

    Raises:
        InputError: no such file, or not one that can be read.
    """
    if name == "-":
        return stdin
    try:
        return Path(name).open("rb")
    except OSError as error:
        raise InputError(
            _("cannot read it: {reason}").format(reason=error.strerror or type(error).__name__), where=name[:200]
        ) from None


def read_lines(stream: Readable, words: Iterable[str] = ()) -> Iterator[Line]:
    """Yield the lines of ``stream`` that hold one of ``words``, and those after them; all lines without words.

    Raises:
        InputError: the stream breaks off with an error.
    """
    needles = [word.encode() for word in words if not any(other != word and other in word for other in words)]
    number, left, owner = 0, 0, ""
    for block in _blocks(stream):
        marks = _marked_lines(block, needles)
        if needles and not marks and left <= 0:
            number += block.count(b"\n")
            continue
        start = 0
        for raw in block.split(b"\n")[:-1]:
            number += 1
            marked = not needles or start in marks
            start += len(raw) + 1
            left = LINES_AFTER if marked else left - 1
            if left > 0:
                line, owner = speak(number, raw, owner, marked=marked)
                yield line


def _marked_lines(block: bytes, needles: list[bytes]) -> set[int]:
    """Return where the lines begin that hold a needle, by one fast pass over the block per needle."""
    found: set[int] = set()
    for needle in needles:
        place = block.find(needle)
        while place >= 0:
            found.add(block.rfind(b"\n", 0, place) + 1)
            end = block.find(b"\n", place)
            place = block.find(needle, end) if end >= 0 else -1
    return found


def _blocks(stream: Readable) -> Iterator[bytes]:
    """Yield blocks of whole lines; lines that are too long are cut."""
    rest, skipping = b"", False
    while block := _read(stream):
        if skipping:  # the end of a line that was cut
            _dropped, end, block = block.partition(b"\n")
            skipping = not end
        joined = rest + block
        end_of_lines = joined.rfind(b"\n") + 1
        rest = joined[end_of_lines:]
        if len(rest) > MAX_LINE_BYTES and not skipping:
            yield joined[: end_of_lines + MAX_LINE_BYTES] + b"\n"
            rest, skipping = b"", True
        elif end_of_lines:
            yield joined[:end_of_lines]
    if rest:
        yield rest + b"\n"


def _read(stream: Readable) -> bytes:
    r"""Return a block whose line ends are all ``\n``; a bare carriage return (progress bars) ends a line too."""
    try:
        block = stream.read(BLOCK_BYTES)
        if block.endswith(b"\r"):
            block += stream.read(1)
    except OSError as error:
        raise InputError(_("cannot read on: {reason}").format(reason=error.strerror or type(error).__name__)) from None
    if b"\r" in block:
        block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return block


def speak(number: int, raw: bytes, owner: str = "", *, marked: bool = True) -> tuple[Line, str]:
    """Return a line without colours and without the name of who speaks, and who owns lines without a name after it."""
    text = raw[:MAX_LINE_BYTES].decode("utf-8", "replace").lstrip("\ufeff").rstrip()
    if not text.isprintable():
        text = _CONTROL.sub("", text)
    if "[0m" in text:  # colours whose escape character got lost
        text = _LOST_COLOUR.sub("", text)
    text = _STAMP.sub("", text, count=1)
    speaker, words = split_speaker(text)
    if speaker:
        owner = speaker if any(prefix.match(text) for prefix in _OF_RECORDS) else ""
    elif _FRESH.match(text):
        owner = ""
    return Line(number=number, speaker=speaker or owner, text=words, marked=marked), owner


def split_speaker(text: str) -> tuple[str, str]:
    """Return who speaks and what is said: ``[rank3]: boom`` is ``("rank3", "boom")``; prefixes may be several."""
    names: list[str] = []
    for _turn in range(3):
        match = next((found for each in _PREFIXES if (found := each.match(text))), None)
        if match is None:
            break
        name = " ".join(match.group(1).split())
        names.append(f"rank{name}" if name.isdigit() else name)
        text = text[match.end() :]
    return " ".join(names), text


def rank_of(speaker: str, text: str = "") -> str:
    """Return the rank that a speaker names, as people write it: ``3``, ``DP2 TP2``; empty when there is none."""
    for find, where in _RANK_FINDERS:
        if found := find(speaker if where == "speaker" else text):
            return found
    return ""


def _by(pattern: re.Pattern[str]) -> Callable[[str], str]:
    def find(text: str) -> str:
        match = pattern.search(text)
        return match.group(1).replace("_", " ").strip() if match else ""

    return find


_RANK_FINDERS: tuple[tuple[Callable[[str], str], str], ...] = (
    (_by(re.compile(r"\brank(\d{1,20})\b")), "speaker"),
    (_by(_RANK_WORDS), "speaker"),
    (_by(_RANK_FIELD), "speaker"),
    (_by(_UNDER_SCORED), "speaker"),
    (_by(re.compile(r"\b((?:(?:DP|PP|TP|EP|CP)\d{1,20} ?)+)(?:$| )")), "speaker"),
    (_by(re.compile(r":\d{1,20}:\d{1,20} \[(\d{1,20})\]")), "speaker"),
    (_by(_RANK_WORDS), "text"),
)
