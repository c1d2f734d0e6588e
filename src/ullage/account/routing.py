"""How unevenly a mixture's tokens reach the ranks: quantiles of the fullest rank, from a stated model of routing.

The model: every expert of a layer has a popularity, drawn once from a log-normal of width ``sigma`` and made to
average 1; tokens choose by it, independently of each other; layers are independent. What a rank gets is then

    variance = (exp(sigma^2) - 1) / m x (1 - 1/EP)  +  (1 - 1/EP) / (n k)

in units of the balanced load: the first part is popularity, the second chance. Over ``num_kept`` layers whose tensors
stand at once, the variance of the sum is that of one layer divided by their number; over ranks (and layers, where one
stands at a time) the fullest counts.
"""

from __future__ import annotations

import math

from ullage.frozen import Frozen

#: Widths by way of balancing, from how far the fullest of 64 experts was above the mean over a validation set
#: (MaxVio_global): 0.04 with a bias for each expert, 0.72 and 0.52 with an auxiliary loss (0.94 with a softmax gate).
#: The fullest of 64 normal deviates is 2.35 on average, so that the width is ln(1 + MaxVio) / 2.35.
#: Source: Wang et al. 2024, arXiv:2408.15664, tables 2 and 6.
SIGMAS = {"bias": 0.017, "auxiliary loss": 0.23}
SOURCE = "Wang et al. 2024, arXiv:2408.15664, table 2"


class Routing(Frozen):
    """One mixture on its ranks.

    Attributes:
        sigma: width of the experts' popularity.
        num_experts: routed experts; num_ranks: that share them (EP).
        num_choices: tokens of a rank's micro-batch x experts per token.
        num_kept: layers whose experts' tensors stand at once; num_tried: layers of which the fullest counts.
    """

    sigma: float
    num_experts: int
    num_ranks: int
    num_choices: int
    num_kept: int = 1
    num_tried: int = 1


def load_quantile(routing: Routing, share: float) -> float:
    """Return the load of the fullest rank that ``share`` of all steps do not pass, in units of the balanced load.

    Formula: q = share^(1 / (EP x layers tried)); exp(s z(q) - s^2 / 2) with s^2 = ln(1 + variance): a log-normal of the
        same mean and variance.
    Source: the model above; order statistics of independent ranks.
    Known error: ranks are not quite independent (their loads add up), which overstates the fullest of few. Tokens of
        one sequence choose alike, and early in training experts are far from balanced (DeepEP issue 99): both are
        understated, a wider sigma says so.
    """
    if routing.num_ranks == 1:
        return 1.0
    others = 1 - 1 / routing.num_ranks
    per_rank = routing.num_experts / routing.num_ranks
    variance = (math.expm1(routing.sigma**2) / per_rank + 1 / max(1, routing.num_choices)) * others
    width = math.sqrt(math.log1p(variance / max(1, routing.num_kept)))
    deviate = normal_quantile(share ** (1 / (routing.num_ranks * max(1, routing.num_tried))))
    return max(1.0, math.exp(width * deviate - width * width / 2))


def normal_quantile(share: float) -> float:
    """Return the deviate that a standard normal does not pass with that probability, to 1e-9, by halving.

    (``statistics.NormalDist`` would load a tenth of a second's worth of modules.)
    """
    low, high = -9.0, 9.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        if math.erfc(-middle / math.sqrt(2)) / 2 < share:
            low = middle
        else:
            high = middle
    return (low + high) / 2
