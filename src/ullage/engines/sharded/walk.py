"""One optimizer step over groups, blocks, loss and optimizer, as allocations on a timeline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from ullage.account.activations import graph as graphs
from ullage.account.activations.graph import Checkpoint, Graph, Kept
from ullage.account.fsdp import Group, Sharder
from ullage.account.timeline import Buffer, Timeline
from ullage.engines.sharded import loss as losses
from ullage.engines.sharded.loss import LossPlan


@dataclass(frozen=True, kw_only=True)
class Block:
    """A block with its group, further groups inside it (experts, adapters) and how it is checkpointed.

    ``without_grad``: nothing up to and in it is trained, so autograd keeps nothing.
    """

    graph: Graph
    group: Group
    more: tuple[Group, ...] = ()
    without_grad: bool = False
    checkpoint: Checkpoint | None = None


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """An embedding whose rows are split by DTensor: every rank looks up all tokens and makes the gradient of all rows.

    Attributes:
        looked_up_bytes: hidden states of all tokens, and in backward their gradients.
        scatter_bytes, gather_bytes: copies that put the sequence first, and back.
        gradient_bytes: of all rows; this rank's are cut out of it.

    Source: torch@2.13.0:torch/distributed/tensor/_ops/_embedding_ops.py:embedding_dense_backward_strategy (replicated);
        torch/distributed/fsdp/_fully_shard/_fsdp_param.py:_get_grad_inner_tensor.
    """

    looked_up_bytes: int
    scatter_bytes: int
    gather_bytes: int
    gradient_bytes: int


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """What one rank does in a step.

    Attributes:
        blocks: in forward order.
        front: group of the embedding; back: of final norm and head; the same object where one unit holds both.
        hidden_bytes: of the embedding's output.
        embedding_grad_bytes: unsharded gradient of the embedding, 0: frozen or not here.
        vocabulary: of an embedding whose rows are split.
        loss: None on a pipeline stage without one.
        weights: tensors that stay on the device: shards of parameters, frozen weights, buffers.
        state_bytes: optimizer states, one tensor each; on the device.
        step_work: temporaries of the optimizer step.
        clip_work: temporaries of gradient clipping.
        num_micro_batches: forward and backward passes walked per step (more repeat).
        in_flight: forward passes before the first backward (pipeline).
        reduces_once: only the last backward pass of a step reduces gradients.
        setup: buffers made and freed once the weights but the last are there (wrapping the root).
        grads_freed_before_forward: zero_grad at the start of a step instead of after it.
        forward_prefetch: in forward, too, the next unit is gathered before this one runs (otherwise the gathers only
            overlap: its output is made when it is needed).
        stash: what the blocks keep goes to the host, but for the last ``stash`` of them; 0: nothing does.
        loss_inside: the model returns the loss (Transformers), not logits: its backward pass, and with it the first
            gather ahead, begins before the loss's.
    """

    blocks: tuple[Block, ...]
    front: Group | None
    back: Group | None
    hidden_bytes: int
    embedding_grad_bytes: int
    vocabulary: Vocabulary | None = None
    loss: LossPlan | None
    weights: tuple[tuple[str, int], ...]
    state_bytes: tuple[int, ...]
    step_work: tuple[int, ...] = ()
    clip_work: tuple[int, ...] = ()
    num_micro_batches: int = 1
    in_flight: int = 1
    setup: tuple[int, ...] = ()
    reduces_once: bool = False
    grads_freed_before_forward: bool = True
    input_grads: bool = True
    loss_inside: bool = False
    forward_prefetch: bool = False
    stash: int = 0


@dataclass
class _Pass:
    """What one forward pass left for its backward pass."""

    kept: list[Kept] = field(default_factory=list)
    loss: losses.LossState | None = None
    out: Buffer | None = None


class Walk:
    """Walks steps of a plan."""

    def __init__(self, plan: StepPlan, timeline: Timeline, sharder: Sharder) -> None:
        self.plan, self.timeline, self.sharder = plan, timeline, sharder
        self.states: list[Buffer] = []
        self.held: list[Buffer] = []
        timeline.begin("start")
        for category, size in plan.weights[:-1]:
            timeline.take(category, size)
        for size in plan.setup:
            timeline.brief("temporaries", size)
        for category, size in plan.weights[-1:]:
            timeline.take(category, size)

    def step(self) -> None:
        """One optimizer step."""
        plan, timeline = self.plan, self.timeline
        if plan.grads_freed_before_forward:
            self.sharder.zero_grad()
        rounds = max(1, min(plan.num_micro_batches, 2) - plan.in_flight + 1)
        for number in range(rounds):
            self._micro_batches(plan.in_flight if number == 0 else 1, last=number == rounds - 1)
        timeline.begin("optimizer step")
        for size in plan.clip_work:
            timeline.brief("temporaries", size)
        if not self.states:
            self.states = [timeline.take("optimizer_states", size) for size in plan.state_bytes]
        work = [timeline.take("optimizer_temporaries", size) for size in plan.step_work]
        for buffer in work:
            timeline.drop(buffer)
        if not plan.grads_freed_before_forward:
            self.sharder.zero_grad()
        timeline.begin("after step")

    def _micro_batches(self, number: int, *, last: bool) -> None:
        passes = []
        for index in range(number):
            self.timeline.begin("forward")
            passes.append(self._forward(index == number - 1))
        for one in passes:
            self.sharder.sync = not self.plan.reduces_once or (last and one is passes[-1])
            self._backward(one)
        self.sharder.end_backward()

    def _forward(self, with_loss: bool) -> _Pass:
        plan, timeline, sharder = self.plan, self.timeline, self.sharder
        found = _Pass()
        if plan.front is not None:
            sharder.unshard(plan.front, forward=True)
        split = plan.vocabulary
        sizes = (split.looked_up_bytes, split.scatter_bytes) if split is not None else ()
        looked_up = [timeline.take("temporaries", size) for size in sizes]
        x = timeline.take("activations", plan.hidden_bytes)
        for buffer in looked_up:
            timeline.drop(buffer)
        if plan.front is not None and plan.front is not plan.back and plan.front.reshard_after_forward:
            sharder.reshard(plan.front)
        for index, block in enumerate(plan.blocks):
            for group in (block.group, *block.more):
                sharder.unshard(group, forward=True)
            if plan.forward_prefetch and index < len(plan.blocks) - 1:
                self._gather_ahead(index + 1)
            out, kept = graphs.forward(block.graph, timeline, x, block.checkpoint)
            timeline.drop(x)
            x = out
            if block.without_grad:
                kept.release(timeline)
            found.kept.append(kept)
            if plan.stash and index >= plan.stash:
                self._send_away(found.kept[index - plan.stash])
            for group in (*block.more, block.group):
                if group.reshard_after_forward:
                    sharder.reshard(group)
        if plan.loss is None:
            sharder.end_forward()
            found.out = x
            return found
        if plan.back is not None:
            sharder.unshard(plan.back, forward=True)
        timeline.begin("loss")
        found.loss = losses.forward(plan.loss, timeline, x, self.held)
        timeline.drop(x)
        sharder.end_forward()
        return found

    def _backward(self, one: _Pass) -> None:
        plan, timeline, sharder = self.plan, self.timeline, self.sharder
        timeline.begin("backward")
        root_grads: list[Buffer] = []
        last = len(plan.blocks) - 1
        if one.loss is not None and plan.loss is not None:
            if plan.loss_inside:
                self._gather_ahead(last)
            grad = losses.backward(
                plan.loss, timeline, one.loss, root_grads.append, before_head=lambda: self._gather_ahead(last)
            )
            self.held += one.loss.held
        else:
            timeline.drop(one.out)
            grad = timeline.take("activation_gradients", plan.hidden_bytes)
        if plan.back is not None and plan.back is not plan.front:
            sharder.reduce(plan.back, root_grads)
            root_grads = []
        for index in range(last, -1, -1):
            grad = self._block_backward(index, one.kept[index], grad)
        if plan.embedding_grad_bytes:
            if plan.front is not None:
                sharder.unshard(plan.front, forward=False)
            root_grads.append(self._embedding_backward(grad))
        else:
            timeline.drop(grad)
        timeline.begin("gradient reduction")
        if plan.front is not None:
            sharder.reduce(plan.front, root_grads)
        else:
            for buffer in root_grads:
                timeline.drop(buffer)

    def _embedding_backward(self, grad: Buffer | None) -> Buffer:
        """Take over the gradient of the embedding's output; return that of this rank's rows."""
        plan, timeline, split = self.plan, self.timeline, self.plan.vocabulary
        if split is None:
            made = timeline.take("unsharded_gradients", plan.embedding_grad_bytes)
            timeline.drop(grad)
            return made
        sent = timeline.take("temporaries", split.gather_bytes)
        gathered = timeline.take("activation_gradients", split.looked_up_bytes)
        timeline.drop(sent)
        timeline.drop(grad)
        whole = timeline.take("unsharded_gradients", split.gradient_bytes)
        timeline.drop(gathered)
        made = timeline.take("unsharded_gradients", plan.embedding_grad_bytes)
        timeline.drop(whole)
        return made

    def _block_backward(self, index: int, kept: Kept, grad: Buffer | None) -> Buffer | None:
        plan, sharder = self.plan, self.sharder
        block = plan.blocks[index]
        for group in (block.group, *block.more):
            sharder.unshard(group, forward=False)
        self._gather_ahead(index - 1)
        self._bring_back(kept)
        grads: list[Buffer] = []
        if grad is None or block.without_grad:
            self.timeline.drop(grad)
            kept.release(self.timeline)
            for group in (*block.more, block.group):
                sharder.reduce(group, grads)
            return None
        keep: Callable[[Buffer], None] = grads.append
        grad = graphs.backward(
            block.graph,
            self.timeline,
            kept,
            grad,
            on_weight_grad=keep,
            input_grad=index > 0 or plan.input_grads,
            lingering=self.held if plan.loss is not None and plan.loss.logits_held else None,
        )
        for group in block.more:
            sharder.reduce(group, ())
        sharder.reduce(block.group, grads)
        return grad

    def _send_away(self, kept: Kept) -> None:
        """Copy what a block keeps to the host; placeholders remember the sizes."""
        for name, buffer in kept.tensors.items():
            self.timeline.drop(buffer)
            kept.tensors[name] = Buffer(buffer.num_bytes, buffer.category, None)

    def _bring_back(self, kept: Kept) -> None:
        """Have on the device what was sent away."""
        for name, buffer in kept.tensors.items() if self.plan.stash else ():
            if buffer.block is None:
                kept.tensors[name] = self.timeline.take(buffer.category, buffer.num_bytes)

    def _gather_ahead(self, index: int) -> None:
        """Start the gather of the unit whose backward pass comes next: a block's, or the embedding's after them.

        Source: torch@2.13.0:torch/distributed/fsdp/_fully_shard/_fsdp_param_group.py:_backward_prefetch;
            torch@2.2.0:torch/distributed/fsdp/_runtime_utils.py:_pre_backward_hook, _prefetch_handle (BACKWARD_PRE).
        """
        if index >= 0:
            block = self.plan.blocks[index]
            for group in (block.group, *block.more):
                self.sharder.gather(group)
        elif self.plan.front is not None and self.plan.front is not self.plan.back:
            self.sharder.gather(self.plan.front)
