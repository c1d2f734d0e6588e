"""The marker that limits the GPU memory of a test; the GPU is a stand-in that counts what it is told."""

import subprocess
import sys
from importlib.metadata import entry_points

import pytest

TEST = """
import pytest

@pytest.mark.gpu_memory_limit({limit})
def test_marked():
    import fake_gpu
    fake_gpu.allocated = 3 * 2**30

def test_not_marked():
    pass
"""
#: As much of torch.cuda as the plugin asks for; its snapshot is one that a run has left behind.
TORCH = """
import pickle, sys, types
import fake_gpu
calls = []
memory = types.SimpleNamespace(
    _record_memory_history=lambda **settings: calls.append(settings),
    _snapshot=lambda: pickle.load(open({snapshot!r}, "rb")),
)
cuda = types.SimpleNamespace(
    is_available=lambda: {gpu}, device_count=lambda: 1, synchronize=lambda device: None, memory=memory,
    reset_peak_memory_stats=lambda device: setattr(fake_gpu, "allocated", 0),
    max_memory_allocated=lambda device: fake_gpu.allocated,
)
"""


def run(tmp_path, limit, *, gpu=True, torch=True):
    from training_snapshot import training

    snapshot = training(2).save(tmp_path / "a.pickle")
    (tmp_path / "fake_gpu.py").write_text("allocated = 0\n")
    (tmp_path / "torch.py").write_text(
        TORCH.format(snapshot=str(snapshot), gpu=gpu) if torch else "raise ImportError('no torch')\n"
    )
    (tmp_path / "test_it.py").write_text(TEST.format(limit=limit))
    installed = any(point.value == "ullage.pytest_plugin" for point in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "ullage.pytest_plugin"]
    command = [sys.executable, "-m", "pytest", "-rs", "--strict-markers", "-p", "no:cacheprovider", *plugin, "."]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def test_below_the_limit(tmp_path):
    code, out = run(tmp_path, "'4GiB'")
    assert code == 0, out
    assert "2 passed" in out


def test_above_the_limit_names_the_holders(tmp_path):
    code, out = run(tmp_path, "'2GiB'")
    assert code == 1
    assert "3.00 GiB were allocated on device 0, and 2.00 GiB are the limit" in out
    assert "activations" in out and "forward (/job/model.py:20)" in out
    assert "1 failed, 1 passed" in out


def test_without_history(tmp_path):
    code, out = run(tmp_path, "'2GiB', history=False")
    assert code == 1
    assert "forward" not in out


@pytest.mark.parametrize(("settings", "why"), [({"gpu": False}, "there is no GPU"), ({"torch": False}, "torch is not")])
def test_what_cannot_be_measured_is_skipped_with_the_reason(settings, why, tmp_path):
    code, out = run(tmp_path, "'2GiB'", **settings)
    assert code == 0
    assert "1 passed, 1 skipped" in out and why in out


@pytest.mark.parametrize("limit", ["'a lot'", "", "'2GiB', 3", "'2GiB', hist=1"])
def test_a_wrong_limit_fails_with_a_sentence(limit, tmp_path):
    code, out = run(tmp_path, limit)
    assert code == 1
    assert "gpu_memory_limit" in out
    assert "INTERNALERROR" not in out


def test_the_plugin_loads_nothing_heavy():
    code = "import ullage.pytest_plugin, sys; print(sorted({'torch', 'numpy', 'rich', 'plotly'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
