"""One rank of many in one process: PyTorch's fake process group, and streams that only have numbers.

Collectives of the fake group do nothing; their buffers are those of a real run, since FSDP2, DDP and DTensor allocate
them. Each stream keeps its own number: the caching allocator has pools of its own for each.

Source: torch@2.13.0:torch/testing/_internal/distributed/fake_pg.py; torch/distributed/_tools/fsdp2_mem_tracker.py.
"""

from __future__ import annotations

import functools
import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from typing import Any
from unittest import mock

import torch

from ullage.errors import InputError
from ullage.i18n import _
from ullage.trace.internals import RANKS, check_names
from ullage.trace.recorder import events as names

_GROUP = "torch.distributed.fsdp._fully_shard._fsdp_param_group"
_PARAM = "torch.distributed.fsdp._fully_shard._fsdp_param"
_CACHE = type(functools.lru_cache(lambda: None))


class FakeEvent:
    """A moment on a stream: everything has happened by the time that anyone asks."""

    def __init__(self, *_arguments: Any, **_named: Any) -> None: ...

    def record(self, *_arguments: Any) -> FakeEvent:
        """Return itself, as FSDP2 expects."""
        return self

    def wait(self, *_arguments: Any) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""

    def query(self) -> bool:
        """Say that it has happened."""
        return True


class FakeStream:
    """A stream: a number. Number 0 computes."""

    def __init__(self, number: int) -> None:
        self.number = number

    def record_event(self, _event: Any = None) -> FakeEvent:
        """Return a moment."""
        return FakeEvent()

    def wait_event(self, _event: Any) -> None:
        """Return at once."""

    def wait_stream(self, _stream: Any) -> None:
        """Return at once."""

    def synchronize(self) -> None:
        """Return at once."""


class FakeDevice:
    """What ``torch.cuda`` is to CUDA tensors, for meta tensors: what FSDP2 and device meshes ask of it."""

    Event = FakeEvent

    def __init__(self, tracker: Any) -> None:
        self._tracker = tracker
        self._streams: list[FakeStream] = [FakeStream(0)]

    def Stream(self, *_arguments: Any, **_named: Any) -> FakeStream:  # noqa: N802 - PyTorch's name
        """Make a stream."""
        self._streams.append(FakeStream(len(self._streams)))
        return self._streams[-1]

    def current_stream(self, *_arguments: Any) -> FakeStream:
        """Return the stream on which memory is taken now."""
        number: int = self._tracker.stream
        return self._streams[number]

    @contextmanager
    def stream(self, stream: FakeStream | None) -> Iterator[None]:
        """Take memory on a stream, for as long as the context lasts."""
        before = self._tracker.stream
        if stream is not None:
            self._tracker.stream = stream.number
        try:
            yield
        finally:
            self._tracker.stream = before

    def current_device(self) -> int:
        """Return 0."""
        return 0

    def set_device(self, *_arguments: Any) -> None:
        """Do nothing."""

    def device_count(self) -> int:
        """Return how many devices the host has: so many that no mesh is refused."""
        return 8

    def is_initialized(self) -> bool:
        """Say that the device is ready."""
        return True

    def is_available(self) -> bool:
        """Say that there is a device."""
        return True

    def synchronize(self, *_arguments: Any) -> None:
        """Return at once."""


@contextmanager
def fake_ranks(tracker: Any, world_size: int, rank: int = 0) -> Iterator[None]:
    """Be a rank of ``world_size`` for as long as the context lasts; 0: no process group.

    Raises:
        InputError: this process is in a process group already, or this PyTorch has none.
    """
    if not world_size:
        yield
        return
    dist = torch.distributed
    if not dist.is_available():
        raise InputError(_("this PyTorch was built without torch.distributed"))
    if dist.is_initialized():
        raise InputError(
            _("torch.distributed is initialised in this process already"),
            remedy=_("leave it to the trace: --world N makes a process group of N fake ranks"),
        )
    check_names(RANKS)
    store = import_module("torch.testing._internal.distributed.fake_pg").FakeStore()
    tensors = import_module("torch.distributed.tensor")
    functional = import_module("torch.distributed._functional_collectives")
    tracker.wrappers = (tensors.DTensor, functional.AsyncCollectiveTensor)
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "meta", FakeDevice(tracker), create=True))
        stack.callback(_forget_meshes)
        dist.init_process_group("fake", store=store, rank=rank, world_size=world_size)
        stack.callback(dist.destroy_process_group)
        _quiet(stack)
        _meshes(stack, dist)
        _propagation(stack)
        _fsdp2(stack, tracker)
        _ddp(stack, tracker)
        yield


def _forget_meshes() -> None:
    """Drop what DTensor remembers: a mesh of the next trace equals this one's, whose process groups are gone."""
    forget = getattr(torch._C, "_clear_DTensor_sharding_propagator_cache", None)
    if forget is not None:
        forget()
    for each in gc.get_objects():
        if type(each) is _CACHE and str(getattr(each.__wrapped__, "__module__", "")).startswith("torch.distributed."):
            each.cache_clear()


def _quiet(stack: ExitStack) -> None:
    """Keep PyTorch's advice on speed to itself: nothing is communicated."""
    stack.enter_context(warnings.catch_warnings())
    warnings.filterwarnings("ignore", module=r"torch\.distributed")
    logger = logging.getLogger("torch.distributed.tensor._redistribute")
    before = logger.level
    logger.setLevel(logging.ERROR)
    stack.callback(logger.setLevel, before)


def _meshes(stack: ExitStack, dist: Any) -> None:
    """Let programs that name CUDA get a mesh of meta devices, and initialise what is initialised."""
    module = import_module("torch.distributed.device_mesh")
    original = module.init_device_mesh

    def init_device_mesh(device_type: str, *arguments: Any, **named: Any) -> Any:
        return original("meta" if device_type == "cuda" else device_type, *arguments, **named)

    for holder in (module, dist):
        stack.enter_context(mock.patch.object(holder, "init_device_mesh", init_device_mesh))
    stack.enter_context(mock.patch.object(dist, "init_process_group", lambda *_a, **_k: None))
    sharding = import_module("torch.distributed.fsdp._fully_shard._fully_shard")
    stack.enter_context(
        mock.patch.object(
            sharding,
            "_init_default_mesh" if hasattr(sharding, "_init_default_mesh") else "_init_default_fully_shard_mesh",
            lambda *_a, **_k: original("meta", (dist.get_world_size(),)),
        )
    )


def _propagation(stack: ExitStack) -> None:
    """Keep out of the trace what DTensor computes on tensors without memory to learn shapes."""
    module = import_module("torch.distributed.tensor._sharding_prop")
    dispatch = import_module("torch.utils._python_dispatch")
    original = module.ShardingPropagator._propagate_tensor_meta_non_cached

    def propagate(self: Any, *arguments: Any, **named: Any) -> Any:
        with dispatch._disable_current_modes():
            return original(self, *arguments, **named)

    stack.enter_context(mock.patch.object(module.ShardingPropagator, "_propagate_tensor_meta_non_cached", propagate))


def _fsdp2(stack: ExitStack, tracker: Any) -> None:
    """Let FSDP2 take meta tensors for a GPU's, and say what its buffers are for.

    Source: torch@2.13.0:torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py:lazy_init (meta is refused there).
    """
    group, parameter = import_module(_GROUP), import_module(_PARAM).FSDPParam
    reduce, copy_out, unshard = group.foreach_reduce, group.foreach_all_gather_copy_out, parameter.init_unsharded_param

    def foreach_reduce(fsdp_params: Any, unsharded_grads: Any, *arguments: Any, **named: Any) -> Any:
        for one, gradient in zip(fsdp_params, unsharded_grads, strict=True):
            tracker.mark(gradient, names.GRADIENT, tracker.positions.owner(one.sharded_param))
        done = reduce(fsdp_params, unsharded_grads, *arguments, **named)
        tracker.mark(done[0], names.COMMUNICATION)
        return done

    def foreach_all_gather_copy_out(result: Any, fsdp_params: Any, *arguments: Any) -> Any:
        done = copy_out(result, fsdp_params, *arguments)
        for one in fsdp_params:
            for output in one.all_gather_outputs:
                tracker.mark(output, names.COMMUNICATION, tracker.positions.owner(one.sharded_param))
        return done

    def init_unsharded_param(self: Any) -> None:
        unshard(self)
        tracker.positions.stands_for(self._unsharded_param, self.sharded_param)

    for holder, name, value in (
        (group.FSDPParamGroup, "_validate_no_meta_params", lambda _self: None),
        (group, "foreach_reduce", foreach_reduce),
        (group, "foreach_all_gather_copy_out", foreach_all_gather_copy_out),
        (parameter, "init_unsharded_param", init_unsharded_param),
    ):
        stack.enter_context(mock.patch.object(holder, name, value))


def _ddp(stack: ExitStack, tracker: Any) -> None:
    """Say that DDP's buckets, made again after the first backward pass, are for communication."""
    reducer = torch.distributed.Reducer
    original = reducer._rebuild_buckets

    def rebuild(self: Any) -> Any:
        with tracker.taking_for(names.COMMUNICATION):
            return original(self)

    stack.enter_context(mock.patch.object(reducer, "_rebuild_buckets", rebuild))
    logger = torch.distributed.Logger  # it has no timer for meta tensors, and says so
    stack.enter_context(mock.patch.object(logger, "set_runtime_stats_and_log", lambda _self: None))
