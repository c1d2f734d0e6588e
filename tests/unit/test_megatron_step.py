"""Megatron-LM's ranks by hand: layouts, states, buffers, activations, schedules, peaks."""

from dataclasses import replace

import pytest

from ullage.engines import megatron
from ullage.engines.megatron import layout, schedule
from ullage.engines.megatron.blocks import placed_bytes
from ullage.engines.megatron.defaults import cublas_workspace, resolve
from ullage.engines.megatron.outside import communicator_bytes, communicators
from ullage.engines.megatron.params import RankTensor, buffer_elements
from ullage.errors import InputError, LayoutError
from ullage.read.machine import parse_machine
from ullage.read.megatron_args import job_from_megatron_args
from ullage.spec.training import Lora
from ullage.units import MiB

GPT = {
    "num-layers": 12,
    "hidden-size": 512,
    "num-attention-heads": 8,
    "micro-batch-size": 4,
    "global-batch-size": 32,
    "seq-length": 1024,
    "max-position-embeddings": 1024,
    "vocab-file": "vocab.json",
    "bf16": True,
    "attention-backend": "unfused",
    "no-gradient-accumulation-fusion": True,
}
ENV = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "NVTE_ALLOW_NONDETERMINISTIC_ALGO": 0}
P = 64_109_568


def job(extra=None, machine="8xA100-80GB-SXM"):
    return job_from_megatron_args({**GPT, **(extra or {})}, ENV, machine=parse_machine(machine))


def only(step):
    (rank,) = step.ranks
    return rank


def term(ledger, name):
    found = ledger.find(name)
    return 0 if found is None else found.bytes


def placed(job_):
    return [[chunk.layers for chunk in parts] for parts in layout.chunks(job_, resolve(job_)[0])]


# ---------------------------------------- layout


def test_layers_are_divided_evenly_and_interleaved():
    assert placed(job({"pipeline-model-parallel-size": 4})) == [[(3 * r, 3 * r + 1, 3 * r + 2)] for r in range(4)]
    virtual = placed(job({"pipeline-model-parallel-size": 4, "num-layers-per-virtual-pipeline-stage": 1}))
    assert virtual[0] == [(0,), (4,), (8,)] and virtual[3] == [(3,), (7,), (11,)]


def test_uneven_ends():
    ends = {"decoder-first-pipeline-num-layers": 2, "decoder-last-pipeline-num-layers": 2}
    assert [len(parts[0]) for parts in placed(job({"pipeline-model-parallel-size": 4, **ends}))] == [2, 4, 4, 2]
    with pytest.raises(LayoutError):
        placed(job({"pipeline-model-parallel-size": 4, "decoder-first-pipeline-num-layers": 1}))


def test_embedding_and_loss_may_count_as_layers():
    flags = {"account-for-embedding-in-pipeline-split": True, "account-for-loss-in-pipeline-split": True}
    counts = placed(job({"pipeline-model-parallel-size": 2, "num-layers": 14, **flags}))
    assert [len(parts[0]) for parts in counts] == [7, 7]


def test_layout_string_with_repeats():
    flags = {"pipeline-model-parallel-layout": "Et*3|(tt|)*4tL", "pipeline-model-parallel-size": 2}
    chunks = layout.chunks(job(flags), resolve(job(flags))[0])
    assert [chunk.layers for chunk in chunks[0]] == [(0, 1, 2), (5, 6), (9, 10)]
    assert [chunk.layers for chunk in chunks[1]] == [(3, 4), (7, 8), (11,)]
    assert chunks[0][0].embedding and chunks[1][-1].head and not chunks[1][0].head


@pytest.mark.parametrize("text", ["Et*3|tL", "xyz", "E(t|)*9999t"])
def test_layouts_that_do_not_fit_are_refused(text):
    with pytest.raises(InputError):
        placed(job({"pipeline-model-parallel-layout": text, "pipeline-model-parallel-size": 2}))


def test_layers_that_do_not_divide_are_refused():
    with pytest.raises(LayoutError, match="cannot be divided"):
        placed(job({"pipeline-model-parallel-size": 8}))


# ---------------------------------------- states


def test_distributed_optimizer_by_hand():
    """2 + 4 bytes of every parameter, 12 of an eighth; two cuBLAS workspaces and Transformer Engine's."""
    rank = only(megatron.step(job({"use-distributed-optimizer": True})))
    after = rank.after_step
    assert term(after, "weights") == 2 * P
    assert term(after, "gradients") == 4 * P
    assert term(after, "master_weights") + term(after, "optimizer_moments") == 12 * P // 8
    assert term(after, "cublas_workspaces") == 64 * MiB
    assert term(after, "te_workspaces") == 4 * MiB  # Ampere


def test_plain_optimizer_takes_eighteen_bytes():
    after = only(megatron.step(job())).after_step
    states = ("weights", "gradients", "master_weights", "optimizer_moments")
    assert sum(term(after, name) for name in states) == 18 * P


def test_fp16_copies_gradients_for_the_step_only():
    rank = only(megatron.step(job({"bf16": False, "fp16": True})))
    assert term(rank.after_step, "gradients") == (2 + 4) * P
    assert term(rank.moments[0], "gradients") == 2 * P


def test_tied_embedding_is_on_first_and_last_stage():
    step = megatron.step(job({"pipeline-model-parallel-size": 4}))
    by_stage = {rank.pp_rank: term(rank.after_step, "weights") for rank in step.ranks}
    layer, embedding = 12 * 512**2 + 13 * 512, 50304 * 512
    assert by_stage[0] == 2 * (embedding + 1024 * 512 + 3 * layer)
    assert by_stage[1] == 2 * 3 * layer
    assert by_stage[3] == 2 * (embedding + 3 * layer + 1024)


def test_experts_are_divided_over_their_groups():
    moe = {"num-experts": 8, "expert-model-parallel-size": 4, "moe-router-topk": 2, "disable-bias-linear": True}
    flags = {"tensor-model-parallel-size": 2, "expert-tensor-parallel-size": 1, "sequence-parallel": True, **moe}
    rank = only(megatron.step(job(flags)))
    expert = 12 * 2 * (2 * 512 * 2048)  # two of eight experts, not divided over tensor ranks
    dense = 50432 // 2 * 512 + 1024 * 512 + 12 * (4 * 512**2 // 2 + 4 * 512 + 8 * 512) + 1024
    assert term(rank.after_step, "weights") == 2 * (expert + dense)
    with pytest.raises(LayoutError):
        megatron.step(job({**flags, "num-experts": 6}))


def test_buckets_are_padded():
    one = RankTensor(name="a", shape=(100,))
    assert buffer_elements([one, one], data=8, distributed=False, bucket=None) == 200
    assert buffer_elements([one, one], data=8, distributed=True, bucket=None) == 256  # 128 + 100, up to 128s
    assert buffer_elements([one, one], data=8, distributed=True, bucket=50) == 256  # a bucket each
    tied = replace(one, shared_embedding=True)
    assert buffer_elements([tied, one, one], data=3, distributed=True, bucket=None) == 384 + 384


def test_cublas_workspace_of_environment_and_architecture():
    assert cublas_workspace(":4096:8", (8, 0)) == 32 * MiB
    assert cublas_workspace(":4096:2:16:8", (8, 0)) == 8 * MiB + 128 * 1024
    assert cublas_workspace("", (8, 0)) == 8 * MiB + 128 * 1024
    assert cublas_workspace("", (9, 0)) == 32 * MiB


def test_blocks_of_the_allocator():
    assert placed_bytes([100]) == 512
    assert placed_bytes([19 * MiB + MiB // 2]) == 20 * MiB  # half a MiB cannot be split off
    assert placed_bytes([5 * MiB] * 4) == 20 * MiB
    assert placed_bytes([19 * MiB // 2, 39 * MiB // 4]) == 20 * MiB  # 9.5 MiB splits off, the other keeps 0.75 MiB
    assert placed_bytes([98 * MiB + MiB]) == 100 * MiB


# ---------------------------------------- activations


def test_unfused_layer_takes_34_sbh_and_5_scores():
    """arXiv:2205.05198, table 2: sbh (34 + 5 a s / h) bytes a layer, plus statistics."""
    rank = only(megatron.step(job()))
    loss = next(moment for moment in rank.moments if moment.moment == "loss")
    sbh = 1024 * 4 * 512
    layers = 12 * sbh * (34 + 5 * 8 * 1024 // 512)
    statistics = 12 * 2 * (2 * 4 * 4096)
    head = 2 * 2 * sbh
    assert term(loss, "activations") == layers + statistics + head + sbh  # embedding dropout's mask


def test_loss_holds_logits_twice():
    rank = only(megatron.step(job()))
    loss = next(moment for moment in rank.moments if moment.moment == "loss")
    assert term(loss, "logits_and_loss") == 6 * 4096 * 50304


def test_full_recompute_keeps_inputs():
    flags = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    rank = only(megatron.step(job(flags)))
    loss = next(moment for moment in rank.moments if moment.moment == "loss")
    assert term(loss, "checkpoints") == 12 * 2 * 4096 * 512
    backward = next(moment for moment in rank.moments if moment.moment == "backward")
    assert term(backward, "recomputed_layer") > 100 * MiB


def test_selective_recompute_drops_scores():
    kept = only(megatron.step(job({"recompute-granularity": "selective"}))).moments[0]
    assert term(kept, "softmax") == 0
    assert term(only(megatron.step(job())).moments[0], "softmax") == 12 * 2 * 4 * 8 * 1024 * 1024


def test_sequence_parallelism_divides_the_stream():
    plain = only(megatron.step(job({"tensor-model-parallel-size": 4}))).moments[0]
    divided = only(megatron.step(job({"tensor-model-parallel-size": 4, "sequence-parallel": True}))).moments[0]
    assert term(plain, "input_layernorm.input") == 4 * term(divided, "input_layernorm.input")
    assert term(plain, "fc1.output") == term(divided, "fc1.output")


def test_mtp_keeps_a_softmax_of_its_own():
    mtp = {"mtp-num-layers": 1, "position-embedding-type": "rope"}
    loss = next(m for m in only(megatron.step(job(mtp))).moments if m.moment == "loss")
    assert term(loss, "mtp.softmax") == 4 * 4096 * 50304


# ---------------------------------------- schedule


def peak_in_flight(**settings):
    live = best = 0
    for one in schedule.passes(**settings):
        live += 1 if one.forward else -1
        best = max(best, live)
    assert live == 0
    return best


@pytest.mark.parametrize(("rank", "expected"), [(0, 4), (1, 3), (3, 1)])
def test_one_forward_one_backward(rank, expected):
    settings = {"schedule": "1f1b", "pipeline": 4, "virtual": 1, "rank": rank, "group": 4}
    assert peak_in_flight(num_micro_batches=16, **settings) == expected
    assert peak_in_flight(num_micro_batches=2, **settings) == min(2, expected)


@pytest.mark.parametrize(("rank", "expected"), [(0, 2 * 3 + 2 * 4 + 1), (3, 2 * 4 + 1)])
def test_interleaved(rank, expected):
    found = peak_in_flight(schedule="interleaved", pipeline=4, virtual=3, rank=rank, num_micro_batches=16, group=4)
    assert found == expected


@pytest.mark.parametrize("rank", range(4))
def test_zero_bubble_fills_every_rank_as_full_as_the_first(rank):
    settings = {"schedule": "zero_bubble", "pipeline": 4, "virtual": 1, "rank": rank, "group": 4}
    assert peak_in_flight(num_micro_batches=16, **settings) == 4
    assert {sum(load.live) for load in schedule.loads(num_micro_batches=16, **settings)} == {4}


@pytest.mark.parametrize("rank", range(4))
def test_dualpipe_holds_one_more_than_the_pipeline(rank):
    found = peak_in_flight(schedule="dualpipe", pipeline=4, virtual=2, rank=rank, num_micro_batches=20, group=4)
    assert found == 5


def test_every_rank_is_in_one_class_and_the_fullest_comes_first():
    step = megatron.step(job({"pipeline-model-parallel-size": 4, "tensor-model-parallel-size": 2}))
    assert sum(rank.num_ranks for rank in step.ranks) == 8
    peaks = [rank.peak.device_used.bytes for rank in step.ranks]
    assert peaks == sorted(peaks, reverse=True)


def test_more_micro_batches_change_no_peak():
    few, many = ({"pipeline-model-parallel-size": 4, "global-batch-size": size} for size in (64 * 2, 64 * 8))
    assert [r.peak.allocated.bytes for r in megatron.step(job(few)).ranks] == [
        r.peak.allocated.bytes for r in megatron.step(job(many)).ranks
    ]


def test_ranges_hold_the_expected_value():
    for rank in megatron.step(job({"pipeline-model-parallel-size": 4})).ranks:
        for moment in rank.moments:
            for one in moment.device_used.walk():
                assert one.low_bytes <= one.bytes <= one.high_bytes


def test_dualpipe_holds_both_ends_and_dualpipev_folds_them():
    both = replace(job({"pipeline-model-parallel-size": 4}), flags=())
    dual = replace(both, parallel=replace(both.parallel, schedule="dualpipe"))
    assert placed(dual)[0] == [(0, 1, 2), (9, 10, 11)]
    folded = replace(both, model=replace(both.model, layers=both.model.layers * 2))
    folded = replace(folded, parallel=replace(both.parallel, schedule="dualpipev"))
    assert placed(folded)[0] == [(0, 1, 2), (21, 22, 23)]
    single = {rank.pp_rank: rank for rank in megatron.step(both).ranks}
    twice = {rank.pp_rank: rank for rank in megatron.step(dual).ranks}
    assert term(twice[1].after_step, "weights") == term(single[1].after_step, "weights") * 2


def test_adapters_are_all_that_is_trained():
    both = replace(job(), lora=Lora(rank=8, targets=("all-linear",)), method="lora")
    after = only(megatron.step(both)).after_step
    pairs = 12 * 8 * ((1536 + 512) + (512 + 512) + (2048 + 512) * 2)  # r (rows + columns) of qkv, proj, fc1, fc2
    assert term(after, "weights") == 2 * (P + pairs)
    assert term(after, "gradients") == 4 * pairs
    assert term(after, "optimizer_moments") == 8 * pairs


def test_uniform_recompute_groups_all_layers():
    full = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 4}
    loss = next(m for m in only(megatron.step(job(full))).moments if m.moment == "loss")
    assert term(loss, "checkpoints") == 3 * 2 * 4096 * 512
    block = {"recompute-granularity": "full", "recompute-method": "block", "recompute-num-layers": 4}
    loss = next(m for m in only(megatron.step(job(block))).moments if m.moment == "loss")
    assert term(loss, "checkpoints") == 4 * 2 * 4096 * 512
    assert term(loss, "softmax") == 8 * 2 * 4 * 8 * 1024 * 1024


def test_head_backward_is_the_peak_where_the_loss_works_in_place():
    flags = {
        "cross-entropy-loss-fusion": True,
        "cross-entropy-fusion-impl": "te",
        "untie-embeddings-and-output-weights": True,
    }
    rank = only(megatron.step(job(flags)))
    head = next(m for m in rank.moments if m.moment == "head backward")
    assert term(head, "head_backward") == 2 * (4096 * 50304 + 50304 * 512 + 4096 * 512)
    assert rank.peak.moment == "head backward"


def test_every_group_of_ranks_that_talks_is_a_communicator():
    spread = {"tensor-model-parallel-size": 2, "pipeline-model-parallel-size": 2, "use-distributed-optimizer": True}
    ampere = job(spread)
    assert sorted(communicators(ampere)) == [1, 2, 2, 2, 2, 2, 4, 8, 8]  # context 1; ends of the tied pipeline 2
    used = sum(communicator_bytes(size, ampere) for size in communicators(ampere))
    assert used == (5 * 544 + 3 * 688) * MiB
    hopper = job(spread, machine="8xH100")
    assert communicator_bytes(8, hopper) == (688 + 8 * 32) * MiB
    outside = only_stage(megatron.step(ampere)).peak.outside
    assert {term.name: term.bytes for term in outside.children}["nccl"] == used


def test_one_gpu_has_no_communicator():
    (rank,) = megatron.step(job(machine="1xA100-80GB-SXM")).ranks
    assert [term.name for term in rank.peak.outside.children] == ["context"]


def only_stage(step):
    return step.ranks[0]
