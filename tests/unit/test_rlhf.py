"""Preference and reinforcement jobs: what stands beside the policy, and when."""

import json

import pytest

from ullage.account.activations.log_probs import LogProbs, log_prob_peak
from ullage.cli import main
from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.read.rlhf_words import parse_rlhf
from ullage.spec.rlhf import Rlhf, Rollout
from ullage.spec.training import Lora, Recompute, TrainingJob, TrainingParallel

MODEL = load_model("qwen2.5-0.5b")
WEIGHTS = 494_032_768 * 2
ADAPTERS = Lora(rank=8, targets=("all-linear",))
EIGHT = TrainingParallel(data_parallel_size=8, zero_stage=3)


def job(kind="dpo", *, machine="1xA100-80GB", engine="hf_trainer", reference=None, completion_len=None, **settings):
    asked = Rlhf(kind=kind, reference=reference, completion_len=completion_len, **settings.pop("rlhf", {}))
    given = {"micro_batch_size": 2, "seq_len": 1024, "grad_accum": 1, **settings}
    return TrainingJob(model=MODEL, machine=parse_machine(machine), engine=engine, rlhf=asked, **given)


def walk(*args, **settings):
    return step(job(*args, **settings)).ranks[0]


def terms(ledger):
    return {term.name: term for term in ledger.allocated.children}


def named(rank, name):
    return next(ledger for ledger in rank.moments if ledger.moment == name)


def test_the_reference_is_a_copy_of_the_weights():
    rank = walk()
    assert all(terms(ledger)["reference_weights"].bytes == WEIGHTS for ledger in (*rank.moments, rank.after_step))


def test_with_adapters_the_model_is_its_own_reference():
    rank = walk(lora=ADAPTERS, method="lora")
    assert "reference_weights" not in terms(rank.after_step)
    assert any(ledger.moment == "reference forward" for ledger in rank.moments)


def test_precomputed_log_probs_need_neither_copy_nor_pass():
    rank = walk(reference="precomputed")
    assert "reference_weights" not in terms(rank.after_step)
    assert not any("reference" in ledger.moment for ledger in rank.moments)


def test_under_zero_3_the_reference_is_sharded():
    rank = walk(machine="8xH100", engine="deepspeed", parallel=EIGHT)
    assert terms(rank.after_step)["reference_weights"].bytes == pytest.approx(WEIGHTS / 8, rel=0.001)


def test_with_parameters_on_the_host_the_reference_is_there_too():
    sharded = TrainingParallel(data_parallel_size=8, fsdp="full_shard")
    away = {"machine": "8xH100", "engine": "fsdp2", "parallel": sharded, "offload": (("params", "cpu"),)}
    with_copy, without = walk(**away), walk(reference="none", **away)
    assert "reference_weights" not in terms(with_copy.after_step)
    assert with_copy.host_bytes - without.host_bytes == pytest.approx(WEIGHTS / 8, rel=0.001)


def test_a_pair_is_two_rows_and_a_packed_row_holds_both_answers():
    padded = named(walk(attention="flash"), "loss")
    packed = named(walk(attention="flash", packing=True), "loss")
    ratio = terms(padded)["kept_activations"].bytes / terms(packed)["kept_activations"].bytes
    assert ratio == pytest.approx(2, rel=0.001)


def test_kto_has_single_rows():
    ratio = [terms(named(walk(kind), "loss"))["kept_activations"].bytes for kind in ("dpo", "kto")]
    assert ratio[0] == pytest.approx(2 * ratio[1], rel=0.001)


def test_a_reward_model_has_no_logits():
    rank = walk("rm")
    assert terms(named(rank, "loss"))["loss"].bytes < 4096 * MODEL.vocab_size // 8
    assert terms(rank.after_step)["weights"].bytes == WEIGHTS + 2 * 896


def test_a_reward_model_of_an_untied_model_loses_the_head():
    model = load_model("qwen2.5-7b")
    asked = TrainingJob(
        model=model, machine=parse_machine("1xH200"), engine="hf_trainer", rlhf=Rlhf(kind="rm"), seq_len=256
    )
    weights = terms(step(asked).ranks[0].after_step)["weights"].bytes
    assert weights == 2 * (7_615_616_512 - 152_064 * 3584 + 3584)


def test_ppo_holds_four_models():
    rank = walk("ppo", completion_len=256)
    found = terms(rank.after_step)
    assert found["reference_weights"].bytes == found["reward_model_weights"].bytes == WEIGHTS
    value = {term.name: term.bytes for term in found["value_model"].children}
    assert value["weights"] == pytest.approx(WEIGHTS, rel=0.001)
    assert value["optimizer"] == pytest.approx(found["optimizer"].bytes, rel=0.001)


def test_generation_by_transformers_fills_a_cache():
    rank = walk("grpo", completion_len=256, grad_accum=4)
    cache = terms(named(rank, "generation"))["generation_kv_cache"]
    assert (
        cache.low_bytes == 2 * 4 * 1024 * 24 * 2 * 2 * 64 * 2
    )  # rows x length x layers x (k, v) x heads x dim x bytes
    assert named(rank, "scoring").allocated.bytes > rank.after_step.allocated.bytes


def test_a_pool_stands_beside_every_moment_unless_it_sleeps():
    awake, asleep, away = (
        walk("grpo", completion_len=256, rlhf={"rollout": rollout})
        for rollout in (
            Rollout(engine="vllm", memory_fraction=0.25),
            Rollout(engine="vllm", memory_fraction=0.25, sleeps=True),
            Rollout(engine="server"),
        )
    )
    pool = round(0.25 * parse_machine("1xA100-80GB").gpu.total_bytes)
    assert all(terms(ledger)["rollout_pool"].bytes == pool for ledger in awake.moments)
    assert terms(named(asleep, "generation"))["rollout_pool"].bytes == pool
    assert "rollout_pool" not in terms(named(asleep, "loss"))
    assert not any(ledger.moment == "generation" for ledger in away.moments)
    assert awake.peak.device_used.bytes > asleep.peak.device_used.bytes > away.peak.device_used.bytes


def test_verl_leaves_the_card_to_the_rollout_and_back():
    rollout = Rollout(engine="vllm", memory_fraction=0.5, sleeps=True, alone=True)
    settings = {
        "machine": "8xH100",
        "engine": "fsdp2",
        "engine_version": "verl",
        "parallel": TrainingParallel(data_parallel_size=8, fsdp="full_shard"),
        "completion_len": 512,
        "rlhf": {"rollout": rollout},
    }
    rank = walk("grpo", **settings)
    found = terms(named(rank, "generation"))
    assert set(found) == {"rollout_pool"}
    logits = 2 * 2 * 1024 * MODEL.vocab_size
    assert terms(named(rank, "scoring"))["scoring"].bytes == 4 * logits  # entropy over all tokens
    rows = walk("grpo", **{**settings, "engine_version": "trl 0.19", "completion_len": 1023})
    assert named(rows, "backward").allocated.bytes > named(rank, "backward").allocated.bytes + logits


def test_versions_of_trl_differ():
    peaks = [named(walk(engine_version=text), "loss") for text in ("trl 0.14", "trl 0.19.1", "trl 1.16")]
    full, rows, tiled = (terms(ledger)["loss"].bytes for ledger in peaks)
    assert full >= rows > 4 * tiled


def test_llamafactory_holds_two_fp32_copies_while_the_reference_runs():
    moment = named(walk(engine_version="llamafactory 0.9.5"), "reference forward")
    logits = 4 * 1024 * MODEL.vocab_size
    assert terms(moment)["policy_log_probs"].bytes == 8 * logits
    assert terms(moment)["scoring"].bytes == 12 * logits


def test_megatron_keeps_a_reference_on_every_stage():
    settings = {
        "machine": "4xA100-80GB",
        "engine": "megatron",
        "parallel": TrainingParallel(tensor_parallel_size=2, pipeline_parallel_size=2, sequence_parallel=True),
        "recompute": Recompute(kind="full"),
        "grad_accum": 2,
    }
    for rank in step(job(**settings)).ranks:
        found = terms(rank.after_step)
        assert found["reference_weights"].bytes == found["weights"].bytes
    plain = step(job("rm", **settings)).ranks
    assert max(rank.peak.device_used.bytes for rank in plain) < step(job(**settings)).ranks[0].peak.device_used.bytes


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("ppo", {"engine": "deepspeed", "machine": "8xH100", "parallel": EIGHT}),
        ("grpo", {"engine": "megatron"}),
        ("dpo", {"engine": "torchtitan"}),
        ("dpo", {"reference": "adapter"}),
        ("dpo", {"loss": "fused"}),
        ("dpo", {"loss": "liger", "engine_version": "trl 0.19"}),
        ("grpo", {"completion_len": 1024}),
    ],
)
def test_what_is_not_followed_is_one_sentence(kind, settings):
    with pytest.raises(InputError) as caught:
        step(job(kind, **settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["grpo,vllm=2", "grpo,vllm", "dpo,vllm=0.3", "dpo,reference=x", "sac", "grpo,x=1", ""])
def test_wrong_words_are_one_sentence(text):
    with pytest.raises(InputError) as caught:
        parse_rlhf(text)
    assert "\n" not in str(caught.value)


def test_words_are_read():
    assert parse_rlhf("reward") == Rlhf(kind="rm")
    assert parse_rlhf("grpo,completion=256,steps=2,vllm=0.3,sleep,reference=copy") == Rlhf(
        kind="grpo",
        completion_len=256,
        steps_per_generation=2,
        reference="copy",
        rollout=Rollout(engine="vllm", memory_fraction=0.3, sleeps=True),
    )


def test_the_command_names_the_moment(capsys):
    asked = "grpo,completion=256,vllm=0.4,sleep"
    main(["fit", "train", "qwen2.5-0.5b", "--on", "1xA100-80GB", "--rlhf", asked, "--seq", "1024", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["job"]["rlhf"]["kind"] == "grpo"
    assert found["worst"]["moment"] == "generation"
    assert any("TRL 1.16" in sentence for sentence in found["job"]["assumed"])


def test_an_answered_job_can_be_asked_again():
    once = step(job(reference="copy"))
    again = step(once.job)
    assert again.ranks[0].peak.device_used.bytes == once.ranks[0].peak.device_used.bytes


def test_log_probs_by_hand():
    asked = {"num_rows": 2, "num_tokens": 4096, "vocab_size": 1024, "hidden_size": 64}
    million = 4096 * 1024
    rows = log_prob_peak(LogProbs(style="rows", **asked))
    assert (rows.loss.forward_bytes, rows.loss.kept_bytes, rows.loss.backward_bytes) == (
        6 * million,
        4 * million,
        12 * million,
    )
    narrow = log_prob_peak(LogProbs(style="rows", widened=False, **asked)).loss
    assert (narrow.forward_bytes, narrow.kept_bytes, narrow.backward_bytes) == (4 * million, 2 * million, 4 * million)
    full = log_prob_peak(LogProbs(style="full", **asked)).loss
    assert (full.forward_bytes, full.kept_bytes, full.backward_bytes) == (12 * million, 8 * million, 12 * million)


def advised(capsys, *words):
    main(["fit", "train", "qwen2.5-3b", "--on", "1xA100-80GB", "--recompute", "full", "--json", *words])
    return json.loads(capsys.readouterr().out)["advice"]


def test_a_pool_that_sleeps_is_advised_where_a_rollout_leaves_no_room(capsys):
    asked = ("--rlhf", "grpo,completion=256,vllm=0.4,reference=copy", "--seq", "2048", "--micro-batch", "8")
    found = advised(capsys, *asked)
    changes = {item["flags"]: item for item in found}
    sleeping = changes["--rlhf grpo,reference=copy,completion=256,vllm=0.4,sleep"]
    assert sleeping["gain_bytes"] > 0 and sleeping["typed"] == "vllm_enable_sleep_mode: true"


def test_log_probs_made_before_training_are_advised(capsys):
    found = advised(capsys, "--rlhf", "dpo", "--seq", "2048", "--micro-batch", "16")
    assert any(item["flags"] == "--rlhf dpo,reference=precomputed" for item in found)
