"""Evaluation between steps: batches of their own size, logits that the training loss spares."""

from dataclasses import replace

import pytest

from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.evaluation_words import evaluation_of, parse_evaluation
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.read.training_words import parse_lora, parse_recompute
from ullage.spec.training import Evaluation, TrainingJob, TrainingParallel
from ullage.training_fit import fit_training

MODEL = load_model("llama-3.1-8b")
VOCAB, HIDDEN, INNER = 128256, 4096, 14336


def job(**changes):
    stated = {
        "model": MODEL,
        "machine": parse_machine("1xH100"),
        "engine": "hf_trainer",
        "seq_len": 2048,
        "recompute": parse_recompute("full"),
        "method": "lora",
        "lora": parse_lora("r=16"),
    }
    return TrainingJob(**{**stated, **changes})


def moment(answer, name="evaluation"):
    return {one.moment: one for one in answer.ranks[0].moments}.get(name)


def term(ledger, name):
    return next((one for one in ledger.allocated.children if one.name == name), None)


def test_nothing_is_added_where_no_evaluation_is_asked_for():
    assert moment(step(job())) is None


def test_logits_are_those_of_the_batch_of_the_evaluation():
    found = term(moment(step(job(evaluation=Evaluation(batch_size=8)))), "evaluation_logits")
    assert found.bytes == 8 * 2048 * VOCAB * (2 + 4 + 4)


def test_a_length_of_its_own_counts():
    found = term(moment(step(job(evaluation=Evaluation(batch_size=8, seq_len=512)))), "evaluation_logits")
    assert found.bytes == 8 * 512 * VOCAB * (2 + 4 + 4)


def test_liger_spares_the_logits_in_training_alone():
    answer = step(job(loss="liger", evaluation=Evaluation(batch_size=1)))
    assert term(moment(answer), "evaluation_logits").bytes == 2048 * VOCAB * (2 + 4 + 4)
    assert answer.ranks[0].peak.moment == "evaluation"
    assert step(job(loss="liger")).ranks[0].peak.device_used.bytes < answer.ranks[0].peak.device_used.bytes


def test_a_loss_without_logits_leaves_the_widest_layer():
    asked = Evaluation(batch_size=8, spares_logits=True)
    found = moment(step(job(evaluation=asked)))
    rows = 8 * 2048 * 2
    # frames' two hidden states; the layer's residual and normed; gate, its activation and up
    assert term(found, "evaluation_layer").bytes == rows * (4 * HIDDEN + 3 * INNER)


def test_metrics_gather_the_logits_of_every_rank():
    parallel = TrainingParallel(data_parallel_size=4)
    asked = Evaluation(batch_size=2, kept_batches=3)
    answer = step(job(machine=parse_machine("4xH100"), parallel=parallel, evaluation=asked))
    assert term(moment(answer), "kept_logits").bytes == 2 * 3 * 4 * 2 * 2048 * VOCAB * 4


def test_models_made_a_cache_before_transformers_5():
    asked = Evaluation(batch_size=4)
    plain = replace(job(evaluation=asked), recompute=parse_recompute("none"))
    cache = 4 * 2048 * 32 * 2 * 8 * 128 * 2
    assert term(moment(step(plain)), "evaluation_kv_cache") is None
    earlier = replace(plain, engine_version="transformers 4.57")
    assert term(moment(step(earlier)), "evaluation_kv_cache").bytes == cache
    recomputed = replace(earlier, recompute=parse_recompute("full"))
    found = term(moment(step(recomputed)), "evaluation_kv_cache")
    assert (found.bytes, found.high_bytes) == (0, cache)


@pytest.mark.parametrize("engine", ["fsdp1", "fsdp2", "deepspeed", "hf_trainer"])
def test_sharded_units_stand_whole_while_they_run(engine):
    sharding = {"zero_stage": 3} if engine == "deepspeed" else {"fsdp": "full_shard"}
    parallel = TrainingParallel(data_parallel_size=8, **sharding)
    asked = Evaluation(batch_size=8)
    answer = step(job(engine=engine, machine=parse_machine("8xH100"), parallel=parallel, evaluation=asked))
    found = term(moment(answer), "unsharded_parameters")
    assert found is not None and found.bytes > 0


def test_a_longer_evaluation_never_needs_less():
    sizes = [step(job(evaluation=Evaluation(batch_size=4, seq_len=n))).ranks[0].peak for n in (128, 512, 2048, 8192)]
    bytes_used = [one.device_used.bytes for one in sizes]
    assert bytes_used == sorted(bytes_used)


def test_advice_makes_the_batch_of_an_evaluation_smaller():
    found = fit_training(job(seq_len=8192, evaluation=Evaluation(batch_size=8)))
    assert found.exit_code == 3
    assert "--evaluate 4" in found.advice[0].flags or "--evaluate 2" in found.advice[0].flags
    kept = fit_training(job(evaluation=Evaluation(batch_size=1, kept_batches=50)))
    assert any(one.flags == "--evaluate 1,kept=1" for one in kept.advice)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8", Evaluation(batch_size=8)),
        ("batch=8,seq=512", Evaluation(batch_size=8, seq_len=512)),
        ("8,kept=10", Evaluation(batch_size=8, kept_batches=10)),
    ],
)
def test_words(text, expected):
    assert parse_evaluation(text) == expected


@pytest.mark.parametrize("text", ["", "0", "-1", "8,seq", "8,seq=0", "8,what=1", "9999999999", "8,kept=x"])
def test_other_words_are_refused(text):
    with pytest.raises(InputError, match="does not describe an evaluation"):
        parse_evaluation(text)


def test_a_job_file_says_the_same():
    fields = {"batch_size": 8, "seq_len": 512, "kept_batches": None}
    assert evaluation_of(fields, "job") == Evaluation(batch_size=8, seq_len=512)
    with pytest.raises(InputError, match=r"job\.evaluation: nonsense does not"):
        evaluation_of({"batch_size": 8, "nonsense": 1}, "job.evaluation")
