"""A layer's backward under Unsloth in closed form, against functions that allocate in the order of its own."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")

import torch

from ullage.engines.hf_trainer.layers import worst_backward
from ullage.engines.unsloth.layers import forward_pass
from ullage.engines.unsloth.rules import resolve
from ullage.read.machine import parse_machine
from ullage.read.model_source import load_model
from ullage.spec.training import Lora, Recompute, TrainingJob
from ullage.trace.cuda.patches import cuda_stand_ins
from ullage.trace.job import LoraOptions, TraceJob
from ullage.trace.models.hf import build_model
from ullage.trace.models.prepare import prepare
from ullage.trace.recorder import events as names
from ullage.trace.stand_ins.fused_ops import fuse_norms, fused_rotary
from ullage.trace.stand_ins.quantised.fused import fuse_adapters
from ullage.trace.step.session import start

pytestmark = pytest.mark.reference
RANK, BATCH, TOKENS, WIDTH, LAYERS = 8, 2, 2048, 1024, 4
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Adapted:
    """A linear layer and its adapter."""

    def __init__(self, module: Any) -> None:
        self.base = module.base_layer
        self.down, self.up = module.lora_A["default"].weight, module.lora_B["default"].weight

    def weight(self) -> Any:
        """Return the weight, written out."""
        return self.base.dequantised()

    def times(self, hidden: Any) -> Any:
        made = hidden @ self.weight().t()
        return made.addmm_(hidden @ self.down.t().to(made.dtype), self.up.t().to(made.dtype))

    def back(self, grad: Any, made: Any = None, *, out: Any = None) -> Any:
        """Return the gradient of the input, added to ``made`` or written over ``out``."""
        weight = self.weight()
        if made is None:
            made = torch.matmul(grad, weight, out=out) if out is not None else grad @ weight
        else:
            made.addmm_(grad, weight)
        del weight
        return made.addmm_(grad @ self.up.to(grad.dtype), self.down.to(grad.dtype))

    def grads(self, hidden: Any, grad: Any) -> tuple[Any, Any]:
        """Return the gradients of both factors."""
        return (
            torch.empty_like(self.down, dtype=grad.dtype).addmm_((grad @ self.up.to(grad.dtype)).t(), hidden, beta=0),
            torch.empty_like(self.up, dtype=grad.dtype).addmm_(grad.t(), hidden @ self.down.t().to(grad.dtype), beta=0),
        )


class FeedForward(torch.autograd.Function):
    """Gate, up and down as one: unsloth@015bdef0:unsloth/kernels/fast_lora.py:LoRA_MLP says what is kept and reused."""

    @staticmethod
    def forward(ctx: Any, hidden: Any, layers: list[Adapted], *factors: Any) -> Any:
        gate, up = (layer.times(hidden.view(-1, hidden.shape[-1])) for layer in layers[:2])
        product = torch.empty_like(gate)
        out = layers[2].times(product)
        ctx.layers = layers
        ctx.save_for_backward(hidden, gate, up, *factors)
        return out.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        of_gate, of_up, of_down = ctx.layers
        hidden, gate, up = ctx.saved_tensors[:3]
        shape, grad = grad.shape, grad.reshape(-1, grad.shape[-1])
        hidden = hidden.view(-1, hidden.shape[-1])
        product = of_down.back(grad)  # the kernel lays the product into it, and the other two over gate and up
        found = [of_gate.grads(hidden, gate), of_up.grads(hidden, up), of_down.grads(product, grad)]
        made = of_up.back(up, out=hidden)
        made = of_gate.back(gate, made)
        return made.view(shape), None, *(each for pair in found for each in pair)


def fuse_feed_forward(module: Any, hidden: Any) -> Any:
    layers = [Adapted(getattr(module, name)) for name in ("gate_proj", "up_proj", "down_proj")]
    return FeedForward.apply(hidden, layers, *(each for layer in layers for each in (layer.down, layer.up)))


def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    values = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": WIDTH, "intermediate_size": 3584,
        "num_attention_heads": 8, "num_key_value_heads": 2, "num_hidden_layers": LAYERS, "vocab_size": 1000,
        "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip
    path.write_text(json.dumps(values))
    return str(path)


def traced(path: str, recompute: str, targets: tuple[str, ...]) -> int:
    """Return the most that the backward of the layers takes beside weights and adapters."""
    job = TraceJob(
        base="nf4", prepare="none", recompute=recompute, lora=LoraOptions(r=RANK, targets=targets), reentrant=True
    )
    model = prepare(build_model(path, job).model, job)
    fuse_norms(model)
    fuse_adapters(model)
    for module in model.modules():
        if hasattr(module, "gate_proj") and hasattr(module.gate_proj, "lora_A"):
            module.forward = partial(fuse_feed_forward, module)
    model.enable_input_require_grads()
    tracker, functions = start(job, stacks=False)
    with cuda_stand_ins(tracker, functions), functions, tracker.watching(), fused_rotary(model):
        tracker.hold(model)
        before = len(tracker.trace.events)
        tokens = torch.zeros(BATCH, TOKENS, dtype=torch.long, device="meta")
        with autocast():  # left before the backward, which forgets the casts made without a gradient
            hidden = model.base_model.model.model(input_ids=tokens, use_cache=False).last_hidden_state
        middle = len(tracker.trace.events)
        hidden.backward(torch.empty_like(hidden))
    running, taken = tracker.trace.running_bytes(), tracker.trace.allocations
    workspaces = sum(one.size_bytes for one in taken if one.category == names.WORKSPACE)
    return (
        max(running[middle:]) - running[before - 1] - workspaces - BATCH * TOKENS * WIDTH * 2
    )  # and what is held here


def autocast() -> Any:
    """As the Trainer computes; made where the stand-ins of a GPU already stand."""
    return torch.autocast("cuda", dtype=torch.bfloat16)


def predicted(path: str, recompute: str, targets: tuple[str, ...]) -> int:
    job = TrainingJob(
        model=load_model(path),
        machine=parse_machine("1xA100-80GB-SXM"),
        engine="unsloth",
        engine_version="2024.12",
        micro_batch_size=BATCH,
        seq_len=TOKENS,
        recompute=Recompute(kind="full") if recompute == "full" else Recompute(),
        attention="sdpa",
        method="lora",
        lora=Lora(rank=RANK, targets=targets),
        base_quantization="nf4",
    )
    one_pass = forward_pass(*resolve(job), steady=True)
    worst = worst_backward(one_pass, grads_before=0, all_grads=False)
    kept = sum(layer.kept_bytes for layer in one_pass.layers[: worst.layer + 1])
    return kept + one_pass.layers[worst.layer].points[worst.point][0] + worst.grad_bytes


@pytest.mark.parametrize("targets", [PROJECTIONS, ("q_proj", "v_proj"), PROJECTIONS[:4]], ids=len)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_backward_of_the_layers_agrees(tmp_path: Path, recompute: str, targets: tuple[str, ...]) -> None:
    """With adapters on all, on some that stay PEFT's, and on attention alone."""
    path = config(tmp_path)
    measured, closed = traced(path, recompute, targets), predicted(path, recompute, targets)
    assert closed == pytest.approx(measured, rel=0.015), (closed, measured)
