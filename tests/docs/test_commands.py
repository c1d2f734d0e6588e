"""What the documentation tells people to type is understood by the program."""

import re
import shlex
from pathlib import Path

import pytest

from ullage.cli import COMMANDS, Parser, main

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def commands():
    found = []
    for page in PAGES:
        for block in re.findall(
            r"```(?:console|sh|bash|shell|text)?\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL
        ):
            for line in block.replace("\\\n", " ").splitlines():
                match = re.match(r"\s*(?:\$ )?(ullage (?!\.)[^|#>…]*?)\s*(?:[#|>].*)?$", line)
                if match and "[" not in match.group(1):
                    found.append((page.name, match.group(1)))
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_a_command_of_the_docs_is_parsed(page, line):
    from importlib import import_module

    words = shlex.split(line)[1:]
    if not words or words[0].startswith("-"):
        return
    assert words[0] in COMMANDS, f"{page}: {line}"
    if words[0] == "explain" and "fit" in words:  # a whole command of its own stands behind the term
        test_a_command_of_the_docs_is_parsed(page, shlex.join(["ullage", *words[words.index("fit") :]]))
        words = words[: words.index("fit")]
    name = "ullage.cli.fit_train" if words[:2] == ["fit", "train"] else COMMANDS[words[0]][0]
    words = words[1:] if name == "ullage.cli.fit_train" else words
    module = import_module(name)
    parser = Parser(prog=words[0], allow_abbrev=False)
    module.add_arguments(parser)
    parser.parse_args(words[1:])


def test_the_example_of_the_help_works(capsys):
    main([])
    example = re.search(r"example:\s+(ullage .*)", capsys.readouterr().out)
    assert example
    assert main(shlex.split(example.group(1))[1:]) in (0, 3, 4)


def test_the_documented_exit_codes_are_those_of_the_program():
    from ullage.fitting import EXIT_CODES

    rows = re.findall(r"^\| ([a-z ]+) \| (\d) \|", (ROOT / "docs" / "verdict.md").read_text(), re.MULTILINE)
    assert {name.replace(" ", "_"): int(code) for name, code in rows} == EXIT_CODES


@pytest.mark.parametrize(("page", "line"), [pair for pair in commands() if pair[0] == "README.md"])
def test_a_command_of_the_readme_runs(page, line, capsys):
    assert main(shlex.split(line)[1:]) in (0, 3, 4), line
    assert capsys.readouterr().out
