"""A job's figures by kind of layer and by chunk, each worked out once: most ranks of a pipeline are alike."""

from __future__ import annotations

from ullage.account.activations.saved import SavedTensor
from ullage.engines.megatron.activations import kept, layer_saved, offloaded_bytes
from ullage.engines.megatron.blocks import Batch
from ullage.engines.megatron.defaults import Settings
from ullage.engines.megatron.holdings import Kind, layer_kind, root_kind
from ullage.engines.megatron.layout import Chunk, Groups
from ullage.engines.megatron.mixture import rows
from ullage.engines.megatron.outside import outside
from ullage.engines.megatron.rests import batches
from ullage.engines.megatron.shape import Sizes
from ullage.engines.megatron.states import Held
from ullage.frozen import Frozen
from ullage.ledger import Term
from ullage.numeric import larger
from ullage.spec.model import Attention, DenseFFN, LatentAttention, Layer, MoEFFN
from ullage.spec.training import TrainingJob
from ullage.units import tensor_bytes


class LayerCost(Frozen):
    """Bytes of one micro-batch in one layer.

    Attributes:
        saved: tensors kept from forward to backward; bytes: of all of them; away_bytes: what offload moves to the host.
        forward_bytes, backward_bytes: on top while the layer runs.
        batch: the tensors as the allocator places them; of arrays, one a layout.
    """

    saved: tuple[SavedTensor, ...]
    bytes: int
    away_bytes: int
    forward_bytes: int
    backward_bytes: int
    batch: Batch | tuple[Batch, ...]


class Tables:
    """What is known of one job (or of many layouts that differ in numbers alone)."""

    def __init__(self, job: TrainingJob, settings: Settings, sizes: Sizes, groups: Groups) -> None:
        self.job, self.settings, self.sizes, self.groups = job, settings, sizes, groups
        self._layers: dict[int, LayerCost] = {}
        self._kinds: dict[int, Kind] = {}
        self._roots: dict[tuple[bool, bool, bool], Kind] = {}
        self.scaled: dict[tuple[int, int], Term] = {}
        self.outside = outside(job)

    def layer(self, layer: Layer) -> LayerCost:
        """Return the activations of a kind of layer."""
        found = self._layers.get(id(layer))
        if found is None:
            found = self._layers[id(layer)] = layer_cost(self.job, self.settings, self.sizes, layer)
        return found

    def held(self, chunk: Chunk) -> Held:
        """Return what a chunk holds: its kinds of layers in order, and last what stands outside layers."""
        found = [(self.kind(layer), times) for layer, times in layer_runs(self.job, chunk.layers)]
        return (*found, (self.root(chunk), 1))

    def kind(self, layer: Layer) -> Kind:
        """Return the parameters of a kind of layer."""
        found = self._kinds.get(id(layer))
        if found is None:
            found = self._kinds[id(layer)] = layer_kind(self.job, layer, self.groups)
        return found

    def root(self, chunk: Chunk) -> Kind:
        """Return the parameters of a chunk outside layers."""
        what = (chunk.embedding, chunk.head, chunk.mtp)
        found = self._roots.get(what)
        if found is None:
            found = self._roots[what] = root_kind(self.job, chunk, self.groups)
        return found


def layer_runs(job: TrainingJob, indexes: tuple[int, ...]) -> list[tuple[Layer, int]]:
    """Return layers in order, with how often each kind comes in a row."""
    found: list[tuple[Layer, int]] = []
    for index in indexes:
        layer = job.model.layers[index]
        if found and found[-1][0] is layer:
            found[-1] = (layer, found[-1][1] + 1)
        else:
            found.append((layer, 1))
    return found


def layer_cost(job: TrainingJob, settings: Settings, sizes: Sizes, layer: Layer) -> LayerCost:
    """Add up one layer."""
    everything = layer_saved(job, settings, sizes, layer)
    tensors = tuple(kept(job, everything))
    each = [tensor.bytes for tensor in tensors]
    away = offloaded_bytes(job, everything)
    forward, backward = _transient(job, settings, sizes, layer)
    return LayerCost(
        saved=tensors,
        bytes=sum(each),
        away_bytes=away,
        forward_bytes=forward + 2 * away,
        backward_bytes=backward + 2 * away,
        batch=batches(each),
    )


def _transient(job: TrainingJob, settings: Settings, sizes: Sizes, layer: Layer) -> tuple[int, int]:
    """Bytes on top of what is kept while a layer runs forward and backward (offload apart).

    Formula: forward 2*n*h; mixtures 5*m*h: rows permuted, sent, computed, sorted back and sent back are all
        held by the frame of the layer. Backward 2*n*h + the gradient of the widest activation; mixtures 4*m*h more.
        Unfused attention: one score matrix forward, two backward.
    """
    width = tensor_bytes(1, job.precision.compute)
    stream = width * sizes.stream_tokens * job.model.hidden_size
    forward, backward = 2 * stream, 2 * stream
    for block in layer.ffns:
        if isinstance(block, DenseFFN):
            backward = backward + width * sizes.tokens * block.intermediate_size // sizes.tensor
        elif isinstance(block, MoEFFN):
            moved = width * rows(job, settings, sizes, block) * job.model.hidden_size
            forward, backward = forward + 5 * moved, backward + 4 * moved
    scores = _scores(settings, sizes, layer)
    return larger(forward, width * scores), larger(backward, 2 * width * scores)


def _scores(settings: Settings, sizes: Sizes, layer: Layer) -> int:
    """Elements of a layer's score matrix where attention writes one out."""
    found = 0
    if settings.attention not in ("flash", "fused"):
        for part in layer.mixers:
            if isinstance(part, (Attention, LatentAttention)):
                found = larger(found, sizes.scores(part.num_heads))
    return found
