"""What one micro-batch costs in one model chunk: kept activations, and bytes on top while a layer runs."""

from __future__ import annotations

from collections.abc import Iterable

from ullage.account.activations.saved import SavedTensor
from ullage.engines.megatron.activations import kept, layer_saved, offloaded_bytes
from ullage.engines.megatron.blocks import placed_bytes
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.layout import Chunk
from ullage.engines.megatron.loss import head_saved_bytes, logits_elements
from ullage.engines.megatron.mixture import rows
from ullage.engines.megatron.shape import Sizes
from ullage.engines.megatron.states import ALLOCATOR
from ullage.frozen import Frozen
from ullage.ledger import Term, exact, ranged, total
from ullage.spec.model import Attention, DenseFFN, LatentAttention, Layer, MoEFFN
from ullage.spec.training import TrainingJob
from ullage.units import tensor_bytes

CHECKPOINT = "Megatron-LM@adc69db:megatron/core/transformer/transformer_block.py:TransformerBlock._checkpointed_forward"


class ChunkCost(Frozen):
    """Bytes of one micro-batch in one chunk.

    Attributes:
        saved: term of what is kept from forward to backward.
        forward_bytes, backward_bytes: on top, while the chunk's fullest layer runs.
        rebuilt_bytes: what full recompute builds again for one group of layers.
    """

    saved: Term
    forward_bytes: int
    backward_bytes: int
    rebuilt_bytes: int
    head: bool


def chunk_cost(job: TrainingJob, settings: Settings, sizes: Sizes, chunk: Chunk) -> ChunkCost:
    """Add up a chunk's layers under the job's recompute."""
    model, recompute = job.model, job.recompute
    parts: list[Term] = []
    rebuilt = 0
    stream = tensor_bytes(sizes.stream_tokens * model.hidden_size, job.precision.compute)
    if recompute.kind == "full":
        number = len(chunk.layers)
        uniform = recompute.method == "uniform"
        every = max(1, recompute.num_layers or recompute.every) if uniform else max(1, recompute.every)
        checked = number if uniform or recompute.num_layers is None else min(number, recompute.num_layers)
        parts.append(
            exact(
                "checkpoints", -(-checked // every) * stream, formula=f"{-(-checked // every)} x n*h", source=CHECKPOINT
            )
        )
        rebuilt = _rebuilt(job, settings, sizes, [model.layers[index] for index in chunk.layers[:checked]], every)
        rest = chunk.layers[checked:]
    else:
        rest = chunk.layers
    parts += _layer_terms(job, settings, sizes, [model.layers[index] for index in rest])
    parts.append(_placed(job, settings, sizes, [model.layers[index] for index in rest]))
    if model.architecture in ("bert", "t5"):
        parts.append(_encoder_doubt(job, sizes, len(chunk.layers)))
    if chunk.mtp and model.mtp:
        parts += _mtp_terms(job, settings, sizes)
    if chunk.head:
        parts.append(exact("head_saved", head_saved_bytes(job, sizes), formula="2*n*h"))
    if chunk.embedding and settings.hidden_dropout:
        mask = sizes.stream_tokens * model.hidden_size
        parts.append(exact("embedding_dropout_mask", mask, formula="n*h"))
    kinds = {id(layer): layer for layer in (model.layers[index] for index in chunk.layers)}
    transient = [_transient(job, settings, sizes, layer) for layer in kinds.values()] or [(0, 0)]
    return ChunkCost(
        saved=total("activations", parts),
        forward_bytes=max(forward for forward, _back in transient),
        backward_bytes=max(backward for _forward, backward in transient),
        rebuilt_bytes=rebuilt,
        head=chunk.head,
    )


def _rebuilt(job: TrainingJob, settings: Settings, sizes: Sizes, layers: list[Layer], every: int) -> int:
    """The fullest group of ``every`` layers, all of whose activations backward builds at once."""
    kinds = {id(layer): layer for layer in layers}
    full = {key: _full_bytes(job, settings, sizes, layer) for key, layer in kinds.items()}
    each = [full[id(layer)] for layer in layers]
    return max((sum(each[at : at + every]) for at in range(0, len(each), every)), default=0)


def _full_bytes(job: TrainingJob, settings: Settings, sizes: Sizes, layer: Layer) -> int:
    return sum(tensor.bytes for tensor in kept(job, layer_saved(job, settings, sizes, layer)))


def _layer_terms(job: TrainingJob, settings: Settings, sizes: Sizes, layers: Iterable[Layer]) -> list[Term]:
    """One term per kind of tensor, over all layers."""
    sums: dict[str, list[int]] = {}
    about: dict[str, SavedTensor] = {}
    counts: dict[int, tuple[Layer, int]] = {}
    for layer in layers:
        counts[id(layer)] = (layer, counts.get(id(layer), (layer, 0))[1] + 1)
    for layer, times in counts.values():
        for tensor in kept(job, layer_saved(job, settings, sizes, layer)):
            about.setdefault(tensor.name, tensor)
            sums.setdefault(tensor.name, []).append(tensor.bytes * times)
    return [_table_term(job, settings, about[name], sum(parts)) for name, parts in sums.items()]


def _placed(job: TrainingJob, settings: Settings, sizes: Sizes, layers: list[Layer]) -> Term:
    """What the allocator adds to kept activations: rests of up to 1 MiB that stay with their blocks.

    Formula: tensors in forward order in a fresh pool; low 0, high twice as much.
    """
    order: list[int] = []
    known: dict[int, list[int]] = {}
    for layer in layers:
        if id(layer) not in known:
            known[id(layer)] = [tensor.bytes for tensor in kept(job, layer_saved(job, settings, sizes, layer))]
        order += known[id(layer)]
    rest = placed_bytes(order) - sum(order)
    return ranged("activation_rounding", rest, low=0, high=2 * rest, formula="rests of blocks", source=ALLOCATOR)


def _table_term(job: TrainingJob, settings: Settings, tensor: SavedTensor, num_bytes: int) -> Term:
    """A row of the table: exact, but for rows of experts under free routing and for a kernel that was guessed."""
    if tensor.name.startswith("experts.") and settings.capacity_factor is None:
        return ranged(
            tensor.name,
            num_bytes,
            low=num_bytes * 2 // 3,
            high=num_bytes * 3 // 2,
            formula=tensor.formula,
            source=tensor.source,
        )
    if tensor.name.startswith("gdn."):
        low, high = num_bytes * 7 // 10, num_bytes * 14 // 10
        return ranged(tensor.name, num_bytes, low=low, high=high, formula=tensor.formula, source=tensor.source)
    if tensor.name == "flash.output" and not settings.attention_sure:
        return ranged(tensor.name, num_bytes, low=0, high=num_bytes, formula=tensor.formula, source=tensor.source)
    if tensor.name == "core_attention.output" and settings.attention == "fused" and not settings.attention_sure:
        return ranged(
            tensor.name, num_bytes, low=num_bytes, high=2 * num_bytes, formula=tensor.formula, source=tensor.source
        )
    return exact(tensor.name, num_bytes, formula=tensor.formula, source=tensor.source)


def _encoder_doubt(job: TrainingJob, sizes: Sizes, layers: int) -> Term:
    """What layers with padding masks may keep beyond the tables: about n*h a layer is seen and not explained."""
    stream = tensor_bytes(sizes.stream_tokens * job.model.hidden_size, job.precision.compute)
    return ranged("encoder_masks", 0, low=0, high=2 * layers * stream, formula="0 .. 2*n*h a layer")


def _mtp_terms(job: TrainingJob, settings: Settings, sizes: Sizes) -> list[Term]:
    """Multi-token prediction: its layers, norms and projection inputs, and the softmax of its loss until backward.

    Formula: per module layer + 4*n*h (both norms, the joined halves) + 2*n*h head; 4*T*V/t fp32 softmax.
    Source: Megatron-LM@adc69db:megatron/core/transformer/multi_token_prediction.py:MultiTokenPredictionLayer.
    """
    stream = tensor_bytes(sizes.stream_tokens * job.model.hidden_size, job.precision.compute)
    number = max(1, settings.count("mtp-num-layers", len(job.model.mtp)))
    layer = _full_bytes(job, settings, sizes, job.model.mtp[0].layer)
    softmax = (2 if settings.fused_loss == "te" else 4) * logits_elements(job, sizes)
    return [
        exact("mtp.layers", number * (layer + 6 * stream), formula=f"{number} x (layer + 6*n*h)"),
        exact("mtp.softmax", number * softmax, formula=f"{number} x 4*T*V/t"),
    ]


def _transient(job: TrainingJob, settings: Settings, sizes: Sizes, layer: Layer) -> tuple[int, int]:
    """Bytes on top of what is kept while a layer runs forward and backward.

    Formula: forward 2*n*h; mixtures 5*m*h: rows permuted, sent, computed, sorted back and sent back are all
        held by the frame of the layer. Backward 2*n*h + the gradient of the
        widest activation; mixtures 4*m*h more. Unfused attention: one score matrix forward, two backward. Offloaded
        tensors of two layers are on the device at a time.
    """
    width = tensor_bytes(1, job.precision.compute)
    away = 2 * offloaded_bytes(job, layer_saved(job, settings, sizes, layer))
    stream = width * sizes.stream_tokens * job.model.hidden_size
    forward, backward = 2 * stream, 2 * stream
    for block in layer.ffns:
        if isinstance(block, DenseFFN):
            inner = width * sizes.tokens * block.intermediate_size // sizes.tensor
            forward, backward = max(forward, stream), backward + inner
        elif isinstance(block, MoEFFN):
            moved = width * rows(job, settings, sizes, block) * job.model.hidden_size
            forward, backward = forward + 5 * moved, backward + 4 * moved
    scores = _scores(settings, sizes, layer)
    return max(forward, width * scores) + away, max(backward, 2 * width * scores) + away


def _scores(settings: Settings, sizes: Sizes, layer: Layer) -> int:
    """Elements of a layer's score matrix where attention writes one out."""
    if settings.attention in ("flash", "fused"):
        return 0
    heads = [part.num_heads for part in layer.mixers if isinstance(part, (Attention, LatentAttention))]
    return max((sizes.scores(number) for number in heads), default=0)
