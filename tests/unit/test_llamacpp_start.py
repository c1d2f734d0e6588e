"""The start of the llama.cpp family: placement, cache, figures, verdict and words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tests.unit.test_llamacpp_file import model
from ullage.engines.llamacpp.defaults import version_day
from ullage.engines.llamacpp.gguf_names import gguf_tensors
from ullage.engines.llamacpp.kv import caches, cell_bytes
from ullage.engines.llamacpp.placement import layer_devices, place
from ullage.engines.llamacpp.schedule import HOST
from ullage.engines.llamacpp.settings import Settings, resolve
from ullage.engines.serving import EngineStart, start
from ullage.errors import InputError, LayoutError
from ullage.spec.machine import Gpu, Machine
from ullage.spec.model import LatentAttention
from ullage.spec.serving import ServingJob
from ullage.units import GiB, MiB

V3_ATTENTION = LatentAttention(
    num_heads=128, q_lora_rank=1536, kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128
)


def job(num_gpus: int = 1, *, gpu_gib: int = 24, latent: bool = False, moe: bool = False, **more: Any) -> ServingJob:
    size = gpu_gib * GiB
    gpu = Gpu(name="card", total_bytes=size, total_low_bytes=size, total_high_bytes=size)
    fields: dict[str, Any] = {
        "engine": "ik_llama.cpp",
        "engine_version": "2025-06-08",
        "quantization": "gguf:Q4_K_M",
        "max_model_len": 4096,
    }
    return ServingJob(
        model=model(latent=latent, moe=moe), machine=Machine(gpu=gpu, gpus_per_node=num_gpus), **(fields | more)
    )


def settings(num_gpus: int = 1, **more: Any) -> Settings:
    return resolve(job(num_gpus, **more))


@pytest.mark.parametrize(
    ("engine", "version", "day"),
    [
        ("ik_llama.cpp", "build 3737 (58f08e43)", "2025-06-08"),
        ("llamacpp", "PR 11446, 2025-02", "2025-02-15"),
        ("llamacpp", "b5000", "2025-03-31"),
        ("ollama", "2024-07-24", "2024-07-24"),
    ],
)
def test_versions_are_builds_or_days(engine: str, version: str, day: str) -> None:
    assert version_day(engine, version) == (day, True)


def test_an_unknown_version_is_said_to_be_assumed() -> None:
    assert any("not understood" in sentence for sentence in settings(engine_version="main").assumed)


def test_layers_are_split_in_equal_shares_with_the_output_last() -> None:
    layers, output = layer_devices(48, replace(settings(2), n_gpu_layers=49), (GiB, GiB))
    assert [layers.count(0), layers.count(1)] == [25, 23]
    assert output == 1


def test_shares_follow_the_tensor_split() -> None:
    layers, _output = layer_devices(48, replace(settings(2, flags=(("ts", "3,1"),)), n_gpu_layers=49), (GiB, GiB))
    assert [layers.count(0), layers.count(1)] == [37, 11]


@pytest.mark.parametrize(
    ("engine", "version", "host", "output"),
    [("ik_llama.cpp", "2025-06-08", 6, HOST), ("llamacpp", "2025-06-08", 6, HOST), ("llamacpp", "b8179", 7, 0)],
)
def test_a_part_of_the_layers_is_offloaded_from_the_end(engine: str, version: str, host: int, output: int) -> None:
    resolved = settings(engine=engine, engine_version=version, flags=(("n_gpu_layers", "10"),))
    layers, where = layer_devices(16, resolved, (GiB,))
    assert layers.count(HOST) == host
    assert where == output


def test_the_first_override_that_hits_decides() -> None:
    resolved = settings(2, moe=True, flags=(("override_tensor", r"blk\.3\.ffn_.*exps=CUDA1"), ("ot", "exps=CPU")))
    tensors = gguf_tensors(model(moe=True))
    places = dict(zip((t.name for t in tensors), place(tensors, resolved, (GiB, GiB), 16).tensors, strict=True))
    assert places["blk.3.ffn_up_exps.weight"] == 1
    assert places["blk.4.ffn_up_exps.weight"] == HOST
    assert places["blk.4.attn_q.weight"] == 0
    assert places["token_embd.weight"] == HOST
    assert places["output.weight"] == 1


@pytest.mark.parametrize("value", ["exps", "exps=", "(=CPU", "exps=CUDA7"])
def test_an_override_that_cannot_be_is_refused(value: str) -> None:
    with pytest.raises(InputError):
        start(job(2, flags=(("override_tensor", value),)))


@pytest.mark.parametrize("flags", [(("tensor_split", "a,b"),), (("n_ctx", "many"),), (("main_gpu", "9"),)])
def test_values_that_cannot_be_read_are_refused(flags: tuple[tuple[str, str], ...]) -> None:
    with pytest.raises(InputError):
        start(job(2, flags=flags))


def test_negative_shares_are_refused() -> None:
    with pytest.raises(LayoutError):
        settings(2, flags=(("tensor_split", "-1,2"),))


def _cell(engine: str, version: str, *flags: tuple[str, str], kv: str = "f16") -> int:
    resolved = settings(latent=True, engine=engine, engine_version=version, kv_cache_dtype=kv, flags=flags)
    return cell_bytes(V3_ATTENTION, resolved)


def test_the_latent_cache_has_the_form_of_its_engine_and_day() -> None:
    # 61 layers of DeepSeek-V3 make 37,332 bytes per token in q8_0, and 4,997,120 with every head in f16
    assert _cell("ik_llama.cpp", "2025-06-08", ("mla", "3"), ("fa", "1"), kv="q8_0") * 61 == 37_332
    assert _cell("ollama", "2025-06-08") * 61 == 4_997_120
    assert _cell("llamacpp", "2025-06-08") == (576 + 512) * 2
    assert _cell("llamacpp", "2026-03-01") == 576 * 2
    assert _cell("ik_llama.cpp", "2025-06-08", ("mla", "1"), ("fa", "0")) == (576 + 512) * 2
    assert _cell("ik_llama.cpp", "2025-06-08", ("mla", "2"), ("fa", "0")) == 576 * 2


def test_sequences_of_a_job_have_a_context_each() -> None:
    assert settings(max_model_len=4096, max_num_seqs=4).n_ctx == 16_384
    assert settings(max_num_seqs=4, flags=(("n_ctx", "4096"),)).n_ctx == 4096
    assert start(job(max_model_len=4096, max_num_seqs=4)).max_concurrency.value == 4


def test_cells_are_padded_to_256_with_flash_attention() -> None:
    assert settings(max_model_len=4000, flags=(("fa", "1"),)).n_ctx == 4096
    assert [cache.num_cells for cache in caches(model(), settings(max_model_len=4000, flags=(("fa", "1"),)))] == [
        4096
    ] * 16


def _parts(result: EngineStart, rank: int) -> dict[str, int]:
    ledger = next(one.ledger for one in result.ranks if one.ledger.rank == rank)
    return {term.name: term.bytes for term in ledger.terms()}


def test_devices_together_hold_the_file_but_the_embedding() -> None:
    result = start(job(2))
    held = sum(_parts(result, rank)["weights"] for rank in (0, 1))
    assert result.host_load_peak_bytes == 32_000 * 1024 * 144 // 256
    assert sum(_parts(result, rank)["kv_cache"] for rank in (0, 1)) == 16 * 4096 * 2 * 2 * 64 * 2
    assert result.figures["weights"].value == _parts(result, 0)["weights"]
    assert held > result.host_load_peak_bytes


def test_logits_of_a_micro_batch_rule_the_compute_buffer() -> None:
    peak = start(job(flags=(("fa", "1"),))).figures["activation_peak"]
    logits = 32_000 * 512 * 4
    assert logits < peak.value < logits + 16 * MiB
    assert peak.low <= peak.value <= peak.high


def test_without_flash_attention_the_scores_do() -> None:
    peak = start(job(max_model_len=32_768, flags=(("fa", "0"),))).figures["activation_peak"]
    assert peak.value > 16 * 32_768 * 512 * 4


def test_the_host_alone_holds_everything_without_a_device() -> None:
    result = start(job(0))
    assert result.starts
    assert len(result.ranks) == 1
    assert "CPU buffer size" in result.log_lines[0]
    assert result.figures["weights"].value == result.host_load_peak_bytes


def test_a_small_card_does_not_hold_it_and_the_reason_names_the_device() -> None:
    result = start(job(gpu_gib=1, max_model_len=131_072, flags=(("fa", "1"),)))
    assert not result.starts
    assert "device 0" in result.reason


def test_log_lines_are_in_the_engines_words() -> None:
    old, new = start(job(2)).log_lines, start(job(2, engine="llamacpp", engine_version="b7000")).log_lines
    assert old[0].startswith("llm_load_tensors:      CUDA0 buffer size = ")
    assert any(line.startswith("llama_kv_cache_init:      CUDA1 KV buffer size = ") for line in old)
    assert new[0].startswith("load_tensors:      CUDA0 model buffer size = ")


def test_a_row_split_shares_the_matrices_and_keeps_the_cache_on_the_main_device() -> None:
    result = start(job(2, flags=(("split_mode", "row"),)))
    assert _parts(result, 1).get("kv_cache", 0) == 0
    assert _parts(result, 1)["weights"] > _parts(result, 0)["weights"] // 2


def test_host_layers_are_computed_on_the_device_with_matrices_and_cache_copied_over() -> None:
    flags = (("fa", "1"), ("n_gpu_layers", "8"))
    part = start(job(max_model_len=131_072, flags=flags)).figures["activation_peak"].value
    without = start(job(max_model_len=131_072, flags=(*flags, ("no_op_offload", "1")))).figures["activation_peak"].value
    cache_of_a_layer = 131_072 * 2 * 2 * 64 * 2
    assert part - without >= cache_of_a_layer


def test_host_experts_are_copied_unless_repacking_hides_them_from_the_device() -> None:
    flags = (("fa", "1"), ("override_tensor", "exps=CPU"), ("n_ubatch", "64"), ("fmoe", "1"))
    up_and_gate = 2 * 64 * 512 * 1024 * 144 // 256
    copied = start(job(moe=True, flags=flags)).figures["activation_peak"].value
    hidden = start(job(moe=True, flags=(*flags, ("run_time_repack", "1")))).figures["activation_peak"].value
    assert copied > up_and_gate > hidden
