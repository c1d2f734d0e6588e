"""What stays on a rank between steps: parameters, gradient buffers, master weights and optimizer moments.

Legend: P parameters of the rank, N ranks that share its optimizer states (data x context parallel, experts: theirs).
"""

from __future__ import annotations

from dataclasses import replace

from ullage.engines.megatron.blocks import placed_bytes
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.layout import Chunk, Groups
from ullage.engines.megatron.params import RankTensor, adapters, buffer_elements, chunk_tensors, layer_tensors
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.ledger import Certainty, Term, exact, ranged
from ullage.spec.training import TrainingJob
from ullage.units import MiB, tensor_bytes

BUFFER = "Megatron-LM@adc69db:megatron/core/distributed/param_and_grad_buffer.py:_ParamAndGradBuffer"
PLAIN = "Megatron-LM@adc69db:megatron/core/optimizer/optimizer.py:Float16OptimizerWithFloat16Params"
SHARDED = "Megatron-LM@adc69db:megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer"
#: Expert tensors of one shape that are placed one by one.
MAX_COPIES = 512
ALLOCATOR = "pytorch@2.9:c10/cuda/CUDACachingAllocator.cpp:should_split"


class States(Frozen):
    """The states of one rank.

    Attributes:
        terms: weights, gradients, master, moments and what the allocator rounds up.
        late_bytes: of these, what the first optimizer step allocates.
        step_only_bytes: of the gradients, the optimizer's fp32 copies, which ``zero_grad`` drops.
        host_bytes: states that offload keeps on the host.
        tensors: every parameter of the rank.
    """

    terms: tuple[Term, ...]
    late_bytes: int
    step_only_bytes: int
    host_bytes: int
    tensors: tuple[RankTensor, ...]


class _Part(Frozen):
    """Dense or expert parameters of one chunk: elements, in buffers, of one optimizer shard, frozen beside them."""

    elements: int
    buffered: int
    shard: int
    tensors: tuple[RankTensor, ...]
    frozen: int = 0


def states(job: TrainingJob, settings: Settings, parts: tuple[Chunk, ...], sizes: Groups) -> States:
    """Return the states of the rank that holds the chunks ``parts``."""
    found = [part for chunk in parts for part in _parts(job, settings, chunk, sizes)]
    tensors = tuple(tensor for part in found for tensor in part.tensors)
    weights = _weights(job, settings, found)
    fp8 = _fp8_weights(job, settings, found)
    grads = _gradients(job, settings, found)
    master, moments, late = _optimizer(job, settings, found)
    rounding = _rounding(job, settings, found)
    return States(
        terms=(weights, fp8, grads, master, moments, rounding),
        late_bytes=late,
        step_only_bytes=4 * _copied_gradients(job, settings, found),
        host_bytes=int(_state_bytes(job, found) * (1.0 - _kept_fraction(job, settings))),
        tensors=tensors,
    )


def _parts(job: TrainingJob, settings: Settings, chunk: Chunk, sizes: Groups) -> list[_Part]:
    tensors = chunk_tensors(job, chunk, sizes)
    instances = max(1, settings.count("num-distributed-optimizer-instances", 1))
    found = []
    for expert, ranks in ((False, sizes.data), (True, sizes.expert_data)):
        own = [tensor for tensor in tensors if tensor.expert is expert]
        if not own:
            continue
        frozen = 0
        if job.lora is not None:
            frozen, own = sum(tensor.num_elements for tensor in own), adapters(job, own)
        bucket = None
        if settings.overlap_grad_reduce and chunk.pp_rank == 0 and chunk.virtual == 0:
            bucket = settings.count("ddp-bucket-size", 0) or max(40_000_000, 1_000_000 * ranks)
        share = ranks // instances if ranks % instances == 0 else ranks
        buffered = buffer_elements(own, data=ranks, distributed=settings.distributed_optimizer, bucket=bucket)
        found.append(
            _Part(
                elements=sum(tensor.num_elements for tensor in own),
                buffered=buffered,
                shard=_shard(job, settings, own, buffered, share),
                tensors=tuple(own),
                frozen=frozen,
            )
        )
    return found


def _shard(job: TrainingJob, settings: Settings, own: list[RankTensor], buffered: int, share: int) -> int:
    """Elements whose optimizer states the fullest rank holds: 1/N, all, or whole tensors dealt out (``dist_muon``)."""
    if settings.distributed_optimizer:
        return -(-buffered // share)
    everything = sum(tensor.num_elements for tensor in own)
    if job.optimizer.startswith("dist_") and share > 1:
        return max(-(-everything // share), max(tensor.num_elements // tensor.copies for tensor in own))
    return everything


def _weights(job: TrainingJob, settings: Settings, parts: list[_Part]) -> Term:
    """Parameters in the compute format; FSDP keeps a shard.

    Formula: P * bytes, padded to buckets with the distributed optimizer.
    Source: Megatron-LM@adc69db:megatron/core/distributed/param_and_grad_buffer.py:_ParamAndGradBuffer (param_data).
    """
    elements = sum(part.buffered + part.frozen for part in parts)
    if job.parallel.zero_stage == 3:
        return exact(
            "weights",
            sum(tensor_bytes(part.shard, job.precision.params) for part in parts),
            formula=f"{elements} / N in {job.precision.params}",
            source="Megatron-LM@adc69db:megatron/core/distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py",
        )
    num_bytes = tensor_bytes(elements, job.precision.params)
    return exact("weights", num_bytes, formula=f"{elements} x {job.precision.params}", source=BUFFER)


def gathered(job: TrainingJob, parts: tuple[Chunk, ...], sizes: Groups) -> Term:
    """What Megatron-FSDP gathers: parameters outside layers and of two layers, and their gradients before they scatter.

    Formula: (embedding, head and norms + 2 x the largest layer) * (parameter bytes + gradient bytes).
    Source: Megatron-LM@d98e8a6:megatron/core/distributed/fsdp/src/megatron_fsdp/param_and_grad_buffer.py:
        AllGatherPipeline, GradReducePipeline.
    """
    if job.parallel.zero_stage != 3:
        return exact("gathered_layers", 0)
    kinds = {id(job.model.layers[index]): job.model.layers[index] for chunk in parts for index in chunk.layers}
    layer = max((sum(t.num_elements for t in layer_tensors(job, kind, sizes)) for kind in kinds.values()), default=0)
    root = sum(t.num_elements for chunk in parts for t in chunk_tensors(job, replace(chunk, layers=()), sizes))
    elements = root + 2 * layer
    num_bytes = tensor_bytes(elements, job.precision.params) + tensor_bytes(elements, job.precision.grads)
    return ranged("gathered_layers", num_bytes, low=num_bytes // 2, high=2 * num_bytes, formula="root + 2 layers")


def _fp8_weights(job: TrainingJob, settings: Settings, parts: list[_Part]) -> Term:
    """Quantised copies of the linear weights that FP8 training keeps: by row, and by column where a GEMM needs both.

    Formula: elements of linear weights x 2 (Hopper, or block scales), x 1 (Blackwell with one scale per tensor); with
        FP8 primary weights the copy by row is the parameter itself, which saves its 16 bits.
    Source: TransformerEngine@v2.8:transformer_engine/pytorch/module/base.py:get_weight_workspace.
    """
    recipe = job.precision.fp8_recipe
    elements = sum(t.num_elements for part in parts for t in part.tensors if t.linear and ".gate." not in t.name)
    if recipe is None or not elements:
        return exact("fp8_weights", 0)
    capability = job.machine.gpu.compute_capability or (9, 0)
    copies = 1 if capability >= (10, 0) and recipe in ("delayed", "tensorwise") else 2
    num_bytes = elements * copies
    scales = -(-4 * copies * elements // 128**2) if recipe == "blockwise" else 0
    if settings.fp8_param_gather:
        num_bytes -= elements * 2
    return ranged(
        "fp8_weights",
        num_bytes + scales,
        low=min(0, num_bytes),
        high=elements * 2 + scales,
        formula=f"{elements} x {copies}",
        source="TransformerEngine@v2.8:transformer_engine/pytorch/module/base.py",
    )


def _gradients(job: TrainingJob, settings: Settings, parts: list[_Part]) -> Term:
    """The gradient buffer in the reduction format (fp32 for bf16 training), plus fp32 copies the optimizer works on.

    Formula: P * bytes; + 4 * (P or shard) where gradients are 16 bit and master weights fp32: the copies live until the
        next ``zero_grad``.
    Source: Megatron-LM@adc69db:megatron/core/optimizer/optimizer.py:_copy_model_grads_to_main_grads.
    """
    grads = job.precision.grads
    elements = sum(part.shard if job.parallel.zero_stage == 3 else part.buffered for part in parts)
    num_bytes = tensor_bytes(elements, grads)
    formula = f"{elements} x {grads}"
    copies = _copied_gradients(job, settings, parts)
    if copies:
        num_bytes += 4 * copies
        formula += f" + {copies} x float32 for the optimizer"
    return exact("gradients", num_bytes, formula=formula, source=BUFFER)


def _copied_gradients(job: TrainingJob, settings: Settings, parts: list[_Part]) -> int:
    """Elements of fp32 gradient copies: where 16-bit gradients meet fp32 master weights."""
    if job.precision.grads == "float32" or settings.precision_aware or job.precision.master is None:
        return 0
    return sum(part.shard for part in parts)


def _state_bytes(job: TrainingJob, parts: list[_Part]) -> int:
    shard = sum(part.shard for part in parts)
    master = 0 if job.precision.master is None else tensor_bytes(shard, job.precision.master)
    return master + tensor_bytes(_moment_elements(job, parts), job.precision.moments)


def _optimizer(job: TrainingJob, settings: Settings, parts: list[_Part]) -> tuple[Term, Term, int]:
    """Master weights and moments, whole or one shard of N.

    Formula: master 4 (bytes of ``--main-params-dtype``) and two moments of 4 each per element of the shard; Muon one
        moment for matrices. Offloaded fractions stay on the host.
    Source: megatron/core/optimizer/distrib_optimizer.py:DistributedOptimizer.
    """
    source = SHARDED if settings.distributed_optimizer else PLAIN
    shard = sum(part.shard for part in parts)
    kept = _kept_fraction(job, settings)
    precision = job.precision
    master_bytes = 0 if precision.master is None else tensor_bytes(shard, precision.master)
    moment_elements = _moment_elements(job, parts)
    moments_bytes = tensor_bytes(moment_elements, precision.moments)
    master = exact("master_weights", int(master_bytes * kept), formula=f"{shard} x {precision.master}", source=source)
    moments = exact(
        "optimizer_moments",
        int(moments_bytes * kept),
        formula=f"{moment_elements} x {precision.moments}",
        source=source,
    )
    return master, moments, moments.bytes


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


def _moment_elements(job: TrainingJob, parts: list[_Part]) -> int:
    """Elements of all moments: Adam two, Muon one for hidden matrices and two for the rest, SGD one.

    Source: Megatron-LM@d98e8a6:megatron/core/optimizer/muon.py:get_megatron_muon_optimizer.
    """
    shard = sum(part.shard for part in parts)
    kind = job.optimizer.lower()
    if kind in ("sgd", "lion"):
        return shard
    if "muon" in kind:
        matrices = sum(t.num_elements for part in parts for t in part.tensors if t.linear)
        everything = sum(part.elements for part in parts)
        dealt_out = any(part.shard < part.elements for part in parts) and kind.startswith("dist_")
        return 2 * shard if dealt_out else 2 * shard - matrices * shard // max(1, everything)
    return 2 * shard


def _rounding(job: TrainingJob, settings: Settings, parts: list[_Part]) -> Term:
    """What the caching allocator adds: a rest of up to 1 MiB stays with the block of a tensor over 1 MiB.

    Formula: expected, tensors placed one after the other in a fresh pool; low 0, high 1 MiB more for each moment, which
        is cut from blocks that activations left.
    """
    expected, count = 0, 0
    buffers = [part.buffered for part in parts]
    if settings.distributed_optimizer:
        weights = [tensor_bytes(size, job.precision.params) for size in buffers]
        order = weights + [tensor_bytes(size, job.precision.grads) for size in buffers]
        order += [tensor_bytes(part.shard // max(1, len(part.tensors)), "float32") for part in parts] * 3
        expected = placed_bytes(order[: 2 * len(parts)]) - sum(order[: 2 * len(parts)])
        count = sum(3 * MiB < 12 * part.shard // max(1, len(part.tensors)) for part in parts) * 4 + 4
    else:
        sizes = [
            t.num_elements // t.copies
            for part in parts
            for t in part.tensors
            for _copy in range(min(t.copies, MAX_COPIES))
        ]
        params = [tensor_bytes(size, job.precision.params) for size in sizes]
        grads = [tensor_bytes(size, job.precision.grads) for size in buffers]
        master = [4 * size for size in sizes] if job.precision.master else []
        moments = [4 * size for size in sizes for _moment in range(2)]
        order = params + grads + master
        expected = placed_bytes(order) - sum(order) + placed_bytes(moments) - sum(moments)
        count = 4 + sum(4 * size > MiB for size in sizes) * 2
    return ranged(
        "allocator_rounding",
        max(0, expected),
        low=0,
        high=expected + count * MiB // 2,
        formula=f"{count} tensors over 1 MiB",
        source=ALLOCATOR,
        certainty=Certainty.MODELLED,
    )
