"""Real recordings: peaks, holders and totals as PyTorch's own tools and a plain count of the events give them."""

import pickle
from collections import Counter

import pytest
from conftest import need_shared

from ullage.observe.snapshot import MAX_NAME
from ullage.observe.snapshot_view import inspect_snapshot
from ullage.units import GiB, MiB

TRAINING = "kkaitlyn111__cs336-a2-systems__memory_files__memory_ctx128_fullstep.pickle"
SMALL = "JasperSolt__EoR_NN__snapshot.pickle"
LEAKING = "codeasier__MemSnapDump__tests__test_data__snapshot_expandable.pkl"
DEVICES = "codeasier__MemSnapDump__tests__test_data__snapshot_with_multi_devices.pkl"
AT_OOM = "Yiyi-philosophy__LLM-inference__oom_snapshot.pickle"
ALL = [(TRAINING, 0), (SMALL, 0), (LEAKING, 0), (DEVICES, 0), (DEVICES, 1), (AT_OOM, 0)]


def path_of(name):
    return need_shared("snapshots", name)


def tree_of(name):
    class Refuse(pickle.Unpickler):
        def find_class(self, module, name):
            raise pickle.UnpicklingError(f"{module}.{name}")

    with path_of(name).open("rb") as file:
        tree = Refuse(file).load()
    return tree if isinstance(tree, dict) else {"segments": tree, "device_traces": []}


def terms_of(found):
    return {term.name: term.bytes for term in found.terms}


@pytest.mark.parametrize(("name", "device"), ALL)
def test_the_parts_add_up(name, device):
    found = inspect_snapshot(path_of(name), device)
    answer = found.detail
    assert sum(term.bytes for term in found.terms) == found.total_bytes
    blocks = [each for each in found.terms if each.name not in ("unused", "releasable", "pinned", "awaiting_free")]
    allocated = answer.lives.totals[answer.moment] if answer.moment >= 0 else answer.lives.start_bytes
    assert sum(term.bytes for term in blocks) == allocated
    assert sum(each.bytes for each in answer.lines) <= allocated


@pytest.mark.parametrize(("name", "device"), ALL[:-1])
def test_the_peak_is_that_of_the_events(name, device):
    """What the viewer of PyTorch draws: bytes asked for, from the allocation to the end of the free."""
    tree = tree_of(name)
    events = tree["device_traces"][device]
    live = {
        block["address"]: block["requested_size"]
        for segment in tree["segments"]
        if segment["device"] == device
        for block in segment["blocks"]
        if block["state"] == "active_allocated"
    }
    total = peak = sum(live.values())
    for event in reversed(events):  # from the end, which is known, backwards
        if event["action"] == "alloc":
            total -= event["size"]
        elif event["action"] == "free_completed":
            total += event["size"]
            peak = max(peak, total)
    found = inspect_snapshot(path_of(name), device)
    lives = found.detail.lives
    drawn = sum(lives.requested[each] for each in lives.alive_at(lives.peak_at))
    assert drawn == pytest.approx(peak, rel=1e-3)  # the same moment, up to rounding
    assert lives.peak_bytes >= peak


def test_a_full_step_is_told_apart():
    found = inspect_snapshot(path_of(TRAINING))
    terms = terms_of(found)
    # parameters, gradients and two states of AdamW, all fp32, of one model
    assert terms["optimizer_states"] == pytest.approx(2 * terms["gradients"], rel=0.01)
    assert terms["weights"] == pytest.approx(terms["gradients"], rel=0.001)
    assert terms["weights"] == pytest.approx(12.82 * GiB, rel=0.001)
    assert found.phase == "the optimizer's step"
    assert {"gradients", "optimizer_states"} <= {term.name for term in found.terms if term.formula == "certain"}
    assert next(term for term in found.terms if term.name == "weights").formula == "likely"


def test_the_leak_of_the_leak_demonstration_is_found():
    found = inspect_snapshot(path_of(LEAKING))
    assert found.cause == "leak"
    assert dict(found.sizes)["leak_per_step"] == pytest.approx(40 * MiB, rel=0.01)
    assert "memory_leaks_demo.py:12" in found.why


@pytest.mark.parametrize(("name", "device"), [(TRAINING, 0), (SMALL, 0), (DEVICES, 1)])
def test_no_leak_is_called_where_there_is_none(name, device):
    assert inspect_snapshot(path_of(name), device).cause == "none"


def test_resnet_50_has_its_weights_and_states():
    found = inspect_snapshot(path_of(DEVICES), 1)
    terms = terms_of(found)
    parameters = 23_528_522  # ResNet-50 with ten classes: 25,557,032 - 2048 x 990 - 990
    assert terms["gradients"] == pytest.approx(4 * parameters, rel=0.01)
    assert terms["optimizer_states"] == pytest.approx(8 * parameters, rel=0.01)
    assert terms["weights"] == pytest.approx(4 * parameters, rel=0.01)


def viz():
    return pytest.importorskip("torch.cuda._memory_viz", reason="torch is not installed (dependency group reference)")


@pytest.mark.reference
@pytest.mark.parametrize(("name", "device"), [(TRAINING, 0), (SMALL, 0), (LEAKING, 0), (AT_OOM, 0)])
def test_totals_are_those_of_segsum(name, device):
    printed = dict(
        line.split(": ", 1)
        for line in viz().segsum(tree_of(name)).splitlines()
        if line.startswith(("total_", "segments"))
    )
    answer = inspect_snapshot(path_of(name), device).detail
    assert int(printed["segments"]) == len(answer.memory.segments)
    assert printed["total_reserved"] == repr(viz().Bytes(answer.final.reserved_bytes))
    assert printed["total_allocated"] == repr(viz().Bytes(answer.final.requested_bytes))


@pytest.mark.reference
@pytest.mark.parametrize(("name", "device"), [(TRAINING, 0), (SMALL, 0), (LEAKING, 0)])
def test_top_holders_at_the_end_are_those_of_the_flame_graph(name, device):
    """``_memory_viz.memory`` prints one line per block: stream, state, stack, bytes."""
    theirs = Counter()
    tree = tree_of(name)
    for segment in tree["segments"]:
        for block in segment["blocks"]:
            block["frames"] = [{**frame, "name": frame["name"][:MAX_NAME]} for frame in block["frames"]]
    for line in viz().memory(tree, format_flamegraph=str).splitlines():
        stack, size = line.rsplit(" ", 1)
        if ";active_allocated;" in stack and not stack.endswith("<gaps>"):
            theirs[stack.split(";active_allocated;", 1)[1]] += int(size)
    answer = inspect_snapshot(path_of(name), device).detail
    memory, ours = answer.memory, Counter()
    for segment in memory.segments:
        for block in segment.blocks:
            frames = [
                {"name": function, "filename": file, "line": line}
                for function, file, line in memory.stacks[block.address]
            ]
            text = ";".join(viz()._frames_fmt(frames, reverse=True)) if frames else "<non-python>"
            ours[text] += block.requested_bytes
    assert ours.most_common(20) == theirs.most_common(20)
    # and what is alive after the last event is the same memory, block by block
    lives = answer.lives
    alive = Counter(lives.requested[each] for each in lives.alive_at(lives.num_events - 1))
    assert alive == Counter(
        block.requested_bytes for one in memory.segments for block in one.blocks if not block.awaiting
    )


@pytest.mark.reference
def test_every_allocation_of_the_trace_is_counted():
    text = viz().trace(tree_of(TRAINING))
    answer = inspect_snapshot(path_of(TRAINING)).detail
    lives = answer.lives
    printed = [line for line in text.splitlines() if " = " in line and "cudaMalloc" not in line]
    assert len(printed) == len(lives.sizes) - lives.num_older
    assert sum(line.startswith("del ") for line in text.splitlines()) == sum(end != 2**32 - 1 for end in lives.ends)
