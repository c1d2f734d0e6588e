"""Layers that repeat, run once and repeated, against all of them run."""

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from ullage.trace.api import trace
from ullage.trace.recorder.events import PARAMETER, SETUP, Allocation, Place, Trace
from ullage.trace.repeat.layers import find_stack
from ullage.trace.repeat.unroll import CannotUnrollError, Stack, unroll

pytestmark = pytest.mark.reference
SMALL = {"seq_len": 64, "steps": 2}


def whole(found):
    return [
        (event >= 0, one.size_bytes, one.op, one.category, one.owner, one.shape, found.place(index))
        for index, event in enumerate(found.events)
        for one in [found.allocations[event if event >= 0 else ~event]]
    ]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("llama", {"recompute": "full"}),
        ("llama", {"recompute": "none", "optimizer_impl": "foreach", "grad_accum": 2}),
        ("llama", {"recompute": "full", "dtype": "fp32", "autocast": "bf16"}),
        ("llama", {"inference": True}),
        ("llama", {"engine": "plain", "optimizer": "adamw8bit"}),
        ("deepseek_v3", {"recompute": "full"}),
        ("deepseek_v3", {"recompute": "none", "engine": "plain"}),
        ("gpt_oss", {"recompute": "none"}),
    ],
)
def test_unrolled_is_the_full_trace_event_for_event(config, name, options):
    path = config(name)
    few = trace(path, **SMALL, **options)
    full = trace(path, unroll=False, **SMALL, **options)
    assert few.num_layers_traced and few.num_layers_traced < few.num_layers, "nothing was unrolled"
    assert full.num_layers_traced == 0
    assert few.trace.events == full.trace.events
    assert whole(few.trace) == whole(full.trace)
    assert few.peak_allocated_bytes == full.peak_allocated_bytes
    assert few.peak_reserved_bytes == full.peak_reserved_bytes


def test_stacks_are_found_by_kind():
    assert find_stack([0] * 3 + [1] * 20, "layers") == Stack(path="layers", first=3, period=1, units=20)
    alternating = find_stack([0, 1] * 12, "layers")
    assert alternating is not None and (alternating.first, alternating.period, alternating.units) == (0, 2, 12)
    assert find_stack([0] * 8, "layers") is None
    assert find_stack(list(range(40)), "layers") is None


def test_a_stream_without_structure_is_refused():
    found = Trace(places=[Place(phase=SETUP, module=f"layers.{index}") for index in range(4)])
    for index in (0, 2, 1, 3):
        found.allocations.append(
            Allocation(
                size_bytes=512,
                place=index,
                op="x",
                category=PARAMETER,
                owner="",
                dtype="",
                shape=(),
                stack=-1,
                stream=0,
            )
        )
        found.events.append(len(found.allocations) - 1)
        found.where.append(index)
    with pytest.raises(CannotUnrollError):
        unroll(found, Stack(path="layers", first=0, period=1, units=4), 3)
