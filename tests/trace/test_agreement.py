"""A traced step of transformers and the closed form of the same step: peaks, and what each layer keeps."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from make_agreement import HEADS, LATENT, LATENT_V3, cases

from ullage.trace.compare.agreement import Agreement, Case, compare

pytestmark = pytest.mark.reference
PEAK, LAYER = 0.01, 0.005
LLAMA, QWEN, MIXTRAL = "meta-llama/Llama-3.2-1B", "Qwen/Qwen3-8B", "mistralai/Mixtral-8x7B-v0.1"
LITE, V3, GPT = "deepseek-ai/DeepSeek-V2-Lite", "deepseek-ai/DeepSeek-V3", "openai/gpt-oss-20b"
THREE, FIVE = (("num_hidden_layers", 3),), (("num_hidden_layers", 5), ("num_nextn_predict_layers", 0))
#: (model, overrides, LoRA targets): every model once with each of recompute, adapters and the fused loss.
MODELS = [
    (LLAMA, THREE, HEADS), (QWEN, THREE, HEADS), (MIXTRAL, THREE, HEADS),
    (LITE, THREE, LATENT), (V3, FIVE, LATENT_V3), (GPT, THREE, HEADS),
]  # fmt: skip
QUICK = [
    Case(model=model, overrides=overrides, recompute=recompute, lora=lora, loss=loss, micro_batch=2, seq_len=1024)
    for model, overrides, targets in MODELS
    for recompute, lora, loss in (("none", (), "plain"), ("full", targets, "plain"), ("full", (), "liger"))
]


#: With as many tokens that the backward pass of attention, not of the logits, decides.
EAGER = [
    Case(model=model, overrides=THREE, recompute=recompute, loss="liger", micro_batch=1, seq_len=6144, eager=True)
    for model, recompute in ((LLAMA, "none"), (LLAMA, "full"), (GPT, "none"))
]


def agrees(found: Agreement) -> None:
    assert abs(found.peak_error) <= PEAK, found.moments
    assert abs(found.layer_error) <= LAYER, found.layers
    assert len(found.moments) >= 3


@pytest.mark.parametrize(
    "case",
    [*QUICK, *EAGER],
    ids=lambda case: f"{case.model}-{case.recompute}-{case.loss}-{len(case.lora)}-{case.seq_len}",
)
def test_peaks_and_layers_agree(case: Case) -> None:
    found = compare(case)
    agrees(found)
    for name, traced, closed in found.moments:  # moments that are not the peak are met as well
        assert closed == pytest.approx(traced, rel=0.02), name


@pytest.mark.skipif("ULLAGE_AGREEMENT" not in os.environ, reason="the page's jobs take minutes: set ULLAGE_AGREEMENT")
@pytest.mark.parametrize("case", cases(), ids=str)
def test_every_job_of_the_page_agrees(case: Case) -> None:
    agrees(compare(case))
