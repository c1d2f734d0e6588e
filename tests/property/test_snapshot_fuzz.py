"""Snapshots that were tampered with, and runs at random: an answer whose parts add up, or one sentence."""

import json
from pathlib import Path

import jsonschema
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_replay_fuzz import tampered

from ullage.allocator.session import choose_device
from ullage.errors import InputError
from ullage.observe.snapshot import parse_snapshot
from ullage.observe.snapshot_answer import answer
from ullage.observe.snapshot_view import inspection_of
from ullage.report.inspect_figures import map_figure, terms_figure, timeline_figure
from ullage.report.inspect_json import inspect_json
from ullage.report.inspect_text import print_inspection

SCHEMA = json.loads((Path(__file__).parents[2] / "src/ullage/schema/inspect.json").read_text())
QUICK = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
FRAMES = st.sampled_from(
    [
        ("forward", "/job/model.py", 3), ("backward", "/x/torch/_tensor.py", 5), ("step", "/x/torch/optim/adamw.py", 7),
        ("torch::autograd::Engine::evaluate_function", "??", 0), ("main", "/job/train.py", 9),
        ("__init__", "/job/m.py", 2),
        ("_apply", "/x/torch/nn/modules/module.py", 4), ("recompute_fn", "/x/torch/utils/checkpoint.py", 4),
        ("c10d::Reducer::prepare", "??", 0), ("getCurrentCUDABlasHandle", "??", 0),
        ("x" * 300, "", -1), ("[bold]", "/a].py", 1),
    ]
)  # fmt: skip


def looked_at(tree):
    snapshot = parse_snapshot(tree)
    device, notes = choose_device(snapshot, None)
    found = inspection_of(answer(snapshot, device), "a b.pickle", tuple(notes))
    jsonschema.validate(json.loads(json.dumps(inspect_json(found), allow_nan=False)), SCHEMA)
    print_inspection(found, Console(file=open("/dev/null", "w"), width=80))  # noqa: SIM115, PTH123
    for figure in (terms_figure(found.terms), timeline_figure(found.detail), map_figure(found.detail)):
        json.dumps(figure, allow_nan=False)
    return found


@QUICK
@given(tampered())
def test_tampered_snapshots_give_an_answer_or_a_sentence(tree):
    try:
        looked_at(tree)
    except InputError as error:
        assert "\n" not in str(error)


@st.composite
def runs(draw):
    """A recording whose final layout is that of its events, each block in a segment of its own."""
    trace, live, address = [], {}, 2**40
    for _at in range(draw(st.integers(0, 60))):
        frames = [
            {"name": name, "filename": file, "line": line} for name, file, line in draw(st.lists(FRAMES, max_size=4))
        ]
        if live and draw(st.booleans()):
            freed = draw(st.sampled_from(sorted(live)))
            size, _frames = live.pop(freed)
            trace += [
                {"action": kind, "addr": freed, "size": size, "stream": 0, "frames": []}
                for kind in ("free_requested", "free_completed")
            ]
            trace.append({"action": "segment_free", "addr": freed, "size": -(-size // 512) * 512, "stream": 0})
        else:
            size, address = draw(st.integers(1, 2**24)), address + 2**26
            live[address] = (size, frames)
            trace.append({"action": "segment_alloc", "addr": address, "size": -(-size // 512) * 512, "stream": 0})
            trace.append({"action": "alloc", "addr": address, "size": size, "stream": 0, "frames": frames})
    drop = draw(st.integers(0, len(trace)))
    segments = []
    for place, (size, frames) in live.items():
        rounded = -(-size // 512) * 512
        block = {"size": rounded, "requested_size": size, "state": "active_allocated", "frames": frames}
        segment = {"device": 0, "address": place, "total_size": rounded, "stream": 0, "segment_type": "large"}
        segments.append({**segment, "blocks": [block]})
    return {"segments": segments, "device_traces": [trace[drop:]]}


@QUICK
@given(runs())
def test_the_parts_of_any_run_add_up(tree):
    if not tree["segments"] and not tree["device_traces"][0]:
        return
    found = looked_at(tree)
    lives = found.detail.lives
    assert sum(term.bytes for term in found.terms) == found.total_bytes
    at_end = sum(segment["total_size"] for segment in tree["segments"])
    assert (lives.totals[-1] if lives.num_events else lives.start_bytes) == at_end
    assert lives.reserved_at(lives.num_events - 1) == at_end
    assert all(total >= 0 for total in lives.totals)
    for event in range(-1, lives.num_events):
        alive = sum(lives.sizes[each] for each in lives.alive_at(event))
        assert alive == (lives.totals[event] if event >= 0 else lives.start_bytes)
