"""A traced step of torchtitan's Llama and its closed form: tensor-parallel and not."""

import json

import pytest

pytest.importorskip("torch")

import titan_net
import torch

from ullage.engines.torchtitan import step
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.spec.training import Precision, Recompute, TrainingJob, TrainingParallel
from ullage.trace.api import trace

pytestmark = pytest.mark.reference
MiB = 1 << 20
#: A second thread has a workspace of its own; the closed form has one.
WORKSPACE = 32 * MiB
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 16384,
    "num_hidden_layers": 4,
    "tie_word_embeddings": False,
    "max_position_embeddings": 4096,
}


def closed_form(path, *, data, tensor, micro_batch, tokens, recompute, split_root):
    job = TrainingJob(
        model=load_model(path),
        machine=parse_machine("8xH100"),
        engine="torchtitan",
        engine_version="2025-12-20" if split_root else "2024-12-26",
        parallel=TrainingParallel(data_parallel_size=data, tensor_parallel_size=tensor, fsdp="full_shard"),
        precision=Precision(params="float32", grads="float32", moments="float32"),
        micro_batch_size=micro_batch,
        seq_len=tokens,
        recompute=Recompute(kind=recompute),
        optimizer_impl="fused",
        loss="plain",
    )
    return {one.moment: one.allocated.bytes for one in step(job).ranks[0].moments}


def traced_moments(found):
    """Return the most bytes of forward (up to the last layer) and backward of the second step."""
    peaks = {}
    for index, running in enumerate(found.running_bytes()):
        place = found.place(index)
        if place.step != 1 or found.events[index] < 0:
            continue
        if place.phase == "forward" and place.module.startswith(("tok_embeddings", "layers")):
            peaks["forward"] = max(peaks.get("forward", 0), running)
        elif place.phase in ("backward", "recompute"):
            peaks["backward"] = max(peaks.get("backward", 0), running)
    return peaks


@pytest.mark.parametrize(
    ("tensor", "micro_batch", "recompute", "split_root", "forward"),
    [
        (1, 2, "none", False, 0.001),
        (4, 2, "none", False, 0.001),
        (4, 2, "selective", True, 0.02),
        (4, 1, "none", True, 0.01),
    ],
)
def test_moments_agree(tmp_path, tensor, micro_batch, recompute, split_root, forward):
    """The peak, in the loss's backward, to a thousandth; forward passes under checkpoints hold a little more."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    options = {"data": 2, "tensor": tensor, "micro_batch": micro_batch, "tokens": 1024, "recompute": recompute}
    options["split_root"] = split_root
    closed = closed_form(str(path), **options)
    found = traced_moments(trace(titan_net.program(CONFIG, **options), world=2 * tensor).trace)
    assert closed["backward"] == pytest.approx(found["backward"] - WORKSPACE, rel=0.001)
    assert closed["forward"] == pytest.approx(found["forward"] - WORKSPACE, rel=forward)


def test_the_norm_runs_as_one_kernel():
    """PyTorch's RMS norm keeps its input and one number per row; weights of another dtype have it written out."""

    def made(dtype):
        net = torch.nn.Sequential(torch.nn.Linear(64, 64, dtype=torch.bfloat16), torch.nn.RMSNorm(64, dtype=dtype))
        return lambda: {
            "module": net,
            "inputs": torch.ones(8, 64, dtype=torch.bfloat16),
            "loss": lambda out: out.sin().sum(),
        }

    options = {"engine": "plain", "optimizer": "none", "steps": 1}
    found = trace(made(torch.bfloat16), **options).trace
    taken = [
        (found.places[one.place].phase, one.shape, one.dtype, one.category)
        for one in found.allocations
        if found.places[one.place].module == "1"
    ]
    assert taken == [
        ("forward", (8, 64), "bfloat16", "activation"),
        ("forward", (8, 1), "float32", "activation"),
        ("backward", (8, 64), "bfloat16", "temporary"),
        ("backward", (64,), "bfloat16", "gradient"),
    ]
    wide = trace(made(torch.float32), **options).trace
    assert len([one for one in wide.allocations if wide.places[one.place].module == "1"]) > len(taken)
