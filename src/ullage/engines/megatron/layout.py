"""Which rank holds which layers: pipeline stages, virtual stages, embedding, head and multi-token prediction.

Source: Megatron-LM@adc69db:megatron/core/transformer/transformer_block.py:get_num_layers_to_build,
megatron/core/transformer/pipeline_parallel_layer_layout.py:PipelineParallelLayerLayout.
"""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import accumulate

from ullage.engines.megatron.defaults import Settings
from ullage.errors import InputError, LayoutError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.numeric import larger
from ullage.spec.training import TrainingJob, TrainingParallel

MAX_STAGES = 4096


class Chunk(Frozen):
    """A model chunk of one pipeline rank: ``layers`` by number; what else it holds."""

    pp_rank: int
    virtual: int
    layers: tuple[int, ...]
    embedding: bool = False
    head: bool = False
    mtp: bool = False

    @property
    def receives(self) -> bool:
        """Its input comes from another stage."""
        return not self.embedding


class Groups(Frozen):
    """Sizes of the groups that shard states: ``data`` counts context parallelism in."""

    data: int
    expert_data: int
    expert: int
    expert_tensor: int


def groups(job: TrainingJob) -> Groups:
    """Sizes of the data-parallel groups of dense and of expert parameters.

    Formula: dense DP x CP; experts world / (ETP x EP x PP).
    Source: Megatron-LM@adc69db:megatron/core/parallel_state.py:initialize_model_parallel.
    """
    found, parallel = group_sizes(job.parallel), job.parallel
    world = found.data * parallel.tensor_parallel_size
    has_experts = any(type(block).__name__ == "MoEFFN" for layer in job.model.layers for block in layer.ffns)
    if has_experts and world % (found.expert * found.expert_tensor):
        raise LayoutError(
            _("{ranks} ranks of a pipeline stage cannot be divided by EP {ep} x ETP {etp}").format(
                ranks=world, ep=found.expert, etp=found.expert_tensor
            )
        )
    return found


def group_sizes(parallel: TrainingParallel) -> Groups:
    """The formula of :func:`groups`."""
    expert, tensor = parallel.expert_parallel_size, parallel.expert_tensor_parallel_size
    tensor = parallel.tensor_parallel_size if tensor is None else tensor
    data = parallel.data_parallel_size * parallel.context_parallel_size
    experts = larger(1, data * parallel.tensor_parallel_size // (expert * tensor))
    return Groups(data=data, expert_data=experts, expert=expert, expert_tensor=tensor)


def chunks(job: TrainingJob, settings: Settings) -> tuple[tuple[Chunk, ...], ...]:
    """Return the chunks of every pipeline rank."""
    pipeline, virtual = job.parallel.pipeline_parallel_size, job.parallel.virtual_pipeline_parallel_size
    if pipeline * virtual > MAX_STAGES:
        raise LayoutError(_("{stages} pipeline stages are too many").format(stages=pipeline * virtual))
    text = settings.flags.get("pipeline-model-parallel-layout", "")
    if text:
        stages = parse_layout(text, job)
        if len(stages) % pipeline:
            raise LayoutError(
                _("the layout has {stages} stages, which PP {pp} does not divide").format(
                    stages=len(stages), pp=pipeline
                )
            )
        virtual = len(stages) // pipeline
        return tuple(
            tuple(_chunk(rank, part, *stages[part * pipeline + rank]) for part in range(virtual))
            for rank in range(pipeline)
        )
    if job.parallel.schedule in ("dualpipe", "dualpipev"):
        return _both_directions(job, settings)
    return _placed(job, layer_counts(job, settings), pipeline)


def _placed(job: TrainingJob, counts: list[int], pipeline: int) -> tuple[tuple[Chunk, ...], ...]:
    """Deal stages out to ranks, one virtual round after the other."""
    starts = [0, *accumulate(counts)]
    found: list[list[Chunk]] = [[] for _rank in range(pipeline)]
    for at, number in enumerate(counts):
        rank, part = at % pipeline, at // pipeline
        last = at == len(counts) - 1
        found[rank].append(
            Chunk(
                pp_rank=rank,
                virtual=part,
                layers=tuple(range(starts[at], starts[at] + number)),
                embedding=at == 0,
                head=last,
                mtp=last and bool(job.model.mtp),
            )
        )
    return tuple(tuple(parts) for parts in found)


def _both_directions(job: TrainingJob, settings: Settings) -> tuple[tuple[Chunk, ...], ...]:
    """Two stages a rank: p and P-1-p of P stages (DualPipe, parameters twice), or p and 2P-1-p of 2P (DualPipeV).

    Source: DualPipe README (deepseek-ai/DualPipe): parameters 2x per device, activations P+1.
    """
    ranks = job.parallel.pipeline_parallel_size
    number = ranks * (2 if job.parallel.schedule == "dualpipev" else 1)
    layers = len(job.model.layers)
    counts = list(job.parallel.pipeline_layout or ())
    if counts and (len(counts) != number or sum(counts) != layers):
        raise LayoutError(_("the pipeline layout does not place every layer on its stages"))
    counts = counts or [layers // number + (at < layers % number) for at in range(number)]
    stages = [parts[0] for parts in _placed(job, counts, number)]
    return tuple(
        (
            replace(stages[rank], pp_rank=rank, virtual=0),
            replace(stages[number - 1 - rank], pp_rank=rank, virtual=1),
        )
        for rank in range(ranks)
    )


def _chunk(rank: int, part: int, layers: tuple[int, ...], marks: str) -> Chunk:
    return Chunk(pp_rank=rank, virtual=part, layers=layers, embedding="E" in marks, head="L" in marks, mtp="m" in marks)


def parse_layout(text: str, job: TrainingJob) -> list[tuple[tuple[int, ...], str]]:
    """Read a layout such as ``Et*3|(tt|)*6mL``: E embedding, t layer, m multi-token prediction, L loss, | next stage.

    Source: Megatron-LM@adc69db:megatron/core/transformer/pipeline_parallel_layer_layout.py:parse_str_to_list.
    """
    plain = text.replace("\\", "").replace(" ", "").replace(",", "")
    if len(plain) > 4 * MAX_STAGES or not re.fullmatch(r"[EtmL|()*0-9]+", plain):
        raise InputError(_("{text!r} is not a pipeline layout").format(text=text[:80]))
    for pattern in (r"\(([EtmL|*0-9]*)\)\*(\d{1,4})", r"([EtmL|])\*(\d{1,4})"):
        plain = re.sub(pattern, lambda match: match.group(1) * int(match.group(2)), plain)
    plain = re.sub(r"([EtmL|])\*(\d{1,4})", lambda match: match.group(1) * int(match.group(2)), plain)
    stages, at = [], 0
    for stage in plain.split("|"):
        number = stage.count("t")
        stages.append((tuple(range(at, at + number)), stage))
        at += number
    if at != len(job.model.layers):
        raise LayoutError(
            _("the pipeline layout places {placed} layers, the model has {layers}").format(
                placed=at, layers=len(job.model.layers)
            )
        )
    return stages


def layer_counts(job: TrainingJob, settings: Settings) -> list[int]:
    """Layers of each of the PP x VPP stages, in the order in which a token meets them.

    First and last stages may be given their own number; embedding and loss may each count as a layer.
    """
    pipeline, virtual = job.parallel.pipeline_parallel_size, job.parallel.virtual_pipeline_parallel_size
    layers = len(job.model.layers)
    if job.parallel.pipeline_layout:
        given = list(job.parallel.pipeline_layout)
        if sum(given) != layers or len(given) != pipeline * virtual:
            raise LayoutError(_("the pipeline layout does not place every layer on its stages"))
        return given
    pattern = settings.flags.get("hybrid-layer-pattern", "").split("/")[0]
    if "|" in pattern:
        return [len(stage) for stage in pattern.split("|")]
    if pipeline == 1:
        return [layers]
    first = settings.count("decoder-first-pipeline-num-layers", 0)
    last = settings.count("decoder-last-pipeline-num-layers", 0)
    if first or last:
        return _with_ends(layers, pipeline, virtual, first, last)
    extra_first = int(settings.on("account-for-embedding-in-pipeline-split"))
    extra_last = int(settings.on("account-for-loss-in-pipeline-split"))
    total, stages = layers + extra_first + extra_last, pipeline * virtual
    if total % stages:
        if settings.flags.get("native") == "true":
            raise LayoutError(
                _("{layers} layers cannot be divided over PP {pp} x VPP {vpp}").format(
                    layers=layers, pp=pipeline, vpp=virtual
                )
            )
        return [total // stages + (at < total % stages) for at in range(stages)]
    counts = [total // stages] * stages
    counts[0] -= extra_first
    counts[-1] -= extra_last
    return counts


def _with_ends(layers: int, pipeline: int, virtual: int, first: int, last: int) -> list[int]:
    ends = [rank for rank, number in ((0, first), (pipeline - 1, last)) if number]
    middle = pipeline - len(ends)
    rest = layers - first - last
    if middle <= 0 or rest < 0 or rest % (middle * virtual) or first % virtual or last % virtual:
        raise LayoutError(
            _("{layers} layers less {first} first and {last} last cannot be divided over the other stages").format(
                layers=layers, first=first, last=last
            )
        )
    per_rank = [rest // middle] * pipeline
    if first:
        per_rank[0] = first
    if last:
        per_rank[-1] = last
    return [per_rank[rank] // virtual for _part in range(virtual) for rank in range(pipeline)]
