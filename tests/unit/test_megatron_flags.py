"""Megatron-LM's flags: what is followed, what is said, what is refused; and what follows from other flags."""

import re
from pathlib import Path

import pytest

import ullage
from ullage.engines import megatron
from ullage.errors import InputError
from ullage.read.machine import parse_machine
from ullage.read.megatron_args import job_from_megatron_args
from ullage.read.megatron_doubts import DOUBTS, REFUSED
from ullage.read.megatron_flags import READ
from ullage.read.megatron_harmless import HARMLESS, HARMLESS_PREFIXES
from ullage.spec.model import Attention, GatedDeltaNet, LatentAttention

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
    "position-embedding-type": "rope",
}
EXPERTS = {"num-experts": 8, "moe-router-topk": 2, "moe-grouped-gemm": True}
SHARED = {"use-distributed-optimizer": True}


def job(extra=None, machine="8xH100"):
    return job_from_megatron_args({**GPT, **(extra or {})}, machine=parse_machine(machine))


def states(extra):
    """Bytes of the fullest rank's states after a step."""
    after = megatron.step(job(extra)).ranks[0].after_step
    names = ("weights", "gradients", "master_weights", "optimizer_moments")
    return {name: found.bytes if (found := after.find(name)) else 0 for name in names}


def said(extra):
    return " | ".join(job(extra).assumed)


# ---------------------------------------- one place for every flag


def test_a_flag_stands_in_one_list():
    lists = {"READ": READ, "HARMLESS": HARMLESS, "DOUBTS": set(DOUBTS), "REFUSED": set(REFUSED)}
    for one, names in lists.items():
        for other, others in lists.items():
            assert one == other or not names & others, (one, other, names & others)
    behind_a_prefix = {name for name in (*DOUBTS, *REFUSED) if name.startswith(HARMLESS_PREFIXES)}
    assert behind_a_prefix <= {
        "muon-scalar-optimizer",
        "logits-load-dir",
        "logits-save-top-k",
        "export-kd-teacher-load",
    }


def test_every_flag_that_is_said_to_be_read_is_named_by_a_reader_or_a_rule():
    root = Path(ullage.__file__).parent
    files = [*root.glob("read/megatron*.py"), *root.glob("engines/megatron/*.py")]
    text = "\n".join(path.read_text() for path in files if path.name != "megatron_flags.py")
    assert not READ - set(re.findall(r'"([a-z0-9-]+)"', text))


@pytest.mark.parametrize(
    ("flag", "value", "harmless"), [("cp-comm-type", "a2a", "p2p"), ("softmax-type", "learnable", "vanilla"),
                                    ("cpu-offloading-num-layers", 2, 0), ("delay-wgrad-compute", True, False)]
)  # fmt: skip
def test_what_may_change_the_memory_and_is_not_followed_is_said(flag, value, harmless):
    assert f"not followed: {flag}" in said({flag: value})
    assert flag not in said({flag: harmless})


def test_layers_in_bf16_matter_beside_fp8_only():
    assert "first-last-layers-bf16" in said({"first-last-layers-bf16": True, "fp8-format": "hybrid"})
    assert "first-last-layers-bf16" not in said({"first-last-layers-bf16": True})


def test_a_vision_encoder_and_generation_are_said():
    assert "vision encoder" in said({"img-h": 336, "patch-dim": 14})
    assert "generation" in said({"perform-rl-step": True, "grpo-group-size": 8})
    assert "deepep holds" in said({**EXPERTS, "moe-token-dispatcher-type": "flex", "moe-enable-deepep": True})


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("num-tokens-to-generate", 20, "trains nothing"),
        ("skip-train", True, "trains nothing"),
        ("export-kd-teacher-load", "/models/teacher", "teacher"),
        ("heterogeneous-layers-config-path", "layers.json", "differ in size"),
        ("batch-size", 4, "--micro-batch-size"),
        ("tensor-parallel-num-weight-shards", 8, "more shards"),
        ("fp8-recipe", "custom", "recipe 'custom'"),
        ("experimental-attention-variant", "kda", "variant 'kda'"),
        ("recompute-modules", "mhc", "module 'mhc'"),
        ("offload-modules", "gdp_qkv", "module 'gdp_qkv'"),
    ],
)
def test_another_kind_of_job_is_refused_in_one_sentence(flag, value, words):
    around = {"fp8-format": "hybrid", "recompute-granularity": "selective", "fine-grained-activation-offloading": True}
    with pytest.raises(InputError, match=re.escape(words)):
        job({"offload-modules": "core_attn", **around, flag: value})


def test_as_many_shards_as_tensor_parallel_ranks_are_the_usual_case():
    job({"tensor-model-parallel-size": 2, "tensor-parallel-num-weight-shards": 2})


# ---------------------------------------- what follows from other flags


def test_old_names_of_graphs():
    assert dict(job({"enable-cuda-graph": True}).flags)["cuda-graph-impl"] == "local"
    assert dict(job({"external-cuda-graph": True}).flags)["cuda-graph-impl"] == "transformer_engine"


def test_no_experts_may_be_written_as_zero():
    assert job({"num-experts": 0}).model == job().model


def test_a_hybrid_pattern_divides_the_pipeline_and_predicts():
    found = job({"hybrid-layer-pattern": "M-M|*-|M*-M|M/*-/*-", "pipeline-model-parallel-size": 2}, machine="2xH100")
    assert len(found.model.mtp) == 2
    ranks = megatron.layout.chunks(found, megatron.resolve(found)[0])
    assert [[len(chunk.layers) for chunk in parts] for parts in ranks] == [[3, 4], [2, 1]]
    assert ranks[0][0].embedding and ranks[1][1].head and ranks[1][1].mtp
    old = {"hybrid-override-pattern": "M-M*", "mtp-hybrid-override-pattern": "*-", "mtp-num-layers": 1}
    assert job(old).model == job({"hybrid-layer-pattern": "M-M*/*-"}).model


def test_buckets_may_end_at_multiples_of_two_to_the_sixteenth():
    odd = {**SHARED, "ffn-hidden-size": 2001}
    padded = states({**odd, "ddp-pad-buckets-for-high-nccl-busbw": True})["gradients"] // 4
    assert padded % 2**16 == 0 and 0 < padded - states(odd)["gradients"] // 4 < 2 * 2**16  # two buckets


def test_ends_that_count_as_layers_make_more_chunks():
    split = {"num-layers": 10, "pipeline-model-parallel-size": 4, "num-layers-per-virtual-pipeline-stage": 1}
    split |= {"account-for-embedding-in-pipeline-split": True, "account-for-loss-in-pipeline-split": True}
    assert job(split).parallel.virtual_pipeline_parallel_size == 3


def test_letters_of_a_hybrid_pattern():
    latent = {"kv-lora-rank": 64, "qk-head-dim": 64, "qk-pos-emb-head-dim": 32, "v-head-dim": 64}
    layers = job({"hybrid-layer-pattern": "G*+D", **latent}).model.layers
    delta, plain, own, sparse = (layer.mixers[0] for layer in layers)
    assert isinstance(delta, GatedDeltaNet) and isinstance(plain, Attention)
    assert isinstance(own, LatentAttention) and own.indexer is None
    assert isinstance(sparse, LatentAttention) and sparse.indexer is not None


def test_linear_attention_by_either_name():
    known = {"linear-attention-freq": 4}
    names = [job({**known, "experimental-attention-variant": name}).model for name in ("gdn", "gated_delta_net")]
    assert names[0] == names[1] and isinstance(names[0].layers[0].mixers[0], GatedDeltaNet)


# ---------------------------------------- states


def test_of_master_weights_beside_bf16_parameters_only_the_rest_is_kept():
    """Transformer Engine's Adam keeps 16 of 32 bits; with FP8 of current scales Megatron-LM holds all 32 itself."""
    plain = states(SHARED)
    precise = states({**SHARED, "use-precision-aware-optimizer": True})
    assert precise["master_weights"] * 2 == plain["master_weights"]
    assert precise["optimizer_moments"] == plain["optimizer_moments"]
    scaled = {**SHARED, "use-precision-aware-optimizer": True, "fp8-format": "hybrid", "fp8-recipe": "tensorwise"}
    assert states(scaled)["master_weights"] == plain["master_weights"]
    assert states({**scaled, "fp8-recipe": "delayed"})["master_weights"] * 2 == plain["master_weights"]


def test_gradients_in_16_bits_are_copied_where_megatron_holds_the_master_weights():
    precise = {**SHARED, "use-precision-aware-optimizer": True, "main-grads-dtype": "bf16"}
    plain, own = states(precise), states({**precise, "fp8-format": "hybrid", "fp8-recipe": "tensorwise"})
    assert own["gradients"] - plain["gradients"] == own["master_weights"]  # fp32 of the shard, as the master weights


def test_moments_may_differ_in_format():
    shard = states(SHARED)["master_weights"] // 4
    precise = {**SHARED, "use-precision-aware-optimizer": True}
    assert states({**precise, "exp-avg-dtype": "bf16"})["optimizer_moments"] == (2 + 4) * shard
    both = {**precise, "exp-avg-dtype": "bf16", "exp-avg-sq-dtype": "fp8"}
    assert states(both)["optimizer_moments"] == (2 + 1) * shard


def test_muon_with_the_distributed_optimizer_deals_out_whole_tensors():
    assert states({"optimizer": "muon", **SHARED}) == states({"optimizer": "dist_muon"})


def test_megatron_fsdp_shares_what_its_strategy_says():
    fsdp = {"use-megatron-fsdp": True, **SHARED}
    none = states(fsdp)
    assert none == states({})
    strategies = ("optim", "optim_grads", "optim_grads_params")
    found = [states({**fsdp, "data-parallel-sharding-strategy": name}) for name in strategies]
    for at, names in enumerate((("master_weights",), ("master_weights", "gradients"), tuple(none)[:3])):
        for name in none:
            whole, shard = none[name], found[at][name]
            shared = name in (*names, "optimizer_moments")
            assert (shard * 8 - whole) in range(0, 8 * 4096) if shared else whole <= shard < whole + 4096


def test_megatron_fsdp_takes_formats_of_its_own():
    whole = {"use-megatron-fsdp": True, "data-parallel-sharding-strategy": "optim_grads_params"}
    fp32, auto = (job({**whole, "megatron-fsdp-main-grads-dtype": name}).precision.grads for name in ("fp32", "auto"))
    assert (fp32, auto) == ("float32", "bfloat16")
    assert job({**whole, "megatron-fsdp-main-params-dtype": "auto"}).precision.master is None


# ---------------------------------------- activations


def kept(extra, name="activations"):
    found = megatron.step(job(extra)).ranks[0].peak.find(name)
    return found.bytes if found is not None else 0


def test_checkpoints_may_be_shared_over_tensor_ranks():
    full = {"recompute-granularity": "full", "recompute-method": "uniform", "recompute-num-layers": 1}
    full |= {"tensor-model-parallel-size": 4}
    whole = kept(full, "checkpoints")
    assert whole == 12 * 4 * 1024 * 512 * 2
    assert kept({**full, "distribute-saved-activations": True}, "checkpoints") == whole // 4


def test_hidden_exchange_of_experts_runs_one_pass_ahead():
    layers = {**EXPERTS, "pipeline-model-parallel-size": 2, "num-layers-per-virtual-pipeline-stage": 2}
    layers |= {"expert-model-parallel-size": 4, "moe-token-dispatcher-type": "alltoall"}
    plain, ahead = (megatron.step(job({**layers, **more})) for more in ({}, {"overlap-moe-expert-parallel-comm": True}))
    for before, after in zip(plain.ranks, ahead.ranks, strict=True):
        assert after.peak.allocated.bytes > before.peak.allocated.bytes


def test_a_router_in_double_precision_keeps_twice_as_much():
    scores = kept(EXPERTS, "router.scores")
    assert kept({**EXPERTS, "moe-router-dtype": "fp64"}, "router.scores") == 2 * scores
