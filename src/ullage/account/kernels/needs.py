"""What a kernel needs beside its inputs and their gradients: for steps that run it among other things."""

from __future__ import annotations

from collections.abc import Callable

from ullage.account.kernels.device import Device
from ullage.account.kernels.tape import Tape, Tensor
from ullage.frozen import Frozen

#: Makes the inputs on a tape, and returns what runs the kernel on them.
Program = Callable[[Tape], Callable[[], Tensor]]


class Needs(Frozen):
    """Bytes of a kernel beside its inputs.

    Attributes:
        forward_bytes, backward_bytes: the most at once, outputs and new gradients included.
        kept_bytes: what stays from forward to backward, the output included.
        gradient_bytes: of the inputs, as the backward pass leaves them.
    """

    forward_bytes: int
    backward_bytes: int
    kept_bytes: int
    gradient_bytes: int


def needs_of(program: Program, device: Device | None = None) -> Needs:
    """Run a program once, forward and backward.

    Formula: peaks of the tape less what the inputs take; the gradient of the output is made before the backward pass
        and counts for it.
    """
    tape = Tape(device)
    run = program(tape)
    inputs = tape.memory.live
    tape.memory.reset()
    made = run()
    forward, kept = tape.memory.peak - inputs, tape.memory.live - inputs
    tape.memory.reset()
    tape.run_backward(made, tape.empty(made.num_elements, made.width))
    backward = tape.memory.peak - inputs
    del made
    return Needs(
        forward_bytes=forward,
        backward_bytes=backward,
        kept_bytes=kept,
        gradient_bytes=tape.memory.live - inputs,
    )
