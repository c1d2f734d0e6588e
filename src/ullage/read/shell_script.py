"""A launch script → the variables that it sets and the commands that it would run, branch by branch.

``if`` and ``case`` take the branch that their words decide (files are taken to exist, arguments of the script not to be
given), ``for`` runs once with the first word, ``while`` not at all. Nothing is run.
"""

from __future__ import annotations

import re
from fnmatch import fnmatchcase

from ullage.errors import InputError
from ullage.i18n import _
from ullage.read.shell_statements import MAX_EXPANDED, Statement, arithmetic, expanded, statements

MAX_STEPS = 20_000
#: Branches and loops within each other; no script that people write comes near.
MAX_DEPTH = 50
_ASSIGNMENT = re.compile(r"([A-Za-z_][A-Za-z0-9_]*)(\+?)=(.*)", re.DOTALL)
_PREFIXES = ("export", "local", "declare", "readonly", "typeset")
_SPOKEN = ("echo", "printf", "set", "shift", "exit", "return", "source", ".", "mkdir", "cd", "rm", "eval")
_LOOPS = ("for", "while", "until", "select")
_FILE_TESTS = ("-e", "-f", "-d", "-r", "-s", "-x", "-L")
_NUMBERS = {
    "-eq": int.__eq__,
    "-ne": int.__ne__,
    "-gt": int.__gt__,
    "-ge": int.__ge__,
    "-lt": int.__lt__,
    "-le": int.__le__,
}


class Script:
    """What a script sets and runs.

    Attributes:
        variables: as they are at its end; arrays are their words with blanks between.
        commands: the words of each command, expanded; what has no value is left as it is written.
    """

    def __init__(self, text: str) -> None:
        self.variables: dict[str, str] = {}
        self.commands: list[list[str]] = []
        self._held = self._depth = 0
        self._statements = statements(text)
        if len(self._statements) > MAX_STEPS:
            raise InputError(_("the script has more than {limit:,} commands").format(limit=MAX_STEPS))
        self._at = 0
        while self._at < len(self._statements):
            self._run(True)

    def _run(self, live: bool) -> None:
        """Go over one statement with its body; ``live``: it would be run."""
        statement = self._statements[self._at]
        word = statement.words[0]
        nested = {"if": self._if, "case": self._case}.get(word) or (self._loop if word in _LOOPS else None)
        if nested is None:
            self._at += 1
            if live:
                self._chain(statement)
            return
        if self._depth == MAX_DEPTH:
            raise InputError(_("the script is nested more than {limit} deep").format(limit=MAX_DEPTH))
        self._depth += 1
        nested(live)
        self._depth -= 1

    def _chain(self, first: Statement) -> None:
        """Run a command and those that hang on it by ``&&`` and ``||``."""
        truth = self._command(first.words)
        while self._at < len(self._statements) and self._statements[self._at].before in ("&&", "||"):
            statement = self._statements[self._at]
            self._at += 1
            if truth == (statement.before == "&&"):
                truth = self._command(statement.words)

    def _body(self, live: bool, ends: tuple[str, ...]) -> str:
        """Go over statements up to one that begins with one of ``ends``, which stays; return it."""
        while self._at < len(self._statements):
            word = self._statements[self._at].words[0]
            if word in ends:
                return word
            self._run(live)
        return ""

    def _drop(self, words: int = 1) -> None:
        """Leave out the first words of the statement at hand; what follows them is a statement."""
        statement = self._statements[self._at]
        if len(statement.words) > words:
            self._statements[self._at] = Statement(words=statement.words[words:], before="\n")
        else:
            self._at += 1

    def _if(self, live: bool) -> None:
        done = False
        self._drop()
        while True:
            truth = self._condition(live and not done)
            if self._body(False, ("then", "fi")) == "then":
                self._drop()
            end = self._body(live and truth and not done, ("elif", "else", "fi"))
            done = done or truth
            if end != "elif":
                break
            self._drop()
        if end == "else":
            self._drop()
            end = self._body(live and not done, ("fi",))
        if end:
            self._drop()

    def _condition(self, live: bool) -> bool:
        truth, before = False, "\n"
        while self._at < len(self._statements) and self._statements[self._at].words[0] not in ("then", "fi"):
            statement = self._statements[self._at]
            before = statement.before if before != "\n" else "first"
            self._at += 1
            if before == "&&":
                truth = truth and live and self._test(statement.words)
            elif before == "||":
                truth = truth or (live and self._test(statement.words))
            else:
                truth = live and self._test(statement.words)
        return truth

    def _case(self, live: bool) -> None:
        words = self._statements[self._at].words
        subject = self._value(words[1]) if len(words) > 1 else ""
        self._drop(min(len(words), 3))
        done = False
        while self._at < len(self._statements) and self._statements[self._at].words[0] != "esac":
            if self._statements[self._at].words[0] == ";;":
                self._at += 1
                continue
            truth = self._pattern(subject)
            self._body(live and truth and not done, (";;", "esac"))
            done = done or truth
        if self._at < len(self._statements):
            self._drop()

    def _pattern(self, subject: str) -> bool:
        """Read ``one|two)`` of a case; the lexer has made statements of its parts."""
        truth = False
        while self._at < len(self._statements):
            words = [word for word in self._statements[self._at].words if word != "("]
            at = words.index(")") if ")" in words else -1
            if not words or words[0] in ("esac", ";;"):
                return truth
            truth = truth or fnmatchcase(subject, self._value(words[0]))
            self._drop(at + 1 if at >= 0 else len(self._statements[self._at].words))
            if at >= 0:
                return truth
        return truth

    def _loop(self, live: bool) -> None:
        """``for NAME in WORDS`` once with its first word; other loops not at all."""
        words = self._statements[self._at].words
        first = " ".join(self._value(word) for word in words[3:]).split()[:1] if words[0] == "for" else []
        if live and first:
            self._set(words[1], first[0])
        self._at += 1
        if self._body(False, ("do", "done")) == "do":
            self._drop()
            self._body(live and bool(first), ("done",))
        if self._at < len(self._statements):
            self._drop()

    def _command(self, words: tuple[str, ...]) -> bool:
        """Take assignments, keep commands, answer tests."""
        if words[0] in ("[", "[[", "test", "!", "(("):
            return self._test(words)
        while words and words[0] in ("{", "}", "(", ")", "then", "do", "else", *_PREFIXES):
            words = words[1:]
        while words and (match := _ASSIGNMENT.fullmatch(words[0])) is not None:
            value = self._assigned(match[3])
            self._set(match[1], self.variables.get(match[1], "") + (" " + value if match[3][:1] == "(" else value)
                      if match[2] else value)  # fmt: skip
            words = words[1:]
        if words and words[0] not in _SPOKEN:
            self.commands.append(" ".join(self._value(word, unset=True) for word in words).split())
            self._held += sum(map(len, self.commands[-1]))
            self._check()
        return True

    def _assigned(self, text: str) -> str:
        """Return the value of an assignment; an array's words have blanks between, and flags keep what has no value."""
        unset = "--" in text
        if not text.startswith("("):
            return self._value(text, unset=unset)
        inner = statements(text[1:-1])
        return " ".join(self._value(word, unset=unset) for statement in inner for word in statement.words)

    def _set(self, name: str, value: str) -> None:
        self._held += len(value)
        self._check()
        self.variables[name] = value

    def _check(self) -> None:
        if self._held > MAX_EXPANDED:
            raise InputError(_("the arguments are longer than {limit} characters").format(limit=MAX_EXPANDED))

    def _value(self, word: str, *, unset: bool = False) -> str:
        """Expand a word; ``unset``: what has no value, or none that is known, stays as it is written."""
        return expanded(
            word, (lambda name: self.variables.get(name) or None) if unset else self.variables.get, unset=unset
        )

    def _test(self, words: tuple[str, ...]) -> bool:
        """Answer ``[ … ]``, ``[[ … ]]``, ``test …``, ``((…))``; any other command is taken to fail."""
        turns = next((at for at, word in enumerate(words) if word != "!"), len(words))
        if turns:
            return turns < len(words) and self._test(words[turns:]) == (turns % 2 == 0)
        if words[0] in ("true", ":"):
            return True
        if words[0] == "(" and words[-1] == ")" and len(words) > 2:
            return arithmetic(" ".join(words).strip("() "), self.variables.get) not in ("", "0")
        if words[0] not in ("[", "[[", "test"):
            return False
        inner = [word for word in words[1:] if word not in ("]", "]]")]
        return any(
            all(self._comparison(part) for part in _split(either, ("&&", "-a")))
            for either in _split(inner, ("||", "-o"))
        )

    def _comparison(self, words: list[str]) -> bool:
        turns = next((at for at, word in enumerate(words) if word != "!"), len(words))
        if turns:
            return self._comparison(words[turns:]) == (turns % 2 == 0)
        values = [self._value(word) for word in words]
        if len(words) == 2 and words[0] in ("-z", "-n"):
            return (not values[1]) == (words[0] == "-z")
        if len(words) == 2 and words[0] in _FILE_TESTS:
            return bool(values[1])
        if len(words) == 3 and words[1] in ("=", "==", "!="):
            return fnmatchcase(values[0], values[2]) == (words[1] != "!=")
        if len(words) == 3 and words[1] in _NUMBERS:
            try:
                return bool(_NUMBERS[words[1]](int(values[0]), int(values[2])))
            except ValueError:
                return False
        return len(values) == 1 and bool(values[0])


def _split(words: list[str], marks: tuple[str, ...]) -> list[list[str]]:
    found: list[list[str]] = [[]]
    for word in words:
        if word in marks:
            found.append([])
        else:
            found[-1].append(word)
    return found
