"""What one micro-batch costs in one model chunk: kept activations, and bytes on top while a layer runs."""

from __future__ import annotations

from ullage.account.activations.saved import SavedTensor
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.layout import Chunk
from ullage.engines.megatron.loss import head_saved_bytes, logits_elements
from ullage.engines.megatron.rests import placed_rest
from ullage.engines.megatron.shape import Sizes
from ullage.engines.megatron.states import ALLOCATOR
from ullage.engines.megatron.tables import LayerCost, Tables, layer_runs
from ullage.frozen import Frozen
from ullage.ledger import Term, exact, ranged, total
from ullage.numeric import larger
from ullage.spec.model import Layer
from ullage.spec.training import TrainingJob
from ullage.units import cdiv, tensor_bytes

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


def chunk_cost(tables: Tables, chunk: Chunk) -> ChunkCost:
    """Add up a chunk's layers under the job's recompute."""
    job, settings, sizes = tables.job, tables.settings, tables.sizes
    model = job.model
    parts: list[Term] = []
    rest, rebuilt = chunk.layers, 0
    stream = tensor_bytes(sizes.stream_tokens * model.hidden_size, job.precision.compute)
    if job.recompute.kind == "full":
        checked, every = checkpointed(job, len(chunk.layers))
        groups = cdiv(checked, every)
        kept, formula = stream, f"{groups} x n*h"
        if settings.on("distribute-saved-activations"):
            kept, formula = stream // sizes.tensor, formula + "/t"
        parts.append(exact("checkpoints", groups * kept, formula=formula, source=CHECKPOINT))
        rebuilt = _rebuilt(tables, [model.layers[index] for index in chunk.layers[:checked]], every)
        rest = chunk.layers[checked:]
    runs = [(tables.layer(layer), times) for layer, times in layer_runs(job, rest)]
    parts += _layer_terms(job, settings, runs)
    parts.append(_placed(runs))
    if model.architecture in ("bert", "t5"):
        parts.append(_encoder_doubt(job, sizes, len(chunk.layers)))
    if chunk.mtp and model.mtp:
        parts += _mtp_terms(tables)
    if chunk.head:
        parts.append(exact("head_saved", head_saved_bytes(job, sizes), formula="2*n*h"))
    if chunk.embedding and settings.hidden_dropout:
        mask = sizes.stream_tokens * model.hidden_size
        parts.append(exact("embedding_dropout_mask", mask, formula="n*h"))
    forward = backward = 0
    for layer, _times in layer_runs(job, chunk.layers):
        cost = tables.layer(layer)
        forward, backward = larger(forward, cost.forward_bytes), larger(backward, cost.backward_bytes)
    return ChunkCost(
        saved=total("activations", parts),
        forward_bytes=forward,
        backward_bytes=backward,
        rebuilt_bytes=rebuilt,
        head=chunk.head,
    )


def checkpointed(job: TrainingJob, number: int) -> tuple[int, int]:
    """Of ``number`` layers under full recompute, how many are checkpointed, and in groups of how many."""
    recompute = job.recompute
    uniform = recompute.method == "uniform"
    every = max(1, recompute.num_layers or recompute.every) if uniform else max(1, recompute.every)
    whole = uniform or recompute.num_layers is None
    return number if whole or recompute.num_layers is None else min(number, recompute.num_layers), every


def _rebuilt(tables: Tables, layers: list[Layer], every: int) -> int:
    """The fullest group of ``every`` layers, all of whose activations backward builds at once."""
    fullest = 0
    groups = {tuple(map(id, layers[at : at + every])): at for at in range(0, len(layers), every)}
    for at in groups.values():
        fullest = larger(fullest, sum(tables.layer(layer).bytes for layer in layers[at : at + every]))
    return fullest


def _layer_terms(job: TrainingJob, settings: Settings, runs: list[tuple[LayerCost, int]]) -> list[Term]:
    """One term per kind of tensor, over all layers."""
    sums: dict[str, int] = {}
    about: dict[str, SavedTensor] = {}
    counts: dict[int, int] = {}
    costs = {id(cost): cost for cost, _times in runs}
    for cost, times in runs:
        counts[id(cost)] = counts.get(id(cost), 0) + times
    for key, cost in costs.items():
        for tensor in cost.saved:
            about.setdefault(tensor.name, tensor)
            sums[tensor.name] = sums.get(tensor.name, 0) + tensor.bytes * counts[key]
    return [_table_term(settings, about[name], num_bytes) for name, num_bytes in sums.items()]


def _placed(runs: list[tuple[LayerCost, int]]) -> Term:
    """What the allocator adds to kept activations: rests of up to 1 MiB that stay with their blocks.

    Formula: tensors in forward order in a fresh pool; low 0, high twice as much.
    """
    rest = placed_rest([(cost.batch, times) for cost, times in runs])
    return ranged("activation_rounding", rest, low=0, high=2 * rest, formula="rests of blocks", source=ALLOCATOR)


def _table_term(settings: Settings, tensor: SavedTensor, num_bytes: int) -> Term:
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


def _mtp_terms(tables: Tables) -> list[Term]:
    """Multi-token prediction: its layers, norms and projection inputs, and the softmax of its loss until backward.

    Formula: per module layer + 4*n*h (both norms, the joined halves) + 2*n*h head; 4*T*V/t fp32 softmax.
    Source: Megatron-LM@adc69db:megatron/core/transformer/multi_token_prediction.py:MultiTokenPredictionLayer.
    """
    job, settings, sizes = tables.job, tables.settings, tables.sizes
    stream = tensor_bytes(sizes.stream_tokens * job.model.hidden_size, job.precision.compute)
    number = max(1, settings.count("mtp-num-layers", len(job.model.mtp)))
    layer = tables.layer(job.model.mtp[0].layer).bytes
    softmax = (2 if settings.fused_loss == "te" else 4) * logits_elements(job, sizes)
    return [
        exact("mtp.layers", number * (layer + 6 * stream), formula=f"{number} x (layer + 6*n*h)"),
        exact("mtp.softmax", number * softmax, formula=f"{number} x 4*T*V/t"),
    ]
