"""Fragmentation made on a real GPU: the setting that the what-if names is confirmed by a run under it."""

import json
import os
import subprocess
import sys

import pytest

from ullage.allocator.session import replay_device
from ullage.observe.snapshot import read_snapshot

torch = pytest.importorskip("torch")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU on this machine"),
]

#: Held blocks of 7 MiB (two in a segment of 20 MiB), and activations of lengths that change from step to step.
JOB = """
import json, sys, torch
torch.cuda.init()
torch.empty(1, device="cuda")
torch.cuda.memory._record_memory_history(max_entries=1_000_000)
MiB = 2**20
def take(size):
    return torch.empty(size, dtype=torch.uint8, device="cuda")
held = [take(7 * MiB) for _ in range(100)]
for step in range(40):
    length = 1 + step * 7 % 11
    kept = [take(length * (16 + layer) * MiB // 2 + 512 * layer) for layer in range(12)]
    while kept:
        gradient = take(length * 9 * MiB)
        kept.pop()
        del gradient
torch.cuda.memory._dump_snapshot(sys.argv[1])
print(json.dumps([torch.cuda.max_memory_reserved(), torch.cuda.max_memory_allocated()]))
"""


def run_job(path, conf):
    environment = {**os.environ, "PYTORCH_CUDA_ALLOC_CONF": conf, "PYTORCH_ALLOC_CONF": conf}
    done = subprocess.run(
        [sys.executable, "-c", JOB, str(path)], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def version():
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "plain.pickle"
    return path, run_job(path, "")


def test_a_real_recording_is_followed_to_the_byte(recorded):
    path, (reserved, allocated) = recorded
    found = replay_device(read_snapshot(path), 0)
    assert found.placement.checked == found.placement.equal > 500
    assert found.placement.final_segments == found.placement.final_equal
    assert (found.peak_reserved_bytes, found.peak_allocated_bytes) == (reserved, allocated)


@pytest.mark.parametrize("rank", [0, 1])
def test_the_winner_is_confirmed_by_a_run_under_it(recorded, rank, tmp_path):
    path, (reserved, _allocated) = recorded
    comparison = replay_device(read_snapshot(path), 0, what_if=True, version=version()).comparison
    assert comparison.baseline.peak_reserved_bytes == reserved
    winner = comparison.better[rank]
    again, _allocated = run_job(tmp_path / "again.pickle", winner.settings.text)
    assert again < reserved
    assert again == winner.peak_reserved_bytes


def test_expandable_segments_are_followed_on_cuda(tmp_path):
    path = tmp_path / "growing.pickle"
    reserved, allocated = run_job(path, "expandable_segments:True")
    found = replay_device(read_snapshot(path), 0)
    assert found.placement.checked == found.placement.equal > 500
    assert found.placement.final_segments == found.placement.final_equal
    assert (found.peak_reserved_bytes, found.peak_allocated_bytes) == (reserved, allocated)
