"""Scripts that are read and not run: branches by their words, and bounds on what a hostile one may ask for."""

import pytest

from ullage.errors import InputError
from ullage.read.shell_script import MAX_DEPTH, Script


def test_negations_in_any_number_turn_a_test_round():
    for number, value in ((0, "1"), (1, "2"), (2, "1"), (5001, "2")):
        text = "if " + "! " * number + "true; then\nA=1\nelse\nA=2\nfi\n"
        assert Script(text).variables["A"] == value
        text = "if [ " + "! " * number + "-n x ]; then\nA=1\nelse\nA=2\nfi\n"
        assert Script(text).variables["A"] == value


def test_branches_may_be_nested_but_not_without_end():
    deep = "if true; then\n" * (MAX_DEPTH - 1) + "A=1\n" + "fi\n" * (MAX_DEPTH - 1)
    assert Script(deep).variables["A"] == "1"
    for opened, closed in (
        ("if true; then\n", "fi\n"),
        ("case x in x)\n", ";; esac\n"),
        ("for i in x; do\n", "done\n"),
    ):
        with pytest.raises(InputError, match="nested more than"):
            Script(opened * 6000 + "A=1\n" + closed * 6000)


@pytest.mark.parametrize(
    "text",
    [
        "A=" + "$(" * 5000 + "echo x" + ")" * 5000,
        "A=$((" + "(" * 5000 + "1" + ")" * 5000 + "))",
        "A=$((9**9**9**9))\nB=$((1<<99999999999))",
        "run ${A:-${B:-" * 2000 + "}}" * 2000,
        "'" * 5001,
        "\\\n" * 9000,
    ],
)
def test_what_nobody_writes_ends_in_a_script_or_a_sentence(text):
    try:
        Script(text)
    except InputError as error:
        assert len(str(error)) < 400


def test_values_that_double_are_bounded():
    with pytest.raises(InputError, match="longer than"):
        Script("A=xxxxxxxxxxxxxxxx\n" + "A=$A$A\n" * 60)
