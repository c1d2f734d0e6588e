"""Unsloth's rules by release, and what must hold for any job under them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage.catalog import models as catalog
from ullage.engines.training import TrainingRank, step
from ullage.engines.unsloth.layers import forward_pass, fused_of, largest_fused
from ullage.engines.unsloth.loss import num_chunks
from ullage.engines.unsloth.rules import release, resolve
from ullage.errors import InputError
from ullage.ledger import Ledger
from ullage.read.machine import parse_machine
from ullage.spec.model import Model
from ullage.spec.rlhf import Rlhf
from ullage.spec.training import Lora, Precision, Recompute, TrainingJob
from ullage.training_fit import fit_training
from ullage.units import GiB, MiB

LLAMA, QWEN2, QWEN3 = "meta-llama/Meta-Llama-3-8B", "Qwen/Qwen2.5-7B-Instruct", "Qwen/Qwen3-8B"
ON_HOST = {"recompute": Recompute(kind="full"), "offload": (("activations", "cpu"),)}
RELEASES = ("2024.1", "2024.6", "2024.12", "2025.2", "2025.3", "2025.8", "2025.9", "2026.8")


def model(name: str) -> Model:
    found = catalog.find(name)
    assert found is not None
    return catalog.load_entry(found)


def job(name: str = LLAMA, release: str = "2026.8", **changes: object) -> TrainingJob:
    made = TrainingJob(
        model=model(name),
        machine=parse_machine("1xA100-80GB-SXM"),
        engine="unsloth",
        engine_version=release,
        precision=Precision(),
        optimizer="adamw_8bit",
        micro_batch_size=2,
        seq_len=2048,
        grad_accum=4,
        recompute=Recompute(kind="full"),
        attention="flash",
        method="qlora",
        lora=Lora(rank=16, targets=("all-linear",)),
        base_quantization="nf4",
    )
    return replace(made, **changes)  # type: ignore[arg-type]


def rank(one: TrainingJob) -> TrainingRank:
    (found,) = step(one).ranks
    return found


def moment(one: TrainingJob, name: str) -> Ledger:
    return next(ledger for ledger in rank(one).moments if ledger.moment == name)


def term(one: TrainingJob, at: str, name: str) -> int:
    found = moment(one, at).find(name)
    return 0 if found is None else found.bytes


def peak(one: TrainingJob) -> int:
    return max(ledger.allocated.bytes for ledger in rank(one).moments)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2025.8.5", (2025, 8)),
        ("2024.12", (2024, 12)),
        ("LLaMA-Factory 0.9.3 with Unsloth 2025.3.19", (2025, 3)),
        ("unsloth@2024.4", (2024, 4)),
        ("transformers 4.55.1", None),
        ("", None),
    ],
)
def test_the_release_is_read_from_a_version(text: str, expected: tuple[int, int] | None) -> None:
    assert release(text) == expected


@pytest.mark.parametrize(
    ("text", "loss", "checkpoints"),
    [
        ("2024.6", "in_place", "host"),
        ("2024.12", "cut", "host"),
        ("2025.3", "cut", "buffered"),
        ("2025.8", "chunked", "buffered"),
        ("2026.8", "chunked", "buffered"),
    ],
)
def test_each_release_has_its_loss_and_its_checkpoints(text: str, loss: str, checkpoints: str) -> None:
    rules = resolve(job(release=text, **ON_HOST))[1]
    assert (rules.loss, rules.checkpoints) == (loss, checkpoints)


def test_few_tokens_and_old_gpus_see_all_logits_until_the_loss_comes_in_chunks() -> None:
    few = {"micro_batch_size": 1, "seq_len": 1024}
    assert resolve(job(release="2025.3", **few))[1].loss == "in_place"
    assert resolve(job(release="2025.3", machine=parse_machine("1xT4")))[1].loss == "in_place"
    assert resolve(job(release="2025.8", **few))[1].loss == "chunked"


def test_nothing_said_is_the_default_of_the_release() -> None:
    silent = Recompute(given=False)
    assert resolve(job(release="2025.3", recompute=silent))[1].checkpoints == "gpu"
    filled, rules = resolve(job(release="2025.8", recompute=silent))
    assert rules.checkpoints == "buffered"
    assert any("use_gradient_checkpointing" in one for one in filled.assumed)


def test_a_release_that_is_not_known_yet_gets_the_newest_rules_and_says_so() -> None:
    filled, rules = resolve(job(release="2027.3"))
    assert rules == resolve(job())[1]
    assert any("newest whose rules are known" in one for one in filled.assumed)
    assert not any("newest whose rules are known" in one for one in resolve(job())[0].assumed)


def test_short_and_small_checkpoints_stay_on_the_gpu() -> None:
    assert resolve(job(seq_len=256, micro_batch_size=32, **ON_HOST))[1].checkpoints == "gpu"
    assert resolve(job(release="2025.8", seq_len=256, micro_batch_size=32, **ON_HOST))[1].checkpoints == "buffered"
    assert resolve(job(release="2025.8", seq_len=256, micro_batch_size=1, **ON_HOST))[1].checkpoints == "gpu"


def test_adapters_are_fused_where_the_whole_group_has_them_and_no_bias() -> None:
    layer, wide = model(LLAMA).layers[0], 4096
    everything = fused_of(layer, wide, Lora(rank=8, targets=("all-linear",)))
    assert everything.mlp
    assert len(everything.names) == 7
    queries = fused_of(layer, wide, Lora(rank=8, targets=("q_proj", "v_proj")))
    assert not queries.mlp
    assert not queries.names
    attention = fused_of(layer, wide, Lora(rank=8, targets=("q_proj", "k_proj", "v_proj", "o_proj")))
    assert not attention.mlp
    assert len(attention.names) == 4
    assert not fused_of(layer, wide, Lora(rank=8, targets=("all-linear",), dropout=0.1)).names
    biased = model(QWEN2)
    names = fused_of(biased.layers[0], biased.hidden_size, Lora(rank=8, targets=("all-linear",))).names
    assert {name.rpartition(".")[2] for name in names} == {"o_proj", "gate_proj", "up_proj", "down_proj"}


def test_a_layer_without_checkpoints_keeps_what_the_kernels_save() -> None:
    """Both norms' inputs and outputs, query, key, value, output, gate and up, and one fp32 value a row and head."""
    one = job(recompute=Recompute())
    filled, rules = resolve(one)
    kept = forward_pass(filled, rules, steady=True).layers[0].kept_bytes
    hidden, queries, keys, inner, heads = 4096, 4096, 1024, 14336, 32
    per_token = 2 * (4 * hidden + 2 * queries + 2 * keys + 2 * inner) + 4 * (2 + heads)
    assert kept == 4096 * per_token


def test_the_backward_of_the_feed_forward_block_writes_over_gate_up_and_input() -> None:
    one = job(base_quantization=None, method="lora")
    filled, rules = resolve(one)
    layer = forward_pass(filled, rules, steady=True).layers[0]
    table = forward_pass(*resolve(job(base_quantization=None, recompute=Recompute())), steady=True).layers[0].kept_bytes
    stream, product = 4096 * 4096 * 2, 4096 * 14336 * 2
    # The checkpoint is the first norm's input; the layer's second output and the gradient of it stand.
    assert layer.working_bytes == table - stream + 2 * stream + product


def test_a_packed_base_has_one_weight_written_out_and_a_buffer_for_forward() -> None:
    weight = 4096 * 14336
    written = 2 * weight + 4 * weight // 64
    assert largest_fused(job()) == weight
    assert term(job(), "loss", "weight_buffer") == written
    assert term(job(release="2024.12"), "loss", "weight_buffer") == 0
    assert term(job(base_quantization=None, method="lora"), "loss", "weight_buffer") == 0
    plain = term(job(base_quantization=None, method="lora"), "backward", "layer_backward")
    assert term(job(), "backward", "layer_backward") - plain == written


def test_where_checkpoints_lie() -> None:
    stream = 4096 * 4096 * 2
    assert term(job(), "loss", "kept_activations") == 32 * stream
    assert term(job(**ON_HOST), "first step: loss", "kept_activations") == 0
    assert term(job(**ON_HOST), "loss", "kept_activations") == stream
    assert term(job(**ON_HOST), "loss", "checkpoint_buffers") == 2 * stream
    assert term(job(release="2025.8", **ON_HOST), "loss", "checkpoint_buffers") == stream
    assert term(job(release="2024.12", **ON_HOST), "loss", "kept_activations") == 0
    assert rank(job(**ON_HOST)).host_bytes == 32 * stream
    assert rank(job()).host_bytes == 0


def test_chunks_follow_the_target_of_the_release() -> None:
    logits = 8192 * 128256 * 4
    fixed = resolve(job(release="2025.8"))[1]
    assert num_chunks(fixed, 8192, 128256, 10 * GiB) == round(logits / GiB / 4) * 4
    free = resolve(job(release="2025.9"))[1]
    assert num_chunks(free, 8192, 128256, 60 * GiB) == 1
    assert num_chunks(free, 8192, 128256, 1 * GiB) == round(logits / (GiB / 2) / 4) * 4
    capped = resolve(job())[1]
    assert num_chunks(capped, 8192, 128256, 60 * GiB) == 1
    assert num_chunks(capped, 16384, 128256, 60 * GiB) == 4
    assert num_chunks(capped, 1024, 128256, 60 * GiB) == 1
    assert num_chunks(capped, 8192, 128256, 1) == 8192


def test_more_room_never_makes_more_chunks() -> None:
    for text in ("2025.9", "2026.8"):
        rules = resolve(job(release=text))[1]
        counts = [num_chunks(rules, 4096, 128256, free * GiB // 4) for free in range(1, 60)]
        assert counts == sorted(counts, reverse=True)


def test_losses_from_all_logits_to_none() -> None:
    tokens, logits = 4096, 4096 * 128256 * 2
    assert term(job(release="2024.6"), "loss", "loss") == logits
    assert term(job(release="2024.12"), "loss", "loss") == tokens * 4096 * 2 + 8 * tokens
    # fp32 logits of 2 GiB over 1 GiB round to no four of chunks, so that there is one
    assert term(job(release="2025.8"), "loss", "loss") == tokens * 4096 * 2 + tokens * (128256 + 4096) * 2
    longer = job(release="2025.8", seq_len=4096)
    assert term(longer, "loss", "loss") == 2 * tokens * 4096 * 2 + 2 * tokens // 4 * (128256 + 4096) * 2


def test_trained_embeddings_have_copies_and_frozen_ones_leave_for_the_disk() -> None:
    lora = Lora(rank=16, targets=("all-linear",), trained_modules=("embed_tokens", "lm_head"))
    both = 2 * 128256 * 4096
    here, away = job(lora=lora), job(lora=lora, **ON_HOST)
    assert term(here, "loss", "weights") - term(away, "loss", "weights") == 2 * both
    assert term(away, "loss", "trained_copies") == 2 * both
    assert term(job(lora=lora, release="2024.6"), "loss", "trained_copies") == 4 * both
    assert term(job(lora=lora, precision=Precision(compute="float16", params="float16")), "loss", "trained_copies") == (
        4 * both
    )
    assert "embedding backward" in [one.moment for one in rank(away).moments]


def test_rotations_are_those_of_the_whole_context() -> None:
    longer = replace(model(LLAMA), max_position_embeddings=131072)
    assert term(job(model=longer), "loss", "rotary_tables") == 131072 * 128 * 2 * 2
    assert term(job(model=longer, release="2024.12"), "loss", "rotary_tables") == 32 * 32768 * 128 * 2 * 2


def test_unsloth_sets_the_allocator_where_nobody_has() -> None:
    assert resolve(job())[0].alloc_conf == "expandable_segments:True"
    assert resolve(job(release="2024.2"))[0].alloc_conf == ""
    assert resolve(job(alloc_conf="max_split_size_mb:128"))[0].alloc_conf == "max_split_size_mb:128"
    apart = moment(job(alloc_conf="max_split_size_mb:128"), "backward")
    assert moment(job(), "backward").reserved_overhead.bytes < apart.reserved_overhead.bytes


def test_the_trainer_with_a_version_that_names_unsloth_gets_its_rules() -> None:
    named = job(engine="hf_trainer", engine_version="LLaMA-Factory with Unsloth 2025.3")
    assert step(named).job.engine == "unsloth"
    assert peak(named) == peak(job(release="2025.3"))


def test_a_program_that_names_no_release_may_keep_its_checkpoints_on_the_host() -> None:
    unsaid = moment(job(engine_version="LLaMA-Factory with Unsloth"), "loss").find("kept_activations")
    said = moment(job(), "loss").find("kept_activations")
    assert unsaid is not None
    assert said is not None
    assert unsaid.bytes == said.bytes
    assert unsaid.low_bytes == 0 < said.low_bytes


def test_advice_for_a_full_card_is_in_unsloths_words() -> None:
    asked = job(base_quantization=None, method="lora", optimizer="adamw", machine=parse_machine("1xRTX4060"))
    found = {one.change: one for one in fit_training(asked).advice}
    assert found["the frozen base in 4 bits"].typed == "load_in_4bit=True"
    assert not any("torch.compile" in change or "Liger" in change for change in found)


def test_what_is_refused_says_why() -> None:
    cases: list[tuple[dict[str, object], str]] = [
        ({"lora": None, "method": "full", "base_quantization": None}, "full fine-tuning under Unsloth"),
        ({"rlhf": Rlhf(kind="dpo"), "base_quantization": None, "method": "lora"}, "dpo under unsloth"),
        ({"model": model("Qwen/Qwen3-30B-A3B")}, "as transformers' code"),
        ({"model": model("google/gemma-2-9b-it")}, "as transformers' code"),
        ({"engine_version": "2023.12"}, "before 2024.1"),
        ({"engine_version": "2024.2", **ON_HOST}, "from 2024.4 on"),
        ({"recompute": Recompute(kind="full", every=2)}, "every layer or none"),
        ({"recompute": Recompute(), "offload": (("activations", "cpu"),)}, "has none"),
        ({"precision": Precision(params="float32")}, "16 bits"),
        ({"loss": "liger"}, "do not follow a liger loss"),
        ({"base_quantization": "int8"}, "do not follow a base in int8"),
        ({"compile": True}, "torch.compile"),
        ({"flags": (("fused_kernels", "rope"),)}, "fused_kernels is not followed"),
        ({"lora": Lora(rank=8, targets=("all-linear",), trained_modules=("norm",))}, "not norm"),
        ({"machine": parse_machine("2xH100"), "parallel": replace(job().parallel, data_parallel_size=2)}, "one GPU"),
    ]
    for changes, words in cases:
        with pytest.raises(InputError, match=words):
            step(job(**changes))


@pytest.mark.parametrize("text", RELEASES)
@pytest.mark.parametrize("name", [LLAMA, QWEN2, QWEN3])
def test_every_release_answers_for_every_family(name: str, text: str) -> None:
    (found,) = step(job(name, text)).ranks
    for ledger in (*found.moments, found.after_step):
        assert 4 * GiB < ledger.allocated.low_bytes <= ledger.allocated.bytes <= ledger.allocated.high_bytes
        assert ledger.allocated.bytes < 40 * GiB
        assert all(0 <= one.low_bytes <= one.bytes <= one.high_bytes for one in ledger.allocated.children)


@settings(max_examples=60, deadline=None)
@given(
    text=st.sampled_from(RELEASES),
    name=st.sampled_from([LLAMA, QWEN2, QWEN3]),
    micro=st.integers(1, 8),
    length=st.sampled_from([256, 512, 1000, 1024, 2048, 8192]),
    targets=st.sampled_from([("all-linear",), ("q_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")]),
    dropout=st.sampled_from([0.0, 0.1]),
    kind=st.sampled_from(["none", "full", "host"]),
    base=st.sampled_from([None, "nf4"]),
)
def test_more_tokens_are_never_less_after_the_loss(
    text: str, name: str, micro: int, length: int, targets: tuple[str, ...], dropout: float, kind: str, base: str | None
) -> None:
    """The loss apart: fewer bytes may be free for more tokens, and then its chunks are smaller."""
    host = kind == "host" and text not in ("2024.1",)
    one = job(
        name,
        text,
        micro_batch_size=micro,
        seq_len=length,
        lora=Lora(rank=8, targets=targets, dropout=dropout),
        recompute=Recompute() if kind == "none" else Recompute(kind="full"),
        offload=(("activations", "cpu"),) if host else (),
        base_quantization=base,
    )
    more = replace(one, micro_batch_size=micro + 1)
    for at in ("backward", "optimizer step"):
        if resolve(one)[1].checkpoints == resolve(more)[1].checkpoints:
            assert moment(more, at).allocated.bytes >= moment(one, at).allocated.bytes
    assert 0 < MiB <= peak(one)
