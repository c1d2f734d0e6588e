"""Every sentence is in the one catalogue, and every sentence in it can be filled in."""

import re
import string
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
sys.path.insert(0, str(TOOLS))
babel = pytest.importorskip("babel", reason="babel is not installed (dependency group locale)")

import make_locale  # noqa: E402


def test_the_template_is_up_to_date():
    assert make_locale.TEMPLATE.read_bytes() == make_locale.template(), "run python tools/make_locale.py"


def test_sentences_name_their_values():
    from babel.messages.pofile import read_po

    with make_locale.TEMPLATE.open("rb") as file:
        messages = [str(message.id) for message in read_po(file) if message.id]
    assert len(messages) > 100
    for text in messages:
        for _literal, field, _spec, _conversion in string.Formatter().parse(text):
            assert field is None or re.match(r"[a-z_]", field), text
