"""Methods that train parts of the model itself, or scale what flows through it.

i and o are a linear's widths, r a rank, n the tokens.
"""
# ruff: noqa: D102  (overrides of Rule, documented there)

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ullage.account.adapters.rule import BASE, Buffer, Rows, Rule, Shape, Target
from ullage.spec import model as spec
from ullage.spec.training import Lora


class Ia3(Rule):
    """A trained factor per input (feed-forward modules) or per output.

    Formula: i or o; kept: the input in fp32, or the base's output, and the factor.
    Source: peft@0.21.2:tuners/ia3/layer.py:Linear.forward.
    """

    names = ("ia3",)
    targets = ("k_proj", "v_proj", "down_proj")
    options: Mapping[str, int | float | str] = {"feedforward_modules": ""}
    source = "peft@0.21.2:tuners/ia3/layer.py:Linear.forward"

    def _scales_input(self, target: Target, lora: Lora) -> bool:
        """Say whether a module is one of the feed-forward block: named so, or, unless told, its last linear."""
        named = [name for name in str(self.option(lora, "feedforward_modules")).split("+") if name]
        known = named or (lora.targets and _feed_forward(lora.targets)) or ("down_proj",)
        return target.name in known

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((1, target.in_features),) if self._scales_input(target, lora) else ((target.out_features, 1),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        if self._scales_input(target, lora):
            rows.per_token("input as fp32", target.in_features, rows.wide)
            rows.keep("factor", target.in_features, rows.wide)
            return
        rows.per_token("output", target.out_features, rows.compute)
        rows.keep("factor", target.out_features, rows.wide)


class Road(Rule):
    """Rotations of pairs of outputs.

    Formula: angles and lengths, o each (road_1: o / 2, road_4: 2o); kept: the output in fp32 and its rotated
        counterpart, 2 n o, and four vectors of o.
    Source: peft@0.21.2:tuners/road/layer.py:Linear.forward, :_apply_road.
    """

    names = ("road",)
    options: Mapping[str, int | float | str] = {"variant": "road_1"}
    alternatives: Mapping[str, tuple[int | float | str, ...]] = {"variant": ("road_2", "road_4")}
    solved = ""
    source = "peft@0.21.2:tuners/road/layer.py:_apply_road"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        variant, size = self.option(lora, "variant"), target.out_features
        size = size // 2 if variant == "road_1" else 2 * size if variant == "road_4" else size
        return ((size,), (size,))

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.per_token("output as fp32", target.out_features, rows.wide)
        rows.per_token("rotated output", target.out_features, rows.wide)
        for _vector in range(4):
            rows.keep("sines and cosines", target.out_features, rows.wide)


class Beft(Rule):
    """A trained bias: o.

    Source: peft@0.21.2:tuners/beft/layer.py:Linear.forward.
    """

    names = ("beft",)
    targets = ("v_proj",)
    source = "peft@0.21.2:tuners/beft/layer.py:Linear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((target.out_features,),)


class LnTuning(Rule):
    """Copies of the norms are trained in the base's dtype; each keeps the normalised input n o.

    Source: peft@0.21.2:tuners/ln_tuning/layer.py:LNTuningLayer.update_layer (deep copy).
    """

    names = ("ln_tuning",)
    targets = ("input_layernorm", "post_attention_layernorm", "norm")
    base_dtype = True
    source = "peft@0.21.2:tuners/ln_tuning/layer.py:LNTuningLayer.update_layer"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        return ((target.out_features,),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rows.per_token("normalised", target.out_features, rows.compute)


class TrainableTokens(Rule):
    """Rows of the embedding: t h, and their frozen originals.

    Known error: with a tied head the embedding is written anew for the head and its gradient has the head's size;
        :func:`ullage.account.adapters.whole.frame_bytes` counts both.
    Source: peft@0.21.2:tuners/trainable_tokens/layer.py:TrainableTokensLayer.get_merged_weights.
    """

    names = ("trainable_tokens",)
    targets = ("embed_tokens",)
    options: Mapping[str, int | float | str] = {"num_tokens": 1}
    solved = "num_tokens"
    reaches_input = True
    source = "peft@0.21.2:tuners/trainable_tokens/layer.py:TrainableTokensLayer.get_merged_weights"

    def shared(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Shape, ...]:
        return ((self.whole(lora, "num_tokens"), model.hidden_size),)

    def shared_held(self, model: spec.Model, targets: Sequence[Target], lora: Lora) -> tuple[Buffer, ...]:
        return ((self.whole(lora, "num_tokens") * model.hidden_size, "float32"),)


class Osf(Rule):
    """The weight's singular vectors: the weakest are trained, the others frozen.

    Formula: r(i + o + 1) for the r weakest of min(i, o) (half of them unless told). Up to peft 0.20 (``factored`` 0):
        frozen the min(i, o) - r others, kept the cast input, the weight written out o i, the scaled vectors r o. From
        0.21 on: frozen a copy of the weakest and, of a linear that is not square, the others on its wider side; kept
        the cast input, two factors of rank 2r and n 2r.
    Source: peft@0.20.1:tuners/osf/layer.py:OSFLayer._reconstruct_weight, :utils.py:decompose_weight_matrix;
        peft@0.21.2:tuners/osf/layer.py:Linear.forward.
    """

    names = ("osf",)
    reads_weight = True
    targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "down_proj", "up_proj")
    options: Mapping[str, int | float | str] = {"factored": 1}
    source = "peft@0.21.2:tuners/osf/layer.py:Linear.forward"

    def weakest(self, target: Target, lora: Lora) -> int:
        """Return how many singular vectors are trained."""
        narrow = min(target.in_features, target.out_features)
        return min(lora.rank or narrow - narrow // 2, narrow)

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        rank = self.weakest(target, lora)
        return ((target.out_features, rank), (rank,), (rank, target.in_features))

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        rank = self.weakest(target, lora)
        others = min(target.in_features, target.out_features) - rank
        if not self.whole(lora, "factored"):
            return ((others * (target.both + 1), ""),)
        wider = max(target.in_features, target.out_features) if target.in_features != target.out_features else 0
        return ((rank * (target.both + 1) + others * wider, ""),)

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        rank = self.weakest(target, lora)
        rows.own_input()
        if not self.whole(lora, "factored"):
            rows.keep("weight, written out", target.size, rows.product)
            rows.keep("scaled vectors", rank * target.out_features, rows.product)
            return
        rows.keep("left factor", 2 * rank * target.out_features, rows.product)
        rows.keep("right factor", 2 * rank * target.in_features, rows.product)
        rows.per_token("product", 2 * rank, rows.product)

    def work_elements(self, target: Target, lora: Lora) -> int:
        return 0 if self.whole(lora, "factored") else 2 * target.size


class AdaMss(Rule):
    """Small factors in clusters of the outputs, behind frozen leading singular vectors.

    Formula: K clusters of rank q: K q r + q o; frozen in the base's format r i, positions 8 o bytes; kept in it: n r
        and n K q.
    Source: peft@0.21.2:tuners/adamss/layer.py:Linear.forward, :AdamssLayer.update_layer.
    Known error: clusters may be fewer than asked for, where the vectors have fewer.
    """

    names = ("adamss",)
    reads_weight = True
    rank = 100
    options: Mapping[str, int | float | str] = {"num_subspaces": 5, "subspace_rank": 1}
    solved = "num_subspaces"
    source = "peft@0.21.2:tuners/adamss/layer.py:Linear.forward"

    def trained(self, target: Target, lora: Lora) -> tuple[Shape, ...]:
        clusters, rank = self.whole(lora, "num_subspaces"), self.whole(lora, "subspace_rank")
        return ((clusters * rank, lora.rank), (target.out_features, rank))

    def held(self, target: Target, lora: Lora) -> tuple[Buffer, ...]:
        return ((lora.rank * target.in_features, BASE), (target.out_features, "int64"))

    def keep(self, rows: Rows, target: Target, lora: Lora) -> None:
        clusters, rank = self.whole(lora, "num_subspaces"), self.whole(lora, "subspace_rank")
        rows.per_token("projected input", lora.rank, rows.compute)
        rows.per_token("inner products", clusters * rank, rows.compute)


def _feed_forward(targets: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in targets if name in ("gate_proj", "up_proj", "down_proj", "fc1", "fc2", "w1", "w2"))


RULES: Sequence[Rule] = (Ia3(), Road(), Beft(), LnTuning(), TrainableTokens(), Osf(), AdaMss())
