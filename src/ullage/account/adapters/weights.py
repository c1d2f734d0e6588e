"""Methods that write out a change of a linear's weight, or a new weight: tensors of the size of the weight are kept.

i and o are the linear's widths, r the rank, n the tokens.
"""
# ruff: noqa: D102  (overrides of Rule, documented there)

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ullage.account.adapters.rule import BASE, Buffer, Rows, Rule, Shape, Target
from ullage.spec.training import Lora


class LoHa(Rule):
    """Hadamard product of two low-rank products.

    Formula: 2r(i + o); kept: the cast input (under autocast the shared one), the change of the weight o i.
    Source: peft@0.21.2:tuners/loha/layer.py:HadaWeight, :lycoris_utils.py:LycorisLayer.
    """

    names = ("loha",)
    rank = 8
    source = "peft@0.21.2:tuners/loha/layer.py:HadaWeight.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((target.out_features, lora.rank), (lora.rank, target.in_features)) * 2

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        _input_of_product(rows)
        rows.keep("change of the weight", target.size, rows.product)

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 4 * target.size


class LoKr(Rule):
    """Kronecker product of a small matrix and a larger one, either of which may be a low-rank product.

    Formula: o = o1 o2, i = i1 i2 by ``factorization``; o1 i1, or r(o1 + i1) where ``decompose_both`` and it is
        smaller; o2 i2, or r(o2 + i2) where r < max(o2, i2) / 2. Kept: the cast input, the large matrix, o i.
    Source: peft@0.21.2:tuners/lokr/layer.py:LoKrLayer.update_layer, :make_kron, :factorization.
    """

    names = ("lokr",)
    rank = 8
    options: Mapping[str, int | float | str] = {"decompose_factor": -1, "decompose_both": 0}
    alternatives: Mapping[str, tuple[int | float | str, ...]] = {"decompose_factor": (2, 4, 8, 16, 32)}
    source = "peft@0.21.2:tuners/lokr/layer.py:make_kron"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        factor = self.whole(lora, "decompose_factor")
        (out_1, out_2), (in_1, in_2) = _factors(target.out_features, factor), _factors(target.in_features, factor)
        found: list[Shape] = []
        if self.whole(lora, "decompose_both") and lora.rank < max(out_1, in_1) / 2:
            found += [(out_1, lora.rank), (lora.rank, in_1)]
        else:
            found.append((out_1, in_1))
        if lora.rank < max(out_2, in_2) / 2:
            found += [(out_2, lora.rank), (lora.rank, in_2)]
        else:
            found.append((out_2, in_2))
        return tuple(found)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        factor = self.whole(lora, "decompose_factor")
        out_2, in_2 = _factors(target.out_features, factor)[1], _factors(target.in_features, factor)[1]
        rows.own_input()
        rows.keep("larger factor", out_2 * in_2, rows.product)
        rows.keep("change of the weight", target.size, rows.product)

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 3 * target.size


class Peanut(Rule):
    """A small network that reads the base weight and writes its change.

    Formula: 2 r o + 2 depth r r; kept: the cast input (under autocast the shared one), the base weight in the
        product's format and the change, 2 o i, the network's hidden values (1 + 2 depth) i r.
    Source: peft@0.21.2:tuners/peanut/layer.py:Linear.forward, :get_delta_weight.
    """

    names = ("peanut",)
    reads_weight = True
    rank = 32
    options: Mapping[str, int | float | str] = {"depth": 0}
    source = "peft@0.21.2:tuners/peanut/layer.py:Linear.get_delta_weight"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        inner = ((lora.rank, lora.rank),) * (2 * self.whole(lora, "depth"))
        return ((lora.rank, target.out_features), (target.out_features, lora.rank), *inner)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        _input_of_product(rows)
        rows.keep("base weight", target.size, rows.product)
        rows.keep("change of the weight", target.size, rows.product)
        rows.keep("hidden values", (1 + 2 * self.whole(lora, "depth")) * target.in_features * lora.rank, rows.product)

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 3 * target.size


class Glora(Rule):
    """A weight that is scaled and shifted by paths of their own, and used instead of the base's.

    Formula: paths A and B: lora r(i + o) each, vector o each; kept: the shared input, the new weight o i. Without a
        bias the paths C, D and E are frozen zeros of i, o and o in the base's format; with one C is trained as lora
        r(i + 1) or vector i, D and E as constants or vectors of o.
    Source: peft@0.21.2:tuners/glora/layer.py:GloraLinear.forward, :make_param.
    """

    names = ("glora",)
    reads_weight = True
    rank = 8
    options: Mapping[str, int | float | str] = {
        "config_A_B": "lora",
        "config_C": "lora",
        "config_D_E": "constant",
    }
    alternatives: Mapping[str, tuple[int | float | str, ...]] = {"config_A_B": ("vector", "constant")}
    source = "peft@0.21.2:tuners/glora/layer.py:GloraLinear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        found = self._path(lora, "config_A_B", target.out_features, target.in_features) * 2
        if target.bias:
            found += self._path(lora, "config_C", target.in_features, 1)
            found += self._path(lora, "config_D_E", target.out_features, 1) * 2
        return found

    def _path(self, lora: Lora, name: str, rows: int, columns: int) -> tuple[Shape, ...]:
        kind = self.option(lora, name)
        if kind == "lora":
            return ((rows, lora.rank), (lora.rank, columns))
        return ((rows, 1),) if kind == "vector" else ((1,),) if kind == "constant" else ()

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        return () if target.bias else ((target.in_features + 2 * target.out_features, BASE),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.shared_input()
        rows.keep("new weight", target.size, rows.compute)

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 2 * target.size


class Miss(Rule):
    """Sums of shards of the input times one trained block.

    Formula: r o, mini: r mini_r; kept: the sums n r (mini: and the block repeated r o); bat: the cast input and two
        weights 2 o i.
    Source: peft@0.21.2:tuners/miss/layer.py:MissLinear.forward.
    """

    names = ("miss",)
    rank = 64
    options: Mapping[str, int | float | str] = {"init_weights": "default", "mini_r": 1}
    alternatives: Mapping[str, tuple[int | float | str, ...]] = {"init_weights": ("bat",)}
    source = "peft@0.21.2:tuners/miss/layer.py:MissLinear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        if self.option(lora, "init_weights") == "mini":
            return ((lora.rank, self.whole(lora, "mini_r")),)
        return ((lora.rank, target.out_features),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        kind = self.option(lora, "init_weights")
        if kind == "bat":
            rows.own_input()
            rows.keep("regrouped weight", target.size, rows.product)
            rows.keep("new weight", target.size, rows.product)
            return
        rows.per_token("sums of shards", lora.rank, rows.wide)
        if kind == "mini":
            rows.keep("repeated block", lora.rank * target.out_features, rows.wide)

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 2 * target.size if self.option(lora, "init_weights") == "bat" else 0


def _input_of_product(rows: Rows) -> None:
    """Keep the input of a product with a written-out weight: under autocast in the base's format, which all share."""
    if rows.precision.autocast:
        rows.shared_input()
    else:
        rows.own_input()


def _factors(size: int, factor: int) -> tuple[int, int]:
    """Return two factors of ``size``, the smaller first: one near ``factor``, -1: both near the square root.

    Source: peft@0.21.2:tuners/lokr/layer.py:factorization.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = size if factor == -1 else factor
    small, large = 1, size
    length = small + large
    while small < large:
        candidate = small + 1
        while size % candidate:
            candidate += 1
        other = size // candidate
        if candidate + other > length or candidate > most:
            break
        small, large = candidate, other
    return (large, small) if small > large else (small, large)


RULES: Sequence[Rule] = (LoHa(), LoKr(), Peanut(), Glora(), Miss())
