"""The metrics that are exported: one table that the endpoint, the dashboard, the alarms and their tests share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ullage.guard.watch.sample import Sample
from ullage.guard.watch.sampler import Line, Trend
from ullage.i18n import _

_DEVICE = ("device", "name", "kind")
_TORCH = ("device", "pid", "rank")


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric. A counter is exported as ``NAME_total``."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str

    @property
    def exported(self) -> str:
        """The name that a query uses."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


METRICS = (
    Metric(name="ullage_device_up", kind="gauge", labels=_DEVICE, help=_("1 when the device answered")),
    Metric(name="ullage_device_total_bytes", kind="gauge", labels=_DEVICE, help=_("Memory of the device")),
    Metric(name="ullage_device_used_bytes", kind="gauge", labels=_DEVICE, help=_("Memory in use, by all processes")),
    Metric(
        name="ullage_device_reserve_line_bytes",
        kind="gauge",
        labels=_DEVICE,
        help=_("Above this the reserve is used"),
    ),
    Metric(
        name="ullage_device_growth_bytes_per_second",
        kind="gauge",
        labels=_DEVICE,
        help=_("Slope of the memory in use over the last ten minutes"),
    ),
    Metric(
        name="ullage_process_used_bytes",
        kind="gauge",
        labels=("device", "pid", "process"),
        help=_("Memory of a process on a device (resident memory on the host)"),
    ),
    Metric(name="ullage_torch_allocated_bytes", kind="gauge", labels=_TORCH, help=_("Held by tensors")),
    Metric(name="ullage_torch_reserved_bytes", kind="gauge", labels=_TORCH, help=_("Held by PyTorch's allocator")),
    Metric(name="ullage_torch_peak_allocated_bytes", kind="gauge", labels=_TORCH, help=_("Peak held by tensors")),
    Metric(name="ullage_torch_peak_reserved_bytes", kind="gauge", labels=_TORCH, help=_("Peak held by the allocator")),
    Metric(
        name="ullage_torch_alloc_retries",
        kind="counter",
        labels=_TORCH,
        help=_("Times the allocator had to empty its cache: the cheapest sign of being at the edge"),
    ),
    Metric(name="ullage_torch_ooms", kind="counter", labels=_TORCH, help=_("Allocations that failed")),
    Metric(name="ullage_torch_counters_age_seconds", kind="gauge", labels=_TORCH, help=_("Age of these counters")),
    Metric(name="ullage_torch_step", kind="gauge", labels=_TORCH, help=_("Step that the job reported last")),
    Metric(name="ullage_watch_samples", kind="counter", labels=(), help=_("Samples taken")),
)
BY_NAME = {metric.name: metric for metric in METRICS}

#: (metric, values of its labels, value)
Value = tuple[Metric, tuple[str, ...], float]


def values_of(samples: list[Sample], line: Line, trend: Trend) -> Iterator[Value]:
    """Yield every value of the samples of a moment."""
    for sample in samples:
        device = sample.device
        labels = (str(device.index), device.name, device.kind)
        yield BY_NAME["ullage_device_up"], labels, 0.0 if sample.error else 1.0
        yield BY_NAME["ullage_device_total_bytes"], labels, device.total_bytes
        if sample.error:
            continue
        yield BY_NAME["ullage_device_used_bytes"], labels, sample.used_bytes
        yield BY_NAME["ullage_device_reserve_line_bytes"], labels, line.line_bytes(device)
        slope = trend.bytes_per_second(device.index)
        if slope is not None:
            yield BY_NAME["ullage_device_growth_bytes_per_second"], labels, slope
        for process in sample.processes:
            named = (str(device.index), str(process.pid), process.name)
            yield BY_NAME["ullage_process_used_bytes"], named, process.used_bytes
        yield from _torch(sample)


def _torch(sample: Sample) -> Iterator[Value]:
    for each in sample.counters:
        labels = (str(each.device), str(each.pid), str(each.rank))
        for name in ("allocated", "reserved", "peak_allocated", "peak_reserved"):
            yield BY_NAME[f"ullage_torch_{name}_bytes"], labels, getattr(each, f"{name}_bytes")
        yield BY_NAME["ullage_torch_alloc_retries"], labels, each.num_alloc_retries
        yield BY_NAME["ullage_torch_ooms"], labels, each.num_ooms
        yield BY_NAME["ullage_torch_counters_age_seconds"], labels, each.age_seconds
        if each.step >= 0:
            yield BY_NAME["ullage_torch_step"], labels, each.step
