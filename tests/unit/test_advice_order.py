"""The catalogue of changes, their order, and that what is told to be typed does what was weighed."""

from __future__ import annotations

import json
import time

import pytest

from ullage.cli import main
from ullage.plan.advice.change import Change, Cost
from ullage.plan.advice.order import Search, Tried, joined, merged_flags

TOTAL = 100


def change(key, gain, slower=0.0, kind="time"):
    return Change(
        key=key,
        change=key,
        cost=Cost(words=key, slower=slower, kind=kind),
        flags=f"--{key} {gain}",
        typed=key,
        apply=lambda used: used - gain,
    )


def advice(changes, used, most_trials=60):
    """Return advice for a job that is a number: what it uses of a card of 100, of which 20 are a reserve."""

    def verdict(size):
        return "does_not_fit" if size > TOTAL else "tight" if size > TOTAL - 20 else "fits"

    def trial(one):
        after = one.apply(used)
        return Tried(change=one, gain_bytes=used - after, verdict=verdict(after))

    search = Search(trial, before=verdict(used), least_bytes=1, needed_bytes=used + 20 - TOTAL, most_trials=most_trials)
    return search.advice(changes)


def keys(found):
    return [one.change.key for one in found]


def test_the_cheapest_that_is_enough_comes_first():
    found = advice([change("dear", 60, 0.3), change("cheap", 45, 0.1), change("free", 10)], 120)
    assert keys(found) == ["cheap", "dear", "free"]


def test_what_fits_comes_before_what_is_tight_whatever_it_costs():
    found = advice([change("near", 25), change("far", 50, 0.5)], 120)
    assert [(one.change.key, one.verdict) for one in found] == [("far", "fits"), ("near", "tight")]


def test_two_together_where_none_is_enough():
    found = advice([change("a", 22, 0.1), change("b", 21, 0.2), change("c", 2)], 120)
    assert found[0].change.key == "a+b"
    assert found[0].verdict == "fits"
    assert found[0].change.cost.slower == pytest.approx(0.3)


def test_more_than_two_together_where_no_pair_is_enough():
    found = advice([change("a", 16), change("b", 15), change("c", 14)], 120)
    assert found[0].change.key == "a+b+c"


def test_the_rest_is_told_by_gain_per_cost():
    found = advice([change("dear", 30, 1.0), change("cheap", 20, 0.1), change("other", 29, kind="function")], 1000)
    assert keys(found) == ["cheap", "dear", "other"]


def test_of_several_sizes_the_mildest_that_is_enough_is_told():
    sizes = [change("batch", gain, slower) for gain, slower in ((10, 0.03), (45, 0.06), (70, 0.09))]
    found = advice(sizes, 120)
    assert [(one.change.key, one.gain_bytes) for one in found] == [("batch", 45)]


def test_of_several_sizes_that_are_not_enough_the_strongest_is_told():
    sizes = [change("batch", gain, slower) for gain, slower in ((10, 0.03), (20, 0.06))]
    assert [one.gain_bytes for one in advice(sizes, 200)] == [20]


def test_the_fit_is_run_as_often_as_it_may_be():
    runs = []

    def trial(one):
        runs.append(one)
        return Tried(change=one, gain_bytes=5, verdict="does_not_fit")

    search = Search(trial, before="does_not_fit", least_bytes=1, needed_bytes=1000, most_trials=10)
    search.advice([change(str(number), 5, 0.1) for number in range(40)])
    assert len(runs) <= 10


def test_joined_changes_are_made_one_after_another():
    both = joined([change("a", 3), change("b", 4)])
    assert (both.apply(10), both.flags) == (3, "--a 3 --b 4")


def test_a_flag_is_told_once():
    told = merged_flags("--sp --dp 4 --grad-accum 2", "--grad-accum 8 --compile")
    assert told == "--sp --dp 4 --grad-accum 8 --compile"
    several = "--offload params=cpu --offload optimizer=cpu"
    assert merged_flags(several) == several


TRAINING = (
    "qwen3-8b --on 8xH100 --engine megatron --micro-batch 4 --seq 8192",
    "qwen3-8b --on 1xA100-80GB --engine hf_trainer --micro-batch 4 --seq 2048 --lora r=16",
    "llama-3.2-1b --on 4x24GiB --engine fsdp2 --micro-batch 8 --seq 2048",
    "llama-3.2-1b --on 4x16GiB --engine deepspeed --zero 1 --micro-batch 8 --seq 2048",
)


def answer(capsys, *words):
    code = main([*words, "--json"])
    assert code in (0, 3, 4)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("line", TRAINING)
def test_the_flags_of_an_advice_lead_to_what_was_weighed(line, capsys):
    words = ["fit", "train", *line.split()]
    before = answer(capsys, *words)
    assert before["verdict"] != "fits"
    assert before["advice"]
    for item in before["advice"]:
        assert item["gain_bytes"] > 0
        assert item["cost"]
        assert item["flags"] or item["typed"]
        if not item["flags"] or "--reserve" in item["flags"]:
            continue
        told = merged_flags(" ".join(words[3:]), item["flags"]).split()
        after = answer(capsys, "fit", "train", words[2], *told, "--no-advice")
        assert after["verdict"] == item["verdict"], item
        gain = before["worst"]["device_used_bytes"] - after["worst"]["device_used_bytes"]
        assert gain == item["gain_bytes"], item


def test_advice_for_training_is_in_order(capsys):
    ranks = {"fits": 0, "tight": 1, "does_not_fit": 2}
    found = answer(capsys, "fit", "train", *TRAINING[1].split())["advice"]
    assert [ranks[item["verdict"]] for item in found] == sorted(ranks[item["verdict"]] for item in found)
    other = ("accuracy", "another method", "other data")
    fits = [item for item in found if item["verdict"] == "fits" and not any(word in item["cost"] for word in other)]
    assert len(fits) >= 2
    assert [item["slower"] for item in fits] == sorted(item["slower"] for item in fits)


def test_a_step_of_2048_gpus_is_advised_on_within_a_second(capsys):
    line = "deepseek-v3 --on 256x8xH800 --engine megatron --pp 16 --ep 64 --zero 1"
    times = []
    for _run in range(3):
        start = time.process_time()
        found = answer(capsys, "fit", "train", *line.split())
        times.append(time.process_time() - start)
    assert found["verdict"] == "does_not_fit"
    assert found["advice"][0]["verdict"] == "fits"
    assert "--recompute-granularity full" in found["advice"][0]["typed"]
    assert min(times) < 1.0


def test_a_serving_start_is_advised_on_in_the_engines_words(capsys):
    found = answer(capsys, "fit", "serve", "deepseek-v3", "--on", "8xH100", "--context", "32k")["advice"]
    assert found
    assert all(item["typed"] for item in found)


def test_a_message_with_its_job_is_answered_with_gains(tmp_path, capsys):
    log, job = tmp_path / "oom.log", tmp_path / "job.json"
    log.write_text(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 3.91 GiB. GPU 0 has a total capacity of 79.25 "
        "GiB of which 1.20 GiB is free. Including non-PyTorch memory, this process has 78.04 GiB memory in use. Of the "
        "allocated memory 77.10 GiB is allocated by PyTorch, and 430.00 MiB is reserved by PyTorch but unallocated.\n"
    )
    job.write_text(
        json.dumps(
            {
                "kind": "train", "model": "Qwen/Qwen3-8B", "gpu": "A100-80GB", "num_gpus": 1, "engine": "hf_trainer",
                "seq_len": 4096, "micro_batch_size": 4, "method": "lora",
                "lora": {"rank": 16, "targets": ["all-linear"]},
            }
        )
    )  # fmt: skip
    found = answer(capsys, "inspect", str(log), "--job", str(job))
    assert found["cause"] == "capacity"
    assert all(item["gain_bytes"] > 0 for item in found["advice"][:3])
    assert any("per_device_train_batch_size" in item["flags"] for item in found["advice"])


def test_another_process_stays_the_first_advice_beside_a_job(tmp_path, capsys):
    log, job = tmp_path / "oom.log", tmp_path / "job.json"
    log.write_text(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.25 GiB of which 1.20 GiB is "
        "free. Process 77 has 60.00 GiB memory in use. Including non-PyTorch memory, this process has 18.00 GiB memory "
        "in use. Of the allocated memory 17.10 GiB is allocated by PyTorch, and 430.00 MiB is reserved by PyTorch but "
        "unallocated.\n"
    )
    job.write_text(
        json.dumps(
            {
                "kind": "train",
                "model": "Qwen/Qwen3-0.6B",
                "gpu": "A100-80GB",
                "num_gpus": 1,
                "engine": "hf_trainer",
                "seq_len": 512,
            }
        )
    )
    found = answer(capsys, "inspect", str(log), "--job", str(job))
    assert found["cause"] == "other_process"
    assert "77" in found["advice"][0]["change"]
