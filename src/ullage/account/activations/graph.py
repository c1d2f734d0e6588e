"""A block as the operations autograd sees, in order: what lives when, through forward, recompute and backward.

Tables of saved tensors say what is kept; a graph also says in which order, with which temporaries, and what the
backward pass makes. Engines whose peak depends on that (op-wise checkpointing, compiled blocks, chunked losses) walk
a graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from ullage.account.timeline import Buffer, Timeline

Kind = Literal["mm", "sdpa", "pointwise", "norm", "add", "view", "comm"]
#: Whether the output of an operation is kept by a checkpoint's policy; ``count`` is the running number of matmuls.
Policy = Callable[["Op", int], bool]


@dataclass(frozen=True, kw_only=True)
class Op:
    """One operation: it reads ``inputs``, makes ``name`` and keeps some tensors for its gradient.

    Attributes:
        name, num_bytes: of the tensor it makes; a view has the bytes of what it views and no memory of its own.
        inputs: tensors it reads whose gradient the backward pass makes.
        reads: further tensors it reads (no gradient).
        keeps: tensors autograd keeps for it, its own output included where it is.
        aside_bytes: kept outputs that nothing else reads (log-sum-exp, rstd, dropout mask).
        weight_grad_bytes: of the gradients of its trained weights, unsharded.
        work_bytes, grad_work_bytes: temporaries of forward and backward.
        kind: what a checkpoint's policy goes by; ``add`` passes its gradient on without a copy.
        lingers: what it keeps is an attribute of a Python function's context and goes only with the graph itself,
            which lives as long as anyone holds its output.
    """

    name: str
    num_bytes: int
    inputs: tuple[str, ...]
    reads: tuple[str, ...] = ()
    keeps: tuple[str, ...] = ()
    aside_bytes: int = 0
    weight_grad_bytes: int = 0
    work_bytes: int = 0
    grad_work_bytes: int = 0
    kind: Kind = "pointwise"
    lingers: bool = False


@dataclass(frozen=True, kw_only=True)
class Graph:
    """The operations of a block from the tensor ``x`` to the last one's output.

    ``input_bytes``: of x. ``needs_input_grad`` False: nothing before the block is trained.
    """

    ops: tuple[Op, ...]
    input_bytes: int
    input_name: str = "x"

    def base_of(self) -> dict[str, str]:
        """Each tensor's own memory: views belong to what they view."""
        return self._bases

    @cached_property
    def _bases(self) -> dict[str, str]:
        base = {self.input_name: self.input_name}
        for op in self.ops:
            base[op.name] = base[op.inputs[0]] if op.kind == "view" else op.name
        return base

    @cached_property
    def saved(self) -> frozenset[str]:
        """The tensors autograd keeps without checkpointing, by their own memory."""
        return frozenset(self._bases[name] for op in self.ops for name in op.keeps)

    @cached_property
    def last_reads(self) -> tuple[tuple[str, ...], ...]:
        """For each operation, the tensors that the forward pass reads there for the last time."""
        base = self._bases
        last = {base[name]: index for index, op in enumerate(self.ops) for name in (*op.inputs, *op.reads)}
        found: list[list[str]] = [[] for _op in self.ops]
        for name, index in last.items():
            found[index].append(name)
        return tuple(tuple(names) for names in found)

    @cached_property
    def first_keeps(self) -> tuple[tuple[str, ...], ...]:
        """For each operation, the kept tensors that no operation before it keeps: the backward pass ends with them."""
        seen: set[str] = set()
        found = []
        for op in self.ops:
            names = tuple(dict.fromkeys(self._bases[name] for name in op.keeps))
            found.append(tuple(name for name in names if name not in seen))
            seen.update(names)
        return tuple(found)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Bytes of each tensor, the input included."""
        return {op.name: op.num_bytes for op in self.ops} | {self.input_name: self.input_bytes}

    @cached_property
    def last_needed(self) -> int:
        """The operation after which a recompute may stop: the last that makes something the backward pass reads."""
        return max(
            (index for index, op in enumerate(self.ops) if op.name in self.saved or op.aside_bytes),
            default=-1,
        )

    @cached_property
    def survivors(self) -> dict[Checkpoint, frozenset[str]]:
        """The outputs that survive a checkpointed forward pass, by checkpoint."""
        return {}

    @property
    def output(self) -> str:
        """The last tensor."""
        return self.ops[-1].name


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """How a block is checkpointed.

    Attributes:
        policy: which outputs survive the forward pass; None: none does (full recompute).
        fused: a compiled block: only outputs the backward pass needs are kept, and pointwise results are made again
            where they are needed instead of all at once.
    """

    policy: Policy | None = None
    fused: bool = False


@dataclass
class Kept:
    """What a block holds between forward and backward."""

    checkpoint: Checkpoint | None
    tensors: dict[str, Buffer] = field(default_factory=dict)
    asides: dict[str, Buffer] = field(default_factory=dict)

    def release(self, timeline: Timeline) -> None:
        """Let everything go."""
        for buffer in (*self.tensors.values(), *self.asides.values()):
            timeline.drop(buffer)
        self.tensors.clear()
        self.asides.clear()


def saved_names(graph: Graph) -> frozenset[str]:
    """The tensors autograd keeps for the block without checkpointing, by their own memory."""
    return graph.saved


def saved_bytes(graph: Graph) -> int:
    """Their bytes, the block's input included where it is kept."""
    names = saved_names(graph)
    total = sum(op.num_bytes for op in graph.ops if op.kind != "view" and op.name in names)
    total += sum(op.aside_bytes for op in graph.ops)
    return total + (graph.input_bytes if graph.input_name in names else 0)


def _policy_names(graph: Graph, checkpoint: Checkpoint) -> frozenset[str]:
    """The outputs that survive a checkpointed forward pass."""
    known = graph.survivors.get(checkpoint)
    if known is not None:
        return known
    chosen, count = set(), 0
    for op in graph.ops if checkpoint.policy is not None else ():
        count += op.kind == "mm"
        if checkpoint.policy is not None and checkpoint.policy(op, count):
            chosen.add(op.name)
    found = frozenset(chosen & _needed(graph, chosen) if checkpoint.fused else chosen)
    graph.survivors[checkpoint] = found
    return found


def _needed(graph: Graph, chosen: set[str]) -> set[str]:
    """What the backward pass reads, directly or to make again what it reads, when ``chosen`` is at hand."""
    base = graph.base_of()
    makers = {op.name: op for op in graph.ops}
    todo = [base[name] for op in graph.ops for name in op.keeps]
    found: set[str] = set()
    while todo:
        name = todo.pop()
        if name in found:
            continue
        found.add(name)
        if name in chosen or name == graph.input_name:
            continue
        op = makers[name]
        todo += [base[read] for read in (*op.inputs, *op.reads)]
    return found


def forward(
    graph: Graph,
    timeline: Timeline,
    x: Buffer,
    checkpoint: Checkpoint | None = None,
    *,
    category: str = "activations",
    at_hand: Kept | None = None,
) -> tuple[Buffer, Kept]:
    """Run a block; the caller keeps its own hold on ``x`` and gets one on the output.

    Args:
        graph: the block.
        timeline: where buffers are made.
        x: the block's input.
        checkpoint: None: autograd keeps what it needs.
        category: what kept tensors are counted under.
        at_hand: what a checkpointed forward pass kept, when this is its recompute.
    """
    wanted = graph.saved if checkpoint is None else _policy_names(graph, checkpoint)
    kept = Kept(checkpoint)
    if checkpoint is not None or graph.input_name in wanted:
        kept.tensors[graph.input_name] = x.hold()
        timeline.relabel(x, category)
    live = {graph.input_name: x.hold()}
    ops = graph.ops if at_hand is None else graph.ops[: graph.last_needed + 1]
    for op, read_last in zip(ops, graph.last_reads, strict=False):
        work = timeline.take("temporaries", op.work_bytes) if op.work_bytes else None
        if op.kind != "view":
            _make(op, timeline, live, kept, wanted, category, at_hand)
        timeline.drop(work)
        for name in read_last:
            if name in live:
                timeline.drop(live.pop(name))
    out = live.pop(graph.base_of()[graph.output], None)
    for buffer in live.values():
        timeline.drop(buffer)
    return out or Buffer(0, category, None), kept


def _make(
    op: Op,
    timeline: Timeline,
    live: dict[str, Buffer],
    kept: Kept,
    wanted: frozenset[str],
    category: str,
    at_hand: Kept | None,
) -> None:
    """Make an operation's output, or take it from what the forward pass kept."""
    known = at_hand.tensors.get(op.name) if at_hand is not None else None
    if known is not None:
        buffer = known.hold()
    else:
        buffer = timeline.take(category if op.name in wanted else "temporaries", op.num_bytes)
    live[op.name] = buffer
    if op.name in wanted:
        kept.tensors[op.name] = buffer.hold()
    aside = at_hand.asides.get(op.name) if at_hand is not None else None
    if aside is not None:
        kept.asides[op.name] = aside.hold()
    elif op.aside_bytes and (kept.checkpoint is None or op.name in wanted):
        kept.asides[op.name] = timeline.take(category, op.aside_bytes)


def backward(
    graph: Graph,
    timeline: Timeline,
    kept: Kept,
    grad: Buffer,
    *,
    on_weight_grad: Callable[[Buffer], None] | None = None,
    input_grad: bool = True,
    lingering: list[Buffer] | None = None,
) -> Buffer | None:
    """Run a block's backward pass: takes over ``grad`` and what was kept, returns the gradient of the input.

    ``lingering`` collects what stays with the graph (see :class:`Op`).
    """
    if kept.checkpoint is not None:
        kept = _recompute(graph, timeline, kept)
    if lingering is not None:
        base = graph.base_of()
        staying = {base[name] for op in graph.ops if op.lingers for name in op.keeps}
        lingering += [kept.tensors[name].hold() for name in staying if name in kept.tensors]
    sizes = graph.sizes
    grads = {graph.output: grad}
    for op, keeps_first in zip(reversed(graph.ops), reversed(graph.first_keeps), strict=True):
        given = grads.pop(op.name, None)
        if op.kind == "view":
            _pass_view(op, timeline, grads, given, sizes)
            continue
        if given is not None:
            _differentiate(op, timeline, grads, given, sizes, on_weight_grad)
        timeline.drop(kept.asides.pop(op.name, None))
        for name in keeps_first:
            timeline.drop(kept.tensors.pop(name, None))
    kept.release(timeline)
    result = grads.pop(graph.input_name, None)
    for left in grads.values():
        timeline.drop(left)
    if result is not None and not input_grad:
        timeline.drop(result)
        return None
    return result


def _recompute(graph: Graph, timeline: Timeline, spent: Kept) -> Kept:
    """Make again what the forward pass did not keep; what it kept is taken over."""
    out, kept = forward(graph, timeline, spent.tensors[graph.input_name], category="recompute", at_hand=spent)
    timeline.drop(out)
    spent.release(timeline)
    return kept


def _pass_view(
    op: Op, timeline: Timeline, grads: dict[str, Buffer], given: Buffer | None, sizes: dict[str, int]
) -> None:
    """A view's gradient is its source's; that of a part is laid into one of the whole size."""
    source = op.inputs[0]
    if given is None:
        return
    if source not in grads and op.num_bytes == sizes[source]:
        grads[source] = given
        return
    if source not in grads:
        grads[source] = timeline.take("activation_gradients", sizes[source])
    timeline.drop(given)


def _differentiate(
    op: Op,
    timeline: Timeline,
    grads: dict[str, Buffer],
    given: Buffer,
    sizes: dict[str, int],
    on_weight_grad: Callable[[Buffer], None] | None,
) -> None:
    """Make the gradients of an operation's inputs and weights, and let its output's gradient go."""
    work = timeline.take("temporaries", op.grad_work_bytes) if op.grad_work_bytes else None
    for name in op.inputs:
        made = given.hold() if op.kind == "add" else timeline.take("activation_gradients", sizes[name])
        before = grads.get(name)
        if before is None:
            grads[name] = made
        elif before.holders > 1:
            grads[name] = timeline.take("activation_gradients", sizes[name])
            timeline.drop(before)
            timeline.drop(made)
        else:
            timeline.drop(made)
    if op.weight_grad_bytes:
        weight = timeline.take("unsharded_gradients", op.weight_grad_bytes)
        if on_weight_grad is not None:
            on_weight_grad(weight)
        else:
            timeline.drop(weight)
    timeline.drop(work)
    timeline.drop(given)


def total_kept(graphs: Iterable[Graph]) -> int:
    """Bytes that blocks keep without checkpointing."""
    return sum(saved_bytes(graph) for graph in graphs)
