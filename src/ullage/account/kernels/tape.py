"""A tape of sizes: programs of eager PyTorch written as what they make, keep and let go; no tensor holds a value.

A program calls :meth:`Tape.op` where PyTorch would run an operation. Lifetimes are Python's own, as in eager PyTorch:
a tensor's bytes go when its last reader goes, be it a variable, a saved tensor of the graph or a gradient. The
backward pass is the engine's: newest node first, gradients of a tensor with several readers are summed, leaves
accumulate in place.

Source: torch@2.13.0:torch/csrc/autograd/engine.cpp (evaluate_function, call_function, validate_outputs),
    input_buffer.cpp (accumulate), functions/accumulate_grad.h (accumulateGrad); c10/cuda/CUDACachingAllocator.cpp.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ullage.account.kernels.device import Device
from ullage.account.kernels.engine import BackwardPass
from ullage.account.kernels.tensors import Backward, Memory, Node, Storage, Tensor, block_bytes, passed, viewed

__all__ = ["Backward", "Tape", "Tensor", "block_bytes", "passed", "viewed"]

#: What the gradient of an input is: a new tensor of the output's size (reduced to the input's afterwards), the
#: output's own gradient passed on, or none.
Grad = Literal["new", "pass", "none"]


class Tape:
    """Runs a program and its backward pass, counting bytes."""

    def __init__(self, device: Device | None = None) -> None:
        self.device = device or Device(num_multiprocessors=0)
        self.memory = Memory()
        self.recording = True
        self._number = 0

    # --- tensors -------------------------------------------------------------------------------------------------

    def empty(self, num_elements: int, width: float) -> Tensor:
        """Make a tensor without a gradient."""
        return Tensor(Storage(self.memory, int(num_elements * width)), num_elements, width)

    def leaf(self, num_elements: int, width: float) -> Tensor:
        """Make a parameter or an input that a gradient is wanted for."""
        made = self.empty(num_elements, width)
        made.requires_grad = True
        return made

    def brief(self, num_bytes: int) -> None:
        """Allocate and free at once."""
        if num_bytes:
            Storage(self.memory, num_bytes)

    def op(
        self,
        inputs: Sequence[Tensor],
        num_elements: int,
        width: float,
        *,
        keeps: Sequence[Tensor] = (),
        keeps_result: bool = False,
        grads: Grad | Sequence[Grad] = "new",
        aside: int = 0,
        work: int = 0,
        grad_work: int = 0,
        backward: Backward | None = None,
    ) -> Tensor:
        """Run an operation with one output.

        Args:
            inputs: tensors it reads that may want a gradient.
            num_elements, width: of the output.
            keeps: tensors the graph keeps, besides the output (``keeps_result``) and ``aside`` bytes of statistics.
            grads: what the gradient of each input is.
            work, grad_work: bytes that are needed for a moment, forward and backward.
            backward: in place of ``grads``: a program of its own.
        """
        self.brief(work)
        made = self.empty(num_elements, width)
        made.per_row = any(each.per_row and each.num_elements == num_elements for each in inputs)
        kept = [*keeps, *([made] if keeps_result else [])]
        statistics = [self.empty(aside, 1)] if aside else []
        kinds = [grads] * len(inputs) if isinstance(grads, str) else list(grads)
        rule = backward or _standard(kinds, grad_work)
        return self.record(inputs, made, [*kept, *statistics], rule)

    def record(self, inputs: Sequence[Tensor], made: Tensor, kept: Sequence[Tensor], rule: Backward) -> Tensor:
        """Put an output on the graph."""
        return self.record_all(inputs, [made], kept, rule)[0]

    def record_all(
        self, inputs: Sequence[Tensor], made: Sequence[Tensor], kept: Sequence[Tensor], rule: Backward
    ) -> Sequence[Tensor]:
        """Put the outputs of one operation on the graph."""
        if self.recording and any(each.requires_grad for each in inputs):
            self._number += 1
            node = Node(self._number, inputs, kept, rule)
            for place, each in enumerate(made):
                each.node, each.place, each.requires_grad = node, place, True
        return made

    def view(self, x: Tensor, num_elements: int | None = None) -> Tensor:
        """Return a view: its gradient is passed on, or laid into zeros where it covers a part."""
        part = x.num_elements if num_elements is None else num_elements
        made = Tensor(x.storage, part, x.width)
        return self.record([x], made, (), _passed)

    # --- backward ------------------------------------------------------------------------------------------------

    def run_backward(self, output: Tensor, grad: Tensor, *, retain_graph: bool = False) -> None:
        """Run the backward pass of ``output``; the caller's hold on ``grad`` lasts as long as its variable."""
        self.run_backward_all([output], [grad], retain_graph=retain_graph)

    def run_backward_all(
        self,
        outputs: Sequence[Tensor],
        grads: Sequence[Tensor],
        *,
        retain_graph: bool = False,
        into: Sequence[Tensor] | None = None,
    ) -> list[Tensor]:
        """Run the backward pass from several outputs.

        ``into``: tensors whose gradients are returned and nothing else is accumulated (``torch.autograd.grad``).
        """
        run = BackwardPass(self, into, retain_graph=retain_graph)
        held = []  # the engine holds what it was given, in the format of the output, until it is done
        for output, grad in zip(outputs, grads, strict=True):
            held.append(grad if grad.width == output.width else self.empty(grad.num_elements, output.width))
            run.root(output, passed(held[-1]))
        recording, self.recording = self.recording, False
        run.go()
        self.recording = recording
        return run.found


def _standard(kinds: Sequence[Grad], grad_work: int) -> Backward:
    """Return a rule of new and passed gradients."""

    def rule(tape: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        assert grad is not None
        work = tape.empty(grad_work, 1)
        made: list[Tensor | None] = []
        for kind in kinds:
            if kind == "new":
                made.append(tape.empty(grad.num_elements, grad.width))
            else:
                made.append(passed(grad) if kind == "pass" else None)
        del work
        return made

    return rule


def _passed(tape: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The gradient of a view is the same bytes; that of a part is laid into zeros of the whole."""
    grad = grads[0]
    assert grad is not None
    return [viewed(grad)]
