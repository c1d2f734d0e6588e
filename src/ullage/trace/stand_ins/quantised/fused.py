"""Adapters around a quantised base as fused kernels: one function for queries, keys and values, one for the output.

Source: fms-acceleration@876e2ed6:plugins/fused-ops-and-kernels/src/fms_acceleration_foak/fused_ops/unsloth_lora/bnb/
    fast_lora.py:LoRA_QKV, LoRA_W (after Unsloth); gptq/fast_lora.py likewise, with the differences said below;
    models/utils.py:_build_fused_forwards, trigger_fused_ops.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.amp import custom_bwd, custom_fwd

from ullage.trace.stand_ins.quantised.gptq import QuantLinear

_QKV = ("q_proj", "k_proj", "v_proj")


class _Adapted:
    """An adapted layer as the kernels see it; ``weight`` is written out inputs first."""

    def __init__(self, module: Any) -> None:
        name = module.active_adapters[0]
        self.base = module.base_layer
        self.down, self.up = module.lora_A[name].weight, module.lora_B[name].weight
        self.scaling, self.dropout = module.scaling[name], module.lora_dropout[name]

    @property
    def is_gptq(self) -> bool:
        return isinstance(self.base, QuantLinear)

    def weight(self) -> Any:
        made = self.base.dequantised()
        return made if self.is_gptq else made.t()


def _forward(hidden: Any, layer: _Adapted, weights: list[Any]) -> tuple[Any, Any]:
    """Return the output, and the input after dropout.

    ``weights`` are those that GPTQ's function has written out before; bitsandbytes' writes each out when it is needed.
    Source: ...unsloth_lora/utils.py:matmul_lora; gptq/fast_lora.py:matmul_lora.
    """
    shape, dtype = hidden.shape, hidden.dtype
    hidden = hidden.view(-1, shape[-1])
    out = torch.matmul(hidden, weights.pop(0) if weights else layer.weight())
    hidden = layer.dropout(hidden)
    out += (hidden @ layer.down.t().to(dtype)) @ (layer.scaling * layer.up.t().to(dtype))
    if layer.base.bias is not None:
        out += layer.base.bias
    return out.view(*shape[:-1], -1), hidden


def _of_adapter(grad: Any, dropped: Any, adapter: Any, scaling: float) -> tuple[Any, Any]:
    """Return the gradients of both matrices."""
    down, up = adapter
    of_down = dropped.t() @ (grad @ up)
    of_up = (down @ dropped.t()) @ grad
    of_down *= scaling
    of_up *= scaling
    return of_down.t(), of_up.t()


def _of_input(grad: Any, dropped: Any, adapter: Any, scaling: float) -> Any:
    """Return the low-rank part of the gradient of the input."""
    down, up = adapter
    return (dropped != 0) * (grad @ up.to(dropped.dtype) @ (scaling * down.to(dropped.dtype)))


class FusedQKV(torch.autograd.Function):
    """Queries, keys and values of one input: it is kept once, and after dropout for each.

    GPTQ's writes out all three weights before the first product, and its backward makes the input's gradient anew;
    that of bitsandbytes writes it over the input.
    """

    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx: Any, hidden: Any, layers: list[_Adapted], *adapters: Any) -> Any:
        """Make all three."""
        held = [layer.weight() for layer in layers] if layers[0].is_gptq else []
        weights = list(held)
        found = [_forward(hidden, layer, weights) for layer in layers]
        ctx.layers = layers
        ctx.save_for_backward(hidden, *adapters, *(dropped for _out, dropped in found))
        return tuple(out for out, _dropped in found)

    @staticmethod
    @custom_bwd(device_type="cuda")
    def backward(ctx: Any, *grads: Any) -> Any:
        """Return the gradient of the input, and of the adapters."""
        layers, (hidden, *saved) = ctx.layers, ctx.saved_tensors
        pairs = [saved[0:2], saved[2:4], saved[4:6]]
        dropped, shape = saved[6:], hidden.shape
        grads = tuple(grad.reshape(-1, grad.shape[-1]) for grad in grads)
        hidden = hidden.view(-1, shape[-1])
        out: list[Any] = []
        for grad, each, pair, layer in zip(grads, dropped, pairs, layers, strict=True):
            out += _of_adapter(grad, each, pair, layer.scaling)
        made: Any = None
        for grad, each, pair, layer in zip(grads, dropped, pairs, layers, strict=True):
            if made is None:
                target = {} if layer.is_gptq else {"out": hidden}
                made = torch.matmul(grad, layer.weight().t(), **target)
            else:
                made += grad @ layer.weight().t()
            made += _of_input(grad, each, pair, layer.scaling)
        return made.view(shape), None, *out


class FusedOutput(torch.autograd.Function):
    """The projection behind attention: its input is kept, and once more after dropout."""

    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx: Any, hidden: Any, layer: _Adapted, *adapter: Any) -> Any:
        """Multiply."""
        out, dropped = _forward(hidden, layer, [])
        ctx.layer = layer
        ctx.save_for_backward(*adapter, hidden, dropped)
        return out

    @staticmethod
    @custom_bwd(device_type="cuda")
    def backward(ctx: Any, grad: Any) -> Any:
        """Return the gradient of the input, and of the adapter."""
        layer, (down, up, hidden, dropped) = ctx.layer, ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        of_adapter = _of_adapter(grad, dropped, (down, up), layer.scaling)
        made = grad @ layer.weight().t()
        made += _of_input(grad, dropped, (down, up), layer.scaling)
        return made.view(hidden.shape), None, *of_adapter


def fuse_adapters(model: Any) -> None:
    """Let the projections of attention that all have adapters run as the two functions."""
    for module in list(model.modules()):
        found = [getattr(module, name, None) for name in _QKV]
        if all(hasattr(each, "lora_A") for each in found):
            outs: dict[str, Any] = {}
            for name, each in zip(_QKV, found, strict=True):
                each.forward = partial(_one_of_three, found, outs, name)  # type: ignore[union-attr]
        out = getattr(module, "o_proj", None)
        if out is not None and hasattr(out, "lora_A"):
            out.forward = partial(_output, out)


def _one_of_three(modules: list[Any], outs: dict[str, Any], name: str, hidden: Any) -> Any:
    """Make all three when the first is asked for; hand out one."""
    if not outs:
        layers = [_Adapted(each) for each in modules]
        adapters = [weight for layer in layers for weight in (layer.down, layer.up)]
        outs.update(zip(_QKV, FusedQKV.apply(hidden, layers, *adapters), strict=True))
    return outs.pop(name)


def _output(module: Any, hidden: Any) -> Any:
    layer = _Adapted(module)
    return FusedOutput.apply(hidden, layer, layer.down, layer.up)
