"""The catalogue for training, layouts: how the step is spread over GPUs, and what lives on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from ullage.i18n import _
from ullage.plan.advice import costs
from ullage.plan.advice.change import Change, Cost
from ullage.plan.advice.typed import typed
from ullage.spec.model import MoEFFN
from ullage.spec.training import Recompute, TrainingJob
from ullage.units import cdiv, dtype_bytes

#: Engines that spread a step along these axes.
SPLITTING = ("megatron", "torchtitan")


def layouts(job: TrainingJob) -> Iterator[Change]:
    """Yield changes of how a step is spread."""
    parallel = job.parallel
    if parallel.tensor_parallel_size > 1 and not parallel.sequence_parallel and job.engine == "megatron":
        yield _spread(job, "sp", _("sequence parallel"), costs.SEQUENCE_PARALLEL, "--sp", sequence_parallel=True)
    yield from _sharding(job)
    yield from _chunks(job)
    yield from _blocks(job)
    if job.engine in SPLITTING:
        yield from _axes(job)


def _spread(
    job: TrainingJob, key: str, change: str, cost: Cost, flags: str, *, passes: int = 1, **fields: Any
) -> Change:
    """Return a change of the layout; ``passes`` times as many passes keep the global batch."""
    name = {"sp": "sequence_parallel"}.get(key, key)
    size = next((value for value in fields.values() if not isinstance(value, bool)), 0)
    more = f" --grad-accum {job.grad_accum * passes}" if passes > 1 else ""

    def apply(job: TrainingJob) -> TrainingJob:
        return replace(job, parallel=replace(job.parallel, **fields), grad_accum=job.grad_accum * passes)

    words = typed(job, name, size=size) if isinstance(size, int) else typed(job, name)
    return Change(key=key.partition(".")[0], change=change, cost=cost, flags=flags + more, typed=words, apply=apply)


def _sharding(job: TrainingJob) -> Iterator[Change]:
    """Yield sharded states: ZeRO, Megatron's distributed optimizer, FSDP."""
    parallel = job.parallel
    if parallel.data_parallel_size * parallel.context_parallel_size == 1:
        return
    cheap, dear = costs.SHARDED_STATES, costs.SHARDED_PARAMETERS
    if parallel.fsdp == "shard_grad_op" or (parallel.fsdp == "hybrid" and job.engine.startswith("fsdp")):
        change = _("parameters sharded as well")
        yield _spread(job, "fsdp", change, dear, "--fsdp full_shard", fsdp="full_shard", shard_group_size=None)
    if parallel.fsdp is not None:
        return
    names = {1: _("optimizer states sharded"), 2: _("gradients sharded as well"), 3: _("parameters sharded as well")}
    most = {"megatron": 1, "deepspeed": 3, "hf_trainer": 3, "ddp": 1}.get(job.engine, 0)
    for stage in range(parallel.zero_stage + 1, most + 1):
        cost = dear if stage == 3 else cheap
        yield _spread(job, f"zero.{stage}", names[stage], cost, f"--zero {stage}", zero_stage=stage)
    if job.engine == "hf_trainer" and parallel.zero_stage == 0:
        change = _("parameters, gradients and states sharded")
        yield _spread(job, "fsdp", change, dear, "--fsdp full_shard", fsdp="full_shard")


def _chunks(job: TrainingJob) -> Iterator[Change]:
    parallel = job.parallel
    if parallel.virtual_pipeline_parallel_size > 1 and parallel.schedule in (None, "interleaved"):
        cost = costs.pipeline_bubble(job, parallel.pipeline_parallel_size, job.grad_accum)
        change = _("one chunk of the model per pipeline stage: fewer passes in flight")
        yield _spread(
            job, "vpp", change, cost, "--vpp 1 --schedule 1f1b", virtual_pipeline_parallel_size=1, schedule="1f1b"
        )


def _blocks(job: TrainingJob) -> Iterator[Change]:
    """Yield Megatron-LM's recompute of some layers of each stage."""
    if job.engine != "megatron" or job.recompute.kind == "full":
        return
    stages = job.parallel.pipeline_parallel_size * job.parallel.virtual_pipeline_parallel_size
    layers = cdiv(len(job.model.layers), stages)
    if layers < 2:
        return
    count = cdiv(layers, 2)
    some = Recompute(kind="full", method="block", num_layers=count)
    yield Change(
        key="recompute",
        change=_("recompute of {count} layers of each stage").format(count=count),
        cost=costs.HALF_RECOMPUTE,
        flags="",
        typed=typed(job, "recompute.block", count=count),
        apply=lambda job: replace(job, recompute=some),
    )


def _axes(job: TrainingJob) -> Iterator[Change]:
    """Yield twice the ranks along one axis; data parallelism gives them, and passes keep the global batch."""
    parallel, machine = job.parallel, job.machine
    half, left = divmod(parallel.data_parallel_size, 2)
    size = parallel.expert_parallel_size * 2
    mixture = any(isinstance(block, MoEFFN) for layer in job.model.layers for block in layer.ffns)
    if mixture and size <= parallel.data_parallel_size * parallel.tensor_parallel_size:
        change = _("experts over {size} GPUs").format(size=size)
        yield _spread(job, "ep", change, costs.wider("expert"), f"--ep {size}", expert_parallel_size=size)
    if left or half == 0:
        return
    size = parallel.context_parallel_size * 2
    yield _spread(
        job, "cp", _("each sequence over {size} GPUs").format(size=size), costs.wider("context"),
        f"--cp {size} --dp {half}", passes=2, context_parallel_size=size, data_parallel_size=half,
    )  # fmt: skip
    size = parallel.tensor_parallel_size * 2
    if size <= machine.gpus_per_node:
        yield _spread(
            job, "tp", _("tensor parallel over {size} GPUs").format(size=size), costs.wider("tensor"),
            f"--tp {size} --sp --dp {half}", passes=2, tensor_parallel_size=size, sequence_parallel=True,
            data_parallel_size=half,
        )  # fmt: skip
    size = parallel.pipeline_parallel_size * 2
    if parallel.pipeline_layout is None and size <= len(job.model.layers):
        bubble = costs.pipeline_bubble(job, size, job.grad_accum * 2, parallel.virtual_pipeline_parallel_size)
        yield _spread(
            job, "pp", _("{size} pipeline stages").format(size=size), bubble, f"--pp {size} --dp {half}", passes=2,
            pipeline_parallel_size=size, data_parallel_size=half, schedule=parallel.schedule or "1f1b",
        )  # fmt: skip


def offloads(job: TrainingJob, num_active: int) -> Iterator[Change]:
    """Yield what can live on the host."""
    offloaded = dict(job.offload)
    engines = {"optimizer": ("megatron", "deepspeed"), "params": ("deepspeed", "fsdp1", "fsdp2", "torchtitan")}
    for what, known in engines.items():
        if offloaded.get(what) or job.engine not in known:
            continue
        pairs = (*job.offload, (what, "cpu"))
        if what == "params" and job.engine == "deepspeed":
            pairs = tuple(dict([*pairs, ("optimizer", "cpu")]).items())
        names = {"optimizer": _("optimizer states on the host"), "params": _("parameters and states on the host")}
        yield Change(
            key=f"offload_{what}",
            change=names[what],
            cost=costs.over_pcie(job, _moved(job), num_active),
            flags=" ".join(f"--offload {name}={where}" for name, where in pairs if name not in offloaded),
            typed=typed(job, f"offload.{what}"),
            apply=_offloading(pairs),
        )


def _offloading(pairs: tuple[tuple[str, str], ...]) -> Callable[[TrainingJob], TrainingJob]:
    return lambda job: replace(job, offload=tuple(dict([*job.offload, *pairs]).items()))


def _moved(job: TrainingJob) -> float:
    """Return the bytes over PCIe in a step per rank: gradients down, parameters up, of the rank's own share."""
    from ullage.account.parameters import count

    parallel, precision = job.parallel, job.precision
    split = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
    if parallel.zero_stage or parallel.fsdp:
        split *= parallel.data_parallel_size * parallel.context_parallel_size
    each = float(dtype_bytes(precision.grads)) + float(dtype_bytes(precision.params))
    return count(job.model).total * each / max(1, split)
