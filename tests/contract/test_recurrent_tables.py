"""The tables of recurrent mixers against what autograd keeps, mixer by mixer, with torch and transformers on a CPU.

Transformers' own fall-backs run as they are. In the place of the packages' kernels stand functions that keep what the
kernels' sources keep (named below), so that everything around them is compared: projections, gates, norms.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
from transformers import AutoConfig
from transformers.models.granitemoehybrid import modeling_granitemoehybrid as granite
from transformers.models.kimi_linear import modeling_kimi_linear as kimi
from transformers.models.lfm2 import modeling_lfm2 as lfm2
from transformers.models.qwen3_next import modeling_qwen3_next as qwen

from ullage.account.activations.recurrent import recurrent_table
from ullage.account.activations.saved import Implementation, Shape, table_bytes
from ullage.spec import mixers as spec

pytestmark = pytest.mark.reference
HIDDEN, BATCH = 64, 2
DELTA = spec.GatedDeltaNet(num_k_heads=2, num_v_heads=4, k_head_dim=16, v_head_dim=24, conv_kernel=4)
KIMI = spec.KimiDeltaAttention(num_heads=4, head_dim=16, conv_kernel=4, gate_rank=16, output_gate_rank=16)
SHORT = spec.ShortConvolution(size=HIDDEN, conv_kernel=3)
STATE = spec.Mamba2(num_heads=8, head_dim=16, state_size=16, num_groups=1, conv_kernel=4)


def kept(function: Any, *inputs: Any, result: Any, saved: Any) -> Any:
    """Stand in for a kernel: keep ``saved(*inputs)`` and answer ``result(*inputs)``."""

    class StandIn(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Any) -> Any:
            ctx.save_for_backward(*saved(*tensors))
            return result(*tensors)

        @staticmethod
        def backward(ctx: Any, *gradients: Any) -> Any:
            raise NotImplementedError(function)

    return StandIn.apply(*inputs)


def convolution(x: Any, weight: Any, bias: Any = None, **_ignored: Any) -> Any:
    """causal-conv1d@1.5:causal_conv1d_interface.py:CausalConv1dFn.forward."""
    return kept("convolution", x, weight, result=lambda one, _w: torch.empty_like(one), saved=lambda one, w: (one, w))


def delta_rule(query: Any, key: Any, value: Any, g: Any, beta: Any, **_ignored: Any) -> Any:
    """fla-core@0.6.0:ops/gated_delta_rule/chunk.py:ChunkGatedDeltaRuleFunction.forward."""

    def saved(q: Any, k: Any, v: Any, g: Any, b: Any) -> Any:
        rows, heads = q.shape[:3], v.shape[2]
        square = torch.empty(*rows[:2], heads, 64, dtype=k.dtype)
        rstd = (torch.empty(rows), torch.empty(rows))
        return (q.contiguous() + 0, k.contiguous() + 0, *rstd, v.contiguous(), g + 0, b, square)

    out = kept("delta rule", query, key, value, g, beta, result=lambda *t: torch.empty_like(t[2]), saved=saved)
    return out, None


def kimi_rule(query: Any, key: Any, value: Any, g: Any, beta: Any, **_ignored: Any) -> Any:
    """fla-core@0.6.0:ops/kda/chunk.py:ChunkKDAFunction.forward."""

    def saved(q: Any, k: Any, v: Any, g: Any, b: Any) -> Any:
        rows = q.shape[:3]
        squares = [torch.empty(*rows, 64, dtype=k.dtype) for _two in range(2)]
        rstd = (torch.empty(rows), torch.empty(rows))
        return (q.contiguous() + 0, k.contiguous() + 0, *rstd, v.contiguous(), g, g + 0, b, *squares)

    out = kept("kimi rule", query, key, value, g, beta, result=lambda *t: torch.empty_like(t[2]), saved=saved)
    return out, None


def combined(projected: Any, *_weights: Any, outproj_weight: Any, ngroups: int, **_ignored: Any) -> Any:
    """mamba@2.3.2:mamba_ssm/ops/triton/ssd_combined.py:MambaSplitConv1dScanCombinedFn.forward."""
    inner = outproj_weight.shape[1]

    def saved(z: Any, weight: Any) -> Any:
        return z, torch.empty(*z.shape[:2], inner, dtype=z.dtype), torch.empty(*z.shape[:2], ngroups), weight

    def result(z: Any, weight: Any) -> Any:
        return z.new_empty(*z.shape[:2], weight.shape[0])

    return kept("combined", projected, outproj_weight, result=result, saved=saved)


def mixer(kind: str) -> tuple[Any, Any]:
    """Return the module of Transformers and its spec."""
    common = {"hidden_size": HIDDEN, "num_hidden_layers": 2}
    if kind == "delta":
        sizes = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_conv_kernel_dim": 4}
        heads = {"linear_key_head_dim": 16, "linear_value_head_dim": 24, "layer_types": ["linear_attention"] * 2}
        return qwen.Qwen3NextGatedDeltaNet(AutoConfig.for_model("qwen3_next", **common, **sizes, **heads), 0), DELTA
    if kind == "kimi":
        sizes = {"linear_num_heads": 4, "linear_head_dim": 16, "linear_conv_kernel_dim": 4}
        return kimi.KimiLinearDeltaAttention(AutoConfig.for_model("kimi_linear", **common, **sizes), 0), KIMI
    if kind == "short":
        config = AutoConfig.for_model("lfm2", **common, conv_L_cache=3, layer_types=["conv"] * 2)
        return lfm2.Lfm2ShortConv(config, 0), SHORT
    sizes = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_n_groups": 1, "mamba_expand": 2}
    config = AutoConfig.for_model("granitemoehybrid", **common, **sizes, layer_types=["mamba"] * 2)
    return granite.GraniteMoeHybridMambaLayer(config, 0), STATE


def measured(module: Any, *, trained: bool, seq_len: int, autocast: bool = False) -> int:
    """Bytes that a forward pass keeps, every storage once, parameters left out."""
    module = module.to(torch.bfloat16).train()
    for parameter in module.parameters():
        parameter.requires_grad_(trained)
    own = {one.untyped_storage().data_ptr() for one in (*module.parameters(), *module.buffers())}
    found: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    x = torch.randn(BATCH, seq_len, HIDDEN, dtype=torch.bfloat16, requires_grad=True)
    casting = torch.autocast("cpu", torch.bfloat16, enabled=autocast)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), casting:
        module(x * 1.0)
    return sum(size for size, _storage in found.values())


def predicted(part: Any, kernels: str, *, trained: bool, seq_len: int, autocast: bool = False) -> int:
    implementation = Implementation(trained=trained, recurrent=kernels, autocast=autocast)  # type: ignore[arg-type]
    return table_bytes(recurrent_table(part, HIDDEN, Shape(micro_batch_size=BATCH, seq_len=seq_len), implementation))


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("seq_len", [256, 512])
@pytest.mark.parametrize("kind", ["delta", "short", "state"])
def test_the_fall_backs_keep_what_autograd_keeps(kind: str, seq_len: int, trained: bool) -> None:
    module, part = mixer(kind)
    found = measured(module, trained=trained, seq_len=seq_len)
    assert predicted(part, "torch", trained=trained, seq_len=seq_len) == pytest.approx(found, rel=0.006)


@pytest.mark.parametrize("kind", ["delta", "state"])
def test_the_fall_backs_keep_narrow_copies_under_autocast(kind: str) -> None:
    module, part = mixer(kind)
    found = measured(module, trained=False, seq_len=512, autocast=True)
    assert predicted(part, "torch", trained=False, seq_len=512, autocast=True) == pytest.approx(found, rel=0.01)


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("kind", ["delta", "kimi", "short", "state"])
def test_all_around_the_kernels_is_what_autograd_keeps(
    kind: str, trained: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (qwen, kimi, lfm2):
        monkeypatch.setattr(module, "causal_conv1d_fn", convolution)
    monkeypatch.setattr(qwen, "torch_chunk_gated_delta_rule", delta_rule)
    monkeypatch.setattr(kimi, "chunk_kimi_delta_attention", kimi_rule)
    monkeypatch.setattr(granite, "mamba2_split_conv1d_scan_combined", combined)
    module, part = mixer(kind)
    found = measured(module, trained=trained, seq_len=128)
    assert predicted(part, "packages", trained=trained, seq_len=128) == pytest.approx(found, rel=0.004)
