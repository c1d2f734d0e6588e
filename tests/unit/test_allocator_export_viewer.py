"""PyTorch's own tools open what is exported."""

import pickle

import pytest

from ullage.allocator.events import WorkloadBuilder
from ullage.allocator.export import export_snapshot
from ullage.allocator.settings import parse_settings

pytest.importorskip("torch")
pytestmark = pytest.mark.reference

MiB = 2**20


@pytest.mark.parametrize("conf", ["", "expandable_segments:True"])
def test_memory_viz_reads_it(tmp_path, conf):
    from torch.cuda import _memory_viz

    builder = WorkloadBuilder(annotated=True)
    for step in range(40):
        builder.stack = builder.known_stacks.number([("malloc", "??", 0), (f"layer{step % 3}", "model.py", step)])
        builder.time_us = 10**15 + step
        owner = builder.allocate(3 * MiB + step * 4096)
        if step % 2:
            builder.request_free(owner)
            builder.complete_free(owner)
    path = tmp_path / "snapshot.pickle"
    outcome = export_snapshot(path, builder.work, parse_settings(conf))
    with path.open("rb") as file:
        data = pickle.load(file)
    trace = _memory_viz.trace(data).splitlines()
    taken = "map" if outcome.settings.expandable_segments else "cudaMalloc"
    assert sum(taken in line for line in trace) == outcome.num_segments_allocated
    assert sum(line.startswith("del ") for line in trace) == sum(line.startswith("# free comp") for line in trace) == 20
    assert f"segments: {len(data['segments'])}" in _memory_viz.segsum(data)
    assert "MemoryViz.js" in _memory_viz.trace_plot(data)
    assert data["device_traces"][0][1]["frames"][1] == {"name": "layer0", "filename": "model.py", "line": 0}
    assert sum(segment["total_size"] for segment in data["segments"]) == outcome.final_reserved_bytes
    held = sum(segment["allocated_size"] for segment in data["segments"])
    assert held == outcome.final_allocated_bytes
