"""Methods that write out a change of a linear's weight, or a new weight: tensors of the size of the weight are kept.

i and o are the linear's widths, r the rank, n the tokens.
"""
# ruff: noqa: D102  (overrides of Rule, documented there)

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ullage.account.adapters.rule import Buffer, Rows, Rule, Shape, Target
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
        bias the paths C, D and E are frozen zeros of i, o and o; with one C is trained as lora r(i + 1) or vector i,
        D and E as constants or vectors of o.
    Source: peft@0.21.2:tuners/glora/layer.py:GloraLinear.forward, :make_param.
    """

    names = ("glora",)
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
        return () if target.bias else ((target.in_features + 2 * target.out_features, "bfloat16"),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.shared_input()
        rows.keep("new weight", target.size, rows.compute)

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 2 * target.size


class Oft(Rule):
    """Block-diagonal orthogonal map of the input, as a truncated series.

    Formula: B blocks of size s: B s(s - 1)/2; frozen indices 2 x 8 bytes x s(s - 1)/2; kept: the cast input and four
        (under autocast seven) copies of the blocks B s s.
    Source: peft@0.21.2:tuners/oft/layer.py:OFTRotationModule.forward, :_cayley_batch, :_project_batch.
    """

    names = ("oft",)
    rank = 0
    options: Mapping[str, int | float | str] = {"oft_block_size": 32, "block_share": 0}
    source = "peft@0.21.2:tuners/oft/layer.py:OFTRotationModule.forward"

    def _blocks(self, target: Target, lora: Lora) -> tuple[int, int]:
        """Return (how many, their size): ``rank`` is their number, and wins over the size."""
        size = target.in_features // lora.rank if lora.rank else self.whole(lora, "oft_block_size")
        size = max(1, min(size, target.in_features))
        return target.in_features // size, size

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        count, size = self._blocks(target, lora)
        return ((1 if self.whole(lora, "block_share") else count, size * (size - 1) // 2),)

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        size = self._blocks(target, lora)[1]
        return ((size * (size - 1), "int64"),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        count, size = self._blocks(target, lora)
        rows.own_input()
        for _copy in range(4 if rows.product == rows.wide else 7):
            rows.keep("blocks", count * size * size, rows.product)


class Boft(Rule):
    """Butterfly orthogonal map of the weight: matrices of i x i are written out.

    Formula: N butterflies (factor) of blocks of size s: N i s + o; kept: 3 N i i (permutation, unit matrix or partial
        product, product), the shared input, the base's output n o.
        The permutations are N i i in fp32 where the model was moved as a whole; else they stay on the host, and are
        copied each time.
    Source: peft@0.21.2:tuners/boft/layer.py:Linear.forward, :BOFTLayer.update_layer (``boft_P``).
    """

    names = ("boft",)
    options: Mapping[str, int | float | str] = {
        "boft_block_size": 4,
        "boft_block_num": 0,
        "boft_n_butterfly_factor": 1,
    }
    solved = "boft_block_size"
    source = "peft@0.21.2:tuners/boft/layer.py:Linear.forward"

    def _size(self, target: Target, lora: Lora) -> int:
        number = self.whole(lora, "boft_block_num")
        return target.in_features // number if number else self.whole(lora, "boft_block_size")

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        size, butterflies = self._size(target, lora), max(1, self.whole(lora, "boft_n_butterfly_factor"))
        return ((butterflies, target.in_features // size, size, size), (target.out_features, 1))

    def hosted(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        return ((max(1, self.whole(lora, "boft_n_butterfly_factor")) * target.in_features**2, "float32"),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        butterflies = max(1, self.whole(lora, "boft_n_butterfly_factor"))
        rows.shared_input()
        for _matrix in range(3 * butterflies):
            rows.keep("written-out map", target.in_features**2, rows.compute)
        rows.per_token("output", target.out_features, rows.compute)

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 3 * target.in_features**2


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


class C3a(Rule):
    """Circular convolution in blocks.

    Formula: o i / s for blocks of size s; kept: the cast input.
    Source: peft@0.21.2:tuners/c3a/layer.py:C3ALinear.forward, :utils.py:BlockCircularConvolution.
    """

    names = ("c3a",)
    options: Mapping[str, int | float | str] = {"block_size": 256}
    solved = ""
    alternatives: Mapping[str, tuple[int | float | str, ...]] = {"block_size": (16, 32, 64, 128, 512)}
    source = "peft@0.21.2:tuners/c3a/layer.py:C3ALinear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        size = self.whole(lora, "block_size")
        return ((target.out_features // size, target.in_features // size, size),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.per_token("adapter input", target.in_features, rows.wide)


class Fourier(Rule):
    """A change of the weight made of a few trained coefficients in another basis (Fourier, wavelets).

    Formula: f per target; kept: the cast input, the change of the weight o i, positions
        from the host 2 x 8 bytes x f.
    Source: peft@0.21.2:tuners/fourierft/layer.py:FourierFTLinear.forward; tuners/waveft/layer.py:WaveFTLinear.forward.
    """

    names = ("fourierft",)
    options: Mapping[str, int | float | str] = {"n_frequency": 1000}
    solved = "n_frequency"
    source = "peft@0.21.2:tuners/fourierft/layer.py:FourierFTLinear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((self.whole(lora, "n_frequency"),),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.own_input()
        rows.keep("change of the weight", target.size, rows.product)
        rows.keep("positions", 2 * self.whole(lora, "n_frequency"), "int64")

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 3 * target.size


class Wave(Fourier):
    """The same in wavelets."""

    names = ("waveft",)
    options: Mapping[str, int | float | str] = {"n_frequency": 2592}
    source = "peft@0.21.2:tuners/waveft/layer.py:WaveFTLinear.forward"


class Shira(Rule):
    """A few trained elements of the weight itself.

    Formula: r(i + o) values, frozen positions 2 x 4 bytes each; kept: the shared input, the new weight o i.
    Source: peft@0.21.2:tuners/shira/layer.py:Linear.forward, :ShiraLayer.update_layer.
    """

    names = ("shira",)
    rank = 32
    source = "peft@0.21.2:tuners/shira/layer.py:Linear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((lora.rank * target.both,),)

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        return ((2 * lora.rank * target.both, "int32"),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.shared_input()
        rows.keep("new weight", target.size, rows.compute)

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 2 * target.size


class Supertuning(Rule):
    """A share of the weight's elements is trained, and a low-rank pair if wished.

    Formula: o i (1 - sparsity) values, their positions 4 bytes each; with a rank r(i + o) more; kept: the shared input,
        the new weight o i, positions as int64; with a rank the cast input and n r.
    Source: peft@0.21.2:tuners/supertuning/layer.py:Linear.forward.
    """

    names = ("supertuning",)
    options: Mapping[str, int | float | str] = {"sparsity": 0.99}
    solved = "sparsity"
    source = "peft@0.21.2:tuners/supertuning/layer.py:Linear.forward"

    def _chosen(self, target: Target, lora: Lora) -> int:
        return int(target.size * (1 - float(self.option(lora, "sparsity"))))

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        pair = ((lora.rank, target.in_features), (target.out_features, lora.rank)) if lora.rank else ()
        return ((self._chosen(target, lora),), *pair)

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        return ((self._chosen(target, lora), "int32"),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.shared_input()
        rows.keep("new weight", target.size, rows.compute)
        rows.keep("positions", self._chosen(target, lora), "int64")
        if lora.rank:
            rows.own_input()
            rows.per_token("product", lora.rank, rows.product)

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 2 * target.size


class Frod(Rule):
    """The weight as U (S + L) V, with frozen U and V, trained diagonal L and sparse S.

    Formula: i + int(rate i i) per target; frozen U o i beside the base; kept: n i, S written out i i, V copied from
        the host i i, indices of the sparse matrix twice and its values twice.
    Source: peft@0.20.1:tuners/frod/layer.py:Linear.forward, :_sparse_activation_mm (16-bit: S is written out).
    """

    names = ("frod",)
    options: Mapping[str, int | float | str] = {"sparse_rate": 0.01, "runtime_offload_base_weight": 1}
    solved = "sparse_rate"
    source = "peft@0.20.1:tuners/frod/layer.py:Linear.forward"

    def _sparse(self, target: Target, lora: Lora) -> int:
        return int(target.in_features**2 * float(self.option(lora, "sparse_rate")))

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((target.in_features,), (self._sparse(target, lora),))

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        return ((target.size, "bfloat16"),)

    def freed_bytes(self, target: Target, lora: Lora, base_width: float) -> int:
        return int(target.size * base_width) if self.whole(lora, "runtime_offload_base_weight") else 0

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.per_token("projected input", target.in_features, rows.compute)
        rows.keep("sparse matrix, written out", target.in_features**2, rows.compute)
        rows.keep("projection from the host", target.in_features**2, rows.compute)
        rows.keep("sparse indices", 4 * self._sparse(target, lora), "int64")
        rows.keep("sparse values", 2 * self._sparse(target, lora), rows.compute)


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


RULES: Sequence[Rule] = (
    LoHa(), LoKr(), Peanut(), Glora(), Oft(), Boft(), Miss(), C3a(), Fourier(), Wave(), Shira(), Supertuning(), Frod(),
)  # fmt: skip
