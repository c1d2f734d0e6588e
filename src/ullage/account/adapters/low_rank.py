"""Methods that add a product of narrow factors to a linear: what differs from LoRA is which factors are trained.

i and o are the linear's widths, r the rank, n the tokens.
"""
# ruff: noqa: D102  (overrides of Rule, documented there)

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ullage.account.adapters.rule import Buffer, Rows, Rule, Shape, Target
from ullage.spec import model as spec
from ullage.spec.training import Lora


class AdaLora(Rule):
    """Adaptive budget: factors and singular values of the initial rank, and importance scores.

    Formula: r(i + o + 1); kept: the cast input, A scaled by E r i, the product n r. ``update_and_allocate`` keeps the
        importance, its average and its uncertainty, three fp32 copies.
    Source: peft@0.21.2:tuners/adalora/layer.py:SVDLinear.forward, :RankAllocator.update_ipt.
    """

    names = ("adalora",)
    rank = 12
    source = "peft@0.21.2:tuners/adalora/layer.py:SVDLinear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((lora.rank, target.in_features), (target.out_features, lora.rank), (lora.rank, 1))

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.own_input()
        rows.keep("scaled factor", lora.rank * target.in_features, rows.product)
        rows.per_token("product", lora.rank, rows.product)

    def num_scores(self) -> int:
        return 3


class DeLora(Rule):
    """Normalised factors with a bounded strength.

    Formula: r(i + o) + 1, frozen norms i; kept: the normed input n i, the product and the scaled product 2 n r.
    Source: peft@0.21.2:tuners/delora/layer.py:DeloraLinear.forward.
    """

    names = ("delora",)
    reads_weight = True
    rank = 8
    source = "peft@0.21.2:tuners/delora/layer.py:DeloraLinear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((lora.rank, target.in_features), (target.out_features, lora.rank), (1,))

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        return ((target.in_features, "float32"),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.per_token("normed input", target.in_features, rows.product)
        rows.per_token("product", lora.rank, rows.product)
        rows.per_token("scaled product", lora.rank, rows.product)
        for _vector in range(7):
            rows.keep("norms of ranks", lora.rank, rows.wide)


class GraLora(Rule):
    """LoRA in blocks: as many parameters, k times the product.

    Formula: r(i + o) + h(i + o) for a hybrid rank h; kept: the cast input (hybrid: twice), the mixed product n k r.
    Source: peft@0.21.2:tuners/gralora/layer.py:Linear.forward.
    """

    names = ("gralora",)
    rank = 32
    options: Mapping[str, int | float | str] = {"gralora_k": 2, "hybrid_r": 0}
    source = "peft@0.21.2:tuners/gralora/layer.py:Linear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        parts, hybrid = self.whole(lora, "gralora_k"), self.whole(lora, "hybrid_r")
        found: list[Shape] = [
            (parts, target.in_features // parts, lora.rank),
            (parts, lora.rank, target.out_features // parts),
        ]
        return (*found, (hybrid, target.in_features), (target.out_features, hybrid)) if hybrid else tuple(found)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        parts, hybrid = self.whole(lora, "gralora_k"), self.whole(lora, "hybrid_r")
        rows.own_input()
        if hybrid:
            rows.own_input()
        rows.per_token("product", parts * lora.rank + hybrid, rows.product)


class Hira(Rule):
    """A low-rank factor times the base weight, element by element.

    Formula: r(i + o); kept: the cast input, the product of weights o i.
    Source: peft@0.21.2:tuners/hira/layer.py:Linear.forward.
    """

    names = ("hira",)
    rank = 32
    source = "peft@0.21.2:tuners/hira/layer.py:Linear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((lora.rank, target.in_features), (target.out_features, lora.rank))

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.own_input()
        rows.keep("product of weights", target.size, rows.product)

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 3 * target.size


class Deft(Rule):
    """A projection that replaces part of the output.

    Formula: r o, and r i unless ``para``; kept: the output widened n o, the product n r, and without ``para`` the cast
        input and one product more.
    Source: peft@0.21.2:tuners/deft/layer.py:Linear.forward.
    """

    names = ("deft",)
    rank = 8
    options: Mapping[str, int | float | str] = {"para": 0}
    alternatives: Mapping[str, tuple[int | float | str, ...]] = {"para": (1,)}
    source = "peft@0.21.2:tuners/deft/layer.py:Linear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        first = (target.out_features, lora.rank)
        return (first,) if self.whole(lora, "para") else (first, (lora.rank, target.in_features))

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.per_token("output", target.out_features, rows.product)
        rows.per_token("product", lora.rank, rows.product)
        rows.keep("projection", target.out_features * lora.rank, rows.product)
        if not self.whole(lora, "para"):
            rows.own_input()
            rows.per_token("second product", lora.rank, rows.product)
            rows.keep("scaled factor", target.in_features * lora.rank, rows.product)


class Vera(Rule):
    """Two trained vectors between random factors that all targets share.

    Formula: o + r; shared r max(i) + max(o) r; kept: both products n r + n o.
    Source: peft@0.21.2:tuners/vera/layer.py:Linear.forward; arXiv:2310.11454.
    """

    names = ("vera",)
    rank = 256
    source = "peft@0.21.2:tuners/vera/layer.py:Linear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((target.out_features,), (lora.rank,))

    def shared_held(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Buffer, ...]:
        widest = max(one.in_features for one in targets) + max(one.out_features for one in targets)
        return ((lora.rank * widest, "float32"),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.per_token("first product", lora.rank, rows.product)
        rows.per_token("second product", target.out_features, rows.product)
        rows.frozen_casts(lora.rank * target.both)


class Pvera(Rule):
    """VeRA with a mean and a deviation per rank, of which a sample is drawn.

    Formula: o + 2r; shared 2r max(i) + max(o) r; kept: n 2r, deviation and noise n r each, n o.
    Source: peft@0.21.2:tuners/pvera/layer.py:Linear.forward.
    """

    names = ("pvera",)
    rank = 256
    source = "peft@0.21.2:tuners/pvera/layer.py:Linear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((target.out_features,), (2 * lora.rank,))

    def shared_held(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Buffer, ...]:
        widest = 2 * max(one.in_features for one in targets) + max(one.out_features for one in targets)
        return ((lora.rank * widest, "float32"),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.per_token("first product", 2 * lora.rank, rows.product)
        rows.per_token("deviation", lora.rank, rows.wide)
        rows.per_token("noise", lora.rank, rows.wide)
        rows.per_token("second product", target.out_features, rows.product)
        rows.frozen_casts(lora.rank * (2 * target.in_features + target.out_features))


class RandLora(Rule):
    """A full-rank sum of random factors of rank r, scaled by trained vectors.

    Formula: d = min(i, o), m = ceil(d / r): r m + m d; shared r max(i) + max(o) m r; kept: the cast input (where o is
        narrower the first product n o), the scaled factors r m d.
    Source: peft@0.21.2:tuners/randlora/layer.py:Linear.forward, :model.py:RandLoraModel._init_randlora_A_randlora_B.
    """

    names = ("randlora",)
    rank = 32
    source = "peft@0.21.2:tuners/randlora/layer.py:Linear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        narrow = min(target.in_features, target.out_features)
        parts = -(-narrow // lora.rank)
        return ((lora.rank, parts), (parts, narrow))

    def shared_held(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Buffer, ...]:
        narrow = max(min(one.in_features, one.out_features) for one in targets)
        wide = max(max(one.in_features, one.out_features) for one in targets)
        return ((lora.rank * narrow + wide * -(-narrow // lora.rank) * lora.rank, "float32"),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        narrow, wide = sorted((target.in_features, target.out_features))
        parts = -(-narrow // lora.rank)
        if target.out_features < target.in_features:
            rows.per_token("first product", target.out_features, rows.product)
        else:
            rows.own_input()
        rows.keep("scaled factors", lora.rank * parts * narrow, rows.product)
        rows.frozen_casts(lora.rank * parts * wide)


class VbLora(Rule):
    """Factors put together from a shared bank of vectors.

    Formula: vectors of length v, bank of m: r m (i + o) / v per target, m v shared; kept: the cast input, the product
        n r, the chosen vectors and their sums 3 r (i + o).
    Source: peft@0.21.2:tuners/vblora/layer.py:Linear.forward, :VBLoRALayer._get_low_rank_matrix.
    """

    names = ("vblora",)
    rank = 4
    options: Mapping[str, int | float | str] = {"num_vectors": 256, "vector_length": 256, "topk": 2}
    solved = "num_vectors"
    source = "peft@0.21.2:tuners/vblora/layer.py:Linear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        length, bank = self.whole(lora, "vector_length"), self.whole(lora, "num_vectors")
        return ((lora.rank, target.in_features // length, bank), (target.out_features // length, lora.rank, bank))

    def shared(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Shape, ...]:
        return ((self.whole(lora, "num_vectors"), self.whole(lora, "vector_length")),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.own_input()
        rows.per_token("product", lora.rank, rows.product)
        chosen = lora.rank * target.both
        rows.keep("chosen vectors", self.whole(lora, "topk") * chosen, rows.wide)
        rows.keep("sums", chosen, rows.product)


class TinyLora(Rule):
    """A few trained numbers between the frozen singular vectors of a linear.

    Formula: u per group of tied targets (weight_tying 0: each its own, 1: all one); frozen r(i + o) + u r r; kept: n r.
    Source: peft@0.21.2:tuners/tinylora/layer.py:Linear.forward, :model.py:TinyLoraModel._init_tinylora_v.
    """

    names = ("tinylora",)
    reads_weight = True
    rank = 2
    options: Mapping[str, int | float | str] = {"u": 64, "weight_tying": 0.0}
    alternatives: Mapping[str, tuple[int | float | str, ...]] = {"weight_tying": (1.0,)}
    solved = ""
    source = "peft@0.21.2:tuners/tinylora/layer.py:Linear.forward"

    def shared(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Shape, ...]:
        tying = float(self.option(lora, "weight_tying"))
        count = sum(one.copies for one in targets)
        groups = max(1, round(count * (1 - tying))) if tying < 1 else 1
        return ((self.whole(lora, "u"),),) * groups

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        return ((lora.rank * target.both + self.whole(lora, "u") * lora.rank**2, "float32"),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.per_token("product", lora.rank, rows.product)
        rows.frozen_casts(lora.rank * target.both)


class UniLora(Rule):
    """Factors whose every element points into one short trained vector.

    Formula: d trained numbers in all; frozen indices (int64) and scales (fp32) r(i + o); kept: the cast input, n r, and
        the gathered and scaled factors 2 r (i + o).
    Source: peft@0.21.2:tuners/unilora/layer.py:Linear.forward, :UniLoraLayer._get_lora_matrices.
    """

    names = ("unilora",)
    rank = 4
    options: Mapping[str, int | float | str] = {"theta_d_length": 256}
    solved = ""
    source = "peft@0.21.2:tuners/unilora/layer.py:Linear.forward"

    def shared(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Shape, ...]:
        return ((self.whole(lora, "theta_d_length"),),)

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        return ((lora.rank * target.both, "int64"), (lora.rank * target.both, "float32"))

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.own_input()
        rows.per_token("product", lora.rank, rows.product)
        rows.keep("gathered factors", lora.rank * target.both, rows.product)


class Psoft(Rule):
    """An orthogonal map between the frozen leading singular vectors of a linear.

    Formula: r(r - 1)/2 + 2r; frozen: indices 2 x 8 bytes each, both factors in fp32, of which a full decomposition
        holds all min(i, o) right vectors; kept: n r, and six r x r of the map.
    Source: peft@0.21.2:tuners/psoft/layer.py:Linear.forward, :PsoftLayer._init_psoft (the cache is a view).
    """

    names = ("psoft",)
    reads_weight = True
    rank = 32
    options: Mapping[str, int | float | str] = {"psoft_svd": "full", "psoft_mag_a": 1, "psoft_mag_b": 1}
    alternatives: Mapping[str, tuple[int | float | str, ...]] = {"psoft_svd": ("lowrank",)}
    solved = "rank"
    source = "peft@0.21.2:tuners/psoft/layer.py:Linear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        vectors = self.whole(lora, "psoft_mag_a") + self.whole(lora, "psoft_mag_b")
        return ((lora.rank * (lora.rank - 1) // 2,), *((lora.rank,),) * vectors)

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        whole = self.option(lora, "psoft_svd") == "full"
        right = (min(target.in_features, target.out_features) if whole else lora.rank) * target.in_features
        indices = lora.rank * (lora.rank - 1)
        return ((indices, "int64"), (right + target.out_features * lora.rank, "float32"))

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.per_token("product", lora.rank, rows.product)
        for _matrix in range(6):
            rows.keep("orthogonal map", lora.rank**2, rows.wide)
        rows.frozen_casts(lora.rank * target.both)


class Lily(Rule):
    """Factors that neighbouring layers share, mixed by a router per target.

    Formula: every ``stride_A`` layers one r i per name, ``num_B`` times r o per width in all, routers num_B r per
        target; kept: the cast input, the scores n num_B, the mixed factor r o, the product n r.
    Source: peft@0.21.2:tuners/lily/layer.py:Linear.forward, :model.py:LilyModel.
    """

    names = ("lily",)
    rank = 32
    options: Mapping[str, int | float | str] = {"stride_A": 1, "num_B": 2}
    source = "peft@0.21.2:tuners/lily/layer.py:Linear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((self.whole(lora, "num_B"), lora.rank),)

    def shared(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Shape, ...]:
        stride, found = self.whole(lora, "stride_A"), []
        by_name: dict[str, list[Target]] = {}
        for one in targets:
            by_name.setdefault(one.name, []).append(one)
        for same in by_name.values():
            found += [(lora.rank, same[0].in_features)] * -(-len(same) // stride)
            found += [(same[0].out_features, lora.rank)] * self.whole(lora, "num_B")
        return tuple(found)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.own_input()
        rows.per_token("scores", self.whole(lora, "num_B"), "float32")
        rows.keep("mixed factor", lora.rank * target.out_features, rows.product)
        rows.per_token("product", lora.rank, rows.product)


RULES: Sequence[Rule] = (
    AdaLora(), DeLora(), GraLora(), Hira(), Deft(), Vera(), Pvera(), RandLora(), VbLora(), TinyLora(), UniLora(),
    Psoft(), Lily(),
)  # fmt: skip
