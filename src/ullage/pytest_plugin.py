"""A limit on the GPU memory of a test: ``@pytest.mark.gpu_memory_limit("2GiB")``.

The test fails when PyTorch allocated more than that on any device while it ran, and says which lines held it. Where
there is no GPU the test is skipped with the reason: a limit that is not measured is not kept. The time of the recording
is some microseconds per allocation; ``history=False`` leaves it out, and the lines with it.
Source: pytorch@2.13.0:torch/cuda/memory.py (reset_peak_memory_stats, max_memory_allocated, _record_memory_history).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

MARKER = "gpu_memory_limit"
MAX_EVENTS = 200_000
MAX_HOLDERS = 5


def pytest_configure(config: pytest.Config) -> None:
    """Make the marker known."""
    config.addinivalue_line(
        "markers",
        f"{MARKER}(size, history=True): fail when the test allocates more GPU memory than size, such as '2GiB'",
    )


def _measured_call(item: pytest.Item) -> Iterator[None]:
    """Measure a marked test."""
    marker = item.get_closest_marker(MARKER)
    if marker is None:
        return (yield)
    limit = _limit(marker)
    cuda = _cuda()
    history = bool(marker.kwargs.get("history", True))
    _begin(cuda, history=history)
    try:
        result = yield
        _judge(cuda, limit, history=history)
    finally:
        if history:
            cuda.memory._record_memory_history(enabled=None)
    return result


if int(pytest.__version__.split(".")[0]) >= 8:  # older ones do not know this kind of hook, and must go on working
    pytest_runtest_call = pytest.hookimpl(wrapper=True)(_measured_call)


def _limit(marker: pytest.Mark) -> int:
    from ullage.errors import InputError
    from ullage.units import parse_size

    if len(marker.args) != 1 or set(marker.kwargs) - {"history"}:
        pytest.fail(f"write @pytest.mark.{MARKER}('2GiB')", pytrace=False)
    size = marker.args[0]
    try:
        return size if type(size) is int else parse_size(str(size))
    except InputError as error:
        pytest.fail(f"@pytest.mark.{MARKER}: {error}", pytrace=False)


def _cuda() -> Any:
    try:
        import torch
    except ImportError:
        pytest.skip("the limit on GPU memory is not measured: torch is not installed")
    if not torch.cuda.is_available():
        pytest.skip("the limit on GPU memory is not measured: there is no GPU")
    return torch.cuda


def _begin(cuda: Any, *, history: bool) -> None:
    for device in range(cuda.device_count()):
        cuda.synchronize(device)
        cuda.reset_peak_memory_stats(device)
    if history:
        cuda.memory._record_memory_history(max_entries=MAX_EVENTS)


def _judge(cuda: Any, limit: int, *, history: bool) -> None:
    """Fail the test when it took more."""
    from ullage.units import format_bytes

    peaks = [cuda.max_memory_allocated(device) for device in range(cuda.device_count())]
    device = max(range(len(peaks)), key=peaks.__getitem__)
    if peaks[device] <= limit:
        return
    lines = [
        f"{format_bytes(peaks[device])} were allocated on device {device}, and {format_bytes(limit)} are the limit"
    ]
    if history:
        lines += _holders(cuda.memory._snapshot(), device)
    pytest.fail("\n".join(lines), pytrace=False)


def _holders(values: dict[str, Any], device: int) -> list[str]:
    """Return the lines that held most at the peak."""
    from ullage.errors import UllageError
    from ullage.observe.snapshot import parse_snapshot
    from ullage.observe.snapshot_answer import answer
    from ullage.units import format_bytes

    try:
        found = answer(parse_snapshot(values), device)
    except (UllageError, KeyError) as error:
        return [f"who held it is not known: {error}"]
    return [
        f"  {format_bytes(each.bytes):>11}  {each.category:<16} {each.name or found.unnamed(each.stack)}"
        for each in found.lines[:MAX_HOLDERS]
    ]
