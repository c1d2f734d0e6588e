"""Megatron-LM flags as people keep them: a mapping, a shell script, a line, or a YAML file → :class:`Arguments`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping

from ullage.errors import InputError
from ullage.frozen import Frozen, field
from ullage.i18n import _
from ullage.read.megatron_flags import READ

MAX_TEXT = 200_000
MAX_INTEGER = 2**40
MAX_SIZE = 2**31
_ASSIGNMENT = re.compile(
    r"(?<![\w-])(?:export\s+)?([A-Za-z_][A-Za-z0-9_]*)=(\([^)]*\)|\"[^\"]*\"|'[^']*'|\S*)", re.DOTALL
)
_VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)(?:\[@\]|:-([^}]*))?\}|\$([A-Za-z_][A-Za-z0-9_]*)")
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
    if re.search(r"^\s*-{0,2}[a-z][\w-]*:(\s|$)", text, re.MULTILINE) and "\\\n" not in text:
        return _from_yaml(text)
    lines = re.sub(r"\\\r?\n", " ", text)
    variables = _variables(lines)
    try:
        words = shlex.split(_expand(lines, variables), comments=True)
    except ValueError as error:
        raise InputError(_("the command line cannot be split: {error}").format(error=error)) from error
    return Arguments(
        values=_flags(words), environment={name: value for name, value in variables.items() if name.isupper()}
    )


def _variables(text: str) -> dict[str, str]:
    """Return the script's variables; one that names itself (``N=${N:-4}``, ``ARGS="$ARGS ..."``) takes what it was."""
    found: dict[str, str] = {}
    for name, value in _ASSIGNMENT.findall(text):

        def before(match: re.Match[str], name: str = name) -> str:
            own = (match.group(1) or match.group(3)) == name
            return found.get(name, match.group(2) or "") if own else match.group(0)

        found[name] = _substituted(before, value.strip("()\"'"))
    return found


def _substituted(value: Callable[[re.Match[str]], str], text: str) -> str:
    """Put values in.

    Raises:
        InputError: the text would grow beyond all sense.
    """
    if sum(len(value(match)) for match in _VARIABLE.finditer(text)) > 4 * MAX_TEXT:
        raise InputError(_("the arguments are longer than {limit} characters").format(limit=MAX_TEXT))
    return _VARIABLE.sub(value, text)


def _expand(text: str, variables: Mapping[str, str], depth: int = 4) -> str:
    """Put variables in, blocks of flags included; unknown ones become empty."""

    def value(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(3)
        return variables.get(name, match.group(2) or "")

    kept = _ASSIGNMENT.sub(" ", text)
    for _round in range(depth):
        expanded = _substituted(value, kept)
        if expanded == kept or len(expanded) > 4 * MAX_TEXT:
            break
        kept = expanded
    blocks = " ".join(block for block in variables.values() if "--" in block)
    return kept if "--" in kept else _substituted(value, blocks)


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
        elif name and word not in ("&&", ";", "|", "2>&1", ")"):
            found[name] = word if found[name] == "true" else f"{found[name]} {word}"
        else:
            name = ""
    return found


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
