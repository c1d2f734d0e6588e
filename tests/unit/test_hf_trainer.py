"""One step of the Trainer family, against published bytes and against what must hold for any job."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ullage.catalog import models as catalog
from ullage.engines.hf_trainer.defaults import resolve, transformers_version
from ullage.engines.training import TrainingRank, step
from ullage.errors import InputError
from ullage.ledger import Ledger
from ullage.read.machine import parse_machine
from ullage.spec.model import Model
from ullage.spec.training import Lora, Precision, Recompute, TrainingJob, TrainingParallel
from ullage.units import GiB

VERSIONS = "torch 2.4.1, transformers {}, accelerate 1.0.1, peft 0.13.2"
ADAPTED = Precision(compute="bfloat16", params="bfloat16", grads="float32", moments="float32")
ALL_BF16 = Precision(moments="bfloat16")


def model(name: str) -> Model:
    found = catalog.find(name)
    assert found is not None
    return catalog.load_entry(found)


def lora_job(name: str = "mistralai/Mistral-7B-v0.1", **settings: object) -> TrainingJob:
    """The fine-tuning jobs of foundation-model-stack/fms-acceleration:scripts/benchmarks/refs."""
    job = TrainingJob(
        model=model(name),
        machine=parse_machine("1xA100-80GB-SXM"),
        engine="hf_trainer",
        engine_version=VERSIONS.format("4.48.1"),
        precision=ADAPTED,
        optimizer="adamw",
        micro_batch_size=4,
        seq_len=4096,
        packing=True,
        recompute=Recompute(kind="full"),
        attention="flash",
        loss="plain",
        method="lora",
        lora=Lora(rank=16, targets=("q_proj", "k_proj", "v_proj", "o_proj"), dropout=0.1),
    )
    return replace(job, **settings)  # type: ignore[arg-type]


def full_job(**settings: object) -> TrainingJob:
    job = lora_job(method="full", lora=None, precision=ALL_BF16)
    return replace(job, **settings)  # type: ignore[arg-type]


def rank(job: TrainingJob) -> TrainingRank:
    (found,) = step(job).ranks
    return found


def peak(job: TrainingJob) -> int:
    return max(moment.allocated.bytes for moment in rank(job).moments)


def moment(job: TrainingJob, name: str) -> Ledger:
    return next(ledger for ledger in rank(job).moments if ledger.moment == name)


FUSED = (("fused_kernels", "rms_norm,rope"),)
LLAMA = "meta-llama/Meta-Llama-3-8B"
#: Published peaks: scripts/benchmarks/refs/a100_80gb.csv and a100_80gb_liger.csv (torch's allocated bytes, rank 0).
PUBLISHED = [
    (lora_job(), 24.8706),
    (lora_job(micro_batch_size=8), 36.0821),
    (lora_job(loss="fused", flags=FUSED), 22.7926),
    (lora_job(LLAMA, loss="fused", flags=FUSED, engine_version=VERSIONS.format("4.45.2")), 35.0587),
    (lora_job(LLAMA, loss="liger", flags=FUSED, engine_version=VERSIONS.format("4.45.2")), 23.1955),
    (lora_job(loss="liger", flags=FUSED, engine_version=VERSIONS.format("4.45.2")), 21.9142),
]


def sharded(ranks: int, **settings: object) -> TrainingJob:
    """The same jobs on several GPUs: scripts/benchmarks/refs/a100_80gb_liger.csv."""
    job = lora_job(LLAMA, loss="liger", flags=FUSED, engine_version=VERSIONS.format("4.45.2"), **settings)
    parallel = TrainingParallel(data_parallel_size=ranks, fsdp="full_shard")
    return replace(job, machine=parse_machine(f"{ranks}xA100-80GB-SXM"), parallel=parallel)


PUBLISHED += [
    (sharded(2), 21.7778),
    (sharded(2, micro_batch_size=16), 57.2285),
    (sharded(4, micro_batch_size=8), 29.8059),
]


@pytest.mark.parametrize(("job", "gib"), PUBLISHED)
def test_published_peaks(job: TrainingJob, gib: float) -> None:
    assert peak(job) / GiB == pytest.approx(gib, rel=0.005)
    ledger = max(rank(job).moments, key=lambda one: one.allocated.bytes)
    assert ledger.allocated.low_bytes <= gib * GiB <= ledger.allocated.high_bytes


def test_published_bytes_between_steps() -> None:
    """13.6574 GiB: base in bfloat16, adapters and two moments in fp32, two cuBLAS workspaces."""
    assert rank(lora_job()).after_step.allocated.bytes / GiB == pytest.approx(13.6574, rel=2e-4)
    qlora = lora_job(LLAMA, method="qlora", base_quantization="nf4", loss="liger", flags=FUSED)
    assert rank(qlora).after_step.allocated.bytes / GiB == pytest.approx(5.48, rel=2e-3)


def test_the_optimizer_step_holds_five_copies_with_foreach_and_four_with_fused() -> None:
    copies = {"foreach": 5, "fused": 4}
    parameters = 7_241_732_096
    for impl, count in copies.items():
        ledger = moment(full_job(optimizer_impl=impl), "optimizer step")
        assert ledger.allocated.bytes == pytest.approx(count * 2 * parameters, rel=0.002)


def test_the_first_step_has_no_optimizer_states_before_its_own_step() -> None:
    first, later = (moment(full_job(), name) for name in ("first step: loss", "loss"))
    states = later.find("optimizer")
    assert states is not None and first.find("optimizer") is None
    assert later.allocated.bytes - first.allocated.bytes == states.bytes
    names = [one.moment for one in rank(full_job()).moments]
    walked = ["loss", "backward", "embedding backward"]
    assert names == [*(f"first step: {name}" for name in walked), *walked, "optimizer step"]


@pytest.mark.parametrize(
    "larger",
    [{"micro_batch_size": 8}, {"seq_len": 8192}, {"recompute": Recompute()}, {"attention": "eager"}],
    ids=lambda settings: next(iter(settings)),
)
def test_more_work_is_never_less_memory(larger: dict[str, object]) -> None:
    for job in (lora_job(), full_job(), lora_job(loss="liger")):
        assert peak(replace(job, **larger)) >= peak(job)  # type: ignore[arg-type]


def test_accumulating_keeps_all_gradients_through_the_backward() -> None:
    once, often = full_job(), full_job(grad_accum=4)
    assert moment(often, "loss").find("gradients").bytes == 2 * 7_241_732_096  # type: ignore[union-attr]
    assert moment(once, "loss").find("gradients") is None
    assert moment(often, "backward").allocated.bytes > moment(once, "backward").allocated.bytes


def test_versions_decide_where_logits_become_fp32() -> None:
    def loss(version: str) -> float:
        term = moment(lora_job(engine_version=VERSIONS.format(version)), "loss").find("loss")
        assert term is not None
        return term.bytes / (4 * 4096 * 32000)

    assert (loss("4.45.2"), loss("4.48.1"), loss("4.50.0")) == (12, 14, 12)
    assert transformers_version("torch 2.4.1, transformers 4.48.1, peft") == (4, 48)
    assert transformers_version("4.45.2") == (4, 45) and transformers_version("early 2024") is None


def test_defaults_are_said() -> None:
    job, recipe = resolve(lora_job(engine_version="", attention=None, loss=None, optimizer_impl=None))
    assert (job.attention, job.loss, job.optimizer_impl) == ("sdpa", "plain", "fused")
    assert len(job.assumed) == 4 and recipe.version == (5, 23)
    known, _recipe = resolve(lora_job(optimizer_impl="foreach"))
    assert not known.assumed


def test_a_prepared_base_trains_with_an_fp32_stream_and_the_range_says_so() -> None:
    plain = lora_job()
    prepared = replace(plain, method="qlora", base_quantization="nf4")
    kept = [moment(job, "loss").find("kept_activations") for job in (plain, prepared)]
    assert kept[0] is not None and kept[1] is not None
    embeddings = kept[0].bytes // 32  # the first of 32 checkpoints stays narrow
    assert kept[1].bytes == 2 * kept[0].bytes - embeddings and kept[1].low_bytes <= kept[0].bytes
    norms = moment(prepared, "loss").find("fp32_norms_and_biases")
    assert norms is not None and norms.bytes == 2 * (65 * 4096)


def test_ddp_adds_buckets_as_large_as_the_gradients() -> None:
    two = full_job(parallel=TrainingParallel(data_parallel_size=2), machine=parse_machine("2xA100-80GB-SXM"))
    assert peak(two) - peak(full_job()) == 2 * 7_241_732_096
    assert moment(two, "optimizer step").find("nccl") is not None


def test_fsdp_spreads_states_and_holds_the_inputs_of_frozen_layers() -> None:
    two, four = (rank(sharded(ranks)) for ranks in (2, 4))
    workspaces = two.after_step.find("cublas_workspaces")
    assert workspaces is not None and two.num_ranks == 2
    spread = [one.after_step.allocated.bytes - workspaces.bytes for one in (two, four)]
    assert spread[0] == pytest.approx(2 * spread[1], rel=1e-3)
    held = moment(sharded(2), "backward").find("held_input_gradients")
    assert held is not None and held.bytes == 30 * 2 * 4 * 4096 * 4096
    full = replace(sharded(2), method="full", lora=None, precision=ALL_BF16)
    assert moment(full, "backward").find("held_input_gradients") is None
    assert moment(full, "optimizer step").allocated.bytes == pytest.approx(5 * 8_030_261_248, rel=0.01)


def test_what_the_rules_do_not_cover_is_refused() -> None:
    parallel = TrainingParallel(data_parallel_size=2, fsdp="hybrid")
    with pytest.raises(InputError, match="do not follow FSDP's hybrid"):
        step(lora_job(parallel=parallel))
    with pytest.raises(InputError, match="under FSDP or ZeRO only"):
        step(lora_job(offload=(("params", "cpu"),)))
    with pytest.raises(InputError, match="unsloth do not follow a plain loss"):
        step(lora_job(engine_version="LLaMA-Factory with Unsloth"))
    with pytest.raises(InputError, match="unknown quantisation of a frozen base"):
        step(lora_job(base_quantization="int2"))
    with pytest.raises(InputError, match="selective"):
        step(lora_job(recompute=Recompute(kind="selective")))


def test_sparse_attention_is_said_to_be_counted_densely() -> None:
    sparse = full_job(model=model("deepseek-ai/DeepSeek-V3.2"), seq_len=512)
    assert any("indexer" in sentence for sentence in step(sparse).warnings)


def test_zero_is_deepspeeds_to_answer() -> None:
    parallel = TrainingParallel(data_parallel_size=4, zero_stage=3)
    job = full_job(parallel=parallel, machine=parse_machine("4xA100-80GB-SXM"))
    answer = step(job)
    assert answer.job.engine == "deepspeed" and answer.ranks
    quantised = replace(job, method="qlora", base_quantization="nf4", lora=Lora(rank=8, targets=("q_proj",)))
    assert step(quantised).job.engine == "hf_trainer"  # a quantised base is spread by the Trainer's own rules


def test_reserved_and_device_hold_what_is_allocated() -> None:
    for ledger in rank(lora_job()).moments:
        assert ledger.allocated.bytes <= ledger.reserved.bytes <= ledger.device_used.bytes
        assert ledger.device_used.bytes <= parse_machine("1xA100-80GB-SXM").gpu.total_bytes
    expandable = lora_job(alloc_conf="expandable_segments:True")
    assert moment(expandable, "loss").reserved_overhead.high_bytes < moment(lora_job(), "loss").reserved_overhead.bytes


@pytest.mark.parametrize("engine", ["hf_trainer", "fsdp2", "deepspeed"])
def test_recurrent_layers_are_said_to_run_by_their_packages(engine: str) -> None:
    parallel = TrainingParallel(data_parallel_size=8, fsdp="full_shard" if engine == "fsdp2" else None)
    hybrid = model("Qwen/Qwen3-Next-80B-A3B-Instruct")
    job = full_job(model=hybrid, engine=engine, parallel=parallel, machine=parse_machine("8xH200"), loss="plain")
    job = replace(job, engine_version="", seq_len=512)
    answer = step(job)
    assert sum("flash-linear-attention" in sentence for sentence in answer.job.assumed) == 1
    asked = replace(job, flags=(("recurrent_kernels", "packages"),))
    assert not any("flash-linear-attention" in sentence for sentence in step(asked).job.assumed)
    plain = step(full_job(engine_version="", seq_len=512))
    assert not any("flash-linear-attention" in sentence for sentence in plain.job.assumed)


def test_recurrent_layers_without_kernels_need_more() -> None:
    hybrid = model("Qwen/Qwen3-Next-80B-A3B-Instruct")
    one = full_job(model=hybrid, seq_len=1024, micro_batch_size=1, recompute=Recompute(kind="none"))
    torch_only = replace(one, flags=(("recurrent_kernels", "torch"),))
    kept = [moment(job, "loss").find("kept_activations") for job in (one, torch_only)]
    assert kept[0] is not None and kept[1] is not None
    more_per_token = 250_496  # of one layer: 353,600 in PyTorch alone, 103,104 by the packages
    assert kept[1].bytes - kept[0].bytes == 36 * 1024 * more_per_token


def test_a_compiled_model_needs_less_and_says_so() -> None:
    eager = full_job(recompute=Recompute(kind="none"), micro_batch_size=1)
    compiled = replace(eager, compile=True)
    kept = [moment(job, "loss").find("kept_activations") for job in (eager, compiled)]
    losses = [moment(job, "loss").find("loss") for job in (eager, compiled)]
    assert all(kept) and all(losses)
    assert kept[1].bytes < 0.75 * kept[0].bytes and losses[1].bytes < 0.5 * losses[0].bytes  # type: ignore[union-attr]
    assert any("partitioner" in sentence for sentence in step(compiled).job.assumed)
    quantised = lora_job(compile=True, base_quantization="nf4", method="qlora")
    assert peak(quantised) == peak(replace(quantised, compile=False))
    assert any("as if eager" in sentence for sentence in step(quantised).job.assumed)
