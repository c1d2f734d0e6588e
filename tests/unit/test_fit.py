"""The verdict, the largest that fits, and the advice, with an engine whose arithmetic can be done by hand."""

import itertools
from dataclasses import replace

import fake_engine
import pytest

from ullage.advise import candidates, fit_line, launch_line
from ullage.engines.serving import Amount
from ullage.errors import InputError, LayoutError
from ullage.fitting import fit_serving, parse_reserve
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.request import default_parallel, requantised, serving_job
from ullage.spec.serving import ServingParallel
from ullage.units import GiB, MiB

VERDICTS = {"fits": 0, "tight": 1, "does_not_fit": 2}


def job(model="qwen3-8b", machine="1x80GiB", **settings):
    return serving_job(load_model(model), parse_machine(machine), engine="vllm@0.2.0", **settings)


def fit(asked, starter=fake_engine.start, **settings):
    return fit_serving(asked, starter=starter, **{"context": 4096, "advise": False, **settings})


def test_it_fits_with_room():
    result = fit(job())
    assert (result.verdict, result.exit_code) == ("fits", 0)


def test_the_pool_is_elastic_so_only_the_need_is_judged():
    result = fit(job(memory_fraction=0.99), reserve="20%")
    assert result.ledger.device_used.bytes > 0.9 * result.total_bytes.value
    assert result.verdict == "fits"


def test_the_need_is_what_is_asked_for():
    result = fit(job(), concurrency=10)
    asked = 10 * (MiB + 4096 * fake_engine.BYTES_PER_TOKEN)
    rest = sum(term.bytes for term in result.ledger.terms() if term.name != "kv_cache")
    assert result.need.kv_cache_bytes == asked
    assert result.need.value == rest + asked


def test_inside_the_reserve_is_tight():
    assert fit(job(), reserve="20%").verdict == "fits"
    result = fit(job(), reserve="85%")
    assert (result.verdict, result.exit_code) == ("tight", 4)
    assert "reserve" in result.reason


def test_more_requests_than_the_pool_holds_do_not_fit():
    most = int(fit(job()).max_concurrency.value)
    assert fit(job(), concurrency=most, reserve="0").verdict != "does_not_fit"
    result = fit(job(), concurrency=most + 1, reserve="0")
    assert (result.verdict, result.exit_code) == ("does_not_fit", 3)


def test_between_the_ends_of_the_range_is_tight():
    result = fit(job(), reserve="0")
    low, most = int(result.max_concurrency.low), int(result.max_concurrency.value)
    assert low < most
    assert fit(job(), concurrency=low, reserve="0").verdict == "fits"
    assert fit(job(), concurrency=most, reserve="0").verdict == "tight"


def test_an_engine_that_does_not_start_does_not_fit():
    result = fit(job(model="deepseek-v3", machine="8x80GiB"))
    assert result.verdict == "does_not_fit"
    assert result.reason == "no memory is left for the KV cache"
    assert result.max_context == 0
    assert result.max_concurrency.value == 0


@pytest.mark.parametrize("starts", [True, False])
def test_a_doubtful_start_is_tight(starts):
    def doubtful(asked):
        return replace(fake_engine.start(asked), starts=starts, doubt="half a GiB decides")

    result = fit(job(), starter=doubtful)
    assert (result.verdict, result.reason) == ("tight", "half a GiB decides")


def test_a_load_peak_beyond_the_device_does_not_fit():
    def heavy_load(asked):
        return replace(fake_engine.start(asked), load_peak_bytes=81 * GiB)

    assert fit(job(), starter=heavy_load).verdict == "does_not_fit"


def test_the_largest_context_is_the_largest():
    result = fit(job(), concurrency=20, context=1024)
    cost = result.engine.kv.bytes_of_request
    assert 20 * cost(result.max_context) <= result.pool.value
    assert result.max_context == 40960 or 20 * cost(result.max_context + 1) > result.pool.value


def test_the_curve_falls_and_agrees_with_the_pool():
    result = fit(job(max_model_len=32768), context=32768)
    points = result.curve
    assert [point.context for point in points] == sorted({point.context for point in points})
    assert all(a.concurrency >= b.concurrency for a, b in itertools.pairwise(points))
    for point in points:
        assert point.concurrency * result.engine.kv.bytes_of_request(point.context) <= result.pool.value


def test_requests_spread_over_data_parallel_replicas():
    single = fit(job(machine="2x80GiB", parallel=ServingParallel()))
    double = fit(job(machine="2x80GiB", parallel=ServingParallel(data_parallel_size=2)))
    assert double.max_concurrency.value == 2 * single.max_concurrency.value
    assert fit(
        job(machine="2x80GiB", parallel=ServingParallel(data_parallel_size=2)), concurrency=3
    ).need.kv_cache_bytes == (2 * single.need.kv_cache_bytes)


def test_more_memory_never_makes_it_worse():
    order = [
        VERDICTS[fit(job(machine=f"1x{size}GiB"), concurrency=8).verdict]
        for size in (12, 16, 18, 20, 22, 24, 28, 32, 48, 80)
    ]
    assert order == sorted(order, reverse=True)
    assert {order[0], order[-1]} == {2, 0}


def test_more_concurrency_than_the_engine_runs_raises_the_limit_and_says_so():
    result = fit(job(), concurrency=300)
    assert result.job.max_num_seqs == 300
    assert any("max_num_seqs" in sentence for sentence in result.job.assumed)


# ----------------------------------------------------------------------------------------------------- default layouts


@pytest.mark.parametrize(
    ("model", "machine", "tensor", "pipeline"),
    [
        ("deepseek-v3", "8xH200", 8, 1),
        ("deepseek-v3", "2x8xH20", 8, 2),
        ("qwen2.5-7b", "8xA100", 7, 1),
        ("qwen3-8b", "6xA100", 4, 1),
    ],
)
def test_the_layout_taken_when_none_is_given(model, machine, tensor, pipeline):
    parallel, said = default_parallel(load_model(model), parse_machine(machine))
    assert (parallel.tensor_parallel_size, parallel.pipeline_parallel_size) == (tensor, pipeline)
    assert said and "tensor parallel" in said[0]


def test_a_layout_larger_than_the_machine_is_refused():
    with pytest.raises(LayoutError, match="16 GPUs"):
        job(machine="8xH200", parallel=ServingParallel(tensor_parallel_size=16))


# --------------------------------------------------------------------------------------------------------------- input


@pytest.mark.parametrize(("text", "size"), [("20%", 20), ("0", 0), ("0%", 0), ("12.5%", 12)])
def test_reserves(text, size):
    assert parse_reserve(text, 100) == size
    assert parse_reserve("8GiB", 100) == 8 * GiB


@pytest.mark.parametrize("text", ["", "much", "-5%", "100%", "nan%", "8 bananas"])
def test_wrong_reserves(text):
    with pytest.raises(InputError, match="reserve"):
        parse_reserve(text, 100)


@pytest.mark.parametrize("settings", [{"context": 0}, {"concurrency": 0}, {"context": 2**40}, {"concurrency": -1}])
def test_wrong_questions(settings):
    with pytest.raises(InputError):
        fit(job(), **settings)


# -------------------------------------------------------------------------------------------------------------- advice


def test_advice_mends_the_verdict_cheapest_first():
    result = fit(job(machine="1x24GiB"), concurrency=64, context=4096, advise=True)
    assert result.verdict == "does_not_fit"
    ranks = [VERDICTS[item.verdict] for item in result.advice]
    assert ranks == sorted(ranks)
    assert ranks[0] < 2
    assert all(item.gain_bytes > 0 and item.cost for item in result.advice)


def test_the_flags_of_an_advice_do_what_it_says():
    result = fit(job(machine="1x24GiB"), concurrency=32, context=4096, advise=True)
    for change in candidates(result):
        again = fit(change.job, concurrency=change.concurrency or 32, context=change.context or 4096)
        named = [item for item in result.advice if item.change == change.change]
        assert all(item.verdict == again.verdict for item in named)


def test_advice_only_names_what_applies():
    dense = fit(job(kv_cache_dtype="fp8", memory_fraction=0.95, max_num_batched_tokens=2048), advise=True)
    changes = " ".join(change.change for change in candidates(dense))
    assert "FP8" not in changes.replace("weights in FP8", "")
    assert "95 %" not in changes
    assert "data-parallel" not in changes
    latent = fit(job(model="deepseek-v3", machine="8xH200"), advise=False)
    assert any("data-parallel" in change.change for change in candidates(latent))


def test_the_next_command_is_the_launch_line_when_it_fits():
    result = fit(job(machine="2x80GiB", kv_cache_dtype="fp8"), advise=True)
    assert result.next_command.startswith("vllm serve Qwen/Qwen3-8B --max-model-len 4096 --tensor-parallel-size 2")
    assert "--kv-cache-dtype fp8" in result.next_command


def test_an_infinite_pool_is_not_a_crash():
    def stateless(asked):
        engine = fake_engine.start(asked)
        return replace(engine, kv=replace(engine.kv, bytes_of_request=lambda length: 0))

    result = fit(job(), starter=stateless)
    assert result.max_concurrency.value == float("inf")
    assert result.verdict == "fits"


def test_amounts_of_the_device_come_from_the_job_when_stated():
    result = fit(job(device_total_bytes=20 * GiB))
    assert result.total_bytes == Amount(value=20 * GiB, low=20 * GiB, high=20 * GiB)


def as_asked(model, name, engine="vllm"):
    return requantised(replace(job(model=model), quantization=name, engine=engine))


@pytest.mark.parametrize(
    ("model", "name", "left", "method"),
    [
        ("deepseek-v3", "fp8", None, "fp8"),  # what the checkpoint is
        ("nvidia/DeepSeek-V3.1-NVFP4", "modelopt_fp4", None, "modelopt"),  # the engine's word for what it is
        ("deepseek-v3", "awq", "awq", "awq_int4"),  # another release
        ("deepseek-v3", "w4afp8", "w4afp8", "w4afp8"),
        ("qwen3-8b", "awq", "awq", "awq_int4"),  # engines cannot make it
        ("qwen3-8b", "fp8", "fp8", None),  # engines make it while they load
    ],
)
def test_a_quantisation_that_is_asked_for_is_counted_or_refused_never_passed_over(model, name, left, method):
    found = as_asked(model, name)
    held = found.model.quantization
    assert (found.quantization, held.method if held else None) == (left, method)
    assert any("release" in said for said in found.model.assumed) == (left is not None and method is not None)


def test_gguf_types_need_no_prefix_for_llama_cpp():
    assert as_asked("qwen3-8b", "Q4_K_M", engine="llamacpp").quantization == "gguf:Q4_K_M"
    with pytest.raises(InputError, match="Q4_K_M"):
        as_asked("qwen3-8b", "int4", engine="llamacpp")
    with pytest.raises(InputError, match="awq_int4"):
        as_asked("qwen3-8b", "fp3")
    with pytest.raises(InputError, match="llamacpp"):
        as_asked("deepseek-v3", "gguf:Q4_K_M")


@pytest.mark.parametrize(
    ("model", "name", "words"),
    [
        ("deepseek-v3", "awq", "vllm serve 'deepseek-ai/DeepSeek-V3 in awq'"),
        ("qwen3-8b", "nf4", "--quantization bitsandbytes"),
        ("qwen3-8b", None, "vllm serve Qwen/Qwen3-8B "),
    ],
)
def test_the_launch_line_names_a_release_or_what_the_engine_makes(model, name, words):
    asked = as_asked(model, name)
    result = fit(asked, advise=False)
    assert words in launch_line(result)
    assert (f"--quantization {name}" in fit_line(result)) == (name is not None)


@pytest.mark.parametrize("text", ["8", "20", "0.5"])
def test_a_reserve_without_a_unit_is_no_reserve(text):
    """Eight bytes, eight per cent or eight GiB?"""
    with pytest.raises(InputError, match="20% or 8GiB"):
        parse_reserve(text, 100 * GiB)


def test_a_reserve_that_no_job_could_leave_is_refused():
    with pytest.raises(InputError, match="leaves nothing"):
        fit_serving(job(), reserve="500GiB", starter=fake_engine.start)


def test_sglang_that_starts_with_a_smaller_pool_is_tight_unless_the_length_was_asked_for():
    split = ServingParallel(tensor_parallel_size=8, data_parallel_size=8, dp_attention=True)
    asked = serving_job(load_model("deepseek-v3.2"), parse_machine("8xH200"), engine="sglang@0.5.23", parallel=split)
    found = fit_serving(asked, advise=False)
    assert found.engine.starts and found.verdict == "tight"
    assert f"{found.max_context:,} tokens of a request" in found.reason
    assert fit_serving(asked, context=found.context, advise=False).verdict == "does_not_fit"
    assert fit_serving(asked, context=found.max_context, advise=False).verdict != "does_not_fit"
