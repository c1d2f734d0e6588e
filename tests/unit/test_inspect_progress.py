"""The bar: on a terminal only, and only for what takes more than a second."""

from __future__ import annotations

import io
import sys
import time

import pytest

from ullage.observe.progress import Watched


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def read_slowly(monkeypatch: pytest.MonkeyPatch, stderr: io.StringIO, seconds: float) -> str:
    clock = [0.0]
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    with Watched(io.BytesIO(b"x" * 100), 100) as stream:
        while stream.read(10):
            clock[0] += seconds / 10
    return stderr.getvalue()


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "reading" in read_slowly(monkeypatch, Terminal(), 5.0)


def test_none_for_what_is_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_slowly(monkeypatch, Terminal(), 0.5) == ""


def test_none_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_slowly(monkeypatch, io.StringIO(), 5.0) == ""
