"""Log-probabilities of preference losses against a traced head: what stands at the worst point, to a few percent.

The functions below do what TRL's and LLaMA-Factory's do to logits, in their order; the traced step is a head alone, so
that its weights and their gradient are all that stands beside them.
"""

import pytest

pytest.importorskip("torch")

import torch
from torch import nn
from torch.nn import functional

from ullage.account.activations.log_probs import LogProbs, log_prob_peak
from ullage.trace.api import trace

pytestmark = pytest.mark.reference
LENGTH, VOCABULARY, HIDDEN = 512, 32000, 64
WORKSPACE = 8 * 2**20 + 128 * 2**10


def rows(logits, labels):
    if logits.dtype == torch.float32:
        chosen = torch.gather(logits, -1, labels.unsqueeze(-1)).squeeze(-1)
        return chosen - torch.stack([torch.logsumexp(row, dim=-1) for row in logits])
    made = []
    for row, label in zip(logits, labels, strict=True):
        made.append(functional.log_softmax(row, dim=-1).gather(-1, label.unsqueeze(-1)).squeeze(-1))
    return torch.stack(made)


def full(logits, labels):
    return torch.gather(logits.log_softmax(-1), 2, labels.unsqueeze(2)).squeeze(2)


class Head(nn.Module):
    def __init__(self, score, widened, num_rows):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(VOCABULARY, HIDDEN, dtype=torch.bfloat16))
        self.score, self.widened, self.shape = score, widened, (num_rows, LENGTH)

    def logits(self, x):
        made = functional.linear(x, self.weight)
        return made.float() if self.widened else made

    def forward(self, x):
        labels = torch.zeros(self.shape[0], self.shape[1] - 1, dtype=torch.long)
        return self.score(self.logits(x)[:, :-1], labels).float().sum()


def peak(score, *, widened, num_rows):
    """Return the peak of a step beyond the head's weights and the workspace of its product."""

    def make():
        inputs = torch.ones(num_rows, LENGTH, HIDDEN, dtype=torch.bfloat16)
        return Head(score, widened, num_rows), inputs

    traced = trace(make, steps=1, engine="plain", optimizer="none", compute_capability=(8, 0))
    return traced.peak_allocated_bytes - 2 * VOCABULARY * HIDDEN - WORKSPACE


@pytest.mark.parametrize(
    ("style", "score", "widened", "num_rows"),
    [
        ("rows", rows, True, 2),
        ("rows", rows, True, 4),
        ("rows", rows, True, 1),
        ("rows", rows, False, 4),
        ("rows", rows, False, 2),
        ("rows", rows, False, 1),
        ("full", full, True, 2),
        ("full", full, True, 1),
        ("full", full, False, 2),
    ],
)
def test_the_peak_of_a_head(style, score, widened, num_rows):
    asked = LogProbs(
        style=style,
        num_rows=num_rows,
        num_tokens=num_rows * LENGTH,
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        widened=widened,
    )
    loss = log_prob_peak(asked).loss
    expected = max(loss.forward_bytes, loss.backward_bytes)
    assert expected == pytest.approx(peak(score, widened=widened, num_rows=num_rows), rel=0.03)
