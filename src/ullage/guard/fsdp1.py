"""FSDP1 (``FullyShardedDataParallel``): a vote before each all-gather and reduce-scatter, as for FSDP2.

The all-gather is a method of each flat parameter's handle, called when its buffer is there; the reduction goes through
FSDP's communication hook, which it calls with both buffers. After a failure nothing in FSDP1 brings it back: the guard
shards each flat parameter, drops its gradients and its hooks of the unfinished backward, and sets every state to idle.

Rests on: torch@2.13.0:distributed/fsdp/_flat_param.py (FlatParamHandle.unshard, _all_gather_flat_param, reshard) and
_runtime_utils.py (_reduce_grad, _reduce_grad_no_shard, _post_backward_final_callback, _finalize_params).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ullage.guard.listed import Listed
from ullage.guard.votes import Votes
from ullage.i18n import _

#: Buffers of a flat parameter that live only while it is unsharded.
_BUFFERS = ("_mp_shard", "_full_param_padded", "_full_prec_full_param_padded")
_NEEDED = ("_all_gather_flat_param", "_use_sharded_flat_param", "_training_state", "_prefetched")


class _Gather:
    """Stands in for the all-gather of one handle."""

    def __init__(self, handle: Any, owner: Fsdp1) -> None:
        self.handle, self.owner = handle, owner

    def __call__(self, padded: Any) -> Any:
        """Vote if the window is voted on, note the call, and make it."""
        handle = self.handle
        self.owner.before(_gather, (padded, handle.flat_param.data, handle.process_group), {})
        return type(handle)._all_gather_flat_param(handle, padded)


class _Reduce:
    """A communication hook that does what FSDP does without one."""

    def __init__(self, state: Any, owner: Fsdp1) -> None:
        self.state, self.owner = state, owner

    def __call__(self, _hook_state: Any, gradient: Any, shard: Any = None) -> None:
        """Vote if the window is voted on, note the call, and make it; ``shard`` is None where nothing is sharded."""
        state = self.state
        self.owner.before(_reduce, (gradient, shard, state.process_group), {})
        _divide(gradient, state._gradient_predivide_factor)
        _reduce(gradient, shard, state.process_group)
        _divide(gradient if shard is None else shard, state._gradient_postdivide_factor)


def _gather(padded: Any, shard: Any, group: Any) -> None:
    if shard.is_cpu:
        dist.all_gather(list(torch.chunk(padded, dist.get_world_size(group))), shard, group=group)
    else:
        dist.all_gather_into_tensor(padded, shard, group=group)


def _reduce(gradient: Any, shard: Any, group: Any) -> None:
    if shard is None:
        dist.all_reduce(gradient, group=group)
    else:
        dist.reduce_scatter_tensor(shard, gradient, group=group)


def _divide(tensor: Any, factor: float) -> None:
    if factor > 1:
        tensor.div_(factor)


class Fsdp1(Listed):
    """What a window of micro-batches needs around a module under ``FullyShardedDataParallel``."""

    def __init__(self, module: Any, votes: Votes, *, always_vote: bool = False) -> None:
        from torch.distributed.fsdp._runtime_utils import _lazy_init

        super().__init__(module, votes, always_vote=always_vote)
        _lazy_init(module, module)  # now: half-way through the first forward it could not be redone
        self.states = list(module._all_fsdp_states)
        for state in self.states:
            state._comm_hook = _Reduce(state, self)
            if state._handle is not None:
                state._handle._all_gather_flat_param = _Gather(state._handle, self)

    def shard_again(self) -> None:
        """Shard all parameters, and forget the unfinished forward and backward."""
        from torch.distributed.fsdp._common_utils import TrainingState

        root = self.module
        root._device_handle.synchronize()  # the buffers freed here were filled on other streams
        root._post_backward_callback_queued = False
        root._exec_order_data.handles_post_forward_order.clear()
        root._free_event_queue._queue.clear()
        for state in self.states:
            state.training_state = TrainingState.IDLE
            state._unshard_event = None
            if state._handle is not None:
                _shard_handle(state._handle)

    def clip(self, parameters: Any, max_norm: float) -> None:
        """Clip by the norm over all ranks: each holds only a part of the gradients."""
        self.module.clip_grad_norm_(max_norm)

    def saved(self, model: Any) -> Any:
        """Return what a checkpoint saves of the model: the shards of this rank."""
        return Shards(model, [state._handle for state in self.states if state._handle is not None])


def _shard_handle(handle: Any) -> None:
    from torch.distributed.fsdp._flat_param import HandleTrainingState
    from torch.distributed.utils import _free_storage

    flat = handle.flat_param
    handle._training_state = HandleTrainingState.IDLE
    handle._use_sharded_flat_param()
    for name in _BUFFERS:
        if getattr(flat, name, None) is not None:
            _free_storage(getattr(flat, name))
    handle._prefetched = handle._ran_pre_backward_hook = False
    handle._needs_pre_forward_unshard = handle._needs_pre_backward_unshard = False
    handle._post_forward_index = None
    if hasattr(flat, "_post_backward_hook_state"):
        flat._post_backward_hook_state[-1].remove()
        del flat._post_backward_hook_state
    if hasattr(flat, "_saved_grad_shard"):
        del flat._saved_grad_shard
    flat._post_backward_called = False
    flat.grad = None


class Shards:
    """The flat parameters and buffers of this rank, as a checkpoint saves and loads them."""

    def __init__(self, model: Any, handles: list[Any]) -> None:
        self._held = {f"flat.{number}": handle.flat_param for number, handle in enumerate(handles)}
        self._held |= {f"buffer.{name}": buffer for name, buffer in model.named_buffers()}

    def state_dict(self) -> dict[str, Any]:
        """Return the shards by number, and the buffers by name."""
        return {name: tensor.detach() for name, tensor in self._held.items()}

    def load_state_dict(self, kept: dict[str, Any]) -> None:
        """Copy the kept values into the shards and buffers."""
        with torch.no_grad():
            for name, tensor in self._held.items():
                tensor.detach().copy_(kept[name])


def obstacles(module: Any) -> Iterator[str]:
    """Yield why a module under FSDP1 cannot be guarded."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.fsdp._init_utils import HYBRID_SHARDING_STRATEGIES

    for each in FullyShardedDataParallel.fsdp_modules(module):
        if each.sharding_strategy in HYBRID_SHARDING_STRATEGIES:
            yield _("FSDP1 with hybrid sharding reduces between nodes where no vote can stand before it")
        if each._comm_hook is not None and not isinstance(each._comm_hook, _Reduce):
            yield _("FSDP1 with a communication hook of the job's own has no place for the vote")
        if each.cpu_offload.offload_params:
            yield _("FSDP1 with offloaded parameters keeps the gradients of the last micro-batch only")
        if each._exec_order_data._checking_order:
            yield _("TORCH_DISTRIBUTED_DEBUG=DETAIL gives FSDP1 collectives of its own")
        missing = [name for name in _NEEDED if each._handle is not None and not hasattr(each._handle, name)]
        if missing:
            yield _("this version of torch has an FSDP1 without {names}").format(names=", ".join(missing))
