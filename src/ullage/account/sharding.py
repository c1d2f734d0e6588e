"""What one rank of a layout holds: the share of every tensor, by the way engines split it.

An engine room says with a :class:`RankShare` how wide each part is split; the arithmetic of a split is here. Engines
that serve want even division, so an uneven one is a :class:`~ullage.errors.LayoutError`; only the vocabulary is padded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

from ullage.account.parameters import Parameter, Placed, Role, layer_parameters, model_parameters, mtp_prefix
from ullage.errors import LayoutError
from ullage.frozen import Frozen
from ullage.i18n import _
from ullage.spec import model as spec
from ullage.units import round_up

#: What a tensor is counted under in a ledger, in ledger order.
COMPONENTS = (
    "embedding",
    "attention",
    "dense_ffn",
    "routed_experts",
    "shared_experts",
    "router",
    "norms",
    "lm_head",
    "mtp",
    "towers",
    "other",
)


class RankShare(Frozen):
    """What one rank of one engine layout holds.

    Attributes:
        layers: half-open range of decoder layers.
        embedding, head, final, mtp, towers: whether the rank holds these parts. A tied head is the embedding itself
            where the rank has both, and a copy of its own where it has only the head.
        attention_tp: splits mixers (attention, MLA, state layers).
        dense_tp, shared_expert_tp: split dense feed-forward blocks and shared experts.
        expert_tp: slices inside each routed expert.
        num_local_experts: routed experts per layer held here, after expert parallelism and redundancy; None: all.
        vocab_tp, head_tp, tower_tp: split embedding, output head and towers.
        vocab_padding: vocabulary rows are padded to this multiple before the split.
            Source: vllm@0.33.0:vllm/model_executor/layers/vocab_parallel_embedding.py:DEFAULT_VOCAB_PADDING_SIZE,
            sglang@0.5.23:srt/layers/vocab_parallel_embedding.py (both 64).
        stored_copies: count the copies of embedding and head that a checkpoint stores with its MTP modules although
            engines share the model's own.
    """

    layers: tuple[int, int]
    embedding: bool
    head: bool
    final: bool
    mtp: bool
    towers: bool
    attention_tp: int = 1
    dense_tp: int = 1
    shared_expert_tp: int = 1
    expert_tp: int = 1
    num_local_experts: int | None = None
    vocab_tp: int = 1
    head_tp: int = 1
    tower_tp: int = 1
    vocab_padding: int = 64
    stored_copies: bool = False

    def tp_of(self, component: str) -> int:
        """Return how many ranks share a tensor of ``component``; routers, norms and extras are not split."""
        return {
            "embedding": self.vocab_tp,
            "attention": self.attention_tp,
            "dense_ffn": self.dense_tp,
            "routed_experts": self.expert_tp,
            "shared_experts": self.shared_expert_tp,
            "lm_head": self.head_tp,
            "towers": self.tower_tp,
        }.get(component, 1)


def whole(model: spec.Model) -> RankShare:
    """Return the share of a rank that holds everything, unpadded: what a checkpoint stores."""
    return RankShare(
        layers=(0, len(model.layers)),
        embedding=True,
        head=True,
        final=True,
        mtp=True,
        towers=True,
        vocab_padding=1,
        stored_copies=True,
    )


class LocalParameter(Frozen):
    """A parameter as a rank holds it: ``copies`` tensors of ``shape``, counted under ``component``."""

    parameter: Parameter
    component: str
    shape: tuple[int, ...]
    copies: int


class RankParameter(Frozen):
    """A parameter in its place (full checkpoint name, section, layer) as a rank holds it."""

    placed: Placed
    component: str
    shape: tuple[int, ...]
    copies: int


def units_per_rank(units: int, tp: int, *, where: str) -> int:
    """Return the indivisible units (KV heads) each rank holds; fewer units than ranks are replicated.

    Formula: max(1, units // tp), where one divides the other.
    Source: vllm@0.33.0:vllm/config/model.py:get_num_kv_heads; vllm/model_executor/layers/linear.py:QKVParallelLinear.

    Raises:
        LayoutError: neither number divides the other.
    """
    if units % tp == 0:
        return units // tp
    if units < tp and tp % units == 0:
        return 1
    raise LayoutError(
        _("{units} heads cannot be spread over {tp} ranks").format(units=units, tp=tp),
        where=where,
        remedy=_("choose a size that divides {units}, or a multiple of it").format(units=units),
    )


def divide(size: int, tp: int, *, where: str) -> int:
    """Return ``size // tp``.

    Raises:
        LayoutError: the division leaves a rest.
    """
    if size % tp:
        raise LayoutError(
            _("{size} cannot be divided by {tp} ranks").format(size=size, tp=tp),
            where=where,
            remedy=_("choose a parallel size that divides {size}").format(size=size),
        )
    return size // tp


def split_shape(parameter: Parameter, tp: int, *, vocab_padding: int = 1) -> tuple[int, ...]:
    """Return the shape of ``parameter`` on one of ``tp`` ranks (see :class:`~ullage.account.parameters.Parameter`).

    Raises:
        LayoutError: the axis does not divide.
    """
    shape = parameter.shape
    if parameter.split == "none" or not shape:
        return shape
    if parameter.split == "vocab":
        where = _("{name}, padded vocabulary").format(name=parameter.name)
        return (divide(round_up(shape[0], vocab_padding), tp, where=where), *shape[1:])
    if tp == 1:
        return shape
    axis = 0 if parameter.split == "out" else len(shape) - 1
    where = _("{name}, axis {axis} of {shape}").format(name=parameter.name, axis=axis, shape=shape)
    if parameter.units:
        size = shape[axis] // parameter.units * units_per_rank(parameter.units, tp, where=where)
    else:
        size = divide(shape[axis] - parameter.whole, tp, where=where) + parameter.whole
    return (*shape[:axis], size, *shape[axis + 1 :])


def _fused_qkv_shape(part: spec.Attention, parameter: Parameter, tp: int) -> tuple[int, ...]:
    """Return a fused projection's shape: its query rows divide, its key and value rows go by KV heads.

    Source: vllm@0.33.0:vllm/model_executor/layers/linear.py:QKVParallelLinear.
    """
    dim, v_dim = part.head_dim, part.v_head_dim or part.head_dim
    kv_heads = units_per_rank(part.num_kv_heads, tp, where=parameter.name)
    q_rows = part.num_heads * dim * (2 if part.output_gate else 1)
    rows = divide(q_rows, tp, where=parameter.name) + kv_heads * (dim + v_dim)
    return (rows, *parameter.shape[1:])


def _check_heads(part: spec.Mixer, tp: int) -> None:
    """Refuse query heads that do not divide: no engine replicates those."""
    heads = getattr(part, "num_heads", None)
    if heads is not None and heads % tp:
        divide(heads, tp, where=_("{prefix}, attention heads").format(prefix=part.prefix))


def _mixer_share(part: spec.Mixer, hidden_size: int, tp: int) -> Iterator[LocalParameter]:
    _check_heads(part, tp)
    alone = spec.Layer(mixers=(part,), ffns=(), norms=())
    fused = part.fused_qkv if isinstance(part, spec.Attention) else None
    for parameter in layer_parameters(alone, hidden_size):
        if fused and parameter.name.startswith(f"{part.prefix}.{fused}."):
            assert isinstance(part, spec.Attention)
            shape = _fused_qkv_shape(part, parameter, tp)
        else:
            shape = split_shape(parameter, tp)
        component = "norms" if parameter.role is Role.NORM else "attention"
        yield LocalParameter(parameter=parameter, component=component, shape=shape, copies=parameter.copies)


def _ffn_component(part: spec.FeedForward, parameter: Parameter) -> str:
    """Return what a feed-forward tensor is counted under; projections into a latent space go with the experts."""
    if parameter.role is Role.NORM:
        return "norms"
    if isinstance(part, spec.DenseFFN):
        return "dense_ffn"
    if parameter.role is Role.ROUTER:
        return "router"
    if parameter.name.startswith(f"{part.prefix}.{part.shared_name}."):
        return "shared_experts"
    return "routed_experts"


def _ffn_share(part: spec.FeedForward, hidden_size: int, share: RankShare) -> Iterator[LocalParameter]:
    alone = spec.Layer(mixers=(), ffns=(part,), norms=())
    for parameter in layer_parameters(alone, hidden_size):
        component = _ffn_component(part, parameter)
        copies = parameter.copies
        if parameter.role is Role.EXPERT and share.num_local_experts is not None:
            copies = share.num_local_experts
        shape = split_shape(parameter, share.tp_of(component))
        yield LocalParameter(parameter=parameter, component=component, shape=shape, copies=copies)


@lru_cache(maxsize=4096)
def layer_share(layer: spec.Layer, hidden_size: int, share: RankShare) -> tuple[LocalParameter, ...]:
    """Return what the rank holds of one layer, names relative to the layer.

    Raises:
        LayoutError: an axis does not divide.
    """
    found: list[LocalParameter] = []
    for mixer in layer.mixers:
        found += _mixer_share(mixer, hidden_size, share.attention_tp)
    for block in layer.ffns:
        found += _ffn_share(block, hidden_size, share)
    rest = replace(layer, mixers=(), ffns=())
    found += [_unsplit(parameter) for parameter in layer_parameters(rest, hidden_size)]
    return tuple(found)


def _unsplit(parameter: Parameter) -> LocalParameter:
    component = "norms" if parameter.role is Role.NORM else "other"
    return LocalParameter(parameter=parameter, component=component, shape=parameter.shape, copies=parameter.copies)


def _mtp_share(model: spec.Model, share: RankShare) -> Iterator[RankParameter]:
    """Yield the multi-token-prediction modules: split like a layer, counted as ``mtp``."""
    for offset, module in enumerate(model.mtp):
        prefix = mtp_prefix(model, offset)
        frame = spec.Layer(mixers=(), ffns=(), norms=module.norms, extras=module.extras)
        found = [_unsplit(parameter) for parameter in layer_parameters(frame, model.hidden_size)]
        found += layer_share(module.layer, model.hidden_size, share)
        for name, tp in _mtp_copies(module, share):
            table = replace(_vocab_table(model), name=name)
            shape = split_shape(table, tp, vocab_padding=share.vocab_padding)
            found.append(LocalParameter(parameter=table, component="mtp", shape=shape, copies=1))
        for local in found:
            parameter = replace(local.parameter, name=prefix + local.parameter.name)
            placed = Placed(section="mtp", layer=len(model.layers) + offset, parameter=parameter)
            yield RankParameter(placed=placed, component="mtp", shape=local.shape, copies=local.copies)


def _mtp_copies(module: spec.MtpModule, share: RankShare) -> Iterator[tuple[str, int]]:
    """Yield name and split of the embedding and head that a module has for itself on this rank."""
    if not module.shares_embedding or (share.stored_copies and module.stores_embedding):
        yield "embed_tokens.weight", share.vocab_tp
    if not module.shares_head or (share.stored_copies and module.stores_head):
        yield "shared_head.head.weight", share.head_tp


_SECTION_COMPONENTS = {"embedding": "embedding", "head": "lm_head", "tower": "towers"}


def _whole_section(placed: Placed, share: RankShare) -> RankParameter:
    """Return the share of a tensor outside the decoder layers; a second table of tokens splits like the embedding.

    Source: vllm@0.33.0:vllm/model_executor/models/gemma4.py:Gemma4Model (embed_tokens_per_layer, vocabulary-parallel);
        sglang@0.5.23:srt/models/gemma4_causal.py:Gemma4TextModel.
    """
    parameter = placed.parameter
    component = _SECTION_COMPONENTS.get(placed.section) or ("norms" if parameter.role is Role.NORM else "other")
    tp = share.vocab_tp if component == "other" and parameter.split == "vocab" else share.tp_of(component)
    shape = split_shape(parameter, tp, vocab_padding=share.vocab_padding if placed.section != "tower" else 1)
    return RankParameter(placed=placed, component=component, shape=shape, copies=parameter.copies)


def _vocab_table(model: spec.Model) -> Parameter:
    """Return the head as a tensor of its own: what a stage holds of a tied head when it has no embedding."""
    return Parameter(
        name=f"{model.head_name}.weight",
        shape=(model.vocab_size, model.embedding_size or model.hidden_size),
        role=Role.EMBEDDING,
        split="vocab",
    )


def frame_share(model: spec.Model, share: RankShare) -> Iterator[RankParameter]:
    """Yield what the rank holds outside the decoder layers: embedding, final norms, head, MTP modules, towers.

    Raises:
        LayoutError: an axis does not divide.
    """
    held = {"embedding": share.embedding, "final": share.final, "head": share.head, "tower": share.towers}
    for placed in model_parameters(replace(model, layers=(), mtp=()), mtp=False, towers=share.towers):
        if held[placed.section]:
            yield _whole_section(placed, share)
    if model.tied_embeddings and share.head and not share.embedding:
        yield _whole_section(Placed(section="head", layer=-1, parameter=_vocab_table(model)), share)
    if share.mtp and model.mtp:
        yield from _mtp_share(model, share)


def rank_parameters(model: spec.Model, share: RankShare) -> Iterator[RankParameter]:
    """Yield every tensor that the rank holds, with full checkpoint names: decoder layers first.

    Raises:
        LayoutError: an axis does not divide.
    """
    for index in range(*share.layers):
        prefix = f"{model.layers_name}.{index}."
        for local in layer_share(model.layers[index], model.hidden_size, share):
            parameter = replace(local.parameter, name=prefix + local.parameter.name)
            placed = Placed(section="layer", layer=index, parameter=parameter)
            yield RankParameter(placed=placed, component=local.component, shape=local.shape, copies=local.copies)
    yield from frame_share(model, share)
