"""Limits on what an inspection finds: kept or broken, and nonsense is told what would be right."""

import json

import pytest
from training_snapshot import MIB, training

from ullage.cli import main
from ullage.errors import InputError
from ullage.observe.assertions import QUANTITIES, failures, parse_assertion
from ullage.observe.inspection import Inspection


@pytest.fixture
def snapshot(tmp_path):
    return str(training(6, leak=2 * MIB).save(tmp_path / "a.pickle"))


def found(**sizes):
    return Inspection(kind="snapshot", verdict="a", cause="none", confidence="likely", sizes=tuple(sizes.items()))


@pytest.mark.parametrize(
    ("text", "value", "broken"),
    [
        ("peak < 1KiB", 1023, False),
        ("peak < 1KiB", 1024, True),
        ("peak<=1KiB", 1024, False),
        ("peak > 1KB", 1001, False),
        ("peak == 1024", 1024, False),
        ("peak >= 2 MiB", 1, True),
    ],
)
def test_comparisons(text, value, broken):
    assert bool(failures([parse_assertion(text)], found(peak_allocated=value))) is broken


def test_units_of_each_quantity():
    assert parse_assertion("leak < 1MiB/step").amount == MIB
    assert parse_assertion("leak < 1MiB / step").amount == MIB
    assert parse_assertion("fragmentation < 12.5%").amount == 0.125
    assert parse_assertion("retries == 0").amount == 0


@pytest.mark.parametrize(
    "text",
    [
        "", "peak", "peak <", "peak < ", "peak ! 3", "peek < 3GiB", "peak < 3 GiB/step", "retries < 1.5", "ooms < 1GiB",
        "fragmentation < 3", "leak < 1MiB/min", "peak < -3", "<3", "peak < 9" + "9" * 50, "peak << 3GiB", "π < 3",
    ],
)  # fmt: skip
def test_nonsense_is_refused_in_one_sentence(text, snapshot, capsys):
    assert main(["inspect", snapshot, "--assert", text]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert "--assert" in error


def test_an_unknown_quantity_names_the_known_ones():
    with pytest.raises(InputError) as refused:
        parse_assertion("peek < 3GiB")
    assert all(name in str(refused.value) for name in QUANTITIES)


def test_what_a_file_does_not_know_is_said(tmp_path, capsys):
    path = tmp_path / "train.log"
    path.write_text("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which 1.00 GiB is free. Of the allocated memory 70.00 GiB is allocated by PyTorch, and 5.00 GiB is reserved by PyTorch but unallocated.\n")  # fmt: skip  # noqa: E501
    assert main(["inspect", str(path), "--assert", "leak < 1MiB/step"]) == 2
    assert "leak is not known of this file; known are peak" in capsys.readouterr().err
    assert main(["inspect", str(path), "--assert", "peak < 71GiB"]) == 0
    assert main(["inspect", str(path), "--assert", "peak < 69GiB"]) == 3


def test_each_broken_limit_is_one_sentence(snapshot, capsys):
    limits = ["peak < 1MiB", "leak < 1MiB/step", "ooms == 0", "retries == 0", "reserved < 1MiB", "fragmentation < 99%"]
    arguments = [word for limit in limits for word in ("--assert", limit)]
    assert main(["inspect", snapshot, *arguments, "--json"]) == 3
    out, error = capsys.readouterr()
    assert json.loads(out)["cause"] == "leak"
    assert [line.split(" is ")[0] for line in error.splitlines()] == [
        "ullage: peak",
        "ullage: leak",
        "ullage: reserved",
    ]
    assert "leak is 2.0 MiB per step, and 'leak < 1MiB/step' was asserted" in error


def test_limits_that_hold_are_silent(snapshot, capsys):
    assert main(["inspect", snapshot, "--assert", "peak < 1GiB", "--assert", "leak <= 2MiB/step"]) == 0
    assert capsys.readouterr().err == ""
