"""SGLang's start arithmetic, against its own worked defaults, published logs and figures worked out by hand."""

from __future__ import annotations

import time
from dataclasses import replace
from fractions import Fraction

import pytest

from ullage.catalog import load
from ullage.engines.sglang import VERSIONS, start
from ullage.engines.sglang.defaults import settings_of
from ullage.engines.sglang.segments import reserved_bytes
from ullage.engines.sglang.versions import resolve, version_key
from ullage.errors import InputError, LayoutError
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.spec.serving import ServingJob, ServingParallel
from ullage.units import GiB, MiB


def job(model: str, machine: str, version: str = "0.5.23", *, tp: int = 1, dp_attention: int = 1, **rest) -> ServingJob:
    parallel = ServingParallel(tensor_parallel_size=tp, data_parallel_size=dp_attention, dp_attention=dp_attention > 1)
    parallel = replace(parallel, **rest.pop("parallel", {}))
    return ServingJob(
        model=load_model(model),
        machine=parse_machine(machine),
        engine="sglang",
        engine_version=version,
        parallel=parallel,
        **rest,
    )


# ------------------------------------------------------------------------------------------------------------ versions


def test_versions_sort_as_they_were_released() -> None:
    keys = [version_key(version) for version in VERSIONS]
    assert None not in keys
    assert keys == sorted(keys)
    assert version_key("0.5.0rc0") < version_key("0.5.0") < version_key("0.5.0.post1") < version_key("0.5.1")
    assert version_key("0.5.12-cu129") == version_key("0.5.12")
    assert version_key("0.4.x") is None


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("2025-05", "0.4.6.post4"),
        ("0.4.x, 2025-02-04", "0.4.1.post7"),
        ("0.4.x, 2025-03-08", "0.4.3.post4"),
        ("2025-08-08", "0.5.0rc0"),
        ("main before PR 11309, 2025-10-07", "0.5.3"),
        ("PR 11309, 2025-10-07", "0.5.4"),
        ("", VERSIONS[-1]),
    ],
)
def test_a_date_stands_for_the_release_of_its_time(text: str, version: str) -> None:
    release = resolve(text)
    assert release.version == version
    assert version in release.assumed


def test_an_unknown_newer_version_says_so_and_nonsense_is_refused() -> None:
    assert "newer" in resolve("0.9.0").assumed
    assert resolve("0.5.4").assumed == ""
    with pytest.raises(InputError, match="not an SGLang version"):
        resolve("banana")


def test_every_catalog_entry_has_unit_source_and_date() -> None:
    catalog = load("engines/sglang.json")
    for entry in [*catalog["defaults"], *catalog["runtime"]]:
        assert entry["unit"] and entry["source"], entry
        assert len(entry["date"]) == 10, entry
    for entry in catalog["runtime"]:
        assert entry["low"] <= entry["value"] <= entry["high"]
    assert catalog["flags"]["source"] and catalog["flags"]["date"]


# ------------------------------------------------------------------------------------------------------------ defaults


@pytest.mark.parametrize(
    ("version", "machine", "tp", "dp", "fraction"),
    [
        # 512 + 1.5 x 8192 + 1024 + 2 x 512 + 1536 = 16384 of 143771 MiB.
        ("0.5.23", "8xH200", 8, 1, 0.886),
        # + 3 x 512 x 8 + 1.5 x 512 x 8 = 34816.
        ("0.5.23", "8xH200", 8, 8, 0.758),
        # no prefill graphs: 14848.
        ("0.5.3", "8xH200", 8, 1, 0.897),
        # (12 + 8 / 2) GiB kept.
        ("0.4.10", "8xH200", 8, 1, 0.886),
        # min(0.88 + 48 GiB x 0.12 / card, 1 - 18 GiB / card).
        ("0.4.6.post4", "8xH200", 8, 1, 1 - 18432 / 143771),
        ("0.4.3.post4", "8xH200", 8, 1, 0.81),
        ("0.4.3.post4", "1xRTX3090", 1, 1, 0.88),
    ],
)
def test_the_default_fraction_follows_the_release(
    version: str, machine: str, tp: int, dp: int, fraction: float
) -> None:
    settings = settings_of(job("deepseek-v3", machine, version, tp=tp, dp_attention=dp))
    assert settings.mem_fraction == pytest.approx(fraction, abs=1e-4)
    assert any("mem_fraction_static" in sentence for sentence in settings.assumed)


def test_chunk_graphs_and_page_follow_card_and_release() -> None:
    small = settings_of(job("Qwen/Qwen3-0.6B", "RTX5080", "2025-08-08"))
    assert (small.chunk, small.graph_sizes, small.page) == (2048, (1, 2, 4, 8), 1)
    assert small.mem_fraction == 0.818  # (2.8 + 1 / 10) GiB of 16303 MiB
    large = settings_of(job("deepseek-v3.2", "8xB200", "0.5.4", tp=8))
    assert (large.chunk, large.graph_max, large.page) == (16384, 512, 64)
    assert large.attention_dp == 8  # that release forces DP attention for sparse attention
    assert large.row_format == "fp8_ds_mla"
    assert settings_of(job("deepseek-v3.2", "8xH200", "0.5.12", tp=8)).row_format == "bfloat16"


def test_a_fraction_or_layout_that_cannot_be_is_refused() -> None:
    with pytest.raises(InputError, match="mem-fraction-static"):
        start(job("deepseek-v3", "8xH200", tp=8, memory_fraction=1.5))
    with pytest.raises(LayoutError, match="DP attention"):
        start(job("deepseek-v3", "8xH200", tp=8, dp_attention=3))
    with pytest.raises(LayoutError, match="expert"):
        start(job("deepseek-v3", "8xH200", tp=8, parallel={"expert_parallel_size": 3}))
    with pytest.raises(InputError, match="cache format"):
        start(job("deepseek-v3", "8xH200", tp=8, kv_cache_dtype="fp9"))


# ---------------------------------------------------------------------------------------------------------- the pools


def test_sparse_attention_before_and_after_its_indexer_was_counted() -> None:
    """sglang PR 11309, 8x B200: 1,462,784 tokens at 0.8 (65.49 GB real), 975,424 with the automatic fraction."""
    before = start(job("deepseek-v3.2", "8xB200", "0.5.3", tp=8))
    after = start(job("deepseek-v3.2", "8xB200", "0.5.4", tp=8))
    assert before.kv_cache_tokens.value == pytest.approx(1_462_784, rel=0.01)
    assert before.kv_cache_bytes.value == pytest.approx(65.49 * GiB, rel=0.01)
    assert after.kv_cache_tokens.value == pytest.approx(975_424, rel=0.01)
    assert after.kv_cache_bytes.value == pytest.approx(43.67 * GiB, rel=0.01)
    assert before.kv.bytes_per_token == 61 * (656 + 132)
    assert any("slack" in warning for warning in before.warnings)


def test_large_scale_expert_parallel_prefill_of_deepseek_v3() -> None:
    """sglang issue 6017: 105.59 GB of weights with DeepEP, 32 redundant experts, whole dense layers and head."""
    flags = (("enable_deepep_moe", "true"), ("moe_dense_tp_size", "1"), ("enable_dp_lm_head", "true"))
    found = start(job("deepseek-v3", "8xH200", "0.4.6.post4", tp=8, dp_attention=8, flags=flags, redundant_experts=32))
    assert found.figures["weights"].value == pytest.approx(105.59 * GiB, rel=0.015)
    assert found.kv.bytes_per_token == 61 * 576 * 2


def test_dense_model_on_one_card_by_hand() -> None:
    """R1-Distill-Qwen-7B: 28 layers x 4 heads x 128 x 2 x 2 B = 57,344 B a token; rest = after - before x 0.12."""
    found = start(
        job(
            "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B", "RTX3090", "0.4.1.post7",
            max_num_batched_tokens=2048, memory_fraction=0.88,
        )
    )  # fmt: skip
    assert found.kv.bytes_per_token == 57_344
    before, after = (found.figures[f"available_{when}_weights"].value for when in ("before", "after"))
    assert found.kv_cache_tokens.value == int((after - before * 0.12) // 57_344)
    # Free memory after the pool: published log 1.68 GB with 0.12 x 22.76 GB kept.
    table = 2049 * (131072 + 4) * 4
    room = found.figures["available_after_pool"].value
    assert room < before * 0.12 - table
    assert room > before * 0.12 - table - 28 * 2 * 2 * MiB


def test_window_layers_have_a_smaller_pool_and_a_fixed_cost() -> None:
    """gpt-oss-20b: 12 full and 12 window layers of 8 heads x 64 x 2 x 2 B = 2048 B; the window holds 128 tokens."""
    found = start(job("gpt-oss-20b", "1xH100", "0.5.12"))
    assert found.kv.bytes_per_token == 12 * 2048
    assert found.kv.fixed_bytes_per_request == 12 * 2048 * 128
    assert found.kv.bytes_of_request(10_000) == 12 * 2048 * (10_000 + 128 + 1)
    plain = start(job("gpt-oss-20b", "1xH100", "0.5.12", flags=(("disable_hybrid_swa_memory", "true"),)))
    assert found.kv_cache_tokens.value / plain.kv_cache_tokens.value == pytest.approx(2 / 1.8, rel=0.01)


def test_recurrent_states_share_the_budget_by_the_ratio() -> None:
    found = start(job("Qwen/Qwen3-Next-80B-A3B-Instruct", "4xH100", "0.5.9", tp=4))
    # 36 layers: conv 3 x 8192 / 4 x 2 B and 8 heads x 128 x 128 x 4 B.
    assert found.kv.fixed_bytes_per_request == 36 * (3 * 2048 * 2 + 8 * 128 * 128 * 4)
    states = found.ranks[0].ledger.find("recurrent_states")
    cache = found.ranks[0].ledger.find("kv_cache")
    assert states is not None and cache is not None
    assert states.bytes / cache.bytes == pytest.approx(0.9, rel=0.02)


def test_v4_is_a_slope_and_a_fixed_part() -> None:
    found = start(job("deepseek-v4-flash", "4xH200", tp=4, memory_fraction=0.8))
    assert found.starts
    cost = found.kv
    assert cost.fixed_bytes_per_request > 0
    assert cost.bytes_of_request(2**20) < cost.fixed_bytes_per_request * 2 + 2**20 * cost.bytes_per_token
    # Two thirds of the compressed layers keep 584 / 4 + 132 / 4 B a token, page padding on top.
    layers = load_model("deepseek-v4-flash").layers
    ratios = [mixer.compress_ratio for layer in layers for mixer in layer.mixers]
    page, padded = 256, Fraction(65 * 576, 64)
    exact = ratios.count(4) * (padded + 132) / 4 + ratios.count(128) * Fraction(3 * 576, page)
    assert cost.bytes_per_token == -(-exact.numerator // exact.denominator)


def test_drafts_take_their_part_by_the_rule_of_the_release() -> None:
    for version in ("0.5.3", "0.5.12", "0.5.23"):
        plain = start(job("deepseek-v3", "8xH200", version, tp=8, memory_fraction=0.85))
        draft = start(job("deepseek-v3", "8xH200", version, tp=8, memory_fraction=0.85, speculative="mtp"))
        assert draft.ranks[0].ledger.find("draft_weights").bytes > GiB
        if version == "0.5.23":
            assert draft.kv_cache_tokens.value < plain.kv_cache_tokens.value
    in_cell = settings_of(job("deepseek-v3", "8xH200", "0.5.23", tp=8, speculative="mtp"))
    assert (in_cell.draft_tokens, in_cell.draft_steps) == (4, 3)


def test_pipeline_stages_take_the_smallest_pool() -> None:
    found = start(job("deepseek-v3", "16xH100", "0.5.12", tp=8, parallel={"pipeline_parallel_size": 2}))
    assert len(found.ranks) == 2
    assert sum(rank.num_ranks for rank in found.ranks) == 16
    formulas = {rank.ledger.find("kv_cache").formula.split()[0] for rank in found.ranks}
    assert len(formulas) == 1


# ------------------------------------------------------------------------------------------------------------- verdict


def test_what_does_not_start_is_said_in_the_engines_words() -> None:
    loading = start(job("deepseek-v3", "1xH200"))
    assert not loading.starts and "out of memory while loading" in loading.reason
    pool = start(job("deepseek-v3", "8xH200", tp=8, memory_fraction=0.3))
    assert not pool.starts and "Not enough memory. Please try to increase --mem-fraction-static" in pool.reason
    # The least fraction that the sentence names is the border.
    least = float(pool.reason.rsplit(" ", 1)[-1])
    assert start(job("deepseek-v3", "8xH200", tp=8, memory_fraction=least + 0.01)).kv_cache_tokens.value > 0
    assert start(job("deepseek-v3", "8xH200", tp=8, memory_fraction=least - 0.001)).kv_cache_tokens.value == 0
    graphs = start(job("deepseek-v3.2", "8xB200", "0.5.3", tp=8, max_model_len=163840))
    assert graphs.starts
    tight = start(job("Qwen/Qwen3-0.6B", "RTX5080", "0.5.0rc0", memory_fraction=0.999))
    assert not tight.starts and "--mem-fraction-static" in tight.reason


def test_lines_are_those_of_the_engine() -> None:
    found = start(job("deepseek-v3", "8xH200", "0.4.6.post4", tp=8))
    text = "\n".join(found.log_lines)
    for words in ("Load weight end. type=DeepseekV3ForCausalLM", "mem usage=", "KV size:", "max_total_num_tokens="):
        assert words in text
    dense = start(job("Qwen/Qwen3-0.6B", "RTX5080", "0.5.0rc0"))
    assert any("K size:" in line and "V size:" in line for line in dense.log_lines)


def test_ledger_and_figures_agree_and_ranges_hold() -> None:
    found = start(job("deepseek-v3", "8xH200", "0.5.23", tp=8))
    ledger = found.ranks[0].ledger
    assert ledger.find("kv_cache").bytes == found.kv_cache_bytes.value
    for amount in found.figures.values():
        assert amount.low <= amount.value <= amount.high
    assert ledger.device_used.bytes == pytest.approx(found.figures["device_used"].value, rel=0.001)
    assert found.job.memory_fraction == 0.886
    assert found.job.assumed


def test_offload_and_gpu_experts_lower_the_weights() -> None:
    whole = start(job("deepseek-v3", "8xH200", tp=8)).figures["weights"].value
    offload = start(job("deepseek-v3", "8xH200", tp=8, cpu_offload_bytes=10 * GiB)).figures["weights"].value
    assert whole - offload >= 10 * GiB
    few = start(job("deepseek-v3", "2xRTX4090", tp=2, flags=(("kt_num_gpu_experts", "2"),), max_model_len=8192))
    assert few.figures["weights"].value < 16 * GiB


# ------------------------------------------------------------------------------------------------------------ segments


def test_segments_of_the_caching_allocator() -> None:
    assert reserved_bytes([]) == 0
    assert reserved_bytes([10 * MiB + 1]) == 12 * MiB
    assert reserved_bytes([8 * MiB, 12 * MiB]) == 20 * MiB + 12 * MiB
    assert reserved_bytes([6 * MiB, 6 * MiB, 6 * MiB]) == 20 * MiB
    assert reserved_bytes([512 * 1024] * 5) == 2 * 2 * MiB


def test_a_start_is_fast() -> None:
    asked = job("deepseek-v3", "8xH200", tp=8)
    start(asked)
    begin = time.perf_counter()
    for _ in range(5):
        start(asked)
    assert (time.perf_counter() - begin) / 5 < 0.1  # about 8 ms; the bound leaves room for a busy machine
