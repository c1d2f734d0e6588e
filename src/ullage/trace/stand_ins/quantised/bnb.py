"""bitsandbytes' 4-bit layer."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ullage.units import cdiv

#: Source: bitsandbytes@0.43.3:functional.py:quantize_4bit (blocksize 64; absmax in blocks of 256).
BLOCK, NESTED_BLOCK = 64, 256
#: Values of a 4-bit code. Source: bitsandbytes@0.43.3:functional.py:get_4bit_type.
CODE = 16


class Linear4bit(torch.nn.Linear):
    """A linear layer whose frozen weight is packed: two elements per byte, one scale per 64.

    Formula: n elements: n / 2 bytes + n / 64 scales of 4 bytes; nested: of 1 byte, and per 256 of them 4 bytes more,
        and one offset; 16 values of the code.
    Source: bitsandbytes@0.43.3:nn/modules.py:Params4bit, Linear4bit; functional.py:quantize_4bit, QuantState.
    """

    def __init__(self, linear: torch.nn.Linear, *, nested: bool) -> None:
        torch.nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        count = linear.weight.numel()
        self.weight = torch.nn.Parameter(_meta((count + 1) // 2, 1, dtype=torch.uint8), requires_grad=False)
        self.bias = linear.bias
        self.made_in = linear.weight.dtype
        self.compute_dtype: torch.dtype | None = None
        self._loaded: torch.dtype | None = None
        self.nested = nested
        blocks = cdiv(count, BLOCK)
        self.register_buffer("absmax", _meta(blocks, dtype=torch.uint8 if nested else torch.float32))
        self.register_buffer("code", _meta(CODE, dtype=torch.float32))
        if nested:
            self.register_buffer("nested_absmax", _meta(cdiv(blocks, NESTED_BLOCK), dtype=torch.float32))
            self.register_buffer("offset", _meta(dtype=torch.float32))

    def dequantised(self) -> Any:
        """Return the weight, written out in the dtype it was loaded in; nested scales are written out beside it.

        Source: bitsandbytes@0.43.3:functional.py:dequantize_4bit, dequantize_blockwise.
        """
        absmax = self.absmax
        if self.nested:
            absmax = torch.empty(absmax.shape, dtype=torch.float32, device="meta")
            absmax += self.offset
        return torch.empty((self.out_features, self.in_features), dtype=self.made_in, device="meta")

    def begin_again(self) -> None:
        """Forget what the first forward pass decided: the next trace starts from the model as it was loaded."""
        if self.bias is not None and self._loaded is not None:
            self.bias.data = self.bias.data.to(self._loaded)
        self.compute_dtype = None

    def forward(self, hidden: Any) -> Any:
        """Multiply in the dtype of the first input that came; the output has that of this one.

        Source: bitsandbytes@0.43.3:nn/modules.py:Linear4bit.forward, set_compute_type.
        """
        if self.compute_dtype is None:
            self._loaded = None if self.bias is None else self.bias.dtype
            self.compute_dtype = self.made_in if hidden.dtype == torch.float16 else hidden.dtype
        if self.bias is not None and self.bias.dtype != hidden.dtype:
            self.bias.data = self.bias.data.to(hidden.dtype)
        dtype = hidden.dtype
        hidden = hidden.to(self.compute_dtype)
        bias = None if self.bias is None else self.bias.to(self.compute_dtype)
        return MatMul4Bit.apply(hidden, self, bias).to(dtype)


class MatMul4Bit(torch.autograd.Function):
    """The product with a packed weight: it is written out in forward, and again in backward; no activation is kept.

    Source: bitsandbytes@0.43.3:autograd/_functions.py:MatMul4Bit.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Any, layer: Linear4bit, bias: Any) -> Any:
        """Write the weight out, in the dtype of the input, and multiply."""
        ctx.layer = layer
        return functional.linear(hidden, layer.dequantised().to(hidden.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        """Write the weight out in the dtype of the gradient; the gradient of a trained bias is a sum."""
        bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        made = torch.matmul(grad, ctx.layer.dequantised().to(grad.dtype)) if ctx.needs_input_grad[0] else None
        return made, None, bias


def _meta(*shape: int, dtype: torch.dtype) -> Any:
    return torch.empty(shape, dtype=dtype, device="meta")
