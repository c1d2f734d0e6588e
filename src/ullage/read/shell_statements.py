"""A shell script → its statements, words with their quotes; and the expansion of ``$NAME``, ``${NAME:-x}``, ``$((…))``.

Only what launch scripts use: no globs, no processes. What a command would print (``$(…)``) is nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _

MAX_EXPANDED = 800_000
MAX_DEPTH = 20
_OPERATORS = (";;", "&&", "||", "|&", ";", "|", "&", "\n")
_HERE = re.compile(r"(?<!<)<<-?[ \t]*['\"]?([A-Za-z_]\w*)['\"]?")
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*|[0-9@*#?$!-]")
_NUMBER = re.compile(r"\s*(\d{1,15}|[A-Za-z_]\w*|[-+*/%()])")


class Statement(Frozen):
    """A command's words as they stand, and the operator before it."""

    words: tuple[str, ...]
    before: str


def statements(text: str) -> list[Statement]:
    """Split a script.

    Raises:
        InputError: quotes or brackets that do not close.
    """
    text = re.sub(r"\\\r?\n", " ", _without_here_documents(text.replace("\r\n", "\n")))
    found: list[Statement] = []
    words: list[str] = []
    before, at, within = "\n", 0, False  # within [[ … ]] operators are words
    while at < len(text):
        if text[at] == "#":
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
            continue
        operator = None if within else _operator(text, at)
        if operator:
            if words:
                found.append(Statement(words=tuple(words), before=before))
            words, before, at = [], operator, at + len(operator)
            if operator == ";;":
                found.append(Statement(words=(";;",), before=";;"))
        elif text[at].isspace():
            at += 1
        else:
            end = _end_of_word(text, at)
            words.append(text[at:end])
            within = words[-1] != "]]" if within else words == ["[["] or words[-2:] in (["if", "[["], ["elif", "[["])
            at = end
    return [*found, Statement(words=tuple(words), before=before)] if words else found


def _operator(text: str, at: int) -> str | None:
    return next((each for each in _OPERATORS if text.startswith(each, at)), None)


def _without_here_documents(text: str) -> str:
    """Leave out what stands between ``<<END`` and a line ``END``."""
    lines, end = [], ""
    for line in text.split("\n"):
        if end:
            end = "" if line.strip() == end else end
            continue
        match = _HERE.search(line)
        end = match[1] if match is not None else ""
        lines.append(line[: match.start()] + line[match.end() :] if match is not None else line)
    return "\n".join(lines)


def _end_of_word(text: str, at: int) -> int:
    """Return where a word ends: at blanks and operators outside quotes and brackets."""
    start = at
    while at < len(text) and not text[at].isspace():
        if text[at] in "'\"`":
            at = _closing_quote(text, at)
        elif text[at] == "\\":
            at += 2
        elif text.startswith(("$(", "${"), at) or (text[at] == "(" and text[start:at].endswith("=")):
            at = closing(text, at + (text[at] == "$"))
        elif text[at] in ";|&" or (text[at] in "()" and at > start):
            break
        else:
            at += 1
            if text[at - 1] in "()":
                break
    return min(max(at, start + 1), len(text))


def _closing_quote(text: str, at: int, depth: int = 0) -> int:
    quote, end = text[at], at + 1
    while end < len(text) and text[end] != quote:
        if quote == '"' and text.startswith(("$(", "${"), end):
            end = closing(text, end + 1, depth)
        else:
            end += 2 if text[end] == "\\" and quote == '"' else 1
    if end >= len(text):
        raise InputError(_("the command line cannot be split: {error}").format(error=_("No closing quotation")))
    return end + 1


def closing(text: str, at: int, depth: int = 0) -> int:
    """Return the place after the bracket that closes the one at ``at``.

    Raises:
        InputError: none does.
    """
    start, wanted = at, []
    while at < len(text) and depth < MAX_DEPTH:
        char = text[at]
        if char in "({":
            wanted.append(")" if char == "(" else "}")
        elif wanted and char == wanted[-1]:
            wanted.pop()
            if not wanted:
                return at + 1
        elif char in "'\"":
            at = _closing_quote(text, at, depth + 1) - 1
        elif char == "\\":
            at += 1
        elif char == "#" and text[at - 1].isspace():
            end = text.find("\n", at)
            at = len(text) if end < 0 else end
        at += 1
    what = text[start : start + 20]
    raise InputError(
        _("the command line cannot be split: {error}").format(error=_("{text!r} is open").format(text=what))
    )


#: Returns the value of a variable, None where it has none.
Lookup = Callable[[str], "str | None"]


def expanded(word: str, lookup: Lookup, *, unset: bool = False, depth: int = 0) -> str:
    """Return a word without quotes, its variables in place.

    Args:
        word: as it stands in the script.
        lookup: of variables.
        unset: leave what has no value as it is written.
        depth: of defaults in defaults.

    Raises:
        InputError: it would grow beyond all sense.
    """
    found: list[str] = []
    at, size, quoted = 0, 0, False
    while at < len(word):
        char = word[at]
        if char == "'" and not quoted:
            end = word.find("'", at + 1)
            end = len(word) if end < 0 else end
            piece, at = word[at + 1 : end], end + 1
        elif char == '"':
            piece, quoted, at = "", not quoted, at + 1
        elif char == "\\" and at + 1 < len(word):
            piece, at = word[at + 1], at + 2
        elif char == "$" and depth < MAX_DEPTH:
            piece, at = _variable(word, at, lookup, unset, depth)
        elif char == "`":
            end = word.find("`", at + 1)
            piece, at = "", len(word) if end < 0 else end + 1
        else:
            piece, at = char, at + 1
        size += len(piece)
        if size > MAX_EXPANDED:
            raise InputError(_("the arguments are longer than {limit} characters").format(limit=MAX_EXPANDED))
        found.append(piece)
    return "".join(found)


def _variable(word: str, at: int, lookup: Lookup, unset: bool, depth: int) -> tuple[str, int]:
    """Return the value of what begins at ``$``, and where it ends."""
    if word.startswith("$((", at):
        end = closing(word, at + 1)
        return arithmetic(expanded(word[at + 3 : end - 2], lookup, depth=depth + 1), lookup), end
    if word.startswith("$(", at):
        return "", closing(word, at + 1)
    if word.startswith("${", at):
        end = closing(word, at + 1)
        return _braced(word[at + 2 : end - 1], lookup, unset, depth), end
    match = _NAME.match(word, at + 1)
    if match is None:
        return "$", at + 1
    value = lookup(match[0])
    return (word[at : match.end()] if unset else "") if value is None else value, match.end()


def _braced(inside: str, lookup: Lookup, unset: bool, depth: int) -> str:
    """``${NAME}`` with an index, a default or another operation, of which only defaults are followed."""
    match = _NAME.match(inside)
    if match is None:
        return ""
    value, rest = lookup(match[0]), inside[match.end() :]
    rest = re.sub(r"^\[[^\]]*\]", "", rest)
    default = re.match(r":?([-=+])", rest)
    if default is None:
        return ("${" + inside + "}" if unset and not rest else "") if value is None else value
    other = rest[default.end() :]
    missing = value is None or (rest[0] == ":" and not value)
    if (default[1] == "+") == missing:
        return value or ""
    return expanded(other, lookup, unset=unset, depth=depth + 1)


def arithmetic(text: str, lookup: Lookup) -> str:
    """Return the value of whole numbers, names, + - * / % and brackets; nothing where it has none."""
    tokens = _NUMBER.findall(text)
    if "".join(tokens) != re.sub(r"\s", "", text) or len(tokens) > 200:
        return ""
    try:
        value, rest = _sum(tokens, lookup, 0)
    except (ValueError, ZeroDivisionError, IndexError):
        return ""
    return "" if rest or abs(value) > 2**62 else str(value)


def _sum(tokens: list[str], lookup: Lookup, depth: int) -> tuple[int, list[str]]:
    value, rest = _product(tokens, lookup, depth)
    while rest and rest[0] in "+-":
        more, after = _product(rest[1:], lookup, depth)
        value, rest = (value + more if rest[0] == "+" else value - more), after
    return value, rest


def _product(tokens: list[str], lookup: Lookup, depth: int) -> tuple[int, list[str]]:
    value, rest = _factor(tokens, lookup, depth)
    while rest and rest[0] in "*/%":
        more, after = _factor(rest[1:], lookup, depth)
        value, rest = (value * more if rest[0] == "*" else value // more if rest[0] == "/" else value % more), after
        if abs(value) > 2**62:
            raise ValueError
    return value, rest


def _factor(tokens: list[str], lookup: Lookup, depth: int) -> tuple[int, list[str]]:
    if depth > MAX_DEPTH:
        raise ValueError
    first, rest = tokens[0], tokens[1:]
    if first == "(":
        value, after = _sum(rest, lookup, depth + 1)
        if after[0] != ")":
            raise ValueError
        return value, after[1:]
    if first == "-":
        value, after = _factor(rest, lookup, depth + 1)
        return -value, after
    return int(first) if first.isdigit() else int(lookup(first) or 0), rest
