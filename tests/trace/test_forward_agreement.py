"""A pass without gradients, traced, beside what the closed form says that its widest layer takes."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from ullage.account.activations.decoder import Slice
from ullage.account.activations.inference import widest_layer
from ullage.read.model_source import load_model
from ullage.records.overrides import with_overrides
from ullage.trace.job import TraceJob
from ullage.trace.models.hf import build_described
from ullage.trace.models.prepare import prepare
from ullage.trace.recorder.events import BUFFER, INPUT, PARAMETER, WORKSPACE
from ullage.trace.step.model import trace_model

pytestmark = pytest.mark.reference
SHALLOW = {"num_hidden_layers": 3, "vocab_size": 256}


DENSE = ("llama-3.1-8b", "qwen3-8b", "qwen3-30b-a3b")


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        *((name, None) for name in (*DENSE, "mixtral-8x7b", "deepseek-v2-lite")),
        ("gpt-oss-20b", "eager"),
        ("gemma-2-9b", "eager"),
    ],
)
def test_the_widest_layer_is_that_traced(name: str, attention: str | None) -> None:
    model = with_overrides(load_model(name), SHALLOW, where=name)
    job = TraceJob(micro_batch=4, seq_len=2048, inference=True, dtype="bfloat16")
    built = build_described(model, job)
    trace = trace_model(prepare(built.model, job), built.config, job).trace
    alive = trace.alive_at(trace.peak()[0])
    standing = (PARAMETER, BUFFER, INPUT, WORKSPACE)
    traced = sum(trace.allocations[one].size_bytes for one in alive if trace.allocations[one].category not in standing)
    found = widest_layer(model, Slice(batch=4, seq_len=2048), dtype="bfloat16", attention=attention)
    assert found.low_bytes <= traced <= found.high_bytes
    if name in DENSE:  # and of experts so small that attention decides
        assert found.num_bytes == pytest.approx(traced, rel=0.005)
