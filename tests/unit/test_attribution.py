"""What each block was for is told from stacks and lives, and the sums are those of the run that was written down."""

import json
from pathlib import Path

import jsonschema
import pytest
from training_snapshot import MIB, Writer, training

from ullage.cli import main
from ullage.observe.snapshot_view import inspect_snapshot

SCHEMA = json.loads((Path(__file__).parents[2] / "src/ullage/schema/inspect.json").read_text())


def terms_of(found):
    return {term.name: term.bytes for term in found.terms}


def test_each_category_at_the_peak(tmp_path):
    found = inspect_snapshot(training().save(tmp_path / "a.pickle"))
    # in backward of a later step: 4 weights, 8 states, and while the last layer goes back 4 activations, one gradient
    # and one temporary; the gradient is asked for when the temporary is there already
    terms = terms_of(found)
    assert terms["weights"] == 4 * 8 * MIB
    assert terms["optimizer_states"] == 8 * 8 * MIB
    assert terms["activations"] == 4 * 10 * MIB
    assert terms["gradients"] == 8 * MIB
    assert terms["temporaries"] == 10 * MIB
    assert found.phase == "the backward pass"
    assert sum(terms.values()) == found.total_bytes


@pytest.mark.parametrize("python_only", [False, True])
def test_autograd_without_frames_is_still_backward(python_only, tmp_path):
    found = inspect_snapshot(training(python_only=python_only).save(tmp_path / "a.pickle"))
    terms = {term.name: term for term in found.terms}
    assert terms["gradients"].bytes == 8 * MIB
    assert terms["gradients"].formula == ("likely" if python_only else "certain")


def test_sums_of_all_moments_are_those_of_the_events(tmp_path):
    found = inspect_snapshot(training(leak=2 * MIB).save(tmp_path / "a.pickle")).detail
    line = found.timeline
    for column, event in enumerate(line.events):
        assert sum(values[column] for values in line.categories.values()) == found.lives.totals[event]
    assert max(sum(values) for values in zip(*line.categories.values(), strict=True)) == found.lives.peak_bytes


def test_thinning_out_keeps_the_peak(tmp_path):
    from ullage.observe.attribution_views import timeline

    answer = inspect_snapshot(training(40).save(tmp_path / "a.pickle")).detail
    for columns in (7, 50, 333):
        line = timeline(answer.found, max_columns=columns)
        assert len(line.events) == columns
        assert max(sum(values) for values in zip(*line.categories.values(), strict=True)) == answer.lives.peak_bytes


def test_lines_and_modules_are_named(tmp_path):
    found = inspect_snapshot(training().save(tmp_path / "a.pickle"))
    listings = {listing.name: listing for listing in found.listings}
    lines = {row[0]: row[1:] for row in listings["lines"].rows}
    assert lines["forward (/job/model.py:31)"] == (10 * MIB, 1, "activations")
    assert lines["MmBackward0 (autograd)"][1] == 2
    modules = {row[0]: row[1] for row in listings["modules"].rows}
    assert modules["model.py:50 > model.py:31"] == 10 * MIB


@pytest.mark.parametrize("leak", [2 * MIB, 64 * MIB])
def test_a_leak_is_measured_and_its_holder_named(leak, tmp_path):
    found = inspect_snapshot(training(8, leak=leak).save(tmp_path / "a.pickle"))
    assert (found.cause, found.confidence) == ("leak", "likely")
    assert dict(found.sizes)["leak_per_step"] == leak
    assert "log (/job/metrics.py:12)" in found.why
    assert found.advice[0].gain_bytes == 7 * leak


def test_what_the_first_step_makes_is_no_leak(tmp_path):
    found = inspect_snapshot(training(8).save(tmp_path / "a.pickle"))
    assert found.cause == "none"
    assert dict(found.sizes)["leak_per_step"] == 0


def test_a_window_that_slides_is_no_leak(tmp_path):
    writer, kept = training(1), []
    for _step in range(10):
        activation = writer.allocate("forward", 10 * MIB)
        kept.append(writer.allocate("leak", 4 * MIB))
        writer.free(writer.allocate("backward", 8 * MIB), activation)
        writer.free(writer.allocate("optimizer", 5 * MIB))
        if len(kept) > 3:
            writer.free(kept.pop(0))
    found = inspect_snapshot(writer.save(tmp_path / "a.pickle"))
    assert dict(found.sizes)["leak_per_step"] < MIB
    assert found.cause == "none"


def test_serving_grows_by_period_and_the_cache_is_named(tmp_path):
    writer = Writer()
    writer.allocate("load", 8 * MIB)
    writer.allocate("kv", 100 * MIB)
    for _request in range(12):
        writer.free(writer.allocate("forward", 6 * MIB), writer.allocate("attention", 4 * MIB))
        writer.allocate("leak", 2 * MIB)
    found = inspect_snapshot(writer.save(tmp_path / "a.pickle"))
    terms = terms_of(found)
    assert terms["kv_cache"] == 100 * MIB
    assert terms["weights"] == 8 * MIB
    assert found.detail.leak.found_by == "period"
    assert dict(found.sizes)["leak_per_step"] == 2 * MIB


def test_blocks_older_than_the_recording_are_told_apart_by_gradients(tmp_path):
    import pickle

    path = training(3).save(tmp_path / "a.pickle")
    tree = pickle.loads(path.read_bytes())
    trace = tree["device_traces"][0]
    starts = [at for at, event in enumerate(trace) if event["action"] == "alloc" and event["size"] == 3 * MIB]
    del trace[: starts[4]]  # from the second step on: weights and states are older
    for segment in tree["segments"]:
        for block in segment["blocks"]:
            block["frames"] = []
    path.write_bytes(pickle.dumps(tree))
    terms = {term.name: term for term in inspect_snapshot(path).terms}
    assert terms["weights"].bytes == 4 * 8 * MIB
    assert terms["optimizer_states"].bytes == 8 * 8 * MIB
    assert terms["weights"].formula == "likely"


def pieces(refused: int) -> Writer:
    """Return a run whose every new block is larger than what is free, and leaves half of it pinned; then one more."""
    writer = Writer()
    for size in (32, 40, 48, 56, 64):
        writer.free(writer.allocate("forward", size * MIB))
        writer.allocate("attention", (size // 2 + 1) * MIB)
    writer.allocate("forward", refused)
    return writer


@pytest.mark.parametrize(("refused", "cause"), [(100, "fragmentation"), (200, "capacity")])
def test_a_refused_request_is_run_again(refused, cause, tmp_path):
    # 125 MiB are in use of 240 reserved and 300 there are: 100 would fit in one piece, 200 never
    found = inspect_snapshot(pieces(refused * MIB).save(tmp_path / "a.pickle", capacity_bytes=300 * MIB))
    assert dict(found.sizes)["requested"] == refused * MIB
    assert (found.cause, found.confidence) == (cause, "certain")
    if cause == "fragmentation":
        assert found.detail.refusal.saved_by[0][0] == "expandable_segments:True"
        assert "expandable_segments:True" in found.advice[0].flags
    else:
        assert found.detail.refusal.gap_bytes == (125 + 200 - 300) * MIB
        assert found.detail.refusal.saved_by == []


def test_settings_that_are_said_to_save_do(tmp_path):
    writer = pieces(100 * MIB)
    path = writer.save(tmp_path / "a.pickle", settings="expandable_segments:True", capacity_bytes=300 * MIB)
    assert inspect_snapshot(path).detail.memory.ooms == []


def test_the_json_fits_its_schema(tmp_path, capsys):
    path = training(leak=2 * MIB).save(tmp_path / "a.pickle")
    assert main(["inspect", str(path), "--json"]) == 0
    jsonschema.validate(json.loads(capsys.readouterr().out), SCHEMA)


def test_one_screen(tmp_path, capsys):
    assert main(["inspect", str(training(8, leak=2 * MIB).save(tmp_path / "a.pickle"))]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("✘ device 0: memory grows by 2.0 MiB per step")
    assert len(lines) <= 50
    assert lines[-1].startswith("Next: ullage inspect")


def test_the_public_function(tmp_path):
    import ullage

    found = ullage.inspect(training(2).save(tmp_path / "a.pickle"))
    assert found.kind == "snapshot"
    assert dict(found.sizes)["peak_allocated"] == found.detail.lives.peak_bytes
    with pytest.raises(ullage.InputError, match="nothing of device 3"):
        ullage.inspect(tmp_path / "a.pickle", device=3)


def test_stages_are_shown_after_a_second_and_only_where_wanted(monkeypatch):
    from ullage.observe import stages

    made = []

    class Bar:
        def update(self, task, **what):
            made.append(what["description"])

        def stop(self):
            made.append("stop")

    monkeypatch.setattr(stages, "_new_bar", lambda: (Bar(), 0))
    now = iter([0.0, 0.5, 1.5])
    monkeypatch.setattr(stages.time, "monotonic", lambda: next(now))
    with stages.Stages(wanted=True) as shown:
        shown.reading(1, 10)
        shown("drawing")
        shown.reading(9, 10)
    assert made == ["drawing", "reading", "stop"]
    made.clear()
    monkeypatch.setattr(stages.time, "monotonic", lambda: 0.0)
    with stages.Stages(wanted=False) as shown:
        shown("drawing")
    assert made == []
