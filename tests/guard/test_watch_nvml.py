"""NVML is faked at its own border only: the module pynvml. Its twin on a real GPU stands in tests/gpu."""

import json
import sys
from types import SimpleNamespace

import pytest

from ullage.cli import main
from ullage.guard.watch.devices import Nvml, gpu_names
from ullage.guard.watch.sampler import Sampler

GiB = 2**30


class NVMLError(Exception):
    pass


def fake(monkeypatch, *, used=(10 * GiB, 70 * GiB), silent=(), dead=False):
    def memory(handle):
        if handle in silent:
            raise NVMLError("GPU is lost")
        return SimpleNamespace(total=80 * GiB, used=used[handle])

    def start():
        if dead:
            raise NVMLError("Driver Not Loaded")

    def running(handle):
        if handle == 1:
            raise NVMLError("Not Supported")
        return [SimpleNamespace(pid=1, usedGpuMemory=4 * GiB), SimpleNamespace(pid=99999999, usedGpuMemory=None)]

    module = SimpleNamespace(
        NVMLError=NVMLError,
        nvmlInit=start,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetCount=lambda: len(used),
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetName=lambda handle: b"NVIDIA H100 80GB HBM3",
        nvmlDeviceGetUUID=lambda handle: f"GPU-{handle}",
        nvmlDeviceGetMemoryInfo=memory,
        nvmlDeviceGetComputeRunningProcesses=running,
        nvmlDeviceGetGraphicsRunningProcesses=running,
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)


def test_devices_and_processes(monkeypatch):
    fake(monkeypatch)
    nvml = Nvml()
    assert [device.total_bytes for device in nvml.devices] == [80 * GiB] * 2
    first, second = nvml.samples()
    assert (first.used_bytes, second.used_bytes) == (10 * GiB, 70 * GiB)
    assert [(each.pid, each.used_bytes) for each in first.processes] == [(1, 4 * GiB), (99999999, 0)]
    assert second.processes == ()
    assert gpu_names() == ("NVIDIA H100 80GB HBM3",) * 2


def test_a_silent_device_does_not_hide_the_others(monkeypatch):
    fake(monkeypatch)
    nvml = Nvml()
    fake(monkeypatch, silent=(0,))
    nvml._library = sys.modules["pynvml"]
    first, second = nvml.samples()
    assert "lost" in first.error
    assert not second.error
    assert second.used_bytes == 70 * GiB


@pytest.mark.parametrize("dead", [True, False])
def test_without_a_gpu_the_host_is_watched(monkeypatch, dead):
    if dead:
        fake(monkeypatch, dead=True)
    else:
        monkeypatch.setitem(sys.modules, "pynvml", None)
    sampler = Sampler(host=False)
    (sample,) = sampler.take()
    assert sample.device.kind == "host"
    assert 0 < sample.used_bytes < sample.device.total_bytes
    assert sampler.nvml.why


def test_the_reserve_is_judged_per_device(monkeypatch, capsys):
    fake(monkeypatch)
    assert main(["watch", "--once", "--json", "--reserve", "20%"]) == 0
    devices = json.loads(capsys.readouterr().out)["devices"]
    assert [device["reserve_passed"] for device in devices[:2]] == [False, True]
    assert devices[0]["line_bytes"] == 80 * GiB - int(80 * GiB * 0.2)
    assert devices[2]["kind"] == "host"


def test_the_machine_of_a_run_is_named_by_nvml(monkeypatch):
    from ullage.guard.run.needs import this_machine
    from ullage.read.machine import parse_machine

    fake(monkeypatch)
    machine = parse_machine(this_machine())
    assert (machine.num_gpus, machine.gpu.name) == (2, parse_machine("2xH100").gpu.name)
