"""Functional collectives on meta tensors: what they take, how long their inputs live, and what a wait gives.

DTensor communicates by operators of ``_c10d_functional``. Each takes its result on the stream that computes and hands
it back before the communication is over; until somebody waits for it, the work keeps what is sent alive.

Source: torch@2.13.0:torch/csrc/distributed/c10d/Functional.cpp (all_gather_into_tensor, reduce_scatter_tensor,
    all_reduce, wait_tensor); ProcessGroupNCCL.cpp (stashed_for_allocator_safety_: inputs until the wait).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch

from ullage.trace.recorder.events import COLLECTIVE, COMMUNICATION

_GROUPS = "torch.distributed.distributed_c10d"
_SWAP = "_dtensor::shard_dim_alltoall"
_WAIT, _WRAP = f"{COLLECTIVE}wait_tensor", f"{COLLECTIVE}_wrap_tensor_autograd"


class Collectives:
    """Runs collectives; keeps what is sent until it is waited for, by the address of the result's storage."""

    def __init__(self) -> None:
        self._sent: dict[int, Any] = {}

    def handler_of(self, func: Any) -> Callable[..., Any] | None:
        """Return what runs an operator instead of it, None for one that is no collective."""
        name: str = func._schema.name
        if name == _SWAP:
            return self._swap
        if not name.startswith(COLLECTIVE):
            return None
        return {_WAIT: self._wait, _WRAP: self._wrap}.get(name, self._run)

    def _wait(self, _tracker: Any, _func: Any, args: Any, _kwargs: Any) -> Any:
        """Give the tensor itself, as the real operator does; the meta kernel makes another."""
        self._sent.pop(args[0].untyped_storage()._cdata, None)
        return args[0]

    def _wrap(self, tracker: Any, _func: Any, args: Any, _kwargs: Any) -> Any:
        """Wrap a tensor that nobody has waited for, as the real operator does; the meta kernel makes another."""
        return tracker.wrappers[-1](args[0])

    def _run(self, _tracker: Any, func: Any, args: Any, kwargs: Any) -> Any:
        """Run a collective; what writes into a tensor that it was given returns that one."""
        found = func(*args, **kwargs)
        out = kwargs.get("out", found)
        for each in out if isinstance(out, (list, tuple)) else (out,):
            if isinstance(each, torch.Tensor):
                self._sent[each.untyped_storage()._cdata] = args[0]
        return out

    def _swap(self, tracker: Any, _func: Any, args: Any, _kwargs: Any) -> Any:
        """Split one dimension and gather another: a copy with the parts first, as much received, and a copy in place.

        The meta kernel gives a part of a tensor that holds everybody's.
        Source: torch@2.13.0:torch/csrc/distributed/c10d/Functional.cpp:shard_dim_alltoall.
        """
        source, gather, shard, group = args
        ranks = group.size() if hasattr(group, "size") else import_module(_GROUPS)._resolve_process_group(group).size()
        sizes = list(source.shape)
        sizes[shard] //= ranks
        found = list(sizes)
        found[gather] *= ranks
        sizes.insert(shard, ranks)
        with tracker:
            with tracker.taking_for(COMMUNICATION):
                sent = source.view(sizes).movedim(shard, 0).contiguous()
                received = torch.empty_like(sent)
            return received.movedim(0, gather).contiguous().view(found)

    def clear(self) -> None:
        """Forget what nobody waited for."""
        self._sent.clear()
