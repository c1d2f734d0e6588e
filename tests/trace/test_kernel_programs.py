"""Programs on the tape of sizes against traces of the PyTorch code that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional  # noqa: E402

from ullage.account.kernels import attention, experts, ffn, heads, losses, norms, ops, rotary  # noqa: E402
from ullage.account.kernels.tape import Tape, Tensor  # noqa: E402
from ullage.trace.api import trace  # noqa: E402

pytestmark = pytest.mark.reference

ROWS, VOCAB, HIDDEN, INNER = 512, 2048, 1024, 3072
NUM_HEADS, KV_HEADS = 8, 2


def _taped(program: Callable[[Tape], Callable[[], Tensor]], *, retain_graph: bool = False) -> int:
    tape = Tape()
    run = program(tape)
    for _step in range(3):
        tape.memory.reset()
        made = run()
        tape.run_backward(made, tape.empty(made.num_elements, made.width), retain_graph=retain_graph)
        del made
    return tape.memory.peak


def _traced(module: Any, forward: Callable[[Any], Any], *, retain_graph: bool = False) -> int:
    def step() -> None:
        made = forward(module)
        made.backward(torch.empty_like(made), retain_graph=retain_graph)

    result = trace(lambda: (module, step), steps=3)
    workspaces = sum(each.size_bytes for each in result.trace.allocations if each.op == "cublas")
    return int(result.outcome.peak_allocated_bytes) - workspaces


class Leaves(torch.nn.Module):
    """Tensors by name: two dimensions each, in 16 bits unless the name ends in ``_wide``."""

    def __init__(self, trained: dict[str, tuple[int, ...]], given: dict[str, tuple[int, ...]] | None = None) -> None:
        super().__init__()
        for name, shape in trained.items():
            setattr(self, name, torch.nn.Parameter(torch.empty(shape, dtype=_format(name), device="meta")))
        for name, shape in (given or {}).items():
            kind = torch.int64 if name == "labels" else _format(name)
            self.register_buffer(name, torch.empty(shape, dtype=kind, device="meta"))


def _format(name: str) -> Any:
    return torch.float32 if name.endswith("_wide") else torch.bfloat16


def _leaves(tape: Tape, module: Leaves) -> dict[str, Tensor]:
    made = {name: tape.leaf(each.numel(), each.element_size()) for name, each in module.named_parameters()}
    return made | {name: tape.empty(each.numel(), each.element_size()) for name, each in module.named_buffers()}


def _agree(
    module: Leaves,
    forward: Callable[[Any], Any],
    program: Callable[[Tape, dict[str, Tensor]], Tensor],
    *,
    rel: float = 0.002,
) -> None:
    def prepared(tape: Tape) -> Callable[[], Tensor]:
        found = _leaves(tape, module)
        return lambda: program(tape, found)

    for retain_graph in (False, True):
        traced = _traced(module, forward, retain_graph=retain_graph)
        assert _taped(prepared, retain_graph=retain_graph) == pytest.approx(traced, rel=rel)


def test_cross_entropy() -> None:
    module = Leaves({"x_wide": (ROWS, VOCAB)}, {"labels": (ROWS,)})
    _agree(
        module,
        lambda m: functional.cross_entropy(m.x_wide, m.labels),
        lambda t, m: losses.cross_entropy(t, m["x_wide"], ROWS),
    )


@pytest.mark.parametrize("tokens", [2048, 4096, 65536])
def test_embedding(tokens: int) -> None:
    _agree(
        Leaves({"weight": (VOCAB, HIDDEN)}, {"labels": (tokens,)}),
        lambda m: functional.embedding(m.labels, m.weight),
        lambda t, m: experts.embedding(t, m["weight"], m["labels"], HIDDEN),
    )


def test_kl_divergence() -> None:
    module = Leaves({"x_wide": (ROWS, VOCAB)}, {"y_wide": (ROWS, VOCAB)})
    _agree(
        module,
        lambda m: functional.kl_div(m.x_wide.log_softmax(-1), m.y_wide, reduction="batchmean"),
        lambda t, m: losses.kl_divergence(t, ops.log_softmax(t, m["x_wide"]), m["y_wide"], ROWS),
    )


def test_jensen_shannon() -> None:
    def forward(m: Any) -> Any:
        kl = torch.nn.KLDivLoss(reduction="none", log_target=True)
        q, p = m.x_wide.log_softmax(-1), m.y_wide
        mean = torch.lerp(torch.exp(q), torch.exp(p), 0.5)
        both = 0.5 * kl(torch.log(mean), p).sum(-1) + 0.5 * kl(torch.log(mean), q).sum(-1)
        return (both / ROWS).sum()

    _agree(
        Leaves({"x_wide": (ROWS, VOCAB)}, {"y_wide": (ROWS, VOCAB)}),
        forward,
        lambda t, m: losses.jensen_shannon(t, ops.log_softmax(t, m["x_wide"]), m["y_wide"], ROWS),
    )


def test_rms_norm() -> None:
    def forward(m: Any) -> Any:
        wide = m.x.to(torch.float32)
        variance = wide.pow(2).mean(-1, keepdim=True)
        wide = wide * torch.rsqrt(variance + 1e-6)
        return m.weight_wide * wide.to(torch.bfloat16)

    _agree(
        Leaves({"x": (ROWS, HIDDEN), "weight_wide": (HIDDEN,)}),
        forward,
        lambda t, m: norms.rms_norm(t, m["x"], m["weight_wide"], ROWS),
    )


def test_dynamic_tanh() -> None:
    _agree(
        Leaves({"x": (ROWS, HIDDEN), "alpha_wide": (1,), "gamma_wide": (HIDDEN,), "beta_wide": (HIDDEN,)}),
        lambda m: m.gamma_wide * torch.tanh(m.x * m.alpha_wide) + m.beta_wide,
        lambda t, m: norms.dynamic_tanh(t, m["x"], m["alpha_wide"], m["gamma_wide"], m["beta_wide"]),
    )


def test_gated_block() -> None:
    def forward(m: Any) -> Any:
        x = m.x
        return functional.linear(functional.silu(functional.linear(x, m.gate)) * functional.linear(x, m.up), m.down)

    def program(t: Tape, m: dict[str, Tensor]) -> Tensor:
        weights = ffn.Weights(gate=m["gate"], up=m["up"], down=m["down"])
        return ffn.gated(t, m["x"], weights, ROWS, fused=False)

    trained = {"x": (2, ROWS // 2, HIDDEN), "gate": (INNER, HIDDEN), "up": (INNER, HIDDEN), "down": (HIDDEN, INNER)}
    _agree(Leaves(trained), forward, program)


def test_rotary_embedding() -> None:
    def half(x: Any) -> Any:
        one, other = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
        return torch.cat((-other, one), dim=-1)

    def forward(m: Any) -> Any:
        q, k = m.q.transpose(1, 2), m.k.transpose(1, 2)
        turned = (q * m.cosine) + (half(q) * m.sine), (k * m.cosine) + (half(k) * m.sine)
        return turned[0]

    def program(t: Tape, m: dict[str, Tensor]) -> Tensor:
        return rotary.rotate_halves(t, t.view(m["q"]), t.view(m["k"]), m["cosine"], m["sine"])[0]

    size = HIDDEN // NUM_HEADS
    module = Leaves(
        {"q": (1, ROWS, NUM_HEADS, size), "k": (1, ROWS, KV_HEADS, size)},
        {"cosine": (1, 1, ROWS, size), "sine": (1, 1, ROWS, size)},
    )
    _agree(module, forward, program)


def test_preference_head() -> None:
    def logps(logits: Any, labels: Any) -> Any:
        return torch.gather(logits.log_softmax(-1), dim=2, index=labels.unsqueeze(2)).squeeze(2).sum(-1)

    def loss_of(m: Any) -> Any:
        logits = (m.x @ m.weight.t()).float()
        chosen = functional.cross_entropy(logits[:1].view(-1, VOCAB), m.labels[:1].view(-1))
        return chosen, logps(logits, m.labels), logits

    def forward(m: Any) -> Any:
        chosen, each, _logits = loss_of(m)
        return chosen - (each[:1] - each[1:]).mean()

    _agree(
        Leaves({"x": (2, ROWS // 2, HIDDEN), "weight": (VOCAB, HIDDEN)}, {"labels": (2, ROWS // 2)}),
        forward,
        lambda t, m: heads.preference_head(t, m["x"], m["weight"], m["labels"], ROWS),
        rel=0.01,
    )


def test_policy_head() -> None:
    def forward(m: Any) -> Any:
        logits = m.x @ m.weight.t()
        values = functional.log_softmax(logits.float(), dim=-1)
        each = values.gather(dim=-1, index=m.labels.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            other = m.reference_x @ m.reference.t()
            others = functional.log_softmax(other.float(), dim=-1)
            kept = others.gather(dim=-1, index=m.labels.unsqueeze(-1)).squeeze(-1)
        return (torch.exp(each - each.detach()) - (kept - each)).sum()

    _agree(
        Leaves(
            {"x": (2, ROWS // 2, HIDDEN), "weight": (VOCAB, HIDDEN)},
            {"reference_x": (2, ROWS // 2, HIDDEN), "reference": (VOCAB, HIDDEN), "labels": (2, ROWS // 2)},
        ),
        forward,
        lambda t, m: heads.policy_head(t, m["x"], m["weight"], m["reference_x"], m["reference"], m["labels"], ROWS),
        rel=0.01,
    )


def test_sparsemax() -> None:
    def forward(m: Any) -> Any:
        ordered, _indices = torch.sort(m.x, dim=-1, descending=True)
        sums = torch.cumsum(ordered, dim=-1)
        numbers = torch.arange(1, HIDDEN + 1, device=m.x.device, dtype=m.x.dtype).view(1, HIDDEN)
        bound = 1 + numbers * ordered
        support = bound > sums
        count = support.sum(dim=-1, keepdim=True).clamp(min=1)
        total = (ordered * support).sum(dim=-1, keepdim=True)
        return torch.clamp(m.x - (total - 1) / count, min=0)

    _agree(Leaves({"x": (ROWS, HIDDEN)}), forward, lambda t, m: attention.sparsemax(t, m["x"], HIDDEN), rel=0.01)


def test_polynomial_norm() -> None:
    def normed(x: Any) -> Any:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(m: Any) -> Any:
        wide = m.x.to(torch.float32)
        cube, square, plain = wide**3, wide**2, wide**1
        parts = normed(cube), normed(square), normed(plain)
        total = m.weight_wide[0] * parts[0] + m.weight_wide[1] * parts[1] + m.weight_wide[2] * parts[2]
        return (total + m.bias_wide).to(torch.bfloat16)

    _agree(
        Leaves({"x": (ROWS, HIDDEN), "weight_wide": (3,), "bias_wide": (1,)}),
        forward,
        lambda t, m: norms.polynomial_norm(t, m["x"], m["weight_wide"], m["bias_wide"], ROWS),
        rel=0.01,
    )


def test_squared_relu() -> None:
    _agree(
        Leaves({"x": (ROWS, HIDDEN)}),
        lambda m: torch.square(functional.relu(m.x)),
        lambda t, m: norms.squared_relu(t, m["x"]),
    )


def test_halves() -> None:
    def forward(m: Any) -> Any:
        gate, up = torch.chunk(m.x, 2, -1)
        return functional.silu(gate) * up

    _agree(Leaves({"x": (ROWS, HIDDEN)}), forward, lambda t, m: ffn.swiglu_of_halves(t, m["x"], kind="torch"))


def test_distillation_head() -> None:
    def forward(m: Any) -> Any:
        logits = (m.x @ m.weight.t()).float()
        with torch.no_grad():
            other = (m.teacher_x @ m.teacher.t()).float()
        hard = functional.cross_entropy(logits.view(-1, VOCAB), m.labels)
        logits /= 1.0
        own, teacher = functional.log_softmax(logits, dim=-1), functional.log_softmax(other, dim=-1)
        mean = (0.5 * own.exp() + 0.5 * teacher.exp()).log()
        one = functional.kl_div(mean, own, reduction="batchmean", log_target=True)
        return 0.5 * hard + 0.5 * (one + functional.kl_div(mean, teacher, reduction="batchmean", log_target=True))

    _agree(
        Leaves(
            {"x": (ROWS, HIDDEN), "weight": (VOCAB, HIDDEN)},
            {"teacher_x": (ROWS, HIDDEN), "teacher": (VOCAB, HIDDEN), "labels": (ROWS,)},
        ),
        forward,
        lambda t, m: heads.distillation_head(t, (m["x"], m["weight"]), (m["teacher_x"], m["teacher"]), ROWS),
        rel=0.01,
    )


def test_jensen_shannon_head() -> None:
    def forward(m: Any) -> Any:
        kl = torch.nn.KLDivLoss(reduction="none", log_target=True)
        logits, others = m.x @ m.weight.t(), m.teacher_x @ m.teacher.t()
        q = torch.log_softmax(logits / 1.0, dim=-1)
        p = torch.log_softmax(others / 1.0, dim=-1)
        return divergence(kl, q, p)

    def divergence(kl: Any, q: Any, p: Any) -> Any:
        p, q = p.to(torch.float), q.to(torch.float)
        mean = torch.lerp(torch.exp(q), torch.exp(p), 0.5)
        both = 0.5 * kl(torch.log(mean), p).sum(-1) + 0.5 * kl(torch.log(mean), q).sum(-1)
        return (both / ROWS).sum()

    _agree(
        Leaves(
            {"x": (ROWS, HIDDEN), "weight": (VOCAB, HIDDEN), "teacher": (VOCAB, HIDDEN)},
            {"teacher_x": (ROWS, HIDDEN)},
        ),
        forward,
        lambda t, m: heads.jensen_shannon_head(t, (m["x"], m["weight"]), (m["teacher_x"], m["teacher"]), ROWS),
        rel=0.01,
    )


def test_complex_rotary_embedding() -> None:
    def forward(m: Any) -> Any:
        angles = torch.polar(m.angles_wide, m.angles_wide)[:, :, None, :]
        return turned(m, angles)

    def turned(m: Any, angles: Any) -> Any:
        q, k = (torch.view_as_complex(each.float().reshape(*each.shape[:-1], -1, 2)) for each in (m.q, m.k))
        q_out, k_out = (torch.view_as_real(each * angles).flatten(3) for each in (q, k))
        return (q_out.type_as(m.q), k_out.type_as(m.k))[0]

    size = HIDDEN // NUM_HEADS
    module = Leaves(
        {"q": (1, ROWS, NUM_HEADS, size), "k": (1, ROWS, KV_HEADS, size)}, {"angles_wide": (1, ROWS, size // 2)}
    )
    _agree(
        module,
        forward,
        lambda t, m: rotary.complex_product(t, m["q"], m["k"], t.empty(ROWS * size // 2, 8))[0],
        rel=0.06,  # the tables, which the program is given, are made here, and held by the function
    )
