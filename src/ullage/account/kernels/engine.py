"""The backward pass: newest node first, gradients of a tensor with several readers summed, leaves in place.

Source: torch@2.13.0:torch/csrc/autograd/engine.cpp (evaluate_function, call_function, validate_outputs),
    input_buffer.cpp (accumulate), functions/accumulate_grad.h (accumulateGrad).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ullage.account.kernels.tensors import Node, Target, Tensor

if TYPE_CHECKING:
    from ullage.account.kernels.tape import Tape


class BackwardPass:
    """One run of the engine. A target is a node, or a leaf: both gather what they are given until it is all there."""

    def __init__(self, tape: Tape, into: Sequence[Tensor] | None, *, retain_graph: bool) -> None:
        self.tape, self.retain_graph = tape, retain_graph
        self.wanted = None if into is None else {(each.node or each, each.place) for each in into}
        self.found: list[Tensor] = []
        self.buffers: dict[Target, list[Tensor | None]] = {}
        self.waiting: dict[Target, int] = {}
        self.ready: list[tuple[float, int, Target]] = []

    def root(self, output: Tensor, grad: Tensor) -> None:
        """Begin at an output."""
        target = output.node or output
        self._count(target)
        self._give(target, output.place, grad)

    def _count(self, start: Target) -> None:
        """Count how many gradients every target waits for."""
        if start in self.waiting:
            return
        self.waiting[start] = 0
        todo = [start]
        while todo:
            target = todo.pop()
            for edge in target.edges if isinstance(target, Node) else ():
                if edge is None:
                    continue
                if edge[0] not in self.waiting:
                    self.waiting[edge[0]] = 0
                    todo.append(edge[0])
                self.waiting[edge[0]] += 1

    def go(self) -> None:
        """Run every target once all its gradients are there: leaves at once, else the newest node first."""
        for target in list(self.waiting):
            self._queue(target)
        while self.ready:
            self._run(heapq.heappop(self.ready)[2])

    def _queue(self, target: Target) -> None:
        if self.waiting[target] == 0:
            order = -float(target.number) if isinstance(target, Node) else -math.inf
            heapq.heappush(self.ready, (order, len(self.waiting) - len(self.ready), target))

    def _run(self, target: Target) -> None:
        grads = self.buffers.pop(target, [])
        if self.wanted is not None:
            self.found += [g for place, g in enumerate(grads) if g is not None and (target, place) in self.wanted]
        if isinstance(target, Tensor):
            if self.wanted is None and grads and grads[0] is not None:
                _accumulate(self.tape, target, grads[0])
            return
        made: list[Tensor | None] = [None] * len(target.edges)
        if any(grads):
            made = list(target.backward(self.tape, target.kept, grads))
        _mark_shared(made, target, grads, retained=self.retain_graph)
        for index, (num_elements, width, per_row) in enumerate(target.sizes):
            grad = made[index]
            if grad is not None and target.edges[index] is None:
                made[index] = None
            elif grad is not None and (grad.num_elements != num_elements or grad.width != width):
                if not per_row:
                    self.tape.brief(self.tape.device.sum_buffer_bytes(num_elements, grad.num_elements // num_elements))
                made[index] = self.tape.empty(num_elements, width)
            del grad
        del grads
        if not self.retain_graph:
            target.kept = []
        for index, edge in enumerate(target.edges):
            given, made[index] = made[index], None
            if edge is not None:
                self._pass(edge, given)
            del given

    def _pass(self, edge: tuple[Target, int], grad: Tensor | None) -> None:
        """Give a gradient to the node or leaf it belongs to."""
        target, place = edge
        if grad is not None:
            self._give(target, place, grad)
        self.waiting[target] -= 1
        self._queue(target)

    def _give(self, target: Target, place: int, grad: Tensor) -> None:
        """Lay a gradient into a buffer; two are summed, in place where nobody else holds the first."""
        buffer = self.buffers.setdefault(target, [])
        while len(buffer) <= place:
            buffer.append(None)
        before = buffer[place]
        if before is None:
            buffer[place] = grad
        elif before.shared:
            buffer[place] = self.tape.empty(grad.num_elements, grad.width)


def _accumulate(tape: Tape, leaf: Tensor, grad: Tensor) -> None:
    """Add to a leaf's gradient: the first is taken over, or copied where others hold it; later ones in place."""
    if leaf.grad is None:
        leaf.grad = grad.detach() if grad.fresh else tape.empty(grad.num_elements, grad.width)


def _mark_shared(made: Sequence[Tensor | None], node: Node, grads: Sequence[Tensor | None], *, retained: bool) -> None:
    """Mark gradients whose bytes others hold too: two of one node, one that came in shared, one that is kept."""
    held = [each.storage for each in grads if each is not None and each.shared]
    kept = [each.storage for each in node.kept] if retained else []
    storages = [each.storage for each in made if each is not None]
    for each in made:
        if each is not None:
            twice = storages.count(each.storage) > 1
            each.shared = each.shared or twice or each.storage in held or each.storage in kept
            each.fresh = each.fresh and each.storage not in kept
