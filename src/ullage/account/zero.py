"""DeepSpeed ZeRO: what each stage keeps, and the buffers it moves parameters and gradients through.

P parameters of the model, T trained ones, N ranks that share a partition, p and g bytes of parameters and gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ullage.account.fsdp import Group
from ullage.account.timeline import Buffer, Timeline
from ullage.units import cdiv


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """The settings of a ``zero_optimization`` section that cost memory, in elements.

    Defaults: deepspeed@0.17.0:deepspeed/runtime/zero/config.py:DeepSpeedZeroConfig.

    Attributes:
        stage: 0 to 3.
        reduce_bucket, allgather_bucket: elements of one bucket.
        prefetch_bucket, persistence_threshold, max_live, max_reuse_distance, sub_group: stage 3.
        overlap_comm: a second reduce bucket. Default: on in stage 3 only.
        contiguous_gradients: gradients are copied into the bucket as they appear.
        offload_optimizer, offload_params: device they live on ("cpu", "nvme") or none.
        hpz_partition_size: ZeRO++ secondary shards within this many ranks, 1: none.
        quantized_weights, quantized_gradients: ZeRO++ int8 and int4 on the wire.
    """

    stage: int = 0
    reduce_bucket: int = 500_000_000
    allgather_bucket: int = 500_000_000
    prefetch_bucket: int = 50_000_000
    persistence_threshold: int = 100_000
    max_live: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    sub_group: int = 1_000_000_000
    overlap_comm: bool | None = None
    contiguous_gradients: bool = True
    offload_optimizer: str | None = None
    offload_params: str | None = None
    hpz_partition_size: int = 1
    quantized_weights: bool = False
    quantized_gradients: bool = False

    @property
    def num_reduce_buckets(self) -> int:
        """Reduce buckets on the device at once."""
        overlap = self.stage == 3 if self.overlap_comm is None else self.overlap_comm
        return 2 if overlap and self.stage < 3 else 1


def parameter_bytes(num_elements: int, element_bytes: int, num_ranks: int, settings: ZeroSettings) -> int:
    """Return the bytes of the parameters to compute with that a rank keeps between steps.

    Formula: P*p, in stage 3 P*p/N (nothing when they are offloaded), plus P*p/h for ZeRO++'s secondary shards.
    Source: deepspeed@0.17.0:deepspeed/runtime/zero/stage_1_and_2.py, partition_parameters.py:_partition_param.
    """
    if settings.stage < 3:
        return num_elements * element_bytes
    secondary = 0
    if settings.hpz_partition_size > 1:
        secondary = cdiv(num_elements, settings.hpz_partition_size) * element_bytes
    shard = 0 if settings.offload_params else cdiv(num_elements, num_ranks) * element_bytes
    return shard + secondary


def master_bytes(num_trained: int, element_bytes: int, num_ranks: int, settings: ZeroSettings) -> int:
    """Return the bytes of the master copy on the device: T*4, T*4/N from stage 1 on; none when it is offloaded.

    Source: deepspeed@0.17.0:deepspeed/runtime/zero/stage_1_and_2.py:DeepSpeedZeroOptimizer.__init__
        (single_partition_of_fp32_groups), stage3.py:_create_fp32_partitions.
    """
    if settings.offload_optimizer or not element_bytes:
        return 0
    return cdiv(num_trained, num_ranks if settings.stage else 1) * element_bytes


def gradient_bytes(num_trained: int, element_bytes: int, num_ranks: int, settings: ZeroSettings) -> int:
    """Return the bytes of gradients that stay on a rank after backward: T*g, T*g/N from stage 2 on.

    Stage 1 keeps whole gradients until the step; stage 3 keeps one flat partition all the time.
    Source: deepspeed@0.17.0:deepspeed/runtime/zero/stage_1_and_2.py:get_flat_partition,
        stage3.py:_setup_for_real_optimizer (grad_partitions_flat_buffer); on the host with an offloaded optimizer.
    """
    if settings.offload_optimizer and settings.stage >= 2:
        return 0
    return cdiv(num_trained, num_ranks if settings.stage >= 2 else 1) * element_bytes


def host_bytes(num_elements: int, num_trained: int, num_ranks: int, settings: ZeroSettings) -> int:
    """Return the host bytes of a rank under offload: master, moments and gradients T*16/N; parameters P*2/N.

    Source: deepspeed@0.17.0:deepspeed/runtime/zero/stage3.py:estimate_zero3_model_states_mem_needs
        (18 bytes with both).
    """
    optimizer = cdiv(num_trained, num_ranks) * 16 if settings.offload_optimizer == "cpu" else 0
    params = cdiv(num_elements, num_ranks) * 2 if settings.offload_params == "cpu" else 0
    return optimizer + params


@dataclass
class Zero12:
    """Stages 0 to 2: parameters are whole; gradients pass through reduce buckets.

    A bucket of ``reduce_bucket`` elements is made with the first gradient of a backward pass and freed after it; from
    stage 2 on only a rank's part of each gradient stays.
    Source: deepspeed@0.17.0:deepspeed/runtime/zero/stage_1_and_2.py:backward,
        reduce_independent_p_g_buckets_and_remove_grads.
    """

    timeline: Timeline
    settings: ZeroSettings
    num_ranks: int
    element_bytes: int = 2
    sync: bool = True
    sharded_grads: list[Buffer] = field(default_factory=list)
    _buckets: list[Buffer] = field(default_factory=list)
    _seen: set[str] = field(default_factory=set)

    def gather(self, group: Group) -> None:
        """Nothing to gather."""

    def unshard(self, group: Group, *, forward: bool) -> None:
        """Make the buckets when backward begins."""
        if forward or self._buckets or not self.settings.stage or not self.settings.contiguous_gradients:
            return
        size = self.settings.reduce_bucket * self.element_bytes
        self._buckets = [
            self.timeline.take("reduce_bucket", size) for _number in range(self.settings.num_reduce_buckets)
        ]

    def reshard(self, group: Group) -> None:
        """Nothing to free."""

    def end_forward(self) -> None:
        """Nothing is held over."""

    def reduce(self, group: Group, grads: Sequence[Buffer]) -> None:
        """Stage 2: gradients are copied into the bucket and a part of them stays; below, they stay whole."""
        first = group.name not in self._seen
        self._seen.add(group.name)
        if self.settings.stage < 2:
            for grad in grads:
                if first:
                    self.sharded_grads.append(grad)
                else:
                    self.timeline.drop(grad)
            return
        part = self.timeline.take("gradients", 0 if not first else self._part(group))
        if part.num_bytes:
            self.sharded_grads.append(part)
        for grad in grads:
            self.timeline.drop(grad)

    def _part(self, group: Group) -> int:
        if self.settings.offload_optimizer:
            return 0
        return cdiv(group.trained_gathered_bytes, self.num_ranks)

    def end_backward(self) -> None:
        """Free the buckets."""
        for buffer in self._buckets:
            self.timeline.drop(buffer)
        self._buckets.clear()

    def zero_grad(self) -> None:
        """Free the gradients."""
        for buffer in self.sharded_grads:
            self.timeline.drop(buffer)
        self.sharded_grads.clear()
        self._seen.clear()


@dataclass
class Zero3:
    """Stage 3: parameters are gathered module by module and let go when too many are live.

    A released parameter stays while it is needed again within ``max_reuse_distance`` and no more than ``max_live``
    elements are live; prefetching gathers ``prefetch_bucket`` elements ahead.
    Source: deepspeed@0.17.0:deepspeed/runtime/zero/partitioned_param_coordinator.py:fetch_sub_module,
        release_sub_module; stage3.py:__add_grad_to_ipg_bucket, __reduce_and_partition_ipg_grads.
    """

    timeline: Timeline
    settings: ZeroSettings
    element_bytes: int = 2
    sync: bool = True
    sharded_grads: list[Buffer] = field(default_factory=list)
    _live: dict[str, Buffer] = field(default_factory=dict)
    _bucket: Buffer | None = None

    def gather(self, group: Group) -> None:
        """Prefetch: at most ``prefetch_bucket`` elements ahead."""

    def unshard(self, group: Group, *, forward: bool) -> None:
        """Gather a unit; older ones go when more than ``max_live`` elements are live."""
        if group.name not in self._live:
            size = sum(group.gathered_bytes)
            limit = self.settings.max_live * self.element_bytes
            while self._live and size + sum(one.num_bytes for one in self._live.values()) > limit:
                self.timeline.drop(self._live.pop(next(iter(self._live))))
            self._live[group.name] = self.timeline.take("unsharded_parameters", size)
            self.timeline.brief("all_gather_output", self.settings.prefetch_bucket * self.element_bytes)
        if not forward and self._bucket is None:
            self._bucket = self.timeline.take("reduce_bucket", self.settings.reduce_bucket * self.element_bytes)

    def reshard(self, group: Group) -> None:
        """Let a unit go, unless it is used again soon enough."""
        if sum(group.gathered_bytes) > self.settings.max_reuse_distance * self.element_bytes:
            self.timeline.drop(self._live.pop(group.name, None))

    def end_forward(self) -> None:
        """What is live stays for the backward pass."""

    def reduce(self, group: Group, grads: Sequence[Buffer]) -> None:
        """Gradients are copied into the bucket; the partition's buffer is there already."""
        for grad in grads:
            self.timeline.drop(grad)

    def end_backward(self) -> None:
        """Free the bucket and all gathered parameters."""
        self.timeline.drop(self._bucket)
        self._bucket = None
        for buffer in self._live.values():
            self.timeline.drop(buffer)
        self._live.clear()

    def zero_grad(self) -> None:
        """The partition's buffer stays."""
