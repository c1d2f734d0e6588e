"""Whatever stands in a log, an inspection answers or refuses, in bounded time."""

from __future__ import annotations

import contextlib
import io
import json
import time
from pathlib import Path

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage.errors import InputError
from ullage.observe import scan
from ullage.observe.engine_logs import figures_of
from ullage.observe.inspection import inspect_stream
from ullage.report.inspect_json import inspect_json

SCHEMA = json.loads((Path(__file__).parents[2] / "src/ullage/schema/inspect.json").read_text(encoding="utf-8"))
PIECES = [
    *sorted(set(scan._WORDS)),
    "CUDA out of memory. Tried to allocate 1.00 GiB",
    " GPU 0 has a total capacity of 80.00 GiB of which 1.00 GiB is free.",
    "Process 77 has 5.00 GiB memory in use. ",
    " this process has 17179869184.00 GiB memory in use. ",
    "Of the allocated memory 70.00 GiB is allocated by PyTorch, and 9.00 GiB is reserved by PyTorch but unallocated.",
    "[rank1]: ", "(Worker_TP0 pid=3) ", "[2026-01-01 00:00:00 DP0 TP0] ", "\n", "\r", "\x1b[31m", " ", "-1",
    "99999999999",
    "0 bytes", "1.5 GiB", "KiB", "(", ")", ";", "'", "max seq len (10)", "KV cache is needed", "buffer size = 1 MiB",
]  # fmt: skip


def answer(text: bytes) -> None:
    with contextlib.suppress(InputError):
        jsonschema.validate(inspect_json(inspect_stream(io.BytesIO(text))), SCHEMA)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40))
def test_any_mixture_of_words_is_answered_or_refused(words: list[str]) -> None:
    answer("".join(words).encode())


@settings(max_examples=60, deadline=None)
@given(st.binary(max_size=400))
def test_any_bytes_are_answered_or_refused(content: bytes) -> None:
    answer(b"CUDA out of memory" + content)


@pytest.mark.parametrize("word", PIECES)
def test_no_word_repeated_takes_long(word: str) -> None:
    text = (word * (200_000 // len(word))).encode()
    began = time.process_time()
    answer(text + b"\n" + text.replace(b"\n", b" ") + b"\n")
    answer((word + " 1").encode() * 5_000)
    assert time.process_time() - began < 5


@pytest.mark.parametrize("filler", ["1", "1,", "a", " ", "1.0 GiB ", "GiB", "(", "mem usage=", "OpType="])
def test_a_line_of_one_sort_takes_no_time(filler: str) -> None:
    began = time.process_time()
    line = "Load weight end." + filler * (16_000 // len(filler))
    list(figures_of(line))
    answer(f"Tried to allocate {filler * (16_000 // len(filler))}".encode())
    assert time.process_time() - began < 2


def test_memory_does_not_grow_with_the_log() -> None:
    import tracemalloc

    class Endless(io.RawIOBase):
        """Many lines that say the same, without end until 64 MB."""

        left = 64 << 20

        def read(self, size: int = -1, /) -> bytes:
            size = min(size, self.left)
            self.left -= size
            return (b"x" * 99 + b"\n") * (size // 100)

    tracemalloc.start()
    answer_of = Endless()
    with contextlib.suppress(InputError):
        inspect_stream(answer_of)
    _now, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 24 << 20
