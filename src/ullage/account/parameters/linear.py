"""The tensors of linear-attention and state-space kinds, under their checkpoint names.

Tensor parallelism is that of vLLM 0.33.0 (vllm/model_executor/layers/mamba/, models/kimi_k3/): projections into heads
are split by heads, the way back by its input; decays and biases per head go with their heads.

Legend: H hidden_size, K conv_kernel, N num_heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import replace

from ullage.account.parameters.parameter import Parameter, Role, Split, linear_parameters, norm_parameters, of_extra
from ullage.spec import model as spec


def _vector(name: str, *shape: int, split: Split = "out", dtype: str | None = None) -> Parameter:
    """A small tensor per head or channel."""
    return Parameter(name=name, shape=shape, role=Role.OTHER, split=split, dtype=dtype)


def _convolution(name: str, channels: int, kernel: int, *, bias: bool = False) -> list[Parameter]:
    """A causal depthwise convolution: one filter of ``kernel`` per channel."""
    found = [Parameter(name=f"{name}.weight", shape=(channels, 1, kernel), role=Role.CONV, split="out")]
    if bias:
        found.append(Parameter(name=f"{name}.bias", shape=(channels,), role=Role.BIAS, split="out"))
    return found


def gated_delta_net(part: spec.GatedDeltaNet, hidden_size: int) -> list[Parameter]:
    """Tensors of a gated delta net.

    Formula: q, k, v and gate (2*Nk*Dk + 2*Nv*Dv, H); beta and decay (2*Nv, H); conv (2*Nk*Dk + Nv*Dv, 1, K);
        A_log, dt_bias (Nv); norm (Dv); out (H, Nv*Dv).
    Symbols: Nk, Nv num_k_heads and num_v_heads; Dk, Dv their head sizes.
    Source: transformers@5.23.0:models/qwen3_next/modeling_qwen3_next.py:Qwen3NextGatedDeltaNet (fused),
        models/qwen3_5/modeling_qwen3_5.py:Qwen3_5GatedDeltaNet; vllm@0.33.0:qwen_gdn_linear_attn.py.
    """
    at, heads = f"{part.prefix}.", part.num_v_heads
    keys, values = part.num_k_heads * part.k_head_dim, heads * part.v_head_dim
    if part.fused:
        rows = {"in_proj_qkvz": 2 * keys + 2 * values, "in_proj_ba": 2 * heads}
    else:
        rows = {"in_proj_qkv": 2 * keys + values, "in_proj_z": values, "in_proj_b": heads, "in_proj_a": heads}
    found = []
    for name, size in rows.items():
        found += linear_parameters(at + name, size, hidden_size, split="out")
    found += _convolution(at + "conv1d", 2 * keys + values, part.conv_kernel)
    found += [_vector(at + "A_log", heads, dtype="float32"), _vector(at + "dt_bias", heads)]
    found += norm_parameters(spec.Norm(name=at + "norm", size=part.v_head_dim))
    found += linear_parameters(at + "out_proj", hidden_size, values, split="in")
    return found + [of_extra(extra, at) for extra in part.extras]


def kimi_delta_attention(part: spec.KimiDeltaAttention, hidden_size: int) -> list[Parameter]:
    """Tensors of Kimi Delta Attention.

    Formula: q, k, v (N*D, H) each with a conv (N*D, 1, K); forget gate f_a (r, H), f_b (N*D, r) or f (N*D, H),
        dt_bias (N*D), A_log (N), stored as (1, 1, N, 1); beta (N, H);
        output gate g_a (rg, H), g_b (N*D, rg), or g (N*D, H);
        norm (D); out (H, N*D). The gates' first halves are on every rank.
    Symbols: r gate_rank, rg output_gate_rank.
    Source: transformers@5.23.0:models/kimi_linear/modeling_kimi_linear.py:KimiLinearDeltaAttention;
        vllm@0.33.0:kimi_gdn_linear_attn.py, vllm/models/kimi_k3/nvidia/kda.py:KimiK3DeltaAttention.
    """
    at, width = f"{part.prefix}.", part.num_heads * part.head_dim
    found = []
    for name in ("q", "k", "v"):
        found += linear_parameters(f"{at}{name}_proj", width, hidden_size, split="out")
    for name in ("q", "k", "v"):
        found += _convolution(f"{at}{name}_conv1d", width, part.conv_kernel)
    if part.gate_rank is None:
        found += linear_parameters(at + "f_proj", width, hidden_size, split="out")
    else:
        found += linear_parameters(at + "f_a_proj", part.gate_rank, hidden_size)
        found += linear_parameters(at + "f_b_proj", width, part.gate_rank, split="out")
    found.append(_vector(at + "dt_bias", width, dtype="float32"))
    found.append(_vector(at + "A_log", part.num_heads, dtype="float32"))
    found += linear_parameters(at + "b_proj", part.num_heads, hidden_size, split="out")
    if part.output_gate_rank is None:
        found += linear_parameters(at + "g_proj", width, hidden_size, split="out")
    else:
        found += linear_parameters(at + "g_a_proj", part.output_gate_rank, hidden_size)
        found += linear_parameters(at + "g_b_proj", width, part.output_gate_rank, split="out")
    found += norm_parameters(spec.Norm(name=at + "o_norm", size=part.head_dim))
    found += linear_parameters(at + "o_proj", hidden_size, width, split="in")
    return found + [of_extra(extra, at) for extra in part.extras]


def lightning_attention(part: spec.LightningAttention, hidden_size: int) -> list[Parameter]:
    """Tensors of lightning attention.

    Formula: qkv (3*N*D, H); output_gate (N*D, H); norm (N*D); out (H, N*D). The decay slopes are computed.
    Source: arXiv:2501.08313 sec. 2.2; transformers@5.23.0:models/minimax/modeling_minimax.py:MiniMaxLightningAttention;
        vllm@0.33.0:vllm/model_executor/layers/mamba/linear/minimax_linear_attn.py.
    """
    at, width = f"{part.prefix}.", part.num_heads * part.head_dim
    found = linear_parameters(at + "qkv_proj", 3 * width, hidden_size, split="out")
    found += linear_parameters(at + "output_gate", width, hidden_size, split="out")
    found.append(Parameter(name=at + "norm.weight", shape=(width,), role=Role.NORM, split="out"))
    found += linear_parameters(at + "out_proj", hidden_size, width, split="in")
    return found + [of_extra(extra, at) for extra in part.extras]


def mamba(part: spec.Mamba, hidden_size: int) -> list[Parameter]:
    """Tensors of a Mamba-1 layer.

    Formula: in (2*I, H); conv (I, 1, K); x (R + 2*n, I); dt (I, R) with bias; A_log (I, n); D (I); out (H, I);
        Jamba's norms of dt (R), B (n) and C (n).
    Symbols: I inner_size, n state_size, R dt_rank.
    Source: arXiv:2312.00752; transformers@5.23.0:models/jamba/modeling_jamba.py:JambaMambaMixer;
        vllm@0.33.0:vllm/model_executor/layers/mamba/mamba_mixer.py:MambaMixer.
    """
    at, inner, state = f"{part.prefix}.", part.inner_size, part.state_size
    found = linear_parameters(at + "in_proj", 2 * inner, hidden_size, bias=part.proj_bias, split="out")
    found += _convolution(at + "conv1d", inner, part.conv_kernel, bias=part.conv_bias)
    found += linear_parameters(at + "x_proj", part.dt_rank + 2 * state, inner, split="in")
    found += linear_parameters(at + "dt_proj", inner, part.dt_rank, bias=True, split="out")
    found += [_vector(at + "A_log", inner, state, dtype="float32"), _vector(at + "D", inner)]
    found += linear_parameters(at + "out_proj", hidden_size, inner, bias=part.proj_bias, split="in")
    if part.inner_norms:
        for name, size in (("dt_layernorm", part.dt_rank), ("b_layernorm", state), ("c_layernorm", state)):
            found += norm_parameters(spec.Norm(name=at + name, size=size))
    return found + [of_extra(extra, at) for extra in part.extras]


def mamba2(part: spec.Mamba2, hidden_size: int) -> list[Parameter]:
    """Tensors of a Mamba-2 layer. A single group's rows are on every rank; several groups are divided.

    Formula: in (2*I + 2*G*n + N, H); conv (I + 2*G*n, 1, K); A_log, D, dt_bias (N); norm (I); out (H, I); I = N*D.
    Symbols: n state_size, G num_groups.
    Source: arXiv:2405.21060; transformers@5.23.0:models/nemotron_h/modeling_nemotron_h.py:NemotronHMamba2Mixer;
        vllm@0.33.0:vllm/model_executor/layers/mamba/mamba_mixer2.py:MambaMixer2.
    """
    at, heads = f"{part.prefix}.", part.num_heads
    inner, groups = heads * part.head_dim, 2 * part.num_groups * part.state_size
    found = linear_parameters(at + "in_proj", 2 * inner + groups + heads, hidden_size, bias=part.proj_bias, split="out")
    found += _convolution(at + "conv1d", inner + groups, part.conv_kernel, bias=part.conv_bias)
    if part.num_groups == 1:
        found = [replace(parameter, whole=groups) for parameter in found]
    found += [_vector(at + "A_log", heads, dtype="float32"), _vector(at + "D", heads), _vector(at + "dt_bias", heads)]
    if part.gated_norm:
        found.append(Parameter(name=at + "norm.weight", shape=(inner,), role=Role.NORM, split="out"))
    found += linear_parameters(at + "out_proj", hidden_size, inner, bias=part.proj_bias, split="in")
    return found + [of_extra(extra, at) for extra in part.extras]


def short_convolution(part: spec.ShortConvolution, hidden_size: int) -> list[Parameter]:
    """Tensors of a gated short convolution.

    Formula: in (3*C, H): two gates and the input; conv (C, 1, K); out (H, C).
    Symbols: C size.
    Source: transformers@5.23.0:models/lfm2/modeling_lfm2.py:Lfm2ShortConv;
        vllm@0.33.0:vllm/model_executor/layers/mamba/short_conv.py:ShortConv.
    """
    at = f"{part.prefix}."
    found = linear_parameters(at + "in_proj", 3 * part.size, hidden_size, bias=part.bias, split="out")
    found += _convolution(at + "conv", part.size, part.conv_kernel, bias=part.bias)
    found += linear_parameters(at + "out_proj", hidden_size, part.size, bias=part.bias, split="in")
    return found + [of_extra(extra, at) for extra in part.extras]
