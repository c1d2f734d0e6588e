"""The graphs of blocks against what autograd keeps.

``MEASURED`` was taken with torch 2.13.0 on CPU in bfloat16 with hooks on saved tensors, every storage once, parameters
and tables left out. Where torch is installed, the same is measured again.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from ullage.account.activations.blocks import Style, Training
from ullage.account.activations.decoder import Slice, decoder_graph
from ullage.account.activations.graph import saved_bytes
from ullage.spec.model import Attention, DenseFFN, Layer, Norm
from ullage.spec.training import Lora

BATCH, SEQ, HIDDEN, HEADS, KV_HEADS, DIM, INNER = 2, 64, 128, 8, 2, 16, 352
#: Bytes that the block's forward pass keeps, its input included.
MEASURED = {"interleaved": 758_784, "interleaved, fused norm": 627_712, "halves": 758_784}
STYLES = {
    "interleaved": Style(rope="complex", repeat_kv=True),
    "interleaved, fused norm": Style(rope="complex", repeat_kv=True, norm="fused"),
    "halves": Style(rope="halves", repeat_kv=True),
}


def layer() -> Layer:
    return Layer(
        mixers=(Attention(num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=DIM),),
        ffns=(DenseFFN(intermediate_size=INNER),),
        norms=(Norm(name="input_layernorm", size=HIDDEN), Norm(name="post_attention_layernorm", size=HIDDEN)),
    )


@pytest.mark.parametrize("name", STYLES)
def test_a_graph_keeps_what_autograd_keeps(name: str) -> None:
    graph = decoder_graph(layer(), HIDDEN, Slice(batch=BATCH, seq_len=SEQ), STYLES[name], Training())
    assert saved_bytes(graph) == MEASURED[name]


def test_litgpt_keeps_the_source_of_padded_low_rank_outputs() -> None:
    """Per layer of litgpt's LoRA block, in units of one bf16 hidden state (n=256, h=1024, i=2752, r=8 on q and v).

    Measured with litgpt@26857050 on CPU: dropout's output 1, low-rank outputs 2 and 0.016, q 1, k 1, qkv 3, output 1,
    log-sum-exp 0.016, two norms in fp32 2 x (2 + 0.002), three of the FFN 2.6875; CUDA's dropout mask 0.5 on top.
    """
    part = Attention(num_heads=8, num_kv_heads=8, head_dim=128)
    norms = (Norm(name="a", size=1024), Norm(name="b", size=1024))
    one = Layer(mixers=(part,), ffns=(DenseFFN(intermediate_size=2752),), norms=norms)
    style = Style(norm="late_cast", rope="halves_fp32", rope_copy=True, fused_qkv=True, gates_first=True)
    training = Training(base=False, lora=Lora(rank=8, targets=("query", "value"), dropout=0.05))
    graph = decoder_graph(one, 1024, Slice(batch=1, seq_len=256), style, training)
    unit = 2 * 256 * 1024
    kept = 1 + 2 + 16 / 1024 + 1 + 1 + 3 + 1 + 16 / 1024 + 2 * (2 + 2 / 1024) + 3 * 2.6875 + 0.5
    assert saved_bytes(graph) == pytest.approx(kept * unit, rel=1e-3)


@pytest.mark.reference
@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="torch is not installed")
@pytest.mark.parametrize("name", STYLES)
def test_autograd_keeps_what_was_measured(name: str) -> None:
    assert measure(STYLES[name]) == MEASURED[name]


def measure(style: Style) -> int:
    """Run one block in PyTorch and add up what autograd keeps."""
    import torch
    from torch.nn import functional as f

    torch.manual_seed(0)
    shapes = [(HIDDEN, HIDDEN), (KV_HEADS * DIM, HIDDEN), (KV_HEADS * DIM, HIDDEN), (HIDDEN, HIDDEN)]
    shapes += [(INNER, HIDDEN), (INNER, HIDDEN), (HIDDEN, INNER), (HIDDEN,), (HIDDEN,)]
    wq, wk, wv, wo, w1, w3, w2, norm1, norm2 = (
        torch.randn(shape, dtype=torch.bfloat16).mul_(0.02).requires_grad_() for shape in shapes
    )
    turns = torch.polar(torch.ones(SEQ, DIM // 2), torch.arange(SEQ * DIM // 2).view(SEQ, DIM // 2).float())
    cosine, sine = torch.randn(SEQ, DIM, dtype=torch.bfloat16), torch.randn(SEQ, DIM, dtype=torch.bfloat16)
    known = {
        one.untyped_storage().data_ptr() for one in (wq, wk, wv, wo, w1, w3, w2, norm1, norm2, turns, cosine, sine)
    }

    def norm(x: Any, weight: Any) -> Any:
        if style.norm == "fused":
            return FusedNorm.apply(x, weight)
        wide = x.float()
        return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x) * weight

    class FusedNorm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any) -> Any:
            rstd = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)
            ctx.save_for_backward(x, rstd)
            return (x * rstd).type_as(x) * weight

        @staticmethod
        def backward(ctx: Any, grad: Any) -> Any:
            return grad, None

    def rope(x: Any) -> Any:
        if style.rope == "complex":
            pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(pairs * turns[None, :, None]).flatten(3).type_as(x)
        x = x.transpose(1, 2)
        turned = torch.cat((-x[..., DIM // 2 :], x[..., : DIM // 2]), dim=-1)
        return (x * cosine + turned * sine).transpose(1, 2)

    def block(x: Any) -> Any:
        h = norm(x, norm1)
        q, k, v = (f.linear(h, one).view(BATCH, SEQ, -1, DIM) for one in (wq, wk, wv))
        q, k = rope(q), rope(k)
        k, v = (one[:, :, :, None].expand(-1, -1, -1, HEADS // KV_HEADS, -1).flatten(2, 3) for one in (k, v))
        out = f.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, k, v)), is_causal=True)
        x = x + f.linear(out.transpose(1, 2).reshape(BATCH, SEQ, -1), wo)
        h = norm(x, norm2)
        return x + f.linear(f.silu(f.linear(h, w1)) * f.linear(h, w3), w2)

    found: dict[int, Any] = {}

    def pack(one: Any) -> Any:
        storage = one.untyped_storage()
        if storage.data_ptr() not in known and one.dim():
            found.setdefault(storage.data_ptr(), storage)
        return one

    x = torch.randn(BATCH, SEQ, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        block(x)
    return sum(storage.nbytes() for storage in found.values())
