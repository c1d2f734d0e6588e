"""PEFT's adapters around quantised layers."""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import Linear as AdaptedLinear

from ullage.trace.stand_ins.quantised.bnb import Linear4bit
from ullage.trace.stand_ins.quantised.gptq import QuantLinear


class AdaptedLinear4bit(AdaptedLinear):
    """PEFT's adapter around it: the output of the base is cloned, and under autocast the input is not cast.

    Source: peft@0.13.2:tuners/lora/bnb.py:Linear4bit.forward; @0.21.2 likewise.
    """

    def forward(self, hidden: Any, *args: Any, **named: Any) -> Any:
        """Add the low-rank product to a copy of the base's output."""
        result = self.base_layer(hidden, *args, **named)
        result = result.clone()
        for name in self.active_adapters:
            down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            converts = not torch.is_autocast_enabled("cuda")
            if converts:
                hidden = hidden.to(down.weight.dtype)
            output = up(down(dropout(hidden))) * self.scaling[name]
            if converts:
                output = output.to(result.dtype)
            result = result + output
        return result


class AdaptedQuantLinear(AdaptedLinear):
    """PEFT's adapter around it: the input is cast to the adapter's dtype.

    Source: peft@0.21.2:tuners/lora/gptq.py:GPTQLoraLinear.forward.
    """

    def forward(self, hidden: Any, *args: Any, **named: Any) -> Any:
        """Add the low-rank product to the base's output."""
        result = self.base_layer(hidden, *args, **named)
        for name in self.active_adapters:
            dtype = result.dtype
            down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            hidden = self._cast_input_dtype(hidden, down.weight.dtype)
            result = result + up(down(dropout(hidden))) * self.scaling[name]
            result = result.to(dtype)
        return result


class EarlierAdaptedQuantLinear(AdaptedLinear):
    """PEFT's adapter as it was: under autocast the input is not cast, and the base's output is added to in place.

    Source: peft@0.13.2:tuners/lora/gptq.py:QuantLinear.forward; @0.12.0 likewise.
    """

    def forward(self, hidden: Any, *args: Any, **named: Any) -> Any:
        """Add the low-rank product to the base's output in place."""
        result = self.base_layer(hidden, *args, **named)
        for name in self.active_adapters:
            down, up, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
            converts = not torch.is_autocast_enabled("cuda")
            if converts:
                hidden = hidden.to(down.weight.dtype)
            output = up(down(dropout(hidden)))
            if converts:
                output = output.to(result.dtype)
            output = output * self.scaling[name]
            result += output
        return result


def adapters_for(*, earlier: bool = False) -> dict[type, type]:
    """Return which adapter PEFT puts around which stand-in; ``earlier``: PEFT up to 0.13."""
    return {
        Linear4bit: AdaptedLinear4bit,
        QuantLinear: EarlierAdaptedQuantLinear if earlier else AdaptedQuantLinear,
    }
