"""NVML on a real GPU: the twin of tests/guard/test_watch_nvml.py."""

import os

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
MiB = 2**20


def test_an_allocation_is_seen_by_nvml_and_by_the_exporter(tmp_path):
    from ullage.guard.watch.counters import read_counters
    from ullage.guard.watch.devices import Nvml
    from ullage.guard.watch.exporter import Exporter

    torch.zeros(1, device="cuda")
    nvml = Nvml()
    before = nvml.samples()[0]
    held = torch.empty(1024 * MiB, dtype=torch.uint8, device="cuda")
    after = nvml.samples()[0]
    assert after.device.total_bytes >= torch.cuda.get_device_properties(0).total_memory
    assert after.used_bytes - before.used_bytes >= 1000 * MiB
    assert Exporter(tmp_path).update(1)
    (found,) = read_counters(tmp_path)
    assert found.pid == os.getpid()
    assert found.allocated_bytes >= held.numel()
    assert found.reserved_bytes >= found.allocated_bytes
