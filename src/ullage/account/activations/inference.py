"""What a pass without gradients takes: one layer at a time, nothing kept."""

from __future__ import annotations

from functools import lru_cache

from ullage.account.activations.blocks import Style, Training
from ullage.account.activations.decoder import Slice, decoder_graph
from ullage.account.activations.graph import Checkpoint, forward
from ullage.account.pools import Unpooled
from ullage.account.timeline import Timeline
from ullage.errors import UllageError
from ullage.frozen import Frozen
from ullage.spec import model as spec
from ullage.units import dtype_bytes

#: Hidden states that frames of callers hold: the embeddings, and the input of the layer that runs.
#: Source: transformers@5.23.0:models/llama/modeling_llama.py:LlamaModel.forward (inputs_embeds, hidden_states).
HELD_BY_FRAMES = 2
#: What the range holds: of what was walked and is dense, of other layers that were walked, of those that were not.
DENSE, OTHER, BY_WIDTH = (0.75, 1.02), (0.6, 1.5), (0.5, 2.0)
_FROZEN = Training(base=False)


class Widest(Frozen):
    """The most that a layer takes, its input included, with its range."""

    num_bytes: int
    low_bytes: int
    high_bytes: int


def widest_layer(model: spec.Model, slice_: Slice, *, dtype: str, attention: str | None = None) -> Widest:
    """Return the most that any layer takes of a pass without gradients.

    Formula: the layer's operations in order, every tensor freed once it was read for the last time, and two hidden
        states held by frames. Of a layer that has no graph: tokens x (6h + 3I) x bytes, I the widest feed-forward
        block that a token passes.
    Source: the modules of transformers@5.23.0 as in :mod:`ullage.account.activations.decoder`.
    Known error: dense layers with fused attention within 0.2 % of traces, down to three quarters where kernels fuse
        norm, rotation or gate. Experts (grouped products make gate and up at once), latent attention and attention
        written out 30 % below to 60 % above; by width, half to twice.
    """
    element = int(dtype_bytes(dtype))
    style = Style(scores=attention in ("eager", "unfused"), element_bytes=element)
    found = [_walked(layer, model.hidden_size, slice_, style) for layer in dict.fromkeys(model.layers)]
    known = [size for size in found if size is not None]
    held = HELD_BY_FRAMES * slice_.num_tokens * model.hidden_size * element
    largest = held + max(known, default=0)
    if len(known) < len(found):
        by_width = held + slice_.num_tokens * (4 * model.hidden_size + 3 * widest_block(model)) * element
        return _widest(max(largest, by_width), BY_WIDTH)
    parts = {type(part) for layer in model.layers for part in (*layer.mixers, *layer.ffns)}
    return _widest(largest, DENSE if parts <= {spec.Attention, spec.DenseFFN} and not style.scores else OTHER)


def _widest(num_bytes: int, shares: tuple[float, float]) -> Widest:
    return Widest(num_bytes=num_bytes, low_bytes=round(shares[0] * num_bytes), high_bytes=round(shares[1] * num_bytes))


@lru_cache(maxsize=256)
def _walked(layer: spec.Layer, hidden_size: int, slice_: Slice, style: Style) -> int | None:
    """Return the peak of one layer's forward pass; None where a part has no graph."""
    try:
        graph = decoder_graph(layer, hidden_size, slice_, style, _FROZEN)
    except UllageError:
        return None
    timeline = Timeline(Unpooled())
    timeline.begin("forward")
    forward(graph, timeline, timeline.take("activations", graph.input_bytes), Checkpoint())
    return timeline.moments[-1].peak_bytes


def widest_block(model: spec.Model) -> int:
    """Return the widest feed-forward block that one token passes."""
    widest = 0
    for block in {block for layer in model.layers for block in layer.ffns}:
        if isinstance(block, spec.DenseFFN):
            widest = max(widest, block.intermediate_size)
        elif isinstance(block, spec.MoEFFN):
            widest = max(widest, block.top_k * block.intermediate_size)
    return widest
