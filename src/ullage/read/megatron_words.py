"""Megatron-LM flags as people keep them: a mapping, a shell script, a line, or a YAML file → :class:`Arguments`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from ullage.errors import InputError
from ullage.frozen import Frozen, field
from ullage.i18n import _
from ullage.read.megatron_flags import NEEDS_VALUE, READ
from ullage.read.shell_script import Script

MAX_TEXT = 200_000
MAX_INTEGER = 2**40
MAX_SIZE = 2**31
#: Endings of flags that take a word.
_WORDS = ("-model", "-file", "-path", "-type", "-format", "-recipe", "-impl", "-pattern", "-layout")
#: A variable that the script does not set, standing alone: other flags, or nothing.
_UNSET = re.compile(r"\$\{?[A-Za-z0-9_@*]+(\[[@*]\])?\}?")
_NUMBER = re.compile(r"-?\d+(\.\d+)?([eE][-+]?\d+)?")


class Arguments(Frozen):
    """Flags without dashes in front → text; a switch is ``true``. ``environment``: variables of the process."""

    values: Mapping[str, str]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.values and self.values[name] != ""

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def get(self, name: str, default: str = "") -> str:
        """Return the text of a flag."""
        return self.values.get(name, default)

    def on(self, name: str) -> bool:
        """Say whether a switch is set."""
        return self.values.get(name, "").lower() in ("true", "1", "yes")

    def stated(self, name: str) -> bool:
        """Say whether a flag is there and not switched off."""
        return self.values.get(name, "").lower() not in ("", "false", "none")

    def count(self, name: str, default: int | None = None) -> int:
        """Return a whole number.

        Raises:
            InputError: it is missing and has no default, or is not a sensible whole number.
        """
        text = self.values.get(name, "")
        if not text and default is not None:
            return default
        try:
            value = int(text)
        except ValueError:
            value = -1
        if not 0 <= value <= MAX_INTEGER:
            what = _("--{name} needs a whole number, not {text!r}") if text else _("--{name} is missing")
            raise InputError(what.format(name=name, text=text[:40]))
        return value

    def size(self, name: str, default: int | None = None, *, most: int = MAX_SIZE) -> int:
        """Return a whole number from 1 to ``most``.

        Raises:
            InputError: it is missing and has no default, or lies outside.
        """
        value = self.count(name, default)
        if not 1 <= value <= most:
            raise InputError(
                _("--{name} needs a number from 1 to {most}, not {value}").format(name=name, most=most, value=value)
            )
        return value

    def number(self, name: str, default: float) -> float:
        """Return a number."""
        text = self.values.get(name, "")
        if not text:
            return default
        if not _NUMBER.fullmatch(text):
            raise InputError(_("--{name} needs a number, not {text!r}").format(name=name, text=text[:40]))
        return float(text)

    def words(self, name: str) -> tuple[str, ...]:
        """Return the words of a list, brackets and commas aside."""
        return tuple(self.values.get(name, "").strip("[]").replace(",", " ").split())

    @property
    def pattern(self) -> str:
        """The hybrid layer pattern, or nothing."""
        return self.get("hybrid-layer-pattern") or self.get("hybrid-override-pattern")


def from_mapping(args: Mapping[str, object], env: Mapping[str, object] | None = None) -> Arguments:
    """Take flags from a mapping; dashes in front, underscores and lists are all understood."""
    values = {_canonical(str(name)): _text(value) for name, value in args.items() if value is not None}
    return Arguments(values=values, environment={str(name): str(value) for name, value in (env or {}).items()})


def _canonical(name: str) -> str:
    return name.strip().lstrip("-").replace("_", "-") if "opt_param" not in name else name.strip().lstrip("-")


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, tuple)):
        return " ".join(_text(item) for item in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def parse_text(text: str) -> Arguments:
    """Read a shell script's argument blocks, a command line, or YAML's ``--flag: value`` lines.

    Raises:
        InputError: too long, or quotes that do not close.
    """
    if len(text) > MAX_TEXT:
        raise InputError(_("the arguments are longer than {limit} characters").format(limit=MAX_TEXT))
    is_yaml = re.search(r"^\s*-{0,2}[a-z][\w-]*:(\s|$)", text, re.MULTILINE) and "\\\n" not in text
    if is_yaml or re.search(r"^(MODEL_ARGS|ENV_VARS):", text, re.MULTILINE):
        return _from_yaml(text)
    script = Script(text)
    return Arguments(
        values=_flags(_launched(script)),
        environment={name: value for name, value in script.variables.items() if name.isupper()},
    )


def _launched(script: Script) -> list[str]:
    """Return the words of the last command that runs a Python script with flags, of any with flags, or all blocks."""
    with_flags = [words for words in script.commands if any(word.startswith("--") for word in words)]
    with_script = [words for words in with_flags if any(word.endswith(".py") for word in words)]
    if with_script or with_flags:
        return (with_script or with_flags)[-1]
    return " ".join(block for block in script.variables.values() if "--" in block).split()


def _flags(words: list[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    name = ""
    for word in words:
        if word.endswith(".py") and name not in READ:
            found, name = {}, ""  # what stood before the script is the launcher's
        elif word.startswith("--") and len(word) > 2:
            name, equals, value = word.partition("=")
            name = _canonical(name)
            found[name] = value if equals else "true"
            if equals:
                name = ""
        elif word.startswith((">", "2>", "&>", "1>", "<")):
            name = ""  # a redirection
        elif name and not (_UNSET.fullmatch(word) and not _takes_word(name, found)):
            found[name] = word if found[name] == "true" else f"{found[name]} {word}"
    return {name: value.strip("\"'") for name, value in found.items()}


def _takes_word(name: str, found: Mapping[str, str]) -> bool:
    """Say whether a flag still lacks the value that it needs."""
    return found[name] == "true" and (name in NEEDS_VALUE or name.endswith(_WORDS))


def _from_yaml(text: str) -> Arguments:
    """Read ``--flag: value`` lines; nested blocks count as one level, ``ENV_VARS`` as the environment.

    Not a YAML parser: what functional tests and launchers write is one ``key: value`` a line.
    """
    values: dict[str, str] = {}
    environment: dict[str, str] = {}
    section = ""
    for line in text.splitlines():
        match = re.fullmatch(r"(\s*)(-{0,2}[\w.-]+):\s*(.*?)\s*(?:\s#.*)?", line)
        if match is None:
            continue
        if not match.group(3):
            section = match.group(2).lower()
        elif section.startswith("env"):
            environment[match.group(2)] = match.group(3).strip("\"'")
        elif match.group(2).startswith("-") or not match.group(2).isupper():  # TEST_TYPE and its kin are the runner's
            values[_canonical(match.group(2))] = match.group(3).strip("\"'")
    return Arguments(values=values, environment=environment)
