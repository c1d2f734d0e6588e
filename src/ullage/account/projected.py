"""Optimizers that keep their moments of a projected gradient: GaLore, APOLLO.

m, n: rows and columns of a matrix, l the longer and s the shorter side, r the rank, w bytes of a parameter. Every
linear layer of the decoder is projected (``optim_target_modules`` of attention and feed-forward blocks); embeddings,
head and vectors are stepped as by AdamW.
"""

from __future__ import annotations

from fractions import Fraction

from ullage.frozen import Frozen

#: Source: transformers@5.23.0:trainer_optimizer.py:_get_galore_optimizer, _get_apollo_optimizer (``rank``).
DEFAULT_RANK = 128


class Projection(Frozen):
    """How an optimizer projects. ``solved``: by a singular value decomposition; else the projector is drawn."""

    solved: bool
    source: str


PROJECTIONS = {
    "galore_adamw": Projection(
        solved=True, source="galore-torch@1.0:galore_torch/adamw.py:AdamW.step, galore_projector.py:GaLoreProjector"
    ),
    "apollo_adamw": Projection(
        solved=False, source="apollo-torch@1.0.3:apollo_torch/apollo.py:AdamW.step, random_projector.py"
    ),
}


def is_projected(shape: tuple[int, ...], frame: frozenset[tuple[int, ...]]) -> bool:
    """Return whether a tensor is the weight of a linear layer: a matrix that is no embedding."""
    return len(shape) == 2 and min(shape) > 1 and shape not in frame


def projected_bytes(rule: Projection, shape: tuple[int, ...], rank: int, width: Fraction) -> Fraction:
    """Return what stays of one matrix: both moments of the projected gradient, and the projector.

    Formula: (2 r l + r s) w with r at most s; a projector solved in fp32 of fp32 gradients is a view of all singular
        vectors, s s w in the place of r s w.
    Source: the rule's own.
    Known error: none against one step of both packages (tests/unit/test_optimizer.py has their figures).
    """
    longer, shorter = max(shape), min(shape)
    kept = min(rank, shorter)
    projector = shorter * shorter if rule.solved and width == 4 else kept * shorter
    return (2 * kept * longer + projector) * width


def projected_work(rule: Projection, shape: tuple[int, ...], width: Fraction) -> int:
    """Return what the step of one matrix takes for a moment.

    Formula: solved: the gradient as fp32, both sets of singular vectors in fp32 and the solver's copy,
        4 (2 m n + m s + s n); else the update of the matrix's own size and its scaled copy, 2 m n w.
    Source: galore_projector.py:GaLoreProjector.get_orthogonal_matrix; apollo.py:AdamW.step (scaled_grad).
    Known error: the solver's own workspace differs by method (gesvdj, gesvd) and may be as large again.
    """
    rows, columns = shape
    update = int(2 * rows * columns * width)
    if not rule.solved:
        return update
    shorter = min(shape)
    return max(update, 4 * (2 * rows * columns + rows * shorter + shorter * columns))
