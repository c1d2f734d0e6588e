"""The start arithmetic of vLLM against figures that its own logs print."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
from conftest import need_shared
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage.engines.serving import start
from ullage.engines.vllm.defaults import read_version, resolve
from ullage.engines.vllm.groups import grouping
from ullage.engines.vllm.layout import stage_layers, stages
from ullage.engines.vllm.loaded import loaded_weights, rounded
from ullage.engines.vllm.profile import activation_peak
from ullage.engines.vllm.workspace import at_load, at_profile, attention_bytes
from ullage.errors import InputError, LayoutError
from ullage.read.hf_config import read_config
from ullage.spec import model as spec
from ullage.spec.machine import Gpu, Machine
from ullage.spec.serving import ServingJob, ServingParallel
from ullage.units import GiB, MiB

H100 = Gpu(
    name="H100-80GB-SXM",
    total_bytes=int(79.18 * GiB),
    total_low_bytes=int(79.10 * GiB),
    total_high_bytes=int(79.65 * GiB),
    compute_capability=(9, 0),
)
A100 = replace(H100, name="A100-SXM4-80GB", total_bytes=int(79.25 * GiB), compute_capability=(8, 0))
L40S = replace(H100, name="L40S-48GB", total_bytes=int(44.4 * GiB), compute_capability=(8, 9))
B200 = replace(H100, name="B200", total_bytes=int(178.4 * GiB), compute_capability=(10, 0))


def model_of(name: str) -> spec.Model:
    return read_config(need_shared("configs", name.replace("/", "__") + ".json"), assume=True)


def small_model(**changes: Any) -> spec.Model:
    """A dense decoder of 4 layers, 8 KV heads of 64."""
    attention = spec.Attention(num_heads=16, num_kv_heads=8, head_dim=64)
    layer = spec.Layer(mixers=(attention,), ffns=(spec.DenseFFN(intermediate_size=2048),), norms=())
    fields: dict[str, Any] = {
        "name": "small",
        "architecture": "LlamaForCausalLM",
        "hidden_size": 1024,
        "vocab_size": 32000,
        "dtype": "bfloat16",
        "layers": (layer,) * 4,
        "final_norms": (),
        "max_position_embeddings": 8192,
    }
    return spec.Model(**{**fields, **changes})


def job_of(model: spec.Model, *, gpu: Gpu = H100, version: str = "0.33.0", gpus: int = 1, **fields: Any) -> ServingJob:
    machine = Machine(gpu=gpu, gpus_per_node=gpus)
    return ServingJob(model=model, machine=machine, engine="vllm", engine_version=version, **fields)


# ------------------------------------------------------------------------------------------------ versions, defaults


@pytest.mark.parametrize(
    ("text", "number", "engine"),
    [
        ("0.33.0", "0.33.0", "V1"),
        ("0.6.x (V0), 2024-12", "0.6.4", "V0"),
        ("0.11.0 or later", "0.11.0", "V1"),
        ("0.26.1rc1.dev156+g0eec856cc.d20260731", "0.26.1", "V1"),
        ("0.8.5 (V0)", "0.8.5", "V0"),
        ("PR 41834, 2026-06-27", "0.23.0", "V1"),
        ("0.5.4", "0.5.4", "V0"),
    ],
)
def test_versions_are_read(text: str, number: str, engine: str) -> None:
    version = read_version(text)
    assert (version.number, version.engine) == (number, engine)
    assert bool(version.assumed) == (text != number)


def test_a_newer_version_is_a_warning() -> None:
    assert start(job_of(small_model(), version="0.99.0")).warnings
    assert not start(job_of(small_model())).warnings


@pytest.mark.parametrize(
    ("gpu", "version", "tokens", "seqs"),
    [
        (H100, "0.8.3", 8192, 1024),
        (A100, "0.8.3", 2048, 1024),
        (A100, "0.8.5", 8192, 1024),
        (A100, "0.11.0", 2048, 256),
        (H100, "0.11.0", 8192, 1024),
        (L40S, "0.33.0", 2048, 256),
        (B200, "0.26.0", 8192, 1024),
        (B200, "0.33.0", 16384, 1024),
        (H100, "0.6.4", 8192, 256),
    ],
)
def test_batch_defaults_by_version_and_card(gpu: Gpu, version: str, tokens: int, seqs: int) -> None:
    job = resolve(job_of(small_model(), gpu=gpu, version=version)).job
    assert (job.max_num_batched_tokens, job.max_num_seqs) == (tokens, seqs)


def test_v0_cuts_prompts_above_32k_only() -> None:
    long = resolve(job_of(small_model(), version="0.6.4", max_model_len=35000))
    short = resolve(job_of(small_model(), version="0.6.4", max_model_len=29000))
    assert (long.tokens, short.tokens) == (512, 29000)


def test_utilisation_default_rose_with_0_20() -> None:
    assert resolve(job_of(small_model(), version="0.19.1")).job.memory_fraction == 0.9
    assert resolve(job_of(small_model(), version="0.20.0")).job.memory_fraction == 0.92


def test_refused_values() -> None:
    with pytest.raises(InputError):
        start(job_of(small_model(), memory_fraction=1.5))
    with pytest.raises(InputError):
        start(job_of(small_model(), max_model_len=0))
    with pytest.raises(LayoutError):
        start(job_of(small_model(), parallel=ServingParallel(tensor_parallel_size=3), gpus=3))


# ---------------------------------------------------------------------------------------------------- layout, weights


def test_pipeline_stages_leave_the_last_light() -> None:
    assert stage_layers(61, 4, None) == [(0, 15), (15, 30), (30, 46), (46, 61)]
    assert [end - first for first, end in stage_layers(62, 4, None)] == [15, 16, 16, 15]
    assert stage_layers(48, 2, (16, 32)) == [(0, 16), (16, 48)]
    with pytest.raises(LayoutError):
        stage_layers(48, 2, (16, 31))


def test_allocator_rounding() -> None:
    assert rounded(259 * MiB) == 260 * MiB  # the rest of the segment is 1 MiB: not split
    assert rounded(64 * MiB + 3 * MiB // 4) == 64 * MiB + 3 * MiB // 4  # a rest of 1.25 MiB is split off
    assert rounded(64 * MiB + 3 * MiB // 4, never_split=True) == 66 * MiB
    assert rounded(1000) == 1024


@pytest.mark.parametrize(
    ("name", "gpu", "version", "fields", "measured"),
    [
        ("Qwen/Qwen3-30B-A3B-Instruct-2507", H100, "0.10.2", {}, 56.9342),
        ("meta-llama/Llama-3.1-8B-Instruct", A100, "0.11.0", {}, 14.9889),
        ("Qwen/Qwen3-8B", A100, "0.9.2", {}, 15.2683),
        ("openai/gpt-oss-20b", A100, "0.19.0", {}, 13.72),
        ("openai/gpt-oss-20b", H100, "0.12.0", {}, 13.47),
        ("openai/gpt-oss-120b", A100, "0.10.1.1", {"parallel": ServingParallel(tensor_parallel_size=4)}, 17.2217),
        ("openai/gpt-oss-120b", H100, "0.12.0", {}, 64.38),
    ],
)
def test_weights_as_logged(name: str, gpu: Gpu, version: str, fields: dict[str, Any], measured: float) -> None:
    setup = resolve(job_of(model_of(name), gpu=gpu, version=version, **fields))
    term = loaded_weights(setup, stages(setup)[0])
    assert term.bytes / GiB == pytest.approx(measured, rel=0.002)
    assert term.low_bytes <= measured * GiB + 6 * MiB
    assert term.high_bytes >= measured * GiB - 6 * MiB


def test_latents_are_replicated_and_experts_spread() -> None:
    model = model_of("deepseek-ai/DeepSeek-V3")
    wide = resolve(
        job_of(model, gpus=16, parallel=ServingParallel(data_parallel_size=16, expert_parallel=True), version="0.33.0")
    )
    share = stages(wide)[0].share
    assert (share.num_local_experts, share.attention_tp, share.expert_tp) == (16, 1, 1)
    assert not share.mtp
    spoken = resolve(replace(wide.job, speculative="deepseek_mtp", num_speculative_tokens=1))
    assert stages(spoken)[0].share.mtp
    assert loaded_weights(spoken, stages(spoken)[0]).bytes > loaded_weights(wide, stages(wide)[0]).bytes


# ------------------------------------------------------------------------------------------------- profile, the budget


@pytest.mark.parametrize(
    ("name", "measured"),
    [
        ("Qwen/Qwen3-0.6B", 5.56),
        ("Qwen/Qwen3-32B", 5.64),
        ("meta-llama/Llama-3.1-8B-Instruct", 4.76),
        ("openai/gpt-oss-20b", 7.38),
    ],
)
def test_the_sampler_makes_the_peak(name: str, measured: float) -> None:
    setup = resolve(job_of(model_of(name), version="0.12.0", max_model_len=16000))
    assert activation_peak(setup, stages(setup)[0]).bytes / GiB == pytest.approx(measured, abs=0.01)


def test_v0_peak_grows_with_the_prompt() -> None:
    model = model_of("meta-llama/Llama-3.1-8B-Instruct")
    card = replace(A100, name="RTX 3090", total_bytes=int(23.58 * GiB))
    for length, measured in ((20000, 17.06), (29000, 17.98)):
        answer = start(job_of(model, gpu=card, version="0.6.4", max_model_len=length, memory_fraction=0.9))
        assert answer.figures["max_allocated"].value / GiB == pytest.approx(measured, abs=0.02)
        assert answer.starts == (length == 20000)


def test_kv_memory_of_a_full_log() -> None:
    model = model_of("Qwen/Qwen3-30B-A3B-Instruct-2507")
    answer = start(job_of(model, version="0.10.2", max_model_len=6144))
    assert answer.kv_cache_bytes.value / GiB == pytest.approx(8.68, rel=0.02)
    assert answer.kv_cache_tokens.value == pytest.approx(94784, rel=0.02)
    assert answer.max_concurrency.value == pytest.approx(15.43, rel=0.02)


def test_graph_estimate_is_subtracted_from_0_20_on() -> None:
    old, new = (
        start(job_of(small_model(), version=version, memory_fraction=0.9, max_num_seqs=8))
        for version in ("0.19.0", "0.20.0")
    )
    assert old.figures["cuda_graph_estimate"].value == 0
    assert new.figures["cuda_graph_estimate"].value > 0
    eager = start(job_of(small_model(), version="0.20.0", enforce_eager=True))
    assert eager.figures["cuda_graph_estimate"].value == eager.figures["cuda_graphs"].value == 0


# ------------------------------------------------------------------------------------------------------ groups, blocks


def test_hybrid_groups_of_gemma3() -> None:
    """62 layers: 10 full and 52 sliding make 7 groups of 10, 8 of them padding; log: 109.86 GiB, 89,994 blocks."""
    model = model_of("google/gemma-3-27b-it")
    fields = {"max_model_len": 4096, "max_num_batched_tokens": 8192, "kv_cache_memory_bytes": int(109.86 * GiB)}
    job = job_of(model, gpu=B200, version="0.11.0", **fields)
    groups = grouping(resolve(job))
    assert (len(groups.groups), groups.width) == (7, 10)
    answer = start(job)
    assert answer.figures["num_gpu_blocks"].value == pytest.approx(89994, abs=5)
    assert answer.kv_cache_tokens.value == pytest.approx(205696, abs=16)
    assert answer.max_concurrency.value == pytest.approx(50.05, abs=0.01)


def test_hybrid_groups_of_gpt_oss() -> None:
    """Log: 330,018 blocks, 2,640,144 tokens, 284.25x for 16,384 tokens on each of 4 ranks."""
    model = model_of("openai/gpt-oss-120b")
    job = job_of(
        model,
        gpu=A100,
        version="0.10.1.1",
        gpus=4,
        parallel=ServingParallel(tensor_parallel_size=4),
        max_model_len=16384,
        max_num_batched_tokens=2048,
        flags=(("num_gpu_blocks_override", "330018"),),
    )
    answer = start(job)
    assert answer.kv_cache_tokens.value == 2640144
    assert answer.max_concurrency.value == pytest.approx(284.25, abs=0.01)
    flat = start(replace(job, flags=(("disable_hybrid_kv_cache_manager", "true"),)))
    assert flat.kv.bytes_per_token == 2 * answer.kv.bytes_per_token


def test_v4_pool_and_its_log() -> None:
    """Log: 32.08 GiB make 8.30x for 262,144 tokens (8.298 by its token figure) on vLLM 0.23.0."""
    model = model_of("deepseek-ai/DeepSeek-V4-Flash")
    fields = {"max_model_len": 262144, "max_num_batched_tokens": 8192, "kv_cache_memory_bytes": int(32.08 * GiB)}
    answer = start(job_of(model, gpu=B200, version="0.23.0", enforce_eager=True, **fields))
    assert answer.max_concurrency.value == pytest.approx(8.298, abs=0.01)


def test_one_latent_group_and_its_indexer() -> None:
    dense = start(
        job_of(model_of("deepseek-ai/DeepSeek-V3"), gpu=B200, gpus=8, parallel=ServingParallel(tensor_parallel_size=8))
    )
    assert dense.kv.bytes_per_token == 61 * 576 * 2
    sparse = job_of(
        model_of("deepseek-ai/DeepSeek-V3.2"),
        gpu=B200,
        gpus=8,
        parallel=ServingParallel(tensor_parallel_size=8),
        kv_cache_dtype="fp8",
    )
    assert start(sparse).kv.bytes_per_token == 61 * (656 + 132)
    sharded = replace(dense.job, parallel=replace(dense.job.parallel, decode_context_parallel_size=8))
    assert start(sharded).kv.bytes_per_token == pytest.approx(61 * 576 * 2 / 8, abs=1)


def test_old_versions_expand_latents() -> None:
    """vLLM 0.5.4 cached 16 heads of 256 keys and values on each of 8 ranks."""
    model = model_of("deepseek-ai/DeepSeek-Coder-V2-Instruct")
    job = job_of(model, version="0.5.4", gpus=8, parallel=ServingParallel(tensor_parallel_size=8), max_model_len=16000)
    answer = start(job)
    assert answer.kv.bytes_per_token == 60 * 16 * 2 * 256 * 2
    assert not answer.starts


def test_states_raise_the_block() -> None:
    model = model_of("Qwen/Qwen3-Next-80B-A3B-Instruct")
    setup = resolve(job_of(model, gpus=4, parallel=ServingParallel(tensor_parallel_size=4), version="0.13.0"))
    groups = grouping(setup)
    kinds = [group.spec.kind for group in groups.groups]
    assert kinds.count("full") == 1 and kinds.count("state") == 3
    assert len({group.spec.page_bytes for group in groups.groups}) == 1
    assert groups.block_tokens % 16 == 0 and groups.block_tokens > 16


def test_a_request_that_does_not_fit_is_refused() -> None:
    model = model_of("Qwen/Qwen3-32B")
    assert start(job_of(model, version="0.12.0", max_model_len=16000, memory_fraction=0.9)).starts
    refused = start(job_of(model, version="0.12.0", max_model_len=32000, memory_fraction=0.9))
    assert not refused.starts
    assert "32000" in refused.reason
    assert refused.max_context.value < 32000
    fitted = start(job_of(model, version="0.12.0", max_model_len=-1, memory_fraction=0.9))
    assert fitted.starts
    assert fitted.job.max_model_len == int(refused.max_context.value)


def test_nothing_left_is_refused() -> None:
    answer = start(job_of(model_of("Qwen/Qwen3-32B"), gpu=L40S))
    assert not answer.starts
    assert any(line.startswith("ValueError") for line in answer.log_lines)


def test_too_little_free_memory_is_refused() -> None:
    answer = start(job_of(small_model(), device_free_bytes=10 * GiB))
    assert not answer.starts and "Free memory" in answer.reason


def test_context_and_early_buffers_stand_outside_the_budget() -> None:
    """Nothing else on the card, and still less is free than 0.999 of it."""
    refused = start(job_of(small_model(), memory_fraction=0.999))
    assert not refused.starts and "Free memory" in refused.reason
    assert not start(job_of(small_model(), version="0.8.5", memory_fraction=0.999)).reason


def test_a_start_at_the_border_is_doubtful_both_ways_and_sure_far_from_it() -> None:
    model = model_of("Qwen/Qwen3-32B")
    lengths = {length: start(job_of(model, version="0.12.0", max_model_len=length)) for length in (1000, 18000, 120000)}
    assert lengths[1000].starts and not lengths[1000].doubt
    assert not lengths[120000].starts and not lengths[120000].doubt
    assert lengths[18000].doubt
    border = int(lengths[18000].max_context.value)
    below, above = (start(job_of(model, version="0.12.0", max_model_len=border + step)) for step in (-64, 64))
    assert below.starts and "may fail" in below.doubt
    assert not above.starts and "may start" in above.doubt


def test_all_layers_are_checked_by_the_versions_that_did() -> None:
    """0.15 asked every pipeline stage to hold a request of all layers: 24 GiB of 262,144 tokens, at most 34,736."""
    model = replace(small_model(max_position_embeddings=1 << 20), layers=small_model().layers * 12)
    job = job_of(
        model,
        gpus=2,
        parallel=ServingParallel(pipeline_parallel_size=2),
        max_model_len=262144,
        kv_cache_memory_bytes=int(20 * GiB),
    )
    assert not start(replace(job, engine_version="0.15.2")).starts
    assert start(replace(job, engine_version="0.33.0")).starts


@settings(max_examples=25, deadline=None)
@given(low=st.floats(0.3, 0.95), step=st.floats(0, 0.05), length=st.integers(1, 8192))
def test_more_memory_never_holds_less(low: float, step: float, length: int) -> None:
    less, more = (
        start(job_of(small_model(), memory_fraction=fraction, max_model_len=length)) for fraction in (low, low + step)
    )
    assert more.figures["num_gpu_blocks"].value >= less.figures["num_gpu_blocks"].value
    for answer in (less, more):
        for amount in answer.figures.values():
            assert amount.low <= amount.value <= amount.high
        cost = answer.kv.bytes_of_request
        assert cost(length) <= cost(length + 1)


@pytest.mark.parametrize("version", ["0.19.0", "0.26.0", "0.33.0"])
def test_figures_add_up_to_the_budget(version: str) -> None:
    """From 0.27 on the printed peak holds the graph estimate; before, both are taken off."""
    figures = start(job_of(small_model(), max_num_seqs=16, version=version)).figures
    parts = ["weights", "activation_peak", "non_torch", "kv_cache"]
    if version == "0.26.0":
        parts.append("cuda_graph_estimate")
    assert sum(figures[part].value for part in parts) == pytest.approx(figures["requested"].value, abs=2)


def test_the_tightest_stage_comes_first() -> None:
    job = job_of(
        model_of("deepseek-ai/DeepSeek-V3"),
        gpu=B200,
        gpus=8,
        parallel=ServingParallel(tensor_parallel_size=4, pipeline_parallel_size=2),
    )
    answer = start(job)
    assert {one.pp_rank for one in answer.ranks} == {0, 1}
    assert sum(one.num_ranks for one in answer.ranks) == 8


def test_deepseek_v3_is_quick() -> None:
    job = job_of(
        model_of("deepseek-ai/DeepSeek-V3"), gpu=B200, gpus=8, parallel=ServingParallel(tensor_parallel_size=8)
    )
    start(job)
    began = time.perf_counter()
    start(job)
    assert time.perf_counter() - began < 0.1  # about 4 ms on an idle core


def test_log_lines_speak_the_version() -> None:
    new, old = (start(job_of(small_model(), version=version)).log_lines for version in ("0.33.0", "0.6.4"))
    assert any(line.startswith("GPU KV cache size: ") for line in new)
    assert any(line.startswith("# GPU blocks: ") for line in old)


def test_every_catalog_entry_has_unit_source_and_date() -> None:
    from ullage.catalog import load

    data = load("engines/vllm.json")
    for name, entry in {"versions": data["versions"], **data["settings"]}.items():
        assert entry["unit"] and entry["source"] and entry["date"], name
        assert entry["values"], name


def test_rocm_counts_what_the_driver_loads_with_the_weights_until_0_21() -> None:
    card = replace(A100, name="MI300X", vendor="amd", compute_capability=None)
    old, new = (start(job_of(small_model(), gpu=card, version=version)) for version in ("0.14.0", "0.21.0"))
    assert new.figures["weights"] == start(job_of(small_model(), version="0.21.0")).figures["weights"]
    tensors = start(job_of(small_model(), version="0.14.0")).figures["weights"]
    assert old.figures["weights"].value > tensors.value + 128 * MiB
    assert old.figures["non_torch"].value > new.figures["non_torch"].value


def test_a_shared_key_projection_fills_both_slots() -> None:
    attention = spec.Attention(num_heads=16, num_kv_heads=8, head_dim=64)
    shared = replace(attention, value_is_key=True)
    layer = small_model().layers[0]
    both, one = (
        start(job_of(small_model(layers=(replace(layer, mixers=(mixer,)),) * 4))).figures["weights"]
        for mixer in (attention, shared)
    )
    assert both == one


def _sparse_setup(name: str, version: str, **fields: Any) -> Any:
    model = model_of(name)
    parallel = ServingParallel(tensor_parallel_size=8)
    job = job_of(model, version=version, gpus=8, parallel=parallel, max_num_batched_tokens=8192, **fields)
    setup = resolve(job)
    return setup, stages(setup)[0]


@pytest.mark.parametrize(
    ("version", "workspace"),
    [
        ("0.12.0", 0),
        ("0.14.0", 5 * 163840 * 576 * 2),
        ("0.20.0", 5 * 163840 * 576 * 2 + 8192 * 16 * 576 * 2),
        ("0.33.0", 5 * 163840 * 576 * 2 + 8192 * (16 * 576 + 64 * (576 + 512) + 16 * 512) * 2),
    ],
)
def test_sparse_attention_reserves_its_workspace_with_the_weights(version: str, workspace: int) -> None:
    """V3.2 at 163,840 tokens with the packed cache: five rows a token, from 0.32 on queries and outputs too."""
    setup, stage = _sparse_setup("deepseek-ai/DeepSeek-V3.2", version, max_model_len=163840, kv_cache_dtype="fp8")
    assert attention_bytes(setup, stage) == workspace
    buffers = at_load(setup, stage)
    assert buffers.bytes == workspace + 8192 * 2048 * 4
    assert buffers.low_bytes == 8192 * 2048 * 4
    assert at_profile(setup, stage) == 0  # 40 x 163,840 x 132 B of gathered keys fit inside it


def test_v4_gathers_keys_in_the_profiling_run() -> None:
    """Gathered index keys, ten a token, against four requests' compressed entries, window and batch."""
    setup, stage = _sparse_setup("deepseek-ai/DeepSeek-V4-Flash", "0.25.0", max_model_len=1 << 20)
    assert at_profile(setup, stage) == max(10 * (1 << 20) * 132, 4 * ((1 << 18) + 128 + 8192) * 512 * 2)
    short, _stage = _sparse_setup("deepseek-ai/DeepSeek-V4-Flash", "0.25.0", max_model_len=4096)
    assert at_profile(short, stage) == 4 * (1024 + 128 + 8192) * 512 * 2
    streams = 8192 * 4 * 4096 * 2
    assert at_load(setup, stage).bytes == streams + 8192 * 512 * 4
    newer, stage = _sparse_setup("deepseek-ai/DeepSeek-V4-Flash", "0.33.0", max_model_len=4096)
    assert at_load(newer, stage).bytes == 8192 * 512 * 4


def test_dense_attention_has_no_such_buffers() -> None:
    setup = resolve(job_of(small_model()))
    stage = stages(setup)[0]
    assert at_load(setup, stage).high_bytes == at_profile(setup, stage) == 0


def test_tables_of_sectioned_rotation_hold_four_times_the_positions() -> None:
    plain, sectioned = (
        loaded_weights(setup, stages(setup)[0])
        for setup in (resolve(job_of(small_model(rotary_sections=flag))) for flag in (False, True))
    )
    table = 8192 * 64 * 2
    sizes = [next(part.bytes for part in term.children if part.name == "rotary_tables") for term in (plain, sectioned)]
    assert sizes == [table, 4 * table]
