"""What stays on a rank between steps: parameters, gradient buffers, master weights and optimizer moments.

Legend: P parameters of the rank, N ranks that share its optimizer states (data x context parallel, experts: theirs).
"""

from __future__ import annotations

from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.holdings import Kind, Runs, Side, buffered
from ullage.engines.megatron.layout import Chunk, Groups
from ullage.engines.megatron.rests import rest_of, tensors_apart
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.ledger import Certainty, Term, exact, ranged
from ullage.numeric import larger, share, shown, smaller, some, where, whole
from ullage.spec.training import TrainingJob
from ullage.units import MiB, cdiv, tensor_bytes

BUFFER = "Megatron-LM@adc69db:megatron/core/distributed/param_and_grad_buffer.py:_ParamAndGradBuffer"
PLAIN = "Megatron-LM@adc69db:megatron/core/optimizer/optimizer.py:Float16OptimizerWithFloat16Params"
SHARDED = "Megatron-LM@adc69db:megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer"
ALLOCATOR = "pytorch@2.9:c10/cuda/CUDACachingAllocator.cpp:should_split"


class States(Frozen):
    """The states of one rank.

    Attributes:
        terms: weights, gradients, master, moments and what the allocator rounds up.
        step_only_bytes: of the gradients, the optimizer's fp32 copies, which ``zero_grad`` drops.
        host_bytes: states that offload keeps on the host.
    """

    terms: tuple[Term, ...]
    step_only_bytes: int
    host_bytes: int


#: What a chunk holds: kinds in module order, with how often each comes in a row.
Held = tuple[tuple[Kind, int], ...]


def states(
    job: TrainingJob, settings: Settings, parts: tuple[Chunk, ...], held: tuple[Held, ...], sizes: Groups
) -> States:
    """Return the states of the rank whose chunks ``parts`` hold ``held``."""
    found = [
        side for chunk, kinds in zip(parts, held, strict=True) for side in _sides(job, settings, chunk, kinds, sizes)
    ]
    terms = (
        _weights(job, settings, found),
        _fp8_weights(job, settings, found),
        _gradients(job, settings, found),
        *_optimizer(job, settings, found),
        rounding(job, settings, found),
    )
    return States(
        terms=terms,
        step_only_bytes=4 * _copied_gradients(job, settings, found),
        host_bytes=whole(_state_bytes(job, settings, found) * (1.0 - _kept_fraction(job, settings))),
    )


def _sides(job: TrainingJob, settings: Settings, chunk: Chunk, held: Held, sizes: Groups) -> list[Side]:
    instances = max(1, settings.count("num-distributed-optimizer-instances", 1))
    found = []
    for name, ranks in (("dense", sizes.data), ("expert", sizes.expert_data)):
        runs = tuple((getattr(kind, name), times) for kind, times in held)
        runs = tuple((one, times) for one, times in runs if times and (one.num_tensors or some(one.frozen)))
        if not runs:
            continue
        bucket = None
        if settings.overlap_grad_reduce and chunk.pp_rank == 0 and chunk.virtual == 0:
            bucket = settings.count("ddp-bucket-size", 0) or larger(40_000_000, 1_000_000 * ranks)
        granule = 2**16 if settings.on("ddp-pad-buckets-for-high-nccl-busbw") else 128
        size = buffered(runs, data=ranks, distributed=settings.distributed_optimizer, bucket=bucket, granule=granule)
        share = where(ranks % instances == 0, ranks // instances, ranks)
        found.append(Side(runs=runs, buffered=size, shard=_shard(job, settings, runs, size, share)))
    return found


def _shard(job: TrainingJob, settings: Settings, runs: Runs, size: int, ranks: int) -> int:
    """Elements whose optimizer states the fullest rank holds: 1/N, all, or whole tensors dealt out (``dist_muon``)."""
    if settings.distributed_optimizer:
        return cdiv(size, ranks)
    everything = sum(holding.elements * times for holding, times in runs)
    if not job.optimizer.startswith("dist_"):
        return everything
    dealt = cdiv(everything, ranks)
    for holding, _times in runs:
        dealt = larger(dealt, holding.largest)
    return where(ranks > 1, dealt, everything)


def _weights(job: TrainingJob, settings: Settings, parts: list[Side]) -> Term:
    """Parameters in the compute format; FSDP keeps a shard.

    Formula: P * bytes, padded to buckets with the distributed optimizer.
    Source: Megatron-LM@adc69db:megatron/core/distributed/param_and_grad_buffer.py:_ParamAndGradBuffer (param_data).
    """
    elements = sum(part.buffered + part.sum("frozen") for part in parts)
    if job.parallel.zero_stage == 3:
        return exact(
            "weights",
            sum(tensor_bytes(part.shard, job.precision.params) for part in parts),
            formula=f"{shown(elements)} / N in {job.precision.params}",
            source="Megatron-LM@adc69db:megatron/core/distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py",
        )
    num_bytes = tensor_bytes(elements, job.precision.params)
    return exact("weights", num_bytes, formula=f"{shown(elements)} x {job.precision.params}", source=BUFFER)


def gathered(job: TrainingJob, held: tuple[Held, ...]) -> Term:
    """What Megatron-FSDP gathers: parameters outside layers and of two layers, and their gradients before they scatter.

    Formula: (embedding, head and norms + 2 x the largest layer) * (parameter bytes + gradient bytes); where only
        gradients are shared (``optim_grads``), the gradients alone.
    Source: Megatron-LM@d98e8a6:megatron/core/distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py:
        AllGatherPipeline, GradReducePipeline.
    """
    if job.parallel.zero_stage < 2:
        return exact("gathered_layers", 0)
    layer = 0
    for kind, _times in (run for kinds in held for run in kinds[:-1]):
        layer = larger(layer, kind.elements)
    elements = sum(kinds[-1][0].elements for kinds in held) + 2 * layer
    num_bytes = tensor_bytes(elements, job.precision.grads)
    if job.parallel.zero_stage == 3:
        num_bytes = num_bytes + tensor_bytes(elements, job.precision.params)
    return ranged("gathered_layers", num_bytes, low=num_bytes // 2, high=2 * num_bytes, formula="root + 2 layers")


def _fp8_weights(job: TrainingJob, settings: Settings, parts: list[Side]) -> Term:
    """Quantised copies of the linear weights that FP8 training keeps: by row, and by column where a GEMM needs both.

    Formula: elements of linear weights x 2 (Hopper, or block scales), x 1 (Blackwell with one scale per tensor); with
        FP8 primary weights the copy by row is the parameter itself, which saves its 16 bits.
    Source: TransformerEngine@v2.8:transformer_engine/pytorch/module/base.py:get_weight_workspace.
    """
    recipe = job.precision.fp8_recipe
    elements = sum(part.sum("quantised") for part in parts)
    if recipe is None or not some(elements):
        return exact("fp8_weights", 0)
    capability = job.machine.gpu.compute_capability or (9, 0)
    copies = 1 if capability >= (10, 0) and recipe in ("delayed", "tensorwise") else 2
    num_bytes = elements * copies
    scales = -(-4 * copies * elements // 128**2) if recipe == "blockwise" else 0
    if recipe == "mxfp8":
        scales = copies * elements // 32
    if settings.fp8_param_gather:
        num_bytes -= elements * 2
    return ranged(
        "fp8_weights",
        num_bytes + scales,
        low=smaller(0, num_bytes),
        high=elements * 2 + scales,
        formula=f"{shown(elements)} x {copies}" + (" + scales" if some(scales) else ""),
        source="TransformerEngine@v2.8:transformer_engine/pytorch/module/base.py",
    )


def _gradients(job: TrainingJob, settings: Settings, parts: list[Side]) -> Term:
    """The gradient buffer in the reduction format (fp32 for bf16 training), plus fp32 copies the optimizer works on.

    Formula: P * bytes; + 4 * (P or shard) where gradients are 16 bit and master weights fp32: the copies live until the
        next ``zero_grad``.
    Source: Megatron-LM@adc69db:megatron/core/optimizer/optimizer.py:_copy_model_grads_to_main_grads.
    """
    grads = job.precision.grads
    elements = sum(part.shard if job.parallel.zero_stage >= 2 else part.buffered for part in parts)
    num_bytes = tensor_bytes(elements, grads)
    formula = f"{shown(elements)} x {grads}"
    copies = _copied_gradients(job, settings, parts)
    if some(copies):
        num_bytes = num_bytes + 4 * copies
        formula += f" + {shown(copies)} x float32 for the optimizer"
    return exact("gradients", num_bytes, formula=formula, source=BUFFER)


def _copied_gradients(job: TrainingJob, settings: Settings, parts: list[Side]) -> int:
    """Elements of fp32 gradient copies: where 16-bit gradients meet fp32 master weights."""
    if job.precision.grads == "float32" or settings.decoupled_gradients or job.precision.master is None:
        return 0
    return sum(part.shard for part in parts)


def _state_bytes(job: TrainingJob, settings: Settings, parts: list[Side]) -> int:
    master = 0 if job.precision.master is None else tensor_bytes(sum(part.shard for part in parts), settings.master)
    return master + _moment_bytes(job, settings, parts)


def _moment_bytes(job: TrainingJob, settings: Settings, parts: list[Side]) -> int:
    """Both moments, which may differ in format (``--exp-avg-dtype``, ``--exp-avg-sq-dtype``)."""
    elements, first, second = _moment_elements(job, parts), job.precision.moments, settings.second_moment
    if first == second:
        return tensor_bytes(elements, first)
    shard = sum(part.shard for part in parts)
    return tensor_bytes(shard, first) + tensor_bytes(elements - shard, second)


def _optimizer(job: TrainingJob, settings: Settings, parts: list[Side]) -> tuple[Term, Term]:
    """Master weights and moments, whole or one shard of N.

    Formula: master 4 (bytes of ``--main-params-dtype``; 2 where only what bf16 parameters lack is kept) and two moments
        of 4 each per element of the shard; Muon one moment for matrices. Offloaded fractions stay on the host.
    Source: megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer.
    """
    source = SHARDED if settings.distributed_optimizer else PLAIN
    shard = sum(part.shard for part in parts)
    kept = _kept_fraction(job, settings)
    precision = job.precision
    master_bytes = 0 if precision.master is None else tensor_bytes(shard, settings.master)
    formats = " and ".join(dict.fromkeys((precision.moments, settings.second_moment)))
    master = exact(
        "master_weights", whole(master_bytes * kept), formula=f"{shown(shard)} x {settings.master}", source=source
    )
    moments = exact(
        "optimizer_moments",
        whole(_moment_bytes(job, settings, parts) * kept),
        formula=f"{shown(_moment_elements(job, parts))} x {formats}",
        source=source,
    )
    return master, moments


def _kept_fraction(job: TrainingJob, settings: Settings) -> float:
    if settings.on("optimizer-cpu-offload"):
        return 1.0 - _fraction(settings.flags.get("optimizer-offload-fraction", ""))
    return 0.0 if ("optimizer", "cpu") in job.offload else 1.0


def _fraction(text: str) -> float:
    """Return the offloaded fraction: all where it is not given.

    Raises:
        InputError: not a number from 0 to 1.
    """
    try:
        value = float(text or 1.0)
    except ValueError:
        value = -1.0
    if not 0.0 <= value <= 1.0:
        raise InputError(
            _("--optimizer-offload-fraction needs a number from 0 to 1, not {text!r}").format(text=text[:40])
        )
    return value


def _moment_elements(job: TrainingJob, parts: list[Side]) -> int:
    """Elements of all moments: Adam two, Muon one for hidden matrices and two for the rest, SGD one.

    Source: Megatron-LM@d98e8a6:megatron/core/optimizer/muon.py:get_megatron_muon_optimizer.
    """
    shard = sum(part.shard for part in parts)
    kind = job.optimizer.lower()
    if kind in ("sgd", "lion"):
        return shard
    if "muon" in kind:
        matrices = sum(part.sum("linear") for part in parts)
        everything = sum(part.sum("elements") for part in parts)
        dealt_out = sum(1 * (part.shard < part.sum("elements")) for part in parts) * kind.startswith("dist_")
        return 2 * shard - where(dealt_out > 0, 0, share(matrices, shard, larger(1, everything)))
    return 2 * shard


def rounding(job: TrainingJob, settings: Settings, parts: list[Side]) -> Term:
    """What the caching allocator adds: a rest of up to 1 MiB stays with the block of a tensor over 1 MiB.

    Formula: expected, tensors placed one after the other in a fresh pool; low 0, high 1 MiB more for each moment, which
        is cut from blocks that activations left.
    """
    buffers = [tensor_bytes(part.buffered, job.precision.params) for part in parts]
    buffers += [tensor_bytes(part.buffered, job.precision.grads) for part in parts]
    if settings.distributed_optimizer:
        expected = rest_of(buffers)
        count = sum(1 * (3 * MiB < 12 * part.shard // max(1, part.sum("num_tensors"))) for part in parts) * 4 + 4
    else:
        expected, count = tensors_apart(job, parts, buffers[len(parts) :])
    return ranged(
        "allocator_rounding",
        larger(0, expected),
        low=0,
        high=expected + count * MiB // 2,
        formula=f"{shown(count)} tensors over 1 MiB",
        source=ALLOCATOR,
        certainty=Certainty.MODELLED,
    )
