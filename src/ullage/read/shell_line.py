"""A command line as it stands in a shell, a README or a script → the words of the engine's own command.

Understood are continuations, comments, prompts, redirections, several commands in a row, variables that the line itself
sets, ``env``, ``nohup``, ``uv run`` and other words before the program, ``docker run … IMAGE …`` and ``bash -c '…'``.
What only a shell could know, the value of a variable or what a placeholder stands for, is asked for in one sentence.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import pairwise

from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _

MAX_LINE = 100_000
MAX_WORDS = 10_000
_OPERATORS = ";&|<>"
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)=(.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))")
#: ``<model>``: its brackets are no redirections; they stand as two other characters while the line is split.
_PLACEHOLDER = re.compile(r"(?<![\w'\"])<(?=[A-Za-z])([\w.:/-]{1,60})>")
_OPEN, _CLOSE = "\ue000", "\ue001"
_OMITTED = re.compile(r"\.{3}|…|\[.*\]|\{\{.*\}\}")
_CONTAINERS = frozenset(("docker", "podman", "nerdctl"))
#: Images whose entry point is the engine's server, so that its flags follow the image.
_IMAGE = re.compile(r"(?:\S*/)?(?:vllm-openai|vllm-cpu-env|llama\.cpp:\S*server\S*|llama\.cpp:full\S*)(?:[-:@]\S*)?")
_BEFORE = frozenset(("env", "export", "$", "%", "#", "nohup", "exec", "sudo", "time", "set", "uv", "run", "uvx"))
_VISIBLE = (
    "CUDA_VISIBLE_DEVICES",
    "HIP_VISIBLE_DEVICES",
    "ROCR_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "ASCEND_RT_VISIBLE_DEVICES",
    "ZE_AFFINITY_MASK",
)

#: Tells where an engine's flags begin in the words of a command, None where it is not this engine's.
AfterProgram = Callable[[list[str]], "int | None"]


class ShellCommand(Frozen):
    """The engine's words, what the environment holds, and how many GPUs the line lets it see (None: all)."""

    words: tuple[str, ...]
    program: str = ""
    environment: tuple[tuple[str, str], ...] = ()
    visible_gpus: int | None = None


def split_command(line: str, after_program: AfterProgram) -> ShellCommand:
    """Find the engine's command in ``line``.

    Raises:
        InputError: too long, quotes that do not close, a placeholder, or a variable in place of flags.
    """
    if len(line) > MAX_LINE:
        raise InputError(_("the command line is longer than {limit:,} characters").format(limit=MAX_LINE))
    text = _joined(line)
    commands = _commands(text)
    at = next((at for at, words in reversed(list(enumerate(commands))) if after_program(words) is not None), None)
    if at is None:
        inner = _script(commands, after_program)
        if inner is not None:
            return split_command(inner, after_program)
        at = next((at for at, words in enumerate(commands) if any(word.startswith("-") for word in words)), 0)
    environment = dict(pair for words in commands[:at] for pair in _assigned(words))
    own = commands[at] if commands else []
    start = after_program(own)
    environment.update(_assigned(own[:start] if start is not None else own))
    environment.update(_container_environment(own[: start or 0]))
    words = own[start:] if start is not None else _bare(own)
    words = [_VARIABLE.sub(partial(_value, environment), word) for word in words]
    return ShellCommand(
        words=tuple(_checked(words)),
        program=re.split(r"[/\\]", own[start - 1])[-1] if start else "",
        environment=tuple(environment.items()),
        visible_gpus=_visible(environment, own[: start or 0]),
    )


def _joined(line: str) -> str:
    """Return the line with its continuations joined; comments between them and after the backslash are left out."""
    text = _PLACEHOLDER.sub(rf"{_OPEN}\1{_CLOSE}", line.replace("\r\n", "\n"))
    text = re.sub(r"^[ \t]*#.*(?:\n|$)", "", text, flags=re.MULTILINE)
    text = re.sub(r"\\[ \t]*(?:[ \t]#[^\n]*)?(?:\n|$)|[ \t][\^`][ \t]*\n", " ", text)
    text = re.sub(r"(?<=\s)[12](?=>)", "", text)  # the numbers of streams that are redirected
    if re.search(r"(?<![A-Za-z])[A-Za-z]:\\", text):  # paths of Windows
        return text.replace("\\", "/")
    return re.sub(r"(?<!\S)\.\\", "./", text)


def _commands(text: str) -> list[list[str]]:
    """Return the words of each command of the line, redirections left out."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars=_OPERATORS)
    lexer.whitespace_split = True
    try:
        tokens = list(lexer)
    except ValueError as error:
        raise InputError(_("the command line cannot be split into words: {error}").format(error=error)) from None
    if len(tokens) > MAX_WORDS:
        raise InputError(_("the command line has more than {limit:,} words").format(limit=MAX_WORDS))
    commands: list[list[str]] = [[]]
    skip = False
    for token in tokens:
        if skip:
            skip = False
        elif token and not token.strip(_OPERATORS):
            skip = "<" in token or ">" in token
            if not skip:
                commands.append([])
        else:
            commands[-1].append(token.replace(_OPEN, "<").replace(_CLOSE, ">"))
    return [words for words in commands if words]


def _script(commands: list[list[str]], after_program: AfterProgram) -> str | None:
    """Return the script in a word, as in ``bash -c '…'``, if it holds the program."""
    for word in (word for words in commands for word in words if re.search(r"\s", word)):
        with suppress(InputError):
            if any(after_program(inner) is not None for inner in _commands(_joined(word))):
                return word
    return None


def _assigned(words: list[str]) -> list[tuple[str, str]]:
    """Return the assignments at the front of a command."""
    found = []
    for word in words:
        match = _ASSIGNMENT.fullmatch(word)
        if match is not None:
            found.append((match[1], match[2]))
        elif word not in _BEFORE:
            break
    return found


def _container_environment(words: list[str]) -> list[tuple[str, str]]:
    """Return what ``docker run -e NAME=VALUE --env=NAME=VALUE`` sets."""
    if not words or words[0] not in _CONTAINERS:
        return []
    given = [word for before, word in pairwise(words) if before in ("-e", "--env")]
    given += [word.partition("=")[2] for word in words if word.startswith("--env=")]
    matches = (_ASSIGNMENT.fullmatch(word) for word in given)
    return [(match[1], match[2]) for match in matches if match is not None]


def _bare(words: list[str]) -> list[str]:
    """Return the words of a command that names no program: what follows its assignments."""
    start = 0
    while start < len(words) and (words[start] in _BEFORE or _ASSIGNMENT.fullmatch(words[start])):
        start += 1
    return words[start:]


def image_end(words: list[str]) -> int | None:
    """Return where the words after an engine's container image begin, None where there is none."""
    if not any(word in _CONTAINERS for word in words[:3]):
        return None
    return next((at + 1 for at, word in enumerate(words) if _IMAGE.fullmatch(word)), None)


def _value(environment: dict[str, str], match: re.Match[str]) -> str:
    return environment.get(match[1] or match[2], match[0])


def _checked(words: list[str]) -> list[str]:
    """Refuse a variable in place of flags, and what a text left out: it could hold anything."""
    for before, word in pairwise(["", *words]):
        loose = not before.startswith("-") or "=" in before
        if _OMITTED.fullmatch(word) and loose:
            raise InputError(
                _("{word} stands for something that was left out").format(word=word[:60]),
                remedy=_("write it out, or leave it away"),
            )
        if is_unset(word) and loose and before:
            raise unset_variable(word)
    return words


def is_unset(word: str) -> bool:
    """Tell whether a word is a variable or a placeholder."""
    return word.startswith(("$", "%", "<"))


def unset_variable(word: str, where: str = "") -> InputError:
    """Return the error for a variable whose value the line does not say, or for a placeholder."""
    if word.startswith("<"):
        what = _("{word} is a placeholder").format(word=word[:60])
        return InputError(what, where=where, remedy=_("put what it stands for in its place"))
    return InputError(
        _("the line does not say what the shell variable {word} holds").format(word=word.strip('"')[:60]),
        where=where,
        remedy=_("put its value in its place, or set it before the command, as in TP=8; …"),
    )


def _visible(environment: dict[str, str], before: list[str]) -> int | None:
    """Return how many GPUs the line lets the engine see."""
    for name in _VISIBLE:
        value = environment.get(name, "").strip()
        if value and value.lower() not in ("all", "void", "none") and "$" not in value:
            return sum(bool(part.strip()) and part.strip() != "-1" for part in value.split(","))
    for flag, value in pairwise(before):
        if flag == "--gpus":
            return _container_gpus(value)
    return next((_container_gpus(word[7:]) for word in before if word.startswith("--gpus=")), None)


def _container_gpus(value: str) -> int | None:
    """Return the count in Docker's ``--gpus 2`` and ``--gpus '"device=0,1"'``."""
    text = value.strip("\"'")
    if text.isdigit():
        return int(text)
    _name, equals, devices = text.partition("device=")
    return len([part for part in devices.split(",") if part.strip()]) if equals else None
