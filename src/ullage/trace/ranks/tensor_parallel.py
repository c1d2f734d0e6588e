"""Tensor parallelism of a model of transformers: by the plan that it declares, or with the sequence split as well."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from typing import Any

import torch

from ullage.errors import InputError
from ullage.i18n import _
from ullage.trace.job import TraceJob

_PARALLEL = "torch.distributed.tensor.parallel"
#: Projections whose outputs are heads, and whose number of heads must divide.
_QUERIES, _KEYS = ("q_proj", "q_b_proj"), ("k_proj", "v_proj", "kv_b_proj")


def split(model: Any, mesh: Any, job: TraceJob) -> None:
    """Split a model over the ranks of a mesh; weights that were shared stay so.

    Raises:
        InputError: the model has no plan, or its heads cannot be split so.
    """
    if job.lora is not None:
        raise InputError(
            _("adapters of a model that is split are not traced"),
            where="--lora",
            remedy=_("split your own module and trace it with --world N"),
        )
    with _shared_again(model):
        if job.sp:
            _split_sequence(model, mesh, job)
        else:
            _split_by_plan(model, mesh, job)


def loss_context(job: TraceJob) -> AbstractContextManager[Any]:
    """Return the context in which loss and backward run: over the split vocabulary where the sequence is split."""
    if not job.sp:
        return nullcontext()
    made: AbstractContextManager[Any] = import_module(_PARALLEL).loss_parallel()
    return made


@contextmanager
def _shared_again(model: Any) -> Iterator[None]:
    """Let parameters that modules share be split one by one, and share the first one's again."""
    places: dict[int, list[tuple[Any, str]]] = {}
    for module in model.modules():
        for name, each in module._parameters.items():
            if each is not None:
                places.setdefault(id(each), []).append((module, name))
    shared = [each for each in places.values() if len(each) > 1]
    for (first, first_name), *others in shared:
        for module, name in others:
            weight = first._parameters[first_name]
            module._parameters[name] = torch.nn.Parameter(weight.detach().clone(), weight.requires_grad)
    yield
    for (first, first_name), *others in shared:
        for module, name in others:
            module._parameters[name] = first._parameters[first_name]


def _split_by_plan(model: Any, mesh: Any, job: TraceJob) -> None:
    """Split by the plan that transformers declares for the model, with its own styles.

    Source: transformers@5.23.0:distributed/mixin.py:maybe_distribute_model; distributed/tensor_parallel.py:
        apply_tensor_parallelism.
    """
    if not hasattr(model, "_resolve_parallel_plans"):
        raise InputError(
            _("transformers {version} has no PreTrainedModel._resolve_parallel_plans, which --tp relies on").format(
                version=import_module("transformers").__version__
            ),
            remedy=_("tracing is tested with transformers {version}").format(version="5.23"),
        )
    if not getattr(model, "tp_plan", None):
        raise InputError(
            _("transformers declares no tensor-parallel plan for {kind}").format(kind=type(model).__name__),
            where="--tp",
            remedy=_("split your own module with parallelize_module and trace it with --world N"),
        )
    _check_heads(model, job)
    distributed = import_module("transformers.distributed.configuration_utils")
    styles = import_module("transformers.distributed.tensor_parallel")
    plan = model._resolve_parallel_plans(distributed.DistributedConfig(tp_size=job.tp))[0]
    styles.apply_tensor_parallelism(model, mesh, plan)


def _check_heads(model: Any, job: TraceJob) -> None:
    """Refuse heads that do not divide: the local width would not be that of whole heads."""
    config, names = model.config, {path.rpartition(".")[2] for path, _module in model.named_modules()}
    heads = getattr(config, "num_attention_heads", 0)
    groups = getattr(config, "num_key_value_heads", None) or heads
    for what, count, projections in ((_("attention"), heads, _QUERIES), (_("key-value"), groups, _KEYS)):
        if count and count % job.tp and names.intersection(projections):
            raise InputError(
                _("{count} {what} heads cannot be split over {ranks} ranks").format(
                    count=count, what=what, ranks=job.tp
                ),
                where="--tp",
                remedy=_("choose a divisor of {count}").format(count=count),
            )


def _split_sequence(model: Any, mesh: Any, job: TraceJob) -> None:
    """Split a Llama-like model as torchtitan does: between the blocks every rank has a part of the sequence.

    Source: torchtitan@d84375e:torchtitan/experiments/transformers_modeling_backend/infra/parallelize.py:
        apply_non_moe_tp.
    """
    _check_heads(model, job)
    if job.seq_len % job.tp:
        raise InputError(
            _("{tokens} tokens cannot be split over {ranks} ranks").format(tokens=job.seq_len, ranks=job.tp),
            where="--sp",
        )
    if getattr(model.config, "_attn_implementation", None) == "eager":
        raise InputError(
            _("attention that is written out makes its mask from hidden states, of which a rank has a part"),
            where="--sp",
            remedy=_("leave --attention or --sp out"),
        )
    decoder: Any = getattr(model, "model", None)
    if not all(hasattr(decoder, name) for name in ("embed_tokens", "layers", "norm")) or not hasattr(model, "lm_head"):
        raise _not_like_llama(model)
    parallel, placed = import_module(_PARALLEL), import_module("torch.distributed.tensor")
    whole, part = placed.Replicate(), placed.Shard(1)
    parallel.parallelize_module(
        model,
        mesh,
        {
            "model.embed_tokens": parallel.RowwiseParallel(input_layouts=whole, output_layouts=part),
            "model.norm": parallel.SequenceParallel(),
            "lm_head": parallel.ColwiseParallel(
                input_layouts=part, output_layouts=placed.Shard(-1), use_local_output=False
            ),
        },
    )
    for layer in decoder.layers:
        parallel.parallelize_module(layer, mesh, _layer_plan(model, layer))


def _layer_plan(model: Any, layer: Any) -> dict[str, Any]:
    """Return the plan of one block."""
    parallel, placed = import_module(_PARALLEL), import_module("torch.distributed.tensor")
    whole, part = placed.Replicate(), placed.Shard(1)
    norms = [name for name, each in layer.named_children() if "Norm" in type(each).__name__]
    plan: dict[str, Any] = {name: parallel.SequenceParallel(use_local_output=True) for name in norms}
    plan["self_attn"] = parallel.PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": part}, desired_input_kwarg_layouts={"hidden_states": whole}
    )
    plan["mlp"] = parallel.PrepareModuleInput(input_layouts=(part,), desired_input_layouts=(whole,))
    for path in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[path] = parallel.ColwiseParallel()
    for path in ("self_attn.o_proj", "mlp.down_proj"):
        plan[path] = parallel.RowwiseParallel(output_layouts=part)
    for name in ("q_norm", "k_norm"):
        if hasattr(getattr(layer, "self_attn", None), name):
            plan[f"self_attn.{name}"] = parallel.SequenceParallel(sequence_dim=2, use_local_output=True)
    known = {path for path, _module in layer.named_modules()}
    if not known.issuperset(plan):
        raise _not_like_llama(model)
    return plan


def _not_like_llama(model: Any) -> InputError:
    return InputError(
        _("{kind} is not built like Llama, whose plan splits the sequence").format(kind=type(model).__name__),
        where="--sp",
        remedy=_("leave --sp out, or split your own module and trace it with --world N"),
    )
