"""Which rank holds what under vLLM: pipeline stages, tensor and expert parallelism, data parallelism of experts."""

from __future__ import annotations

import re

from ullage.account.sharding import RankShare
from ullage.engines.vllm.defaults import Setup
from ullage.errors import LayoutError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec import model as spec
from ullage.units import cdiv


class Stage(Frozen):
    """One pipeline stage: its share of the model, and how many equal ranks of one replica hold it."""

    pp_rank: int
    num_ranks: int
    share: RankShare
    last: bool


def stage_layers(num_layers: int, stages: int, given: tuple[int, ...] | None) -> list[tuple[int, int]]:
    """Return the half-open layer range of each stage: even, the rest to the last stages but the very last.

    Formula: L // P each; the rest r goes one each to stages P-2, P-3, ..., P-1-r (vLLM keeps the first and last light).
    Source: vllm@0.33.0:vllm/distributed/utils.py:get_pp_indices.

    Raises:
        LayoutError: the partition given does not add up.
    """
    counts = list(given) if given else [num_layers // stages] * stages
    if given is None:
        for index in range(2, num_layers % stages + 2):
            counts[-index] += 1
    if len(counts) != stages or sum(counts) != num_layers or min(counts) < 0:
        raise LayoutError(
            _("{counts} layers do not make {stages} stages of {layers} layers").format(
                counts=counts, stages=stages, layers=num_layers
            ),
            remedy=_("VLLM_PP_LAYER_PARTITION takes one count for each stage"),
        )
    ranges, first = [], 0
    for count in counts:
        ranges.append((first, first + count))
        first += count
    return ranges


def _partition(setup: Setup) -> tuple[int, ...] | None:
    parallel = setup.job.parallel
    if parallel.pipeline_layers:
        return parallel.pipeline_layers
    text = setup.flag("VLLM_PP_LAYER_PARTITION") or setup.flag("vllm_pp_layer_partition")
    counts = re.findall(r"\d+", text)
    return tuple(int(count) for count in counts) or None


def num_experts(model: spec.Model) -> int:
    """Return the routed experts of a layer, 0 for a dense model."""
    return max(
        (ffn.num_experts for layer in model.layers for ffn in layer.ffns if isinstance(ffn, spec.MoEFFN)), default=0
    )


def expert_parallel_size(setup: Setup) -> int:
    """Return over how many ranks routed experts are spread; 1 when they are sliced instead.

    Formula: tp x dp with ``--enable-expert-parallel``, else 1 (then sliced tp x dp ways).
    Source: vllm@0.33.0:vllm/model_executor/layers/fused_moe/config.py:FusedMoEParallelConfig.make.
    """
    parallel = setup.job.parallel
    if not parallel.expert_parallel:
        return 1
    return parallel.expert_parallel_size or parallel.tensor_parallel_size * parallel.data_parallel_size


def sequence_parallel_moe(setup: Setup) -> bool:
    """Tell whether MoE layers run sequence-parallel, so that every rank holds all of the shared experts.

    Source: vllm@0.33.0:vllm/config/parallel.py:use_sequence_parallel_moe (an all-to-all backend, expert parallelism,
        tensor and data parallelism above one).
    """
    parallel = setup.job.parallel
    wide = parallel.expert_parallel and parallel.tensor_parallel_size > 1 and parallel.data_parallel_size > 1
    return wide and setup.version.at_least("0.10.2")


def loads_mtp(setup: Setup) -> bool:
    """Tell whether the checkpoint's own prediction module is loaded as a draft."""
    return bool(setup.job.model.mtp) and (setup.job.speculative or "").lower().endswith("mtp")


def _tower_tp(setup: Setup) -> int:
    """Return how many ranks share a tower: one where it runs data-parallel or its heads do not divide.

    Source: vllm@0.33.0:vllm/model_executor/models/vision.py:is_vit_use_data_parallel.
    """
    tp = setup.job.parallel.tensor_parallel_size
    divides = all(tower.num_heads % tp == 0 for tower in setup.job.model.towers)
    return tp if divides and setup.flag("mm_encoder_tp_mode") != "data" else 1


def stages(setup: Setup) -> tuple[Stage, ...]:
    """Return the pipeline stages of one replica.

    Raises:
        LayoutError: the layout does not fit the model.
    """
    job, model = setup.job, setup.job.model
    parallel = job.parallel
    tp, pp, dp = parallel.tensor_parallel_size, parallel.pipeline_parallel_size, parallel.data_parallel_size
    ep, experts = expert_parallel_size(setup), num_experts(model)
    local = cdiv(experts + job.redundant_experts, ep) if experts and ep > 1 else None
    mixed = experts and not parallel.expert_parallel and dp > 1
    found = []
    for rank, layers in enumerate(stage_layers(len(model.layers), pp, _partition(setup))):
        last = rank == pp - 1
        share = RankShare(
            layers=layers,
            embedding=rank == 0 or (last and model.tied_embeddings and pp > 1) or (last and loads_mtp(setup)),
            head=last,
            final=last,
            mtp=last and loads_mtp(setup),
            towers=rank == 0 and (setup.multimodal or not setup.version.at_least("0.11.0")),
            attention_tp=tp,
            dense_tp=tp,
            shared_expert_tp=1 if sequence_parallel_moe(setup) else tp,
            expert_tp=1 if ep > 1 else (tp * dp if mixed else tp),
            num_local_experts=local,
            vocab_tp=tp,
            head_tp=tp,
            tower_tp=_tower_tp(setup),
        )
        found.append(Stage(pp_rank=rank, num_ranks=tp * dp, share=share, last=last))
    return tuple(found)
