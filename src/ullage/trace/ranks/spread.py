"""How a traced model is spread over ranks: FSDP2 and DDP, as accelerate and transformers' Trainer wrap it, and TP."""

from __future__ import annotations

import copy
from importlib import import_module
from typing import Any

import torch

from ullage.errors import InputError
from ullage.i18n import _
from ullage.trace.job import TraceJob
from ullage.trace.ranks.tensor_parallel import split


def spread(model: Any, job: TraceJob) -> Any:
    """Return a copy of a model for one rank, sharded as the job says; the model itself where it says nothing.

    A wrapped module cannot be unwrapped, and a trace may run several sizes of one model.
    """
    if not job.fsdp and not job.ddp and not job.tp:
        return model
    model = copy.deepcopy(model)
    meshes = import_module("torch.distributed.device_mesh")
    if job.tp:
        mesh = meshes.init_device_mesh("meta", (job.fsdp or 1, job.tp), mesh_dim_names=("dp", "tp"))
        split(model, mesh["tp"], job)
        if job.fsdp:
            shard(model, job, mesh["dp"])
    elif job.fsdp:
        shard(model, job, meshes.init_device_mesh("meta", (job.fsdp,)))
    return model


def sentences(job: TraceJob) -> list[str]:
    """Say how a model of transformers was spread, and which rank was traced."""
    found = []
    if job.tp:
        found.append(
            _("TP, rank {rank} of {ranks}: matrices, sequence and loss are split as torchtitan splits them")
            if job.sp
            else _("TP, rank {rank} of {ranks}: split by the plan that transformers declares for the model")
        )
    if job.fsdp:
        found.append(_("FSDP2: every decoder layer is a unit, gathered in bf16 and reduced in fp32"))
    return [each.format(rank=job.rank, ranks=job.num_ranks) for each in found]


def check_wrapping(job: TraceJob, traced: Any) -> None:
    """Refuse what cannot be wrapped from outside, and DDP from inside: its buckets would not be seen.

    Raises:
        InputError: so.
    """
    if job.fsdp or job.tp:
        raise InputError(
            _("which parts of your own module are sharded is yours to say"),
            remedy=_("call fully_shard or parallelize_module in your function and trace it with --world N"),
        )
    replicas = any(isinstance(each, torch.nn.parallel.DistributedDataParallel) for each in traced.module.modules())
    if replicas or (job.ddp and traced.step is not None):
        raise InputError(
            _("DistributedDataParallel cannot be traced when your function makes it"),
            remedy=_("return (module, inputs) unwrapped and trace it with --ddp N"),
        )


def units_of(model: Any) -> list[Any]:
    """Return the modules that are sharded as units: those of the classes that the model says not to split.

    Source: accelerate@1.10:utils/fsdp_utils.py:fsdp2_prepare_auto_wrap_policy (transformer_based_wrap:
        ``_no_split_modules``).

    Raises:
        InputError: the model names none.
    """
    classes = set(getattr(model, "_no_split_modules", None) or ())
    units = [each for each in model.modules() if type(each).__name__ in classes]
    if not units:
        raise InputError(
            _("the model does not say which of its modules are layers"),
            remedy=_("wrap your own module with fully_shard and trace it with --world N"),
        )
    return units


def shard(model: Any, job: TraceJob, mesh: Any) -> None:
    """Shard every decoder layer, and the rest as the root: parameters are gathered in bf16, gradients reduced in fp32.

    The root is not resharded after forward. With the sequence split, units are those of torchtitan: the embedding is
    one, and so are norm and head together.

    Source: torch@2.13.0:torch/distributed/fsdp/_fully_shard/_fully_shard.py:fully_shard (reshard_after_forward None).
        torchtitan@d84375e:torchtitan/experiments/transformers_modeling_backend/infra/parallelize.py:apply_fsdp.
    """
    fsdp = import_module("torch.distributed.fsdp")
    policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mesh": mesh, "mp_policy": policy}
    units = units_of(model)
    if job.sp and model.lm_head.weight is not model.model.embed_tokens.weight:
        units = [model.model.embed_tokens, *units]
    for unit in units:
        fsdp.fully_shard(unit, reshard_after_forward=job.reshard_after_forward, **options)
    if job.sp and units[0] is model.model.embed_tokens:
        fsdp.fully_shard([model.model.norm, model.lm_head], reshard_after_forward=False, **options)
    fsdp.fully_shard(model, reshard_after_forward=None if job.reshard_after_forward else False, **options)


def replicate(model: Any) -> Any:
    """Wrap a model in DistributedDataParallel with its defaults: buckets of 25 MiB beside the gradients.

    The first bucket is of 1 MiB until the order of the gradients is known; buckets are made again after the first step.

    Source: torch@2.13.0:torch/nn/parallel/distributed.py:DistributedDataParallel.__init__ (bucket_cap_mb 25,
        gradient_as_bucket_view False).
    """
    wrapped = torch.nn.parallel.DistributedDataParallel(model, init_sync=False)
    wrapped.register_comm_hook(None, lambda _state, bucket: _reduced(bucket))
    return wrapped


def _reduced(bucket: Any) -> Any:
    """Return a bucket as reduced in place, as the default of DDP does: the work of a fake group has no result."""
    done: Any = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done
