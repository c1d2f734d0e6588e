"""What SGLang's rules ask about a model: which attention, which towers, which layers keep a state."""

from __future__ import annotations

import math
from functools import lru_cache

from ullage.account.state import has_state
from ullage.frozen import Frozen
from ullage.spec import model as spec


class Traits(Frozen):
    """Answers about a model.

    ``mla``: latent attention, V4's included; ``dsa``: DeepSeek sparse attention with an indexer; ``v4``: compressed
    attention; ``windows``: some layers have a sliding window; ``state``: some keep a recurrent state; ``num_experts``:
    routed experts per layer, 0 for none; ``vision_parameters``: of the towers, 0 without.
    """

    mla: bool
    dsa: bool
    v4: bool
    windows: bool
    state: bool
    num_experts: int
    vision_parameters: int

    @property
    def multimodal(self) -> bool:
        """Tell whether the model has towers."""
        return self.vision_parameters > 0


def of(model: spec.Model) -> Traits:
    """Return the traits of a model."""
    return _of(model.layers, model.towers)


@lru_cache(maxsize=64)
def _of_kinds(kinds: tuple[spec.Layer, ...], towers: tuple[spec.Tower, ...]) -> Traits:
    mixers = [mixer for layer in kinds for mixer in layer.mixers]
    latent = [mixer for mixer in mixers if isinstance(mixer, spec.LatentAttention)]
    v4 = any(isinstance(mixer, spec.CompressedAttention) for mixer in mixers)
    plain = [mixer for mixer in mixers if isinstance(mixer, spec.Attention)]
    experts = [ffn.num_experts for layer in kinds for ffn in layer.ffns if isinstance(ffn, spec.MoEFFN)]
    return Traits(
        mla=bool(latent) or v4,
        dsa=any(mixer.indexer is not None or mixer.shared_indexer for mixer in latent),
        v4=v4,
        windows=any(mixer.window or mixer.chunk for mixer in plain),
        state=any(has_state(mixer) for mixer in mixers),
        num_experts=max(experts, default=0),
        vision_parameters=sum(
            tower.copies * sum(math.prod(tensor.shape) for tensor in tower.tensors) for tower in towers
        ),
    )


def _of(layers: tuple[spec.Layer, ...], towers: tuple[spec.Tower, ...]) -> Traits:
    return _of_kinds(tuple(kinds_of(layers)), towers)


def kinds_of(layers: tuple[spec.Layer, ...]) -> list[spec.Layer]:
    """Return each kind of layer once, by identity (readers share equal layers), in order."""
    return list({id(layer): layer for layer in layers}.values())
