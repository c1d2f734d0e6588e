"""Methods that map a linear's input by written-out matrices, or train a few elements of its weight in some basis.

i and o are the linear's widths, r the rank, n the tokens.
"""
# ruff: noqa: D102  (overrides of Rule, documented there)

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ullage.account.adapters.rule import BASE, Buffer, Rows, Rule, Shape, Target
from ullage.spec.training import Lora


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


class Hra(Rule):
    """Householder reflections of the input, one after another: every partial product is written out.

    Formula: r i; kept: (r + 1) i i (Gram-Schmidt: i i and some r r i), the new weight o i, and without autocast its
        fp32 base o i and the cast input, under autocast the layer's own.
    Source: peft@0.21.2:tuners/hra/layer.py:HRALinear.get_delta_weight, .forward.
    """

    names = ("hra",)
    reads_weight = True
    rank = 8
    options: Mapping[str, int | float | str] = {"apply_GS": 0}
    source = "peft@0.21.2:tuners/hra/layer.py:HRALinear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((target.in_features, lora.rank),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        orthogonal = bool(self.whole(lora, "apply_GS"))
        for _matrix in range(1 if orthogonal else lora.rank + 1):
            rows.keep("partial product", target.in_features**2, rows.product)
        if orthogonal:
            rows.keep("vectors made orthogonal", lora.rank**2 * target.in_features, rows.wide)
        rows.keep("new weight", target.size, rows.product)
        if rows.precision.autocast:
            rows.shared_input()
            return
        rows.keep("base weight", target.size, rows.product)
        rows.own_input()

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 3 * target.in_features**2


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
    reads_weight = True
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

    Formula: i + int(rate i i) per target; frozen U o i beside the base, in its format; kept: n i, S written out i i, V
        copied from the host i i, indices of the sparse matrix twice and its values twice.
    Source: peft@0.20.1:tuners/frod/layer.py:Linear.forward, :_sparse_activation_mm (16-bit: S is written out).
    """

    names = ("frod",)
    reads_weight = True
    options: Mapping[str, int | float | str] = {"sparse_rate": 0.01, "runtime_offload_base_weight": 1}
    solved = "sparse_rate"
    source = "peft@0.20.1:tuners/frod/layer.py:Linear.forward"

    def _sparse(self, target: Target, lora: Lora) -> int:
        return int(target.in_features**2 * float(self.option(lora, "sparse_rate")))

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((target.in_features,), (self._sparse(target, lora),))

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        return ((target.size, BASE),)

    def freed_bytes(self, target: Target, lora: Lora, base_width: float) -> int:
        return int(target.size * base_width) if self.whole(lora, "runtime_offload_base_weight") else 0

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.per_token("projected input", target.in_features, rows.compute)
        rows.keep("sparse matrix, written out", target.in_features**2, rows.compute)
        rows.keep("projection from the host", target.in_features**2, rows.compute)
        rows.keep("sparse indices", 4 * self._sparse(target, lora), "int64")
        rows.keep("sparse values", 2 * self._sparse(target, lora), rows.compute)


RULES: Sequence[Rule] = (Oft(), Boft(), Hra(), C3a(), Fourier(), Wave(), Shira(), Supertuning(), Frod())
