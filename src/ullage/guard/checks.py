"""Where a guard cannot work, it says so at the start; and which way of training on several ranks it has before it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ullage.errors import InputError
from ullage.guard.parallel import Parallel
from ullage.guard.votes import Votes
from ullage.i18n import _


def check(model: Any, optimizer: Any) -> None:
    """Raise :class:`InputError` for a job whose window cannot be redone."""
    for each in (model, optimizer):
        if type(each).__module__.split(".")[0] == "deepspeed":
            raise InputError(
                _("a DeepSpeed engine runs its own windows, reduces while it goes, and cannot redo them"),
                remedy=_("use ullage run with --restart plans, or FSDP2 or DDP with the guard"),
            )
    for module in model.modules():
        home = type(module).__module__
        if home.startswith(("torch.distributed.pipelining", "megatron.core.pipeline")):
            raise InputError(
                _("a pipeline's ranks are at different micro-batches when one fails: a window cannot be redone"),
                remedy=_("guard each restart with ullage run"),
            )
        if type(module).__name__ == "FullyShardedDataParallel" and not home.startswith("torch."):
            raise InputError(
                _("the FSDP of {package} gathers and reduces where no vote can stand before it").format(
                    package=home.split(".")[0]
                ),
                remedy=_("use fully_shard (FSDP2), or guard each restart with ullage run"),
            )
    _check_graphs(model)
    for parameter in model.parameters():
        if getattr(parameter, "_in_backward_optimizers", None) or getattr(
            parameter, "_post_accumulate_grad_hooks", None
        ):
            raise InputError(
                _("an optimizer that steps in backward has changed weights before the ranks can agree"),
                remedy=_("step after the backward"),
            )


def _check_graphs(model: Any) -> None:
    if any(_compiled_with_graphs(module) for module in model.modules()):
        raise InputError(
            _("a model compiled with CUDA graphs keeps its memory in the graphs: no smaller micro-batch frees it"),
            remedy=_("compile with mode='default'"),
        )


def _compiled_with_graphs(module: Any) -> bool:
    if type(module).__name__ == "CUDAGraphWrapper":
        return True
    if type(module).__name__ != "OptimizedModule":
        return False
    context = getattr(module, "dynamo_ctx", None)
    callback = getattr(context, "callback", None)
    while callback is not None:  # the compiler's function lies inside wrappers
        config = getattr(callback, "config", None) or getattr(getattr(callback, "__self__", None), "config", None)
        if isinstance(config, dict) and config.get("triton.cudagraphs"):
            return True
        callback = getattr(callback, "_torchdynamo_orig_backend", None) or getattr(callback, "_orig_callable", None)
    return False


def parallel_of(model: Any, votes: Votes, *, always_vote: bool) -> Parallel:
    """Return how the ranks of this model agree within a window."""
    sharded = [module for module in model.modules() if hasattr(module, "_get_fsdp_state")]
    replicated = [module for module in model.modules() if type(module).__name__ == "DistributedDataParallel"]
    flat = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    if replicated:
        return _ddp(model, replicated, votes)
    if flat:
        return _fsdp1(model, votes, always_vote)
    if sharded:
        return _fsdp2(model, votes, always_vote)
    return Parallel(votes)


def _ddp(model: Any, replicated: list[Any], votes: Votes) -> Parallel:
    from ullage.guard.ddp import Ddp

    module = replicated[0]
    if len(replicated) > 1:
        raise InputError(_("more than one part of the model is a DistributedDataParallel"))
    for reason in _ddp_obstacles(module):
        raise InputError(reason, remedy=_("build DistributedDataParallel without it"))
    return Ddp(module, votes)


def _ddp_obstacles(module: Any) -> Iterator[str]:
    if getattr(module, "static_graph", False):
        yield _("DDP with static_graph counts the calls of each parameter, which a failed backward changes")
    if getattr(module, "_use_python_reducer", False):
        yield _("DDP with the Python reducer compiles its collectives into the graph")
    if getattr(module, "_delay_all_reduce_all_params", False):
        yield _("DDP with delayed all-reduce of all parameters reduces them at once")
    missing = [
        name
        for name in ("reducer", "_sync_buffers", "_check_sync_bufs_pre_fwd", "_lazy_init_ran")
        if not hasattr(module, name)
    ]
    if missing:
        yield _("this version of torch has a DDP without {names}").format(names=", ".join(missing))


def _fsdp1(model: Any, votes: Votes, always_vote: bool) -> Parallel:
    from ullage.guard.fsdp1 import Fsdp1, obstacles

    while type(model).__name__ != "FullyShardedDataParallel":
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise InputError(_("FullyShardedDataParallel must be applied to the whole model, as the last call"))
        model = inner
    for reason in obstacles(model):
        raise InputError(reason, remedy=_("use fully_shard (FSDP2), or guard each restart with ullage run"))
    return Fsdp1(model, votes, always_vote=always_vote)


def _fsdp2(model: Any, votes: Votes, always_vote: bool) -> Parallel:
    from ullage.guard.fsdp2 import Fsdp2

    while not hasattr(model, "_get_fsdp_state"):
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if inner is None:
            raise InputError(_("fully_shard must be applied to the whole model, as the last call"))
        model = inner
    if not hasattr(model, "reset_iter_state"):
        raise InputError(
            _("this version of torch cannot bring FSDP2 back after an exception (no reset_iter_state)"),
            remedy=_("use torch 2.13 or newer, or guard each restart with ullage run"),
        )
    found = Fsdp2(model, votes, always_vote=always_vote)
    if not found.groups:
        raise InputError(_("no parameter of this model is sharded"))
    return found


def check_schedule(parallel: Parallel, settings: Any) -> None:
    """A schedule of the job's own runs its backwards where DDP and FSDP would reduce in each of them."""
    if settings.schedule and type(parallel) is not Parallel:
        raise InputError(
            _("a schedule of the job's own cannot run inside DDP or FSDP"),
            remedy=_("reduce the gradients behind guard.gradients, before guard.update"),
        )
    if settings.schedule and (settings.scaler is not None or settings.backward is not None):
        raise InputError(_("with schedule=True the backward is the job's own: neither scaler nor backward is used"))


def check_fit(job: Any, reserve: str) -> str:
    """Return why the ledger says that the job cannot fit, empty where it does (or where there is no job)."""
    if job is None:
        return ""
    fit = as_fit(job, reserve)
    if fit.verdict != "does_not_fit":
        return ""
    return _("the ledger says that it cannot fit: {need}").format(need=ledger_words(fit))


def as_fit(job: Any, reserve: str) -> Any:
    """Return the ``TrainingFit`` of a job, or the one given."""
    if hasattr(job, "verdict"):
        return job
    from ullage.training_fit import fit_training

    return fit_training(job, reserve=reserve, advise=False)


def ledger_words(fit: Any) -> str:
    """Return what the fullest rank needs, what there is, and the largest terms."""
    from ullage.units import format_bytes

    used = fit.ledger.device_used
    largest = sorted(fit.ledger.terms(), key=lambda term: -term.bytes)[:4]
    terms = ", ".join(f"{term.name} {format_bytes(term.bytes)}" for term in largest)
    return _("{need} are needed of {total}: {terms}").format(
        need=format_bytes(used.bytes), total=format_bytes(fit.total_bytes.value), terms=terms
    )
