"""A quantised frozen base under ZeRO."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ullage.engines.training import step
from ullage.errors import InputError
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.spec.training import Lora, Precision, Recompute, TrainingJob, TrainingParallel

MODEL = load_model("llama-3.1-8b")


def job(stage: int, gpus: int = 4, base: str | None = "nf4", **changes: object) -> TrainingJob:
    first = TrainingJob(
        model=MODEL,
        machine=parse_machine(f"{gpus}xA100-80GB"),
        engine="hf_trainer",
        parallel=TrainingParallel(data_parallel_size=gpus, zero_stage=stage),
        precision=Precision(grads="float32"),
        seq_len=2048,
        recompute=Recompute(kind="full"),
        attention="flash",
        method="qlora",
        lora=Lora(rank=16, targets=("all-linear",)),
        base_quantization=base,
    )
    return replace(first, **changes)  # type: ignore[arg-type]


def terms(one: TrainingJob) -> dict[str, int]:
    return {each.name: each.bytes for each in step(one).ranks[0].peak.allocated.children}


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("base", ["nf4", "int8"])
def test_low_stages_leave_the_base_whole(stage: int, base: str) -> None:
    alone, spread = job(0, gpus=1, base=base), job(stage, base=base)
    assert terms(spread)["weights"] == terms(alone)["weights"]
    states = step(alone).ranks[0].after_step, step(spread).ranks[0].after_step
    whole, quarter = (next(one.bytes for one in each.allocated.children if one.name == "optimizer") for each in states)
    assert quarter == pytest.approx(whole / 4, abs=4)
    assert any(f"ZeRO-{stage}" in said for said in step(spread).warnings)


def test_stage_3_spreads_the_base_but_not_its_scales() -> None:
    alone, spread = job(0, gpus=1), job(3)
    whole, quarter = terms(alone)["weights"], terms(spread)["weights"]
    assert whole / 4 < quarter < whole / 2
    found = terms(spread)
    assert 0 < found["unsharded_parameters"] <= 2 * 10**9
    assert "input_gradients" not in found
    assert any("bnb_4bit_quant_storage" in said for said in step(spread).warnings)


def test_more_ranks_never_need_more() -> None:
    for stage in (1, 2, 3):
        peaks = [step(job(stage, gpus=gpus)).ranks[0].peak.allocated.bytes for gpus in (2, 4, 8)]
        assert peaks == sorted(peaks, reverse=True)


@pytest.mark.parametrize("base", ["int8", "gptq"])
def test_stage_3_cannot_spread_what_is_no_16_bit_storage(base: str) -> None:
    with pytest.raises(InputError, match=f"does not spread a base in {base}"):
        step(job(3, base=base))


def test_parameters_on_the_host_are_refused() -> None:
    with pytest.raises(InputError, match="lie on the host"):
        step(job(3, offload=(("params", "cpu"),)))
