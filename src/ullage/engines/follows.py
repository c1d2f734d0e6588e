"""What each framework's rules follow of a job. The rest is refused: a setting passed over would be a wrong answer.

A setting that takes no memory by itself (a schedule without a pipeline, ZeRO on one GPU) is no reason to refuse.
"""

from __future__ import annotations

from collections.abc import Iterator

from ullage.account.optimizer import rule_name
from ullage.account.projected import PROJECTIONS
from ullage.errors import InputError, LayoutError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec.model import MoEFFN
from ullage.spec.training import TrainingJob, TrainingParallel

ADAM = frozenset({"adamw", "adam"})
PLAIN_OPTIMIZERS = ADAM | {"sgd"}
#: Those whose states are values of each element, so that a flat shard has them whole.
BY_ELEMENT = PLAIN_OPTIMIZERS | {"sgd_momentum", "lion", "adamw_8bit", "lion_8bit", "adamw_4bit"}
FULLY_SHARDED = frozenset({"full_shard", "shard_grad_op", "hybrid"})


class Follows(Frozen):
    """What the rules of one framework take account of.

    Attributes:
        splits: of tensor, sequence, context, pipeline, virtual, expert and expert_tensor parallelism.
        zero_stages, fsdp: ways to shard.
        optimizers: by name, None: every one that :mod:`ullage.account.optimizer` knows.
        impls: whether fused, foreach and for_loop are told apart.
        attention, losses: kernels; flash and sdpa keep the same.
        adapters, offload, compile: as in the job; methods: of PEFT other than LoRA and DoRA.
        base_quantizations: of a frozen base, None: all that the rules' own reading knows.
        fp8: recipes of products in 8 or 4 bits.
        evaluation: with a batch of its own.
    """

    splits: frozenset[str] = frozenset()
    zero_stages: frozenset[int] = frozenset()
    fsdp: frozenset[str] = frozenset()
    optimizers: frozenset[str] | None = PLAIN_OPTIMIZERS
    impls: bool = True
    attention: frozenset[str] = frozenset({"flash", "sdpa"})
    losses: frozenset[str] = frozenset({"plain", "fused", "chunked", "liger"})
    adapters: bool = True
    methods: bool = False
    base_quantizations: frozenset[str] | None = frozenset()
    offload: frozenset[str] = frozenset()
    compile: bool = True
    fp8: frozenset[str] = frozenset()
    evaluation: bool = False


_ALL_ATTENTION = frozenset({"flash", "sdpa", "eager", "unfused"})
_HF_LOSSES = frozenset({"plain", "fused", "chunked", "liger", "tiled"})
_HF = Follows(
    splits=frozenset({"context"}),  # DeepSpeed's Ulysses; the Trainer's own rules refuse the rest in their words
    zero_stages=frozenset({1, 2, 3}),
    fsdp=frozenset({"full_shard"}),
    optimizers=None,
    attention=_ALL_ATTENTION,
    losses=_HF_LOSSES,
    methods=True,
    base_quantizations=None,
    offload=frozenset({"activations", "optimizer", "params"}),
    evaluation=True,
)
_FSDP = Follows(
    splits=frozenset({"context"}),
    fsdp=FULLY_SHARDED,
    optimizers=BY_ELEMENT,
    attention=_ALL_ATTENTION,
    losses=_HF_LOSSES,
    base_quantizations=frozenset({"nf4", "fp4"}),
    offload=frozenset({"optimizer", "params"}),
    evaluation=True,
)

FOLLOWS = {
    "megatron": Follows(
        splits=frozenset({"tensor", "context", "pipeline", "virtual", "expert", "expert_tensor"}),
        zero_stages=frozenset({1, 2, 3}),  # the distributed optimizer, and Megatron's FSDP
        optimizers=PLAIN_OPTIMIZERS | {"muon", "dist_muon"},
        impls=False,
        attention=_ALL_ATTENTION,
        losses=frozenset({"plain", "fused"}),
        offload=frozenset({"optimizer"}),
        compile=False,
        fp8=frozenset({"blockwise", "delayed", "tensorwise", "mxfp8", "nvfp4"}),
    ),
    "hf_trainer": _HF,
    "single": _HF,
    "ddp": _HF,
    "unsloth": Follows(
        optimizers=None,
        losses=frozenset(),  # each release has its own
        base_quantizations=frozenset({"nf4"}),
        offload=frozenset({"activations"}),
        compile=False,
    ),
    "fsdp1": _FSDP,
    "fsdp2": _FSDP,
    "torchtune": Follows(
        fsdp=FULLY_SHARDED,
        optimizers=BY_ELEMENT | {"paged_adamw", "paged_adamw_8bit"},
        base_quantizations=frozenset({"nf4"}),
        losses=frozenset({"plain", "chunked"}),
        offload=frozenset({"activations", "optimizer", "params"}),
    ),
    "torchtitan": Follows(
        splits=frozenset({"tensor", "context", "pipeline", "expert"}),
        fsdp=FULLY_SHARDED,
        optimizers=BY_ELEMENT,
        losses=frozenset({"plain", "chunked"}),
        adapters=False,
        offload=frozenset({"params"}),
        fp8=frozenset({"tensorwise", "mxfp8"}),
    ),
    "litgpt": Follows(
        fsdp=frozenset({"full_shard"}),
        optimizers=PLAIN_OPTIMIZERS | {"paged_adamw"},
        impls=False,
        losses=frozenset({"chunked"}),
        base_quantizations=frozenset({"nf4", "nf4-dq", "fp4", "fp4-dq", "int8"}),
        compile=False,
    ),
    "deepspeed": Follows(
        splits=frozenset({"context"}),
        zero_stages=frozenset({1, 2, 3}),
        optimizers=BY_ELEMENT,
        impls=False,
        attention=_ALL_ATTENTION,
        losses=_HF_LOSSES,
        offload=frozenset({"optimizer", "params"}),
        compile=False,
        evaluation=True,
    ),
}


def check_followed(job: TrainingJob) -> None:
    """Refuse what the rules of the job's framework would pass over.

    Raises:
        LayoutError: a way to split that does not exist or is not followed.
        InputError: any other setting that is not followed, or a quantised base that is to be trained itself.
    """
    _check_counts(job)
    _check_sizes(job.parallel)
    _check_experts(job)
    _check_projected(job)
    own = FOLLOWS.get(job.engine)
    if own is None:
        return
    if job.base_quantization is not None and job.lora is None and job.method == "full":
        raise InputError(
            _("a base in {name} cannot be trained itself").format(name=job.base_quantization[:40]),
            remedy=_("train adapters on it, such as --lora r=16"),
        )
    for what, kind in _passed_over(job, own):
        others = [name for name, follows in FOLLOWS.items() if not list(_only(job, follows, what))]
        raise kind(
            _("ullage's rules of {engine} do not follow {what}").format(engine=job.engine, what=what),
            remedy=_("those of {engines} do").format(engines=", ".join(others)) if others else "",
        )


def _check_projected(job: TrainingJob) -> None:
    """Refuse projected optimizers where they would see no matrices, or too many kinds of them.

    Source: transformers@5.23.0:trainer_optimizer.py:_setup_low_rank_optimizer (weights of ``nn.Linear`` alone: stacked
        experts and flat shards are none).
    """
    name = rule_name(job.optimizer)
    if name not in PROJECTIONS:
        if "optim_rank" in dict(job.flags):
            raise InputError(_("{name} projects nothing, and has no rank").format(name=name[:40]))
        return
    sharded = job.parallel.fsdp is not None or job.parallel.zero_stage
    experts = any(isinstance(block, MoEFFN) for layer in job.model.layers for block in layer.ffns)
    where = _("adapters") if job.lora else _("sharded parameters") if sharded else _("stacked experts")
    if job.lora is not None or (sharded and job.parallel.data_parallel_size > 1) or experts:
        raise InputError(_("{name} is not followed on {what}").format(name=name, what=where))
    rank = dict(job.flags).get("optim_rank", "1")
    if not (rank.isascii() and rank.isdigit() and 0 < int(rank[:9]) < 10**6):
        raise InputError(_("a rank is a number from 1 on, not {rank!r}").format(rank=rank[:20]), where="optim_rank")


def _only(job: TrainingJob, follows: Follows, what: str) -> Iterator[str]:
    return (found for found, _kind in _passed_over(job, follows) if found == what)


def _passed_over(job: TrainingJob, own: Follows) -> Iterator[tuple[str, type[InputError]]]:
    """Yield what the job states and the rules do not follow, in words, with the kind of error."""
    for name, words in _splits(job.parallel):
        if name not in own.splits:
            yield words, LayoutError
    yield from ((words, LayoutError) for words in _sharding(job.parallel, own))
    if own.optimizers is not None and job.optimizer not in own.optimizers:
        yield _("the optimizer {name}").format(name=job.optimizer[:40]), InputError
    if job.optimizer_impl == "for_loop" and not own.impls:
        yield _("a {impl} optimizer").format(impl=job.optimizer_impl), InputError
    if job.attention is not None and job.attention not in own.attention:
        yield _("{kind} attention").format(kind=job.attention), InputError
    if job.loss is not None and job.loss not in own.losses:
        yield _("a {kind} loss").format(kind=job.loss), InputError
    if job.lora is not None and not own.adapters:
        yield _("adapters"), InputError
    if not own.methods and _own_method(job):
        yield _("the method {name}").format(name=_own_method(job)), InputError
    known = own.base_quantizations
    if job.base_quantization is not None and known is not None and job.base_quantization not in known:
        yield _("a base in {name}").format(name=job.base_quantization[:40]), InputError
    for what, where in job.offload:
        if what not in own.offload:
            yield _("{what} on {where}").format(what=what, where=where), InputError
    if job.precision.fp8_recipe is not None and job.precision.fp8_recipe not in own.fp8:
        yield _("products in {recipe}").format(recipe=_recipe(job.precision.fp8_recipe)), InputError
    if job.compile and not own.compile:
        yield "torch.compile", InputError
    if job.routing_sigma is not None and not ("expert" in own.splits and job.parallel.expert_parallel_size > 1):
        yield _("uneven routing without expert parallelism"), InputError
    if job.evaluation is not None and (not own.evaluation or job.rlhf is not None):
        yield _("an evaluation of {kind}").format(kind=job.rlhf.kind if job.rlhf else job.engine), InputError


def _recipe(name: str) -> str:
    return name if name in ("mxfp8", "nvfp4") else f"fp8 ({name})"


def _own_method(job: TrainingJob) -> str:
    """Return the name of a method that is not LoRA (of litgpt: nor DoRA), "" for LoRA."""
    if job.lora is None or (job.lora.kind == "lora" and not (job.lora.dora and job.engine == "litgpt")):
        return ""
    return "dora" if job.lora.dora else job.lora.kind[:40]


def _splits(parallel: TrainingParallel) -> Iterator[tuple[str, str]]:
    sizes = (
        ("tensor", parallel.tensor_parallel_size, _("tensor parallelism")),
        ("context", parallel.context_parallel_size, _("context parallelism")),
        ("pipeline", parallel.pipeline_parallel_size, _("pipeline parallelism")),
        ("virtual", parallel.virtual_pipeline_parallel_size, _("several model chunks on a pipeline rank")),
        ("expert", parallel.expert_parallel_size, _("expert parallelism")),
        ("expert_tensor", parallel.expert_tensor_parallel_size or 1, _("expert tensor parallelism")),
    )
    yield from ((name, words) for name, size, words in sizes if size > 1)


def _check_counts(job: TrainingJob) -> None:
    counts = {
        "micro_batch_size": job.micro_batch_size,
        "seq_len": job.seq_len,
        "grad_accum": job.grad_accum,
        "recompute: every": job.recompute.every,
    }
    if job.evaluation is not None:
        length = job.evaluation.seq_len
        counts["evaluation: batch_size"] = job.evaluation.batch_size
        counts["evaluation: seq_len"] = 1 if length is None else length
        counts["evaluation: kept_batches"] = job.evaluation.kept_batches + 1
    wrong = next((name for name, count in counts.items() if count < 1), None)
    if wrong is not None:
        raise InputError(_("{name} is {size}").format(name=wrong, size=counts[wrong]), remedy=_("write 1 or more"))


def _check_sizes(parallel: TrainingParallel) -> None:
    sizes = {name: size for name, size in vars(parallel).items() if name.endswith("_size") and size is not None}
    wrong = next((name for name, size in sizes.items() if size < 1), None)
    if wrong is not None:
        raise LayoutError(
            _("{name} is {size}").format(name=wrong, size=sizes[wrong]),
            remedy=_("a size is a number of ranks from 1 on"),
        )


def _sharding(parallel: TrainingParallel, own: Follows) -> Iterator[str]:
    """FSDP is told by its own names, ZeRO by its stage; FSDP's full_shard may be called stage 3 as well."""
    if parallel.data_parallel_size * parallel.context_parallel_size == 1:
        return
    if parallel.zero_stage and parallel.zero_stage not in own.zero_stages:
        alike = {2: "shard_grad_op", 3: "full_shard"}.get(parallel.zero_stage)
        if not own.fsdp or alike != (parallel.fsdp or "full_shard"):
            yield _("ZeRO stage {stage}").format(stage=parallel.zero_stage)
    same = parallel.fsdp == "full_shard" and parallel.zero_stage == 3 and 3 in own.zero_stages
    if parallel.fsdp is not None and parallel.fsdp not in own.fsdp and not same:
        yield _("FSDP's {name}").format(name=parallel.fsdp)


def _check_experts(job: TrainingJob) -> None:
    blocks = {type(block) for layer in job.model.layers for block in layer.ffns}
    if job.parallel.expert_parallel_size > 1 and MoEFFN not in blocks:
        raise LayoutError(
            _("{model} has no experts to spread").format(model=job.model.name),
            remedy=_("leave out expert parallelism"),
        )
