"""The plan and its store: strict, atomic, never backwards, corrupt files kept aside."""

import contextlib
import errno
import json
import multiprocessing
import os
from pathlib import Path

import pytest

from ullage.errors import InputError
from ullage.guard import CANNOT_FIT_EXIT_CODE, RESTART_EXIT_CODE, Plan, PlanStore


def test_a_plan_comes_back_as_it_was():
    plan = Plan(knobs={"micro_batch": 8, "offload": False, "recompute": "none"}).shrunk("OOM", micro_batch=4)
    assert Plan.from_json(plan.to_json()) == plan
    assert (plan.generation, plan.get("micro_batch"), plan.get("absent", 7)) == (1, 4, 7)
    assert plan.history == ("1: OOM",)
    assert isinstance(plan.get("offload"), bool) and hash(plan)


def test_history_is_bounded():
    plan = Plan()
    for _ in range(300):
        plan = plan.shrunk("again", micro_batch=1)
    assert plan.generation == 300 and len(plan.history) == 100 and plan.history[-1].startswith("300:")


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{}", "null", "{", '{"ullage_plan": 2}', '{"ullage_plan": 1, "more": 1}', "[" * 100000,
        '{"ullage_plan": 1, "generation": -1}', '{"ullage_plan": 1, "generation": true}',
        '{"ullage_plan": 1, "generation": "1"}', '{"ullage_plan": 1, "knobs": []}',
        '{"ullage_plan": 1, "knobs": {"a": null}}', '{"ullage_plan": 1, "knobs": {"a": [1]}}',
        '{"ullage_plan": 1, "knobs": {"a": NaN}}', '{"ullage_plan": 1, "knobs": {"1 a": 1}}',
        '{"ullage_plan": 1, "history": [1]}', '{"ullage_plan": 1, "reason": 1}',
    ],
)  # fmt: skip
def test_nonsense_is_refused(text):
    with pytest.raises(InputError):
        Plan.from_json(text)


def test_an_absent_store_holds_nothing(tmp_path):
    assert PlanStore(tmp_path / "deep" / "plan.json").load() is None


def test_the_store_goes_only_forward(tmp_path):
    store = PlanStore(tmp_path / "plan.json")
    first = Plan(knobs={"micro_batch": 8})
    second = first.shrunk("OOM", micro_batch=4)
    store.save(first)
    store.save(second)
    store.save(second)
    assert store.load() == second
    for older in (first, Plan(generation=1, knobs={"micro_batch": 2})):
        with pytest.raises(InputError, match="not newer"):
            store.save(older)
    assert store.load() == second
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.json", "plan.json.lock"]


@pytest.mark.parametrize("data", [b"{", b"\xff\xfe", b"", b" " * (1 << 21)])
def test_a_corrupt_store_is_kept_aside(tmp_path, data):
    path = tmp_path / "plan.json"
    for number in (1, 2):
        path.write_bytes(data)
        with pytest.raises(InputError, match=f"corrupt-{number}"):
            PlanStore(path).load()
        assert (tmp_path / f"plan.json.corrupt-{number}").read_bytes() == data
    path.write_bytes(data)
    with pytest.raises(InputError, match="corrupt-3"):
        PlanStore(path).save(Plan())
    assert PlanStore(path).load() is None
    PlanStore(path).save(Plan())


def test_a_full_disk_keeps_the_old_plan(tmp_path, monkeypatch):
    store = PlanStore(tmp_path / "plan.json")
    store.save(Plan())

    def full(self, _text, **_how):
        self.touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(InputError, match=r"disk is full.*is kept"):
        store.save(Plan().shrunk("OOM", micro_batch=1))
    assert store.load() == Plan()
    assert not list(tmp_path.glob(".plan*"))


WINS_EACH = 20


def _race(path, writer, queue, together):
    """Write the next generation, again and again, until this writer's plans have been taken ``WINS_EACH`` times."""
    store, won, gone = PlanStore(path), [], 0
    together.wait(60)
    while len(won) < WINS_EACH:
        held = store.load()
        gone += held is None and bool(won)
        generation = 0 if held is None else held.generation + 1
        with contextlib.suppress(InputError):  # another writer was quicker
            store.save(Plan(generation=generation, knobs={"writer": writer}))
            won.append(generation)
    queue.put((won, gone))


def test_writers_take_turns(tmp_path):
    context = multiprocessing.get_context("spawn")
    queue, together = context.Queue(), context.Barrier(3)
    writers = [context.Process(target=_race, args=(tmp_path / "plan.json", n, queue, together)) for n in range(3)]
    for writer in writers:
        writer.start()
    results = [queue.get(timeout=60) for _ in writers]
    for writer in writers:
        writer.join(60)
    taken = sorted(generation for won, _gone in results for generation in won)
    assert taken == list(range(3 * WINS_EACH)), "each generation is written by one writer alone"
    assert not any(gone for _won, gone in results), "a plan that was written is never absent"
    assert json.loads((tmp_path / "plan.json").read_text())["generation"] == 3 * WINS_EACH - 1
    assert not list(tmp_path.glob("*corrupt*"))


def test_the_environment_names_the_store(tmp_path, monkeypatch):
    monkeypatch.delenv("ULLAGE_PLAN_STORE", raising=False)
    assert PlanStore.from_environment() is None
    monkeypatch.setenv("ULLAGE_PLAN_STORE", str(tmp_path / "p.json"))
    store = PlanStore.from_environment()
    assert store is not None and store.path == tmp_path / "p.json"


def test_exit_codes():
    assert (RESTART_EXIT_CODE, CANNOT_FIT_EXIT_CODE) == (75, 3)
