"""Operations of PyTorch as a tape sees them: what each keeps and what its gradients are.

Source: torch@2.13.0:tools/autograd/derivatives.yaml, under each operation's name;
    torch/csrc/autograd/FunctionsManual.cpp where a formula makes more than its result.
"""

from __future__ import annotations

from collections.abc import Sequence

from ullage.account.kernels.tape import Tape, Tensor, viewed

#: Bytes of fp32.
WIDE = 4


def add(t: Tape, *inputs: Tensor) -> Tensor:
    """Sum or difference: the gradient is passed to both."""
    return t.op(inputs, max(each.num_elements for each in inputs), max(each.width for each in inputs), grads="pass")


def shift(t: Tape, x: Tensor) -> Tensor:
    """A number added: the gradient is passed on."""
    return t.op([x], x.num_elements, x.width, grads="pass")


def scale(t: Tape, x: Tensor) -> Tensor:
    """A number multiplied."""
    return t.op([x], x.num_elements, x.width)


def scale_in_place(t: Tape, x: Tensor) -> Tensor:
    """A number multiplied in place: a new gradient all the same."""
    return t.record([x], Tensor(x.storage, x.num_elements, x.width), (), _new)


def _new(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
    grad = grads[0]
    assert grad is not None
    return [t.empty(grad.num_elements, grad.width)]


def mul(t: Tape, one: Tensor, other: Tensor) -> Tensor:
    """Product: each factor is kept for the other's gradient."""
    keeps = ([one] if other.requires_grad else []) + ([other] if one.requires_grad else [])
    grads = tuple("new" if each.requires_grad else "none" for each in (one, other))
    size, width = max(one.num_elements, other.num_elements), max(one.width, other.width)
    return t.op([one, other], size, width, keeps=keeps, grads=grads)  # type: ignore[arg-type]


def divide(t: Tape, one: Tensor, other: Tensor) -> Tensor:
    """Quotient: as a product; the divisor is always kept."""
    keeps = [other, *([one] if other.requires_grad else [])]
    grads = tuple("new" if each.requires_grad else "none" for each in (one, other))
    size, width = max(one.num_elements, other.num_elements), max(one.width, other.width)
    return t.op([one, other], size, width, keeps=keeps, grads=grads)  # type: ignore[arg-type]


def cast(t: Tape, x: Tensor, width: float) -> Tensor:
    """Another format; the same one is the tensor itself."""
    if x.width == width:
        return x
    before = x.width

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        assert grad is not None
        return [t.empty(grad.num_elements, before)]

    return t.op([x], x.num_elements, width, backward=backward)


def pointwise(t: Tape, x: Tensor, *, keeps_result: bool = False, grad_work: int = 0) -> Tensor:
    """One input, one output of its size: keeps its input (square, log, silu ...) or its result (exp, tanh ...)."""
    keeps = () if keeps_result else (x,)
    return t.op([x], x.num_elements, x.width, keeps=keeps, keeps_result=keeps_result, grad_work=grad_work)


def square(t: Tape, x: Tensor) -> Tensor:
    """x^2: keeps x; backward makes x^1, its double and the product with the gradient."""
    return t.op([x], x.num_elements, x.width, keeps=[x], grad_work=2 * x.num_bytes)


def softmax(t: Tape, x: Tensor, width: float | None = None) -> Tensor:
    """Softmax: keeps its result; backward multiplies it with the gradient first.

    ``width``: of a result in another format. Source: torch@2.13.0:aten/src/ATen/native/cuda/SoftMax.cu
        (softmax_backward_cuda_out: ``tmp = grad * output``).
    """
    size = width or x.width
    return t.op([x], x.num_elements, size, keeps_result=True, grad_work=int(x.num_elements * size))


def log_softmax(t: Tape, x: Tensor, width: float | None = None) -> Tensor:
    """Log-softmax: keeps its result."""
    return t.op([x], x.num_elements, width or x.width, keeps_result=True)


def reduce(t: Tape, x: Tensor, num_elements: int, *, keeps: bool = False, divided: bool = False) -> Tensor:
    """A sum or mean: the gradient is expanded without memory; ``divided`` (a mean): and divided, a new one."""

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        assert grad is not None
        if divided:
            return [t.empty(x_elements, x_width)]
        return [expanded(grad, x_elements, x_width)]

    x_elements, x_width = x.num_elements, x.width
    made = t.op([x], num_elements, x.width, keeps=[x] if keeps else (), backward=backward)
    made.per_row = True
    return made


def expanded(grad: Tensor, num_elements: int, width: float) -> Tensor:
    """A small tensor seen as a large one: no memory of its own."""
    return Tensor(grad.storage, num_elements, width)


def gather(t: Tape, x: Tensor, index: Tensor) -> Tensor:
    """Values at an index: keeps the index; the gradient is zeros of the whole size."""
    size, width = x.num_elements, x.width

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [t.empty(size, width)]

    return t.op([x], index.num_elements, x.width, keeps=[index], backward=backward)


def linear(t: Tape, x: Tensor, weight: Tensor, rows: int, *, folded: bool = False) -> Tensor:
    """Product with W^T: keeps what the other's gradient needs.

    ``folded``: x has batch and sequence, and is seen as rows: its gradient comes back through a view.
    """
    keeps = ([x] if weight.requires_grad else []) + ([weight] if x.requires_grad else [])
    sizes = [(each.num_elements, each.width, each.requires_grad) for each in (x, weight)]
    inner = x.num_elements // rows

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        made = [t.empty(size, width) if wanted else None for size, width, wanted in sizes]
        if folded and made[0] is not None:
            made[0].shared = True
        return made

    return t.op([x, weight], rows * (weight.num_elements // inner), x.width, keeps=keeps, backward=backward)


def halves(t: Tape, x: Tensor) -> tuple[Tensor, Tensor]:
    """Two views, whose gradients are joined (``chunk``)."""
    size, width = x.num_elements, x.width

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        return [t.empty(size, width)]

    made = t.record_all([x], [Tensor(x.storage, size // 2, width) for _half in range(2)], (), backward)
    return made[0], made[1]


def cat(t: Tape, parts: Sequence[Tensor]) -> Tensor:
    """Joined: the gradients are parts of the whole one."""
    sizes = [(each.num_elements, each.width) for each in parts]

    def backward(t: Tape, kept: Sequence[Tensor], grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        grad = grads[0]
        assert grad is not None
        return [viewed(Tensor(grad.storage, size, width)) for size, width in sizes]

    return t.op(parts, sum(size for size, _width in sizes), parts[0].width, backward=backward)
