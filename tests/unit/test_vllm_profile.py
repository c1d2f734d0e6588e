"""What vLLM's profiling run counts, by version and card: runners, samplers, workspaces, unpacked matrices, NCCL.

Figures "as logged" are of published starts outside the truth files, named where they are used.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from ullage.engines.serving import start
from ullage.engines.vllm.backend import uses_flashinfer, workspace
from ullage.engines.vllm.defaults import Setup, read_version, resolve
from ullage.engines.vllm.graphs import cuda_graphs, estimate, num_full, sizes
from ullage.engines.vllm.groups import grouping
from ullage.engines.vllm.layout import stages
from ullage.engines.vllm.nontorch import nccl_in_use, non_torch_parts, nvswitch_buffers
from ullage.engines.vllm.profile import activation_peak, forward_bytes
from ullage.engines.vllm.runner import second_runner
from ullage.engines.vllm.sampler import sampler_path
from ullage.ledger import total
from ullage.read.quantization_names import named_quantization
from ullage.spec import model as spec
from ullage.spec.machine import Gpu, Machine
from ullage.spec.serving import ServingJob, ServingParallel
from ullage.units import GiB, MiB


def card(name: str, gib: float, capability: tuple[int, int] | None, **fields: Any) -> Gpu:
    size = int(gib * GiB)
    return Gpu(
        name=name,
        total_bytes=size,
        total_low_bytes=size,
        total_high_bytes=size,
        compute_capability=capability,
        **fields,
    )


H200 = card("H200-141GB", 139.81, (9, 0))
A100 = card("A100-40GB", 39.49, (8, 0))
T4 = card("T4-16GB", 14.56, (7, 5))
RTX5090 = card("RTX5090-32GB", 31.36, (12, 0))
B300 = card("B300", 267.69, (10, 3))
GB10 = card("GB10-128GB", 121.69, (12, 1), unified=True)
MI300 = card("MI300X", 191.98, None, vendor="amd")
UNKNOWN = card("80GB card", 79.1, None)


def dense(
    *, layers: int = 4, hidden: int = 1024, heads: int = 16, dim: int = 64, inner: int = 4096, **fields: Any
) -> spec.Model:
    attention = spec.Attention(num_heads=heads, num_kv_heads=8, head_dim=dim)
    layer = spec.Layer(mixers=(attention,), ffns=(spec.DenseFFN(intermediate_size=inner),), norms=())
    values: dict[str, Any] = {
        "name": "dense",
        "architecture": "LlamaForCausalLM",
        "hidden_size": hidden,
        "vocab_size": 128_000,
        "dtype": "bfloat16",
        "layers": (layer,) * layers,
        "final_norms": (),
        "max_position_embeddings": 8192,
    }
    return spec.Model(**{**values, **fields})


def experts() -> spec.Model:
    model = dense(architecture="Qwen3MoeForCausalLM")
    block = spec.MoEFFN(num_experts=64, top_k=8, intermediate_size=768)
    return replace(model, layers=tuple(replace(layer, ffns=(block,)) for layer in model.layers))


def hybrid() -> spec.Model:
    model = dense(architecture="JambaForCausalLM")
    state = spec.Mamba2(num_heads=16, head_dim=64, state_size=64, num_groups=1, conv_kernel=4)
    layer = replace(model.layers[0], mixers=(state,))
    return replace(model, layers=(layer, *model.layers[1:]))


def setup_of(model: spec.Model, *, gpu: Gpu = H200, version: str = "0.33.0", gpus: int = 1, **fields: Any) -> Setup:
    return resolve(job_of(model, gpu=gpu, version=version, gpus=gpus, **fields))


def job_of(model: spec.Model, *, gpu: Gpu = H200, version: str = "0.33.0", gpus: int = 1, **fields: Any) -> ServingJob:
    fields.setdefault("parallel", ServingParallel(tensor_parallel_size=gpus))
    machine = Machine(gpu=gpu, gpus_per_node=gpus)
    return ServingJob(model=model, machine=machine, engine="vllm", engine_version=version, **fields)


# ------------------------------------------------------------------------------------------------- the second runner

QWEN3 = dense(architecture="Qwen3ForCausalLM")
AWQ_QWEN3 = replace(QWEN3, quantization=named_quantization("awq_int4", QWEN3))


@pytest.mark.parametrize(
    ("model", "version", "second"),
    [
        (QWEN3, "0.21.0", False),
        (QWEN3, "0.22.1", True),
        (AWQ_QWEN3, "0.23.0", False),
        (AWQ_QWEN3, "0.24.0", True),
        (dense(), "0.22.1", False),
        (dense(), "0.23.0", True),
        (dense(architecture="OlmoForCausalLM"), "0.24.0", False),
        (dense(architecture="OlmoForCausalLM"), "0.25.0", True),
        (experts(), "0.28.0", False),
        (experts(), "0.29.0", True),
        (hybrid(), "0.28.0", False),
        (hybrid(), "0.29.0", True),
    ],
)
def test_which_models_run_on_the_second_runner(model: spec.Model, version: str, second: bool) -> None:
    assert second_runner(setup_of(model, version=version)) is second


def test_what_the_second_runner_lacks_and_the_variable_decide() -> None:
    ngram = setup_of(dense(), version="0.29.0", speculative="ngram", num_speculative_tokens=3)
    asked = setup_of(experts(), version="0.27.0", flags=(("VLLM_USE_V2_MODEL_RUNNER", "1"),))
    refused = setup_of(dense(), flags=(("VLLM_USE_V2_MODEL_RUNNER", "0"),))
    assert not second_runner(ngram)
    assert second_runner(asked)
    assert not second_runner(refused)


def test_the_second_runner_draws_without_filtering() -> None:
    """Logits in bf16 are all it holds: 2 B; a float32 copy up to 0.25; gathered ones are copied once more."""
    each = {
        version: sampler_path(setup_of(dense(), version=version)).each for version in ("0.21.0", "0.25.0", "0.27.0")
    }
    assert each == {"0.21.0": 14, "0.25.0": 6, "0.27.0": 2}
    assert sampler_path(setup_of(dense(), gpus=2)).each == 5


def test_the_second_runner_estimates_graphs_from_0_29_on_and_then_all_of_them() -> None:
    none = setup_of(dense(), version="0.28.0")
    whole = setup_of(dense(), version="0.29.0")
    pair = setup_of(experts(), version="0.28.0")
    assert estimate(none, stages(none)[0]).bytes == 0
    assert estimate(pair, stages(pair)[0]).bytes > 0
    assert estimate(whole, stages(whole)[0]).bytes > cuda_graphs(whole, stages(whole)[0]).bytes


def test_the_printed_peak_holds_the_estimate_from_0_27_on() -> None:
    old, new = (start(job_of(experts(), version=version, max_num_seqs=8)) for version in ("0.26.0", "0.27.0"))
    assert old.figures["cuda_graph_estimate"].value == new.figures["cuda_graph_estimate"].value > 0
    held = new.figures["activation_peak"].value - old.figures["activation_peak"].value
    assert held == new.figures["cuda_graph_estimate"].value


# ------------------------------------------------------------------------------------------------------- samplers


@pytest.mark.parametrize(
    ("version", "name", "low", "high"),
    [
        ("0.10.1.1", "sort", 14, 38),
        ("0.10.1.1 (image vllm/vllm-openai)", "in_place", 14, 38),
        ("0.10.1.1+381074ae.nv25.09", "in_place", 14, 38),
        ("0.11.0 or later (image vllm/vllm-openai)", "sort", 14, 38),
        ("0.13.0", "sort", 38, 38),
        ("0.13.0 (image vllm/vllm-openai)", "sort", 38, 38),
        ("0.13.0+faa43dbf.nv26.01", "sort", 14, 38),
        ("0.17.0", "in_place", 14, 14),
    ],
)
def test_flashinfer_samples_where_a_version_finds_it(version: str, name: str, low: float, high: float) -> None:
    path = sampler_path(setup_of(experts(), version=version))
    assert (path.name, path.low, path.high) == (name, low, high)


def test_a_log_that_says_so_decides_the_sampler() -> None:
    said = setup_of(experts(), version="0.10.1.1", flags=(("sampler", "FlashInfer top-p & top-k"),))
    assert (sampler_path(said).each, sampler_path(said).high) == (14, 14)


def test_the_in_place_kernel_is_not_nvidias_alone() -> None:
    assert sampler_path(setup_of(experts(), gpu=MI300, version="0.16.0")).each == 38
    assert sampler_path(setup_of(experts(), gpu=MI300, version="0.17.0")).each == 14


# -------------------------------------------------------------------------------------------- attention's workspace


@pytest.mark.parametrize(
    ("gpu", "version", "cache", "flashinfer"),
    [
        (B300, "0.25.0", "auto", True),
        (B300, "0.11.0", "auto", False),
        (H200, "0.25.0", "fp8", False),
        (RTX5090, "0.25.0", "auto", False),
        (RTX5090, "0.25.0", "fp8", True),
        (RTX5090, "0.29.0", "nvfp4", True),
        (T4, "0.20.0", "auto", True),
        (T4, "0.25.0", "auto", False),
        (UNKNOWN, "0.25.0", "fp8", False),
        (MI300, "0.25.0", "fp8", False),
    ],
)
def test_where_flashinfer_attends(gpu: Gpu, version: str, cache: str, flashinfer: bool) -> None:
    assert uses_flashinfer(setup_of(dense(), gpu=gpu, version=version, kv_cache_dtype=cache)) is flashinfer


def test_the_workspace_grows_with_the_batch_as_a_published_table_says() -> None:
    """vllm-project/vllm#52872, RTX 5090: a graph pool of 0.89 GiB at 8,192 tokens, of 0.52 at 4,096 and below."""
    model, found = dense(layers=64, heads=24, dim=256), {}
    for tokens in (8192, 4096, 2048):
        setup = setup_of(
            model, gpu=RTX5090, version="0.28.0", kv_cache_dtype="fp8", max_num_batched_tokens=tokens, max_num_seqs=1
        )
        found[tokens] = workspace(setup, stages(setup)[0]).bytes
    assert found[2048] == found[4096] == 394 * MiB
    assert (found[8192] - found[4096]) / GiB == pytest.approx(0.89 - 0.52, abs=0.01)


def test_the_workspace_stands_in_the_estimate_if_a_whole_graph_is_captured() -> None:
    fields: dict[str, Any] = {"gpu": RTX5090, "version": "0.28.0", "kv_cache_dtype": "fp8", "max_num_seqs": 4}
    model = experts()
    plain = setup_of(model, **{**fields, "kv_cache_dtype": "auto"})
    held = setup_of(model, **fields)
    drafts = setup_of(model, **fields, speculative="eagle", num_speculative_tokens=2)
    assert estimate(held, stages(held)[0]).bytes - estimate(plain, stages(plain)[0]).bytes == 394 * MiB
    assert num_full(drafts, sizes(drafts)) == 0  # FlashInfer captures no drafts whole there, so none is built
    assert estimate(drafts, stages(drafts)[0]).bytes < 394 * MiB


def test_graphs_of_a_hybrid_are_logged_with_the_workspace_that_nothing_warmed_up() -> None:
    alone, mixed = (
        start(job_of(model, gpu=RTX5090, version="0.29.0", kv_cache_dtype="fp8", max_num_seqs=1))
        for model in (dense(), hybrid())
    )
    assert alone.figures["cuda_graphs"].value < 100 * MiB
    assert 394 * MiB < mixed.figures["cuda_graphs"].value < 500 * MiB


# ------------------------------------------------------------------------------------------------ unpacked matrices


def wide(method: str) -> spec.Model:
    model = dense(hidden=5120, heads=40, dim=128, inner=13824, layers=2)
    return replace(model, quantization=named_quantization(method, model))


@pytest.mark.parametrize(
    ("method", "gpu", "flags", "unpacked"),
    [
        ("awq_int4", A100, (), 0),
        ("awq_int4", A100, (("quantization", "awq"),), 2 * 13824),
        ("awq_int4", T4, (), 2 * 13824),
        ("awq_int4", MI300, (), 2 * 13824),
        ("gptq_int4", T4, (), 2 * 13824),
        ("gptq_int4", A100, (), 0),
        ("bnb_nf4", A100, (), 13824),
    ],
)
def test_a_forward_pass_holds_the_matrix_it_unpacks(
    method: str, gpu: Gpu, flags: tuple[tuple[str, str], ...], unpacked: int
) -> None:
    """Gate and up at once are 5,120 x 27,648 halves, 0.264 GiB, beside their input and output."""
    setup = setup_of(wide(method), gpu=gpu, version="0.14.0", max_num_batched_tokens=1024, flags=flags)
    hidden, inner = 1024 * 5120 * 2, 1024 * 13824 * 2
    expected = 3 * hidden + max(3 * inner, 2 * inner + 5120 * unpacked * 2 if unpacked else 0)
    assert forward_bytes(setup, stages(setup)[0])[0] == expected


def test_small_batches_are_multiplied_packed() -> None:
    setup = setup_of(wide("awq_int4"), gpu=T4, version="0.14.0", max_num_batched_tokens=255, max_num_seqs=8)
    assert forward_bytes(setup, stages(setup)[0])[0] == 255 * 2 * (3 * 5120 + 3 * 13824)


def test_modular_kernels_of_experts_have_two_wide_workspaces() -> None:
    old, new = (
        forward_bytes(setup, stages(setup)[0])[0]
        for setup in (
            setup_of(experts(), version=version, max_num_batched_tokens=2048) for version in ("0.13.0", "0.14.0")
        )
    )
    assert new - old == 2048 * 8 * (1024 - 768) * 2 - 2048 * 1024 * 2  # the second one wider, the result in the first


# ---------------------------------------------------------------------------------------------- outside torch, GB10


def test_nccl_behind_nvswitch_grows_with_the_ranks() -> None:
    """One neighbour in the ring, two in a tree of more than two, and multicast for more than two."""
    connection = 512 * 1024 + 4_915_200 + 4 * MiB
    found = {ranks: nvswitch_buffers(setup_of(dense(), gpus=ranks)) for ranks in (2, 4, 8)}
    assert found == {
        2: 24 * 2 * connection,
        4: 24 * 3 * connection + 128 * MiB,
        8: 24 * 3 * connection + 256 * MiB,
    }


@pytest.mark.parametrize(
    ("gpu", "version", "gpus", "logged"),
    [(H200, "0.10.2", 1, 0.07), (H200, "0.10.2", 2, 1.38), (B300, "0.26.0", 1, 0.25), (B300, "0.26.0", 4, 0.95)],
)
def test_non_torch_memory_of_published_starts(gpu: Gpu, version: str, gpus: int, logged: float) -> None:
    """Start logs in public repositories ("GiB for non-torch memory"), on H100 and H200 of 2025, B300 of 2026."""
    term = total("non_torch", non_torch_parts(setup_of(dense(), gpu=gpu, version=version, gpus=gpus)))
    assert term.bytes / GiB == pytest.approx(logged, rel=0.15)
    assert term.low_bytes / GiB <= logged <= term.high_bytes / GiB


def test_boxes_of_one_gpu_talk_over_a_network() -> None:
    boxes, cards = (setup_of(dense(), gpu=gpu, gpus=2) for gpu in (GB10, RTX5090))
    assert nccl_in_use(boxes).bytes > 8 * nccl_in_use(cards).bytes


@pytest.mark.parametrize("version", ["0.13.0", "0.29.0", "0.33.0"])
def test_gb10_has_the_small_defaults(version: str) -> None:
    """NVML says no memory there; its logs print max_num_batched_tokens=2048 and capture 35 whole graphs."""
    setup = setup_of(dense(), gpu=GB10, version=version)
    assert (setup.tokens, setup.rows) == (2048, 256)
    assert num_full(setup, sizes(setup)) == 35


def test_a_published_start_on_gb10() -> None:
    """Qwen3-0.6B, 0.27.1, 0.60 of 121.69 GiB: 69.4 GiB of KV cache (3.35 consumed, host processes included)."""
    model = dense(layers=28, hidden=1024, heads=16, dim=128, inner=3072, architecture="Qwen3ForCausalLM")
    model = replace(model, vocab_size=151_936, tied_embeddings=True)
    found = start(job_of(model, gpu=GB10, version="0.27.1", memory_fraction=0.6)).figures["kv_cache"]
    assert found.value / GiB == pytest.approx(69.4, rel=0.01)
    assert found.low / GiB < 69.4 < found.high / GiB


# ------------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(("text", "number"), [("2026", "0.24.0"), ("2026-08", "0.27.0"), ("2026-08-31", "0.28.0")])
def test_a_year_or_month_is_read_as_its_middle(text: str, number: str) -> None:
    assert read_version(text).number == number


def test_the_peak_of_a_wide_vocabulary_shrinks_with_each_way_of_sampling() -> None:
    peaks = [
        activation_peak(setup, stages(setup)[0]).bytes
        for setup in (
            setup_of(dense(), version=version, max_num_batched_tokens=1024)
            for version in ("0.13.0", "0.21.0", "0.29.0")
        )
    ]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] - peaks[1] == 1024 * 128_000 * (38 - 14)


# --------------------------------------------------------------------------------------------------------- states


def gated(layers: int = 4) -> spec.Model:
    """Three gated delta nets to an attention layer, as Qwen3-Next and later."""
    model = dense(layers=layers, architecture="Qwen3NextForCausalLM")
    state = spec.GatedDeltaNet(num_k_heads=16, num_v_heads=32, k_head_dim=128, v_head_dim=128, conv_kernel=4)
    mixed = [replace(layer, mixers=(state,)) for layer in model.layers[:-1]]
    return replace(model, layers=(*mixed, model.layers[-1]))


@pytest.mark.parametrize(
    ("version", "gpu", "flags", "states"),
    [
        ("0.25.0", H200, (), 1),
        ("0.25.0", H200, (("enable_prefix_caching", "true"),), 2),
        ("0.26.0", H200, (), 2),
        ("0.26.0", H200, (("enable_prefix_caching", "false"),), 1),
        ("0.33.0", H200, (), 3),
        ("0.33.0", A100, (), 2),
    ],
)
def test_hybrids_cache_prefixes_by_default_from_0_26_on(
    version: str, gpu: Gpu, flags: tuple[tuple[str, str], ...], states: int
) -> None:
    groups = grouping(setup_of(gated(), gpu=gpu, version=version, flags=flags)).groups
    assert {group.spec.states for group in groups if group.spec.kind == "state"} == {states}


def test_two_states_a_group_are_what_a_log_of_a_hybrid_counts() -> None:
    """vllm-project/vllm#57475: 62 blocks make 1.2157 requests of 124,000 tokens: 45 blocks and 3 groups of 2 states."""
    model = dense(layers=64, hidden=5120, heads=24, dim=256, architecture="Qwen3_5ForConditionalGeneration")
    state = spec.GatedDeltaNet(num_k_heads=16, num_v_heads=48, k_head_dim=128, v_head_dim=128, conv_kernel=4)
    attention = spec.Attention(num_heads=24, num_kv_heads=4, head_dim=256)
    layers = [
        replace(layer, mixers=(attention if index % 4 == 3 else state,)) for index, layer in enumerate(model.layers)
    ]
    fields: dict[str, Any] = {"gpu": RTX5090, "version": "0.29.0", "kv_cache_dtype": "nvfp4", "max_model_len": 124_000}
    setup = setup_of(replace(model, layers=tuple(layers)), **fields, flags=(("mamba_ssm_cache_dtype", "float32"),))
    groups = grouping(setup)
    assert groups.block_tokens == 2784
    assert groups.request_blocks(124_000) == 45 + 3 * 2


def test_largest_images_bound_the_peak_of_small_batches_too() -> None:
    """Qwen's processors make images of 16,384 tokens, which the encoder's budget holds whatever the batch is."""
    shapes = [("patch.weight", (1152, 3, 2, 16, 16)), ("fc1.weight", (4304, 1152))]
    tensors = tuple(spec.ExtraTensor(name=name, shape=shape) for name, shape in shapes)
    tower = spec.Tower(name="vision", tensors=tensors, num_layers=27, hidden_size=1152, num_heads=16)
    model = dense(hidden=5120, rotary_sections=True, towers=(tower,), max_position_embeddings=262_144)
    setup = setup_of(model, gpu=RTX5090, version="0.25.0", max_num_batched_tokens=2048, max_num_seqs=1)
    high = activation_peak(setup, stages(setup)[0]).high_bytes
    assert 1.7 * GiB < high < 3 * GiB  # 1.7 GiB published for a 27B
    alone = setup_of(
        model,
        gpu=RTX5090,
        version="0.25.0",
        max_num_batched_tokens=2048,
        max_num_seqs=1,
        flags=(("language_model_only", "true"),),
    )
    assert activation_peak(alone, stages(alone)[0]).high_bytes < GiB


@pytest.mark.parametrize(("share", "starts"), [(0.8, True), (0.85, True), (0.92, False), (0.95, False)])
def test_a_shared_memory_is_never_all_free(share, starts):
    """On GB10 0.85 starts and the default 0.92 does not: the system holds its part before the engine asks."""
    from ullage.fitting import fit_serving
    from ullage.read.machine import parse_machine
    from ullage.read.model_source import load_model
    from ullage.request import serving_job

    asked = serving_job(load_model("qwen3-8b"), parse_machine("1xGB10"), engine="vllm", memory_fraction=share)
    result = fit_serving(asked, context=4096, reserve="0", advise=False, calibrated=False)
    assert result.engine.starts == starts
    assert starts or result.verdict != "fits"
    assert result.ledger.find("system_in_use") is not None
    stated = fit_serving(
        replace(asked, device_free_bytes=result.job.machine.gpu.total_bytes), context=4096, reserve="0", advise=False
    )
    assert stated.ledger.find("system_in_use") is None


def test_less_is_advised_where_more_is_asked_for_than_is_free():
    from ullage.fitting import fit_serving
    from ullage.read.machine import parse_machine
    from ullage.read.model_source import load_model
    from ullage.request import serving_job

    asked = serving_job(load_model("qwen3-8b"), parse_machine("1xH100"), engine="vllm", memory_fraction=0.995)
    result = fit_serving(asked, context=4096)
    assert result.verdict == "tight" and not result.engine.starts
    assert result.advice[0].typed == "--gpu-memory-utilization 0.95" and result.advice[0].verdict == "fits"
