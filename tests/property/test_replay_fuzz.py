"""Recordings that were tampered with: an answer or one sentence, never a traceback, never without end."""

import copy

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullage.allocator.session import choose_device, replay_device
from ullage.allocator.settings import parse_settings
from ullage.errors import InputError
from ullage.observe.snapshot import parse_snapshot
from ullage.report.replay import print_replay, replay_json

MiB = 2**20
BASE = 2**40


def event(action, address, size, stream=0):
    return {"action": action, "addr": address, "size": size, "stream": stream, "frames": []}


def sound(expandable=True):
    """Small and large segments, with what led to them."""
    kind, taken = ("segment_map", 40) if expandable else ("segment_alloc", 30)
    trace = [event(kind, BASE, 2 * MiB)]
    trace += [event("alloc", BASE + 512 * n, 500) for n in range(6)]
    trace += [event(kind, 2 * BASE, taken * MiB), event("alloc", 2 * BASE, 30 * MiB)]
    for n in (1, 4):
        trace += [event("free_requested", BASE + 512 * n, 500), event("free_completed", BASE + 512 * n, 500)]
    trace += [event("free_requested", 2 * BASE, 30 * MiB), event("free_completed", 2 * BASE, 30 * MiB)]
    trace += [event("oom", 0, 5)]
    trace[-1]["device_free"] = trace[-1].pop("addr")
    sizes = [(512, 500), (512, None), (512, 500), (512, 500), (512, None), (512, 500), (2 * MiB - 3072, None)]
    blocks = [
        {"size": size, "state": "inactive" if asked is None else "active_allocated", "requested_size": asked or 0}
        for size, asked in sizes
    ]
    small = {
        "device": 0,
        "address": BASE,
        "total_size": 2 * MiB,
        "stream": 0,
        "segment_type": "small",
        "blocks": blocks,
    }
    pages = {
        "device": 0, "address": 2 * BASE, "total_size": 20 * MiB, "stream": 0, "segment_type": "large",
        "is_expandable": expandable, "blocks": [{"size": 20 * MiB, "state": "inactive"}],
    }  # fmt: skip
    small["is_expandable"] = expandable
    pages["total_size"] = pages["blocks"][0]["size"] = taken * MiB
    return {"segments": [small, pages], "device_traces": [trace]}


VALUES = st.one_of(
    st.integers(-2, 2**66),
    st.sampled_from([0, 1, 512, MiB, 2 * MiB, 20 * MiB, BASE, BASE + 512, BASE + MiB, 2 * BASE, 2**63]),
    st.sampled_from(
        [None, "alloc", "free_completed", "segment_free", "segment_unmap", "inactive", [], {}, (1, 2), True]
    ),
)


def paths(value, path=()):
    """Yield the way to every value in a tree."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key)
        yield from paths(item, (*path, key))


@st.composite
def tampered(draw):
    tree = sound(draw(st.booleans()))
    for _ in range(draw(st.integers(1, 4))):
        ways = list(paths(tree))
        if not ways:
            break
        way = draw(st.sampled_from(ways))
        place = tree
        for key in way[:-1]:
            place = place[key]
        kind = draw(st.sampled_from(["set", "drop", "double", "move"]))
        if kind == "set":
            place[way[-1]] = draw(VALUES)
        elif kind == "drop":
            del place[way[-1]]
        elif isinstance(place, list):
            item = copy.deepcopy(place[way[-1]])
            if kind == "move":
                del place[way[-1]]
            place.insert(draw(st.integers(0, len(place))), item)
    return tree


def answer(tree, conf=None):
    try:
        snapshot = parse_snapshot(tree)
        device, _notes = choose_device(snapshot, None)
        other = None if conf is None else parse_settings(conf)
        found = replay_device(snapshot, device, settings=other, capacity_bytes=2**34 if conf else None, what_if=True)
        return replay_json(found), found
    except InputError as error:
        assert "\n" not in str(error)
        return None


@pytest.mark.parametrize(("expandable", "taken"), [(True, 40), (False, 30)])
def test_the_sound_one_is_followed(expandable, taken):
    values, _found = answer(sound(expandable))
    assert values["placement"]["checked"] == values["placement"]["equal"] == 7
    assert values["placement"]["final_segments"] == values["placement"]["final_equal"] == 2
    assert values["peak_reserved_bytes"] == values["final_reserved_bytes"] == (taken + 2) * MiB


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(tampered(), st.sampled_from([None, "", "expandable_segments:True", "max_split_size_mb:20"]))
def test_a_tampered_one_is_answered_or_refused(tree, conf):
    found = answer(tree, conf)
    if found is not None:
        print_replay(found[1])
