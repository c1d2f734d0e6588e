"""A model's linear layers → stand-ins for their quantised forms."""

from __future__ import annotations

from typing import Any

import torch

from ullage.i18n import _
from ullage.trace.stand_ins.quantised.bnb import Linear4bit
from ullage.trace.stand_ins.quantised.gptq import QuantLinear


def quantise(model: Any, scheme: str, *, nested: bool = True, group_size: int = 128) -> list[str]:
    """Replace linear layers in place; return sentences on what was assumed.

    bitsandbytes takes every linear layer but the output head; GPTQ every one of a decoder layer but routers. A head or
    experts that are one tensor stay as they are.
    Source: transformers@4.48.1:quantizers/quantizer_bnb_4bit.py:_process_model_before_weight_loading
        (get_keys_to_not_convert); fms-acceleration@876e2ed6:plugins/accelerated-peft/src/fms_acceleration_peft/
        gptqmodel/models/mixtral.py (layer_modules).
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    for path, module in list(model.named_modules()):
        if type(module) is not torch.nn.Linear or module is head:
            continue
        if scheme == "gptq" and (path.endswith(".gate") or ".layers." not in f".{path}"):
            continue
        made = QuantLinear(module, group_size=group_size) if scheme == "gptq" else Linear4bit(module, nested=nested)
        parent, _dot, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, made)
    kept = sum(each.numel() for each in model.parameters() if each.dim() == 3)
    sentences = []
    if kept:
        sentences.append(_("experts that are one tensor stay as they are: linear layers alone are quantised"))
    if scheme == "gptq":
        sentences.append(_("GPTQ: 4 bits, scales for groups of {size}").format(size=group_size))
    elif nested:
        sentences.append(_("bitsandbytes: nested scales (double quantisation)"))
    return sentences


def num_elements(model: Any) -> int:
    """Return the parameters of a model: a packed weight has as many elements as it stands for."""
    found = {id(each): each.numel() for each in model.parameters()}
    packed: list[Any] = [module for module in model.modules() if isinstance(module, (Linear4bit, QuantLinear))]
    for module in packed:
        found.pop(id(module.weight), None)
    return int(sum(found.values()) + sum(module.in_features * module.out_features for module in packed))
