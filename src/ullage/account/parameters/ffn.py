"""The tensors of the feed-forward kinds.

Legend: H hidden_size (or the latent size inside the experts), I intermediate_size, E num_experts.
"""

from __future__ import annotations

from ullage.account.parameters.parameter import Parameter, Role, Split, linear_parameters, of_extra
from ullage.spec import model as spec


def dense(part: spec.DenseFFN, hidden_size: int) -> list[Parameter]:
    """Tensors of a dense block: gate and up (I, H), down (H, I), biases as flagged.

    Source: transformers@5.23.0:models/llama/modeling_llama.py:LlamaMLP.
    """
    at, inner = f"{part.prefix}." if part.prefix else "", part.intermediate_size
    if part.fused_gate_up:
        found = linear_parameters(at + part.fused_gate_up, 2 * inner, hidden_size, bias=part.bias, split="out")
    else:
        found = []
        if part.gated:
            found += linear_parameters(at + part.gate_name, inner, hidden_size, bias=part.bias, split="out")
        found += linear_parameters(at + part.up_name, inner, hidden_size, bias=part.bias, split="out")
    found += linear_parameters(at + part.down_name, hidden_size, inner, bias=part.bias, split="in")
    return found + [of_extra(extra, at) for extra in part.extras]


def mixture_of_experts(part: spec.MoEFFN, hidden_size: int) -> list[Parameter]:
    """Tensors of a mixture of experts: router (E, H), E times gate, up, down, and the shared experts as one block.

    Source: arXiv:2401.06066 eq. 9-11; transformers@5.23.0:models/deepseek_v3/modeling_deepseek_v3.py:DeepseekV3MoE.
    """
    at = f"{part.prefix}." if part.prefix else ""
    found = linear_parameters(
        at + part.router_name, part.num_experts, hidden_size, bias=part.router_bias, role=Role.ROUTER
    )
    if part.correction_bias:
        found.append(
            Parameter(
                name=at + (part.correction_bias_name or part.router_name + ".e_score_correction_bias"),
                shape=(part.num_experts,),
                role=Role.ROUTER,
                buffer=True,
                dtype="float32",
            )
        )
    width = part.latent_size or hidden_size
    if part.latent_size:
        found += linear_parameters(at + "fc1_latent_proj", part.latent_size, hidden_size)
        found += linear_parameters(at + "fc2_latent_proj", hidden_size, part.latent_size)
    found += _experts(part, at, width)
    if part.shared_intermediate_size:
        shared = spec.DenseFFN(
            intermediate_size=part.shared_intermediate_size,
            gated=part.gated,
            prefix=at + part.shared_name,
            gate_name=part.gate_name,
            up_name=part.up_name,
            down_name=part.down_name,
        )
        found += dense(shared, hidden_size)
    if part.shared_gate:
        found += linear_parameters(at + part.shared_name + "_gate", 1, hidden_size, role=Role.ROUTER)
    return found + [of_extra(extra, at) for extra in part.extras]


def _experts(part: spec.MoEFFN, at: str, width: int) -> list[Parameter]:
    """The routed experts: ``copies`` equal tensors each; all but ``top_k`` sleep for a given token."""
    inner = part.intermediate_size
    up: list[tuple[str, int, int, Split]] = [(part.up_name, inner, width, "out")]
    if part.gated and part.fused_experts:
        up = [("gate_up_proj", 2 * inner, width, "out")]
    elif part.gated:
        up.insert(0, (part.gate_name, inner, width, "out"))
    found = []
    for name, rows, columns, split in [*up, (part.down_name, width, inner, "in")]:
        base = f"{at}{part.experts_name}." + (name if part.fused_experts else f"{{e}}.{name}")
        found.append(_expert(part, base + ("" if part.fused_experts else ".weight"), (rows, columns), split))
        if part.expert_bias:
            bias_split: Split = "out" if split == "out" else "none"
            found.append(_expert(part, base + ("_bias" if part.fused_experts else ".bias"), (rows,), bias_split))
    return found


def _expert(part: spec.MoEFFN, name: str, shape: tuple[int, ...], split: Split) -> Parameter:
    return Parameter(
        name=name, shape=shape, role=Role.EXPERT, split=split, copies=part.num_experts, active_copies=part.top_k
    )
