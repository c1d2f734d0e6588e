"""Fully sharded data parallelism: what a group's gather, its parameters, and its reduction take, and when.

A *group* is what is wrapped as one unit (usually a block): U elements, gathered in p bytes each, its gradients in p,
reduced in r bytes over N ranks.

FSDP2, per group (torch@2.13.0:torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py:foreach_all_gather,
foreach_all_gather_copy_out, foreach_reduce; _fsdp_param_group.py:wait_for_unshard, post_backward):
    all-gather output U*p in the copy-in stream's pool, its own rank's cast shard U*p/N beside it; unsharded parameters
    U*p in the compute stream's pool; the output is kept until the next group's copy-out in forward, freed at once in
    backward. Reduce-scatter input U*r in the compute stream's pool, the one of the group before kept until the next
    group's reduction; reduce-scatter output U*r/N, which is the sharded gradient.
FSDP1, per flat parameter (torch@2.2.0:torch/distributed/fsdp/_runtime_utils.py:_unshard, _reshard,
_post_backward_hook; _flat_param.py:_alloc_padded_unsharded_flat_param):
    the unsharded flat parameter U*p is allocated in the unshard stream's pool and gathered in place; with
    ``limit_all_gathers`` at most two wait to be freed; the gradient U*p is reduced from a padded copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from ullage.account.timeline import Buffer, Timeline
from ullage.units import cdiv

GATHER_STREAM = "all-gather"
REDUCE_STREAM = "reduce-scatter"


@dataclass(frozen=True, kw_only=True)
class Group:
    """One unit of sharding.

    Attributes:
        name: for people.
        gathered_bytes: unsharded parameters as computed with, one entry per parameter tensor.
        stored_bytes: of this rank's shard between steps.
        trained_gathered_bytes: the part of ``gathered_bytes`` that has gradients.
        reduced_bytes: unsharded gradients in the reduce dtype, 0: nothing is reduced.
        num_ranks: ranks that share the group.
        reshard_after_forward: freed after forward and gathered again in backward.
        kept_grad_bytes: of this rank's part of the gradients where it is kept wider than it is reduced; 0: as reduced.
    """

    name: str
    gathered_bytes: tuple[int, ...]
    stored_bytes: int
    trained_gathered_bytes: int
    reduced_bytes: int
    num_ranks: int
    reshard_after_forward: bool = True
    kept_grad_bytes: int = 0

    @property
    def all_gather_bytes(self) -> int:
        """U*p, padded so that each rank's part is equal."""
        return cdiv(sum(self.gathered_bytes), self.num_ranks) * self.num_ranks

    @property
    def casts(self) -> bool:
        """Whether this rank's shard is stored wider than it is gathered: then a copy is made to be sent."""
        return self.stored_bytes > cdiv(sum(self.gathered_bytes), self.num_ranks)


@dataclass
class Fsdp2:
    """The walk of FSDP2's groups over a timeline.

    Args:
        timeline: where buffers are made.
        implicit_prefetch: False where each group's output is freed at its own copy-out.
        offload: shards live on the host: gathered from there, gradients copied to it.
        sync: whether this backward pass reduces; one that does not adds to whole gradients in the reduce dtype and
            keeps the parameters gathered (pipelines). Source: torch@2.13.0:torch/distributed/fsdp/_fully_shard/
            _fsdp_param.py:to_accumulated_grad_if_needed.
    """

    timeline: Timeline
    offload: bool = False
    sync: bool = True
    _accumulated: dict[str, Buffer] = field(default_factory=dict)
    _unsharded: dict[str, list[Buffer]] = field(default_factory=dict)
    _gathered: dict[str, Buffer] = field(default_factory=dict)
    _last_output: Buffer | None = None
    _last_input: Buffer | None = None
    sharded_grads: list[Buffer] = field(default_factory=list)
    _reduced: set[str] = field(default_factory=set)

    def gather(self, group: Group) -> None:
        """Start the all-gather of a group, unless it is there or under way."""
        if group.num_ranks == 1 or group.name in self._unsharded or group.name in self._gathered:
            return
        take = self.timeline.take
        part = group.all_gather_bytes // group.num_ranks
        shard = take("all_gather_input", part, GATHER_STREAM) if group.casts or self.offload else None
        self._gathered[group.name] = take("all_gather_output", group.all_gather_bytes, GATHER_STREAM)
        self.timeline.drop(shard)

    def unshard(self, group: Group, *, forward: bool) -> None:
        """Gather and lay out the parameters of a group."""
        if group.name in self._unsharded:
            return
        self.gather(group)
        if forward:
            self.timeline.drop(self._last_output)
            self._last_output = None
        self._unsharded[group.name] = [
            self.timeline.take("unsharded_parameters", size) for size in group.gathered_bytes
        ]
        output = self._gathered.pop(group.name, None)
        if forward:
            self._last_output = output
        else:
            self.timeline.drop(output)

    def reshard(self, group: Group) -> None:
        """Free the unsharded parameters of a group."""
        for buffer in self._unsharded.pop(group.name, []):
            self.timeline.drop(buffer)

    def end_forward(self) -> None:
        """The root's forward is over: the last output is freed."""
        self.timeline.drop(self._last_output)
        self._last_output = None

    def reduce(self, group: Group, grads: Sequence[Buffer]) -> None:
        """Reduce the gradients of a group: its parameters go first, its gradients after they are copied in."""
        if not self.sync:
            if group.reduced_bytes and group.name not in self._accumulated:
                self._accumulated[group.name] = self.timeline.take("accumulated_gradients", group.reduced_bytes)
            for grad in grads:
                self.timeline.drop(grad)
            return
        self.reshard(group)
        self.timeline.drop(self._last_input)
        self._last_input = None
        if not group.reduced_bytes:
            for grad in grads:
                self.timeline.drop(grad)
            return
        wire = self.timeline.take("reduce_scatter_input", group.reduced_bytes)
        self.timeline.drop(self._accumulated.pop(group.name, None))
        for grad in grads:
            self.timeline.drop(grad)
        shard = self.timeline.take("gradients", cdiv(group.reduced_bytes, group.num_ranks), REDUCE_STREAM)
        if group.kept_grad_bytes:
            wide = self.timeline.take("gradients", group.kept_grad_bytes, REDUCE_STREAM)
            self.timeline.drop(shard)
            shard = wide
        if self.offload or group.name in self._reduced:
            self.timeline.drop(shard)
        else:
            self.sharded_grads.append(shard)
            self._reduced.add(group.name)
        self._last_input = wire

    def end_backward(self) -> None:
        """All reductions are over; what was gathered ahead for a unit that has no backward pass goes too."""
        self.timeline.drop(self._last_input)
        self._last_input = None
        for output in self._gathered.values():
            self.timeline.drop(output)
        self._gathered.clear()

    def zero_grad(self) -> None:
        """Free the sharded gradients."""
        for buffer in self.sharded_grads:
            self.timeline.drop(buffer)
        self.sharded_grads.clear()
        self._reduced.clear()


@dataclass
class Fsdp1:
    """The walk of FSDP1's flat parameters: as :class:`Fsdp2`, with the unsharded parameter in the gather's own pool.

    ``limit``: gathered parameters whose memory is not yet free for reuse (``limit_all_gathers``: 2).
    """

    timeline: Timeline
    offload: bool = False
    limit: int = 2
    sync: bool = True
    _unsharded: dict[str, Buffer] = field(default_factory=dict)
    _leaving: list[Buffer] = field(default_factory=list)
    _last_input: Buffer | None = None
    sharded_grads: list[Buffer] = field(default_factory=list)
    _reduced: set[str] = field(default_factory=set)

    def gather(self, group: Group) -> None:
        """Gather a flat parameter in place."""
        if group.num_ranks == 1 or group.name in self._unsharded:
            return
        while len(self._leaving) >= self.limit:
            self.timeline.drop(self._leaving.pop(0))
        if self.offload:
            shard = self.timeline.take("all_gather_input", group.all_gather_bytes // group.num_ranks, GATHER_STREAM)
            self._leaving.append(shard)
        self._unsharded[group.name] = self.timeline.take("unsharded_parameters", group.all_gather_bytes, GATHER_STREAM)

    def unshard(self, group: Group, *, forward: bool) -> None:
        """Gather a flat parameter, if it is not there."""
        self.gather(group)

    def reshard(self, group: Group) -> None:
        """Free it; its memory is reusable once the compute stream is through with it."""
        buffer = self._unsharded.pop(group.name, None)
        if buffer is not None:
            self._leaving.append(buffer)

    def end_forward(self) -> None:
        """Nothing is held over."""

    def reduce(self, group: Group, grads: Sequence[Buffer]) -> None:
        """Reduce-scatter one flat gradient; the one before is free by then."""
        self.reshard(group)
        self.timeline.drop(self._last_input)
        self._last_input = None
        if not group.reduced_bytes:
            for grad in grads:
                self.timeline.drop(grad)
            return
        wire = self.timeline.take("reduce_scatter_input", group.reduced_bytes, REDUCE_STREAM)
        for grad in grads:
            self.timeline.drop(grad)
        if group.num_ranks == 1:
            self.sharded_grads.append(wire)
            return
        shard = self.timeline.take("gradients", cdiv(group.reduced_bytes, group.num_ranks), REDUCE_STREAM)
        if self.offload or group.name in self._reduced:
            self.timeline.drop(shard)
        else:
            self.sharded_grads.append(shard)
            self._reduced.add(group.name)
        self._last_input = wire

    def end_backward(self) -> None:
        """All reductions are over; leaving parameters too."""
        self.timeline.drop(self._last_input)
        self._last_input = None
        while self._leaving:
            self.timeline.drop(self._leaving.pop())

    def zero_grad(self) -> None:
        """Free the sharded gradients."""
        for buffer in self.sharded_grads:
            self.timeline.drop(buffer)
        self.sharded_grads.clear()
        self._reduced.clear()


@dataclass
class Replicated:
    """No sharding: parameters are always whole and gradients stay where autograd made them (single device, DDP)."""

    timeline: Timeline
    sync: bool = True
    sharded_grads: list[Buffer] = field(default_factory=list)
    _reduced: set[str] = field(default_factory=set)

    def gather(self, group: Group) -> None:
        """Nothing to gather."""

    def unshard(self, group: Group, *, forward: bool) -> None:
        """Nothing to gather."""

    def reshard(self, group: Group) -> None:
        """Nothing to free."""

    def end_forward(self) -> None:
        """Nothing is held over."""

    def reduce(self, group: Group, grads: Sequence[Buffer]) -> None:
        """Keep the first micro-batch's gradients; later ones are added to them and freed."""
        again = group.name in self._reduced
        self._reduced.add(group.name)
        for grad in grads:
            if again:
                self.timeline.drop(grad)
            else:
                self.sharded_grads.append(grad)

    def end_backward(self) -> None:
        """Nothing is held over."""

    def zero_grad(self) -> None:
        """Free the gradients."""
        for buffer in self.sharded_grads:
            self.timeline.drop(buffer)
        self.sharded_grads.clear()
        self._reduced.clear()


class Sharder(Protocol):
    """What a walk asks of the way parameters and gradients are spread."""

    sharded_grads: list[Buffer]
    sync: bool

    def gather(self, group: Group) -> None:
        """Start a gather ahead of its use."""

    def unshard(self, group: Group, *, forward: bool) -> None:
        """Have the parameters of a unit whole."""

    def reshard(self, group: Group) -> None:
        """Let them go."""

    def end_forward(self) -> None:
        """The forward pass is over."""

    def reduce(self, group: Group, grads: Sequence[Buffer]) -> None:
        """Take over the gradients of a unit."""

    def end_backward(self) -> None:
        """The backward pass is over."""

    def zero_grad(self) -> None:
        """Free the gradients."""
