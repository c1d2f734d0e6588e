"""What the start of the program loads, and how long it takes."""

import json
import statistics
import subprocess
import sys
import time

import pytest

HEAVY = (
    "torch",
    "numpy",
    "pandas",
    "starlette",
    "uvicorn",
    "asyncio",
    "email",
    "urllib.request",
    "http",
    "transformers",
)
FIT = "from ullage.cli import main; main(['fit', 'serve', 'deepseek-v3', '--on', '8xH200', '--json'])"


def loaded_by(code):
    """Return the names of all modules loaded after ``code`` ran in a fresh interpreter."""
    report = "import sys, json; print(chr(10) + json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


def heavy_in(names):
    return sorted(name for name in HEAVY if name in names)


def test_import_ullage_loads_nothing_heavy():
    names = loaded_by("import ullage")
    assert heavy_in(names) == []
    assert "rich" not in names
    assert not {name for name in names if name.startswith("ullage.")}


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_fit_json_loads_nothing_heavy(engine):
    names = loaded_by(FIT.replace("'--json'", f"'--json', '--engine', '{engine}'"))
    assert heavy_in(names) == []
    assert "rich" not in names


def test_fit_loads_only_the_engine_asked_for():
    names = loaded_by(FIT)
    assert "ullage.engines.vllm" in names
    assert not {name for name in names if name.startswith(("ullage.engines.sglang", "ullage.engines.llamacpp"))}
    assert not {name for name in names if name.startswith(("ullage.read.hf_config.families.", "ullage.records"))}


@pytest.mark.parametrize("name", ["asyncio", "http"])
def test_the_check_can_fail(name):
    assert heavy_in(loaded_by(f"import {name}")) != []


def seconds(arguments):
    start = time.perf_counter()
    subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def test_fit_json_answers_within_twelve_bare_interpreters():
    """The promise of a quick start; the least of several tries, because other work shares the machine."""
    bare, fit = [], []
    for _ in range(9):
        bare.append(seconds([sys.executable, "-c", "pass"]))
        fit.append(seconds([sys.executable, "-c", FIT]))
        if len(fit) >= 3 and min(fit) < 12 * min(bare):
            break
    assert min(fit) < 12 * min(bare), (statistics.median(fit), statistics.median(bare))
