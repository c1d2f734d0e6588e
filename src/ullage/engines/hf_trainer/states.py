"""What lies on the GPU between two steps: frozen base, trained weights, optimizer states, library workspaces."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

from ullage.account.gradients import gradients_term
from ullage.account.lora import adapter_parameters, copied_parameters
from ullage.account.optimizer import Trained, optimizer_terms
from ullage.account.parameters import Placed, Role, model_parameters
from ullage.account.projected import DEFAULT_RANK
from ullage.account.sharding import RankShare, whole
from ullage.account.weights import weights_term
from ullage.engines.hf_trainer import experts
from ullage.engines.hf_trainer.adapted import beside_weights, idle_gradients
from ullage.engines.hf_trainer.defaults import Recipe
from ullage.errors import InputError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.ledger import Term, exact, ranged, total
from ullage.spec import model as spec
from ullage.spec.training import TrainingJob
from ullage.units import MiB, WeightFormat, dtype_bytes

#: Source: bitsandbytes@0.43.3:functional.py:quantize_4bit (blocks of 64, absmax fp32; nested: 8-bit absmax with one
#: fp32 per 256 blocks); arXiv:2305.14314 sec. 3 (double quantisation).
NF4 = WeightFormat(name="nf4 double", dtype="int4", block=(1, 64), scale_dtype="uint8", scales_per_scale=256)
INT8 = WeightFormat(name="bnb int8", dtype="int8", block=(1, 0), scale_dtype="float32")
#: Source: AutoGPTQ@0.7.1:auto_gptq/nn_modules/qlinear (group 128, fp16 scales, packed 4-bit zeros, int32 g_idx).
GPTQ = WeightFormat(
    name="gptq int4", dtype="int4", block=(1, 128), scale_dtype="float16", zero_point_dtype="int4", column_index_bytes=4
)
#: What the format may be instead, where a job says no more than its name.
UNSTATED = {
    "nf4": replace(NF4, name="nf4", scale_dtype="float32", scales_per_scale=0),
    "gptq": replace(GPTQ, name="gptq int4 per row", block=(1, 0)),
}
BASE_FORMATS = {"nf4": NF4, "fp4": NF4, "int8": INT8, "gptq": GPTQ}


class States(Frozen):
    """What stays on the GPU.

    ``weights`` of the base and ``adapters``, with what a method holds ``beside``; ``trained``: what the optimizer works
    on; ``trained_dtype``: its dtype;
    ``copies``: modules trained in full beside adapters, in the base's dtype.
    """

    weights: Term
    adapters: Term
    beside: Term
    trained: Trained
    trained_dtype: str
    copies: Trained
    gradients: Term
    optimizer: Term
    buckets: Term
    workspaces: Term


def states(job: TrainingJob, recipe: Recipe) -> States:
    """Return what stays on the GPU under a job."""
    lora = job.lora
    copies = copied_parameters(job.model, lora) if lora is not None else Trained(tensors=())
    if lora is not None:
        trained, dtype, grads, moments = (adapter_parameters(job.model, lora), *(recipe.adapters.dtype,) * 3)
    else:
        trained = replace(full_parameters(job.model), rank=int(dict(job.flags).get("optim_rank", DEFAULT_RANK)))
        dtype = job.precision.params
        grads, moments = job.precision.grads, job.precision.moments
    base = job.precision.compute
    grad_terms = _both(
        "gradients",
        gradients_term(trained, dtype=grads),
        gradients_term(copies, dtype=base) if copies.tensors else None,
    )
    if idle := idle_gradients(job):
        grad_terms = total("gradients", (grad_terms, exact("idle_gradients", idle)))
    return States(
        weights=_base_weights(job, recipe),
        adapters=_adapters(trained, dtype, copies, base) if lora is not None else exact("adapters", 0),
        beside=beside_weights(job, trained),
        trained=trained,
        trained_dtype=dtype,
        copies=copies,
        gradients=grad_terms,
        optimizer=_both(
            "optimizer",
            optimizer_terms(
                job.optimizer, trained, moments=moments, params=dtype, master=None if lora else job.precision.master
            ),
            optimizer_terms(job.optimizer, copies, moments=base, params=base, master=None) if copies.tensors else None,
        ),
        buckets=_buckets(job, grad_terms),
        workspaces=workspaces(job),
    )


def _buckets(job: TrainingJob, gradients: Term) -> Term:
    """Return DDP's buckets: a copy of all gradients from the start on, as they are not views of each other.

    Source: torch@2.13.0:torch/csrc/distributed/c10d/reducer.cpp:Reducer.initialize_buckets; accelerate@1.0.1:utils/
        dataclasses.py:DistributedDataParallelKwargs (gradient_as_bucket_view False).
    """
    parallel = job.parallel
    plain = parallel.data_parallel_size > 1 and parallel.fsdp is None and not parallel.zero_stage
    return exact(
        "ddp_buckets",
        gradients.bytes if plain else 0,
        formula="one copy of the gradients",
        source="torch@2.13.0:torch/csrc/distributed/c10d/reducer.cpp:Reducer.initialize_buckets",
    )


def _adapters(trained: Trained, dtype: str, copies: Trained, base: str) -> Term:
    """Return the adapters' weights, and the full copies of modules trained beside them."""
    size = int(trained.num_elements * dtype_bytes(dtype))
    found = exact("adapters", size, formula=f"{trained.num_elements:,} x {dtype}", source="arXiv:2106.09685")
    if not copies.tensors:
        return found
    full = int(copies.num_elements * dtype_bytes(base))
    copy = exact("trained_copies", full, formula=f"{copies.num_elements:,} x {base}")
    return _both("adapters", found, copy)


def _both(name: str, first: Term, second: Term | None) -> Term:
    return first if second is None else total(name, (first, second), source=first.source)


@lru_cache(maxsize=64)
def full_parameters(model: spec.Model) -> Trained:
    """Return every trained tensor of a model: tied embeddings once, without MTP modules and towers."""
    tensors: dict[tuple[int, ...], int] = {}
    for placed in decoder_parameters(model):
        shape = placed.parameter.shape
        tensors[shape] = tensors.get(shape, 0) + placed.parameter.copies
    return Trained(tensors=tuple(tensors.items()), frame=frozenset({(model.vocab_size, model.hidden_size)}))


def decoder_parameters(model: spec.Model) -> list[Placed]:
    """Return the parameters that a causal language model class of transformers trains."""
    return [
        placed
        for placed in model_parameters(model)
        if placed.section not in ("mtp", "tower") and not placed.parameter.buffer
    ]


def workspaces(job: TrainingJob) -> Term:
    """Return the cuBLAS workspaces: one for the main thread, one for the thread of the backward pass.

    Formula: 2 x (2 x 4 MiB + 8 x 16 KiB), from compute capability 9.0 on 2 x 32 MiB.
    Source: torch@2.4.1:aten/src/ATen/cuda/CublasHandlePool.cpp:parseChosenWorkspaceSize.
    Known error: none on A100 (published bytes after training, docs/training.md).
    """
    capability = job.machine.gpu.compute_capability or (8, 0)
    one = 32 * MiB if capability >= (9, 0) else 2 * 4096 * 1024 + 8 * 16 * 1024
    return ranged(
        "cublas_workspaces",
        2 * one,
        low=one,
        high=2 * one,
        formula="2 threads",
        source="torch@2.4.1:aten/src/ATen/cuda/CublasHandlePool.cpp:parseChosenWorkspaceSize",
    )


def base_quantization(job: TrainingJob) -> spec.Quantization | None:
    """Return how the frozen base is stored, None when it is not quantised."""
    scheme = job.base_quantization
    if scheme not in BASE_FORMATS:
        return None
    return spec.Quantization(
        method=scheme, rules=(*wide_experts(job), spec.QuantRule(pattern="", format=_base_format(job, scheme)))
    )


def _base_format(job: TrainingJob, scheme: str) -> WeightFormat:
    """Return the format of a base; a job may state GPTQ's group size (flag ``gptq_group_size``, 0: no groups)."""
    stated = dict(job.flags).get("gptq_group_size", "")
    if scheme == "gptq" and stated.isdigit():
        return replace(GPTQ, block=(1, int(stated)))
    return BASE_FORMATS[scheme]


def wide_experts(job: TrainingJob) -> tuple[spec.QuantRule, ...]:
    """Return the rule that leaves stacked experts as they are, where it applies."""
    return (spec.QuantRule(pattern=experts.ROUTED, format=None),) if experts.stay_wide(job) else ()


def _base_weights(job: TrainingJob, recipe: Recipe) -> Term:
    share = replace(whole(job.model), mtp=False, towers=False)
    scheme = job.base_quantization
    if scheme is None:
        return weights_term(job.model, share, quantization=None, dtype=job.precision.params)
    if scheme not in BASE_FORMATS:
        raise InputError(
            _("unknown quantisation of a frozen base {scheme!r}").format(scheme=scheme[:40]),
            remedy=_("known are {known}").format(known=", ".join(BASE_FORMATS)),
        )
    base = weights_term(job.model, share, quantization=base_quantization(job), dtype=job.precision.compute)
    if scheme in UNSTATED and "gptq_group_size" not in dict(job.flags):
        base = _unstated(job, share, base, UNSTATED[scheme])
    widened = _widened_bytes(job, recipe)
    if not widened:
        return base
    stacks = int(experts.widened_elements(job) * (4 - dtype_bytes(job.precision.compute)))
    fp32 = ranged("fp32_experts", stacks, low=0, high=stacks, formula="2 bytes more per element of stacked experts")
    extra = ranged(
        "fp32_norms_and_biases",
        widened,
        low=0,
        high=widened,
        formula="2 bytes more per element",
        source="peft@0.13.2:utils/other.py:prepare_model_for_kbit_training; trl@0.11.4:trainer/utils.py:"
        "peft_module_casting_to_bf16",
    )
    more = (extra, fp32) if stacks else (extra,)
    return total("weights", (*(base.children or (base,)), *more), source=base.source)


def _unstated(job: TrainingJob, share: RankShare, base: Term, other: WeightFormat) -> Term:
    """Return the weights with the range of what a job does not state: nested scales of nf4, group size of GPTQ."""
    rules = (*wide_experts(job), spec.QuantRule(pattern="", format=other))
    quantization = spec.Quantization(method=other.name, rules=rules)
    size = weights_term(job.model, share, quantization=quantization, dtype=job.precision.compute).bytes
    return ranged("weights", base.bytes, low=size, high=size, formula=base.formula, source=base.source)


def _widened_bytes(job: TrainingJob, recipe: Recipe) -> int:
    """Return what fp32 norms and biases take more: everything is cast up, embeddings and head back down."""
    if not recipe.norms_fp32:
        return 0
    wide = 4 - dtype_bytes(job.precision.compute)
    small = (one.parameter for one in decoder_parameters(job.model) if one.parameter.role in (Role.NORM, Role.BIAS))
    return int(sum(_elements(parameter.shape) * parameter.copies for parameter in small) * wide)


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
