"""What a mixture of experts keeps: router, permutation, grouped GEMMs, shared experts.

Legend: n tokens of the residual stream on the rank, E experts, k experts per token, m = n*k*e rows that the rank's
experts work on when routing is balanced (e expert-tensor size, load > 1 for the fullest rank), f expert FFN size.
"""

from __future__ import annotations

from ullage.account.activations.saved import SavedTensor
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.shape import Sizes
from ullage.numeric import both, where, whole
from ullage.spec.model import MoEFFN
from ullage.spec.training import TrainingJob

SOURCE = "Megatron-LM@adc69db:megatron/core/transformer/moe/"


def rows(job: TrainingJob, settings: Settings, sizes: Sizes, part: MoEFFN) -> int:
    """Rows of the rank's experts: under balanced routing times the job's expert load, or the capacity.

    Formula: n*k*t_e/(t/t_sp): every rank of the expert group sends 1/EP of its n*k rows and receives as many; expert
        tensor parallelism gathers the rows of its ranks.
    Source: Megatron-LM@adc69db:megatron/core/transformer/moe/token_dispatcher.py:MoEAlltoAllTokenDispatcher.
    """
    gathered = sizes.stream_tokens * part.top_k * sizes.expert_tensor
    whole_stream = both(sizes.tensor > 1, sizes.sequence == False)  # noqa: E712 (an array has no ``not``)
    tokens = where(whole_stream, sizes.tokens * part.top_k, gathered)
    capacity = settings.capacity_factor
    if capacity is not None and settings.on("moe-pad-expert-input-to-capacity"):
        return whole(tokens * capacity)
    load = job.expert_load if capacity is None else min(job.expert_load, max(1.0, capacity))
    return tokens if load == 1.0 else whole(tokens * load)


def mixture_saved(job: TrainingJob, settings: Settings, sizes: Sizes, part: MoEFFN) -> list[SavedTensor]:
    """Return what the block keeps for one micro-batch."""
    n, h, dtype = sizes.stream_tokens, job.model.hidden_size, job.precision.compute
    source = SOURCE + "moe_layer.py:MoELayer.forward"
    found = [
        _saved("pre_mlp_layernorm.input", "stream", n * h, dtype, "n*h", source),
        _saved("pre_mlp_layernorm.statistics", "stream", 2 * n, "float32", "2*n", source),
        _saved("pre_mlp_layernorm.output", "layernorm", n * h, dtype, "n*h", source),
    ]
    found += _router(job, settings, sizes, part)
    found += _experts(job, settings, sizes, part)
    if part.shared_intermediate_size:
        found += _shared(job, settings, sizes, part)
    return found


def _router(job: TrainingJob, settings: Settings, sizes: Sizes, part: MoEFFN) -> list[SavedTensor]:
    """Scores, probabilities and the routing map: n*E each; what the score function and the auxiliary loss keep.

    Source: Megatron-LM@adc69db:megatron/core/transformer/moe/router.py:TopKRouter.routing. Known error: a few n*E.
    """
    scores = sizes.stream_tokens * part.num_experts
    source = SOURCE + "router.py:TopKRouter.routing"
    dtype = "float64" if settings.flags.get("moe-router-dtype") == "fp64" else "float32"
    return [
        _saved("router.scores", "moe", 3 * scores, dtype, "3*n*E", source),
        _saved("routing_map", "moe", 2 * scores, "bool", "2*n*E", source),
        _saved("permutation", "moe", sizes.stream_tokens * part.top_k * 2, "int64", "2*n*k", source),
    ]


def _experts(job: TrainingJob, settings: Settings, sizes: Sizes, part: MoEFFN) -> list[SavedTensor]:
    """Grouped GEMMs: their inputs, the activation's input, and what unfused activation and weighting keep.

    Formula: m*h + m*u*f/t_e + m*f/t_e; unfused: + m*f/t_e for the activated rows before the router's weights (gated:
        the activated gate too). Fused permutation keeps no rows of its own.
    Source: Megatron-LM@adc69db:megatron/core/transformer/moe/experts.py:TEGroupedMLP.forward.
    """
    m, h, dtype = rows(job, settings, sizes, part), part.latent_size or job.model.hidden_size, job.precision.compute
    quantised = "float8_e4m3" if job.precision.fp8_recipe else dtype
    inner = m * part.intermediate_size // sizes.expert_tensor
    source = SOURCE + "experts.py:TEGroupedMLP.forward"
    found = [
        _saved("experts.fc1.input", "moe", m * h, quantised, "m*h", source),
        _saved("experts.fc1.output", "moe", inner * (2 if part.gated else 1), dtype, "m*u*f", source),
        _saved("experts.probs", "moe", m, "float32", "m", source),
    ]
    fused = settings.fused_activation and part.gated
    fused = fused or (part.activation == "relu2" and settings.on("use-fused-weighted-squared-relu"))
    if not fused:
        found.append(_saved("experts.activated", "moe", inner * (2 if part.gated else 1), dtype, "m*f", source))
    found.append(_saved("experts.fc2.input", "moe_act", inner, quantised, "m*f", source))
    return found


def _shared(job: TrainingJob, settings: Settings, sizes: Sizes, part: MoEFFN) -> list[SavedTensor]:
    """Shared experts: a dense block over the same normalised input.

    Source: Megatron-LM@adc69db:megatron/core/transformer/moe/shared_experts.py:SharedExpertMLP.
    """
    inner = sizes.tokens * part.shared_intermediate_size // sizes.tensor
    dtype = job.precision.compute
    quantised = "float8_e4m3" if job.precision.fp8_recipe else dtype
    source = SOURCE + "shared_experts.py:SharedExpertMLP"
    return [
        _saved("shared.fc1.output", "shared_experts", inner * (2 if part.gated else 1), dtype, "T*u*f/t", source),
        _saved("shared.fc2.input", "shared_experts", inner, quantised, "T*f/t", source),
    ]


def _saved(name: str, module: str, elements: int, dtype: str, formula: str, source: str) -> SavedTensor:
    return SavedTensor(name=name, module=module, num_elements=elements, dtype=dtype, formula=formula, source=source)
