"""GPTQ's 4-bit layer with the Triton v2 kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch.amp import custom_bwd, custom_fwd

from ullage.units import cdiv

BITS = 4
#: Elements that a 32-bit integer holds.
PACKED = 32 // BITS


class QuantLinear(torch.nn.Linear):
    """A linear layer whose frozen weight is packed in 32-bit integers, with fp16 scales per group of inputs.

    Formula: in x out / 2 bytes; per group out x (2 + 1/2) bytes of scale and zero; 4 bytes of group number per input.
        No groups: one for all inputs.
    Source: fms-acceleration@876e2ed6:plugins/accelerated-peft/src/fms_acceleration_peft/gptqmodel/nn_modules/qlinear/
        qlinear_tritonv2.py:QuantLinear (after GPTQModel's).
    """

    def __init__(self, linear: torch.nn.Linear, *, group_size: int) -> None:
        torch.nn.Module.__init__(self)
        inputs, outputs = linear.in_features, linear.out_features
        self.in_features, self.out_features = inputs, outputs
        self.register_parameter("weight", None)
        groups = cdiv(inputs, group_size) if group_size > 0 else 1
        for name, shape, dtype in (
            ("qweight", (inputs // PACKED, outputs), torch.int32),
            ("qzeros", (groups, outputs // PACKED), torch.int32),
            ("scales", (groups, outputs), torch.float16),
            ("g_idx", (inputs,), torch.int32),
        ):
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        has_bias = linear.bias is not None
        self.register_buffer("bias", torch.empty(outputs, dtype=torch.float16, device="meta") if has_bias else None)

    def dequantised(self) -> Any:
        """Return the weight written out in fp16, inputs first.

        Source: fms-acceleration@876e2ed6:...gptqmodel/nn_modules/triton_utils/dequant.py:dequant248.
        """
        return torch.empty((self.in_features, self.out_features), dtype=torch.float16, device="meta")

    def forward(self, hidden: Any) -> Any:
        """Multiply; the output is fp16.

        Source: as of the class.
        """
        shape = (*hidden.shape[:-1], self.out_features)
        out = QuantLinearFunction.apply(hidden.reshape(-1, hidden.shape[-1]), self)
        out = out.half().reshape(shape)
        return out if self.bias is None else out + self.bias


class QuantLinearFunction(torch.autograd.Function):
    """The product: the weight is written out in forward, and again in backward; no activation is kept.

    Source: fms-acceleration@876e2ed6:...gptqmodel/nn_modules/triton_utils/dequant.py:QuantLinearFunction.
    """

    @staticmethod
    @custom_fwd(device_type="cuda")
    def forward(ctx: Any, hidden: Any, layer: QuantLinear) -> Any:
        """Write the weight out and multiply."""
        ctx.layer = layer
        weight = layer.dequantised()
        return hidden @ weight

    @staticmethod
    @custom_bwd(device_type="cuda")
    def backward(ctx: Any, grad: Any) -> Any:
        """Write the weight out again."""
        if not ctx.needs_input_grad[0]:
            return None, None
        weight = ctx.layer.dequantised()
        return grad @ weight.t(), None
