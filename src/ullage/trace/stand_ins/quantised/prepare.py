"""What trainers do to a quantised base before adapters are put in."""

from __future__ import annotations

from typing import Any

import torch

_HALVES = (torch.float16, torch.bfloat16)
_NARROW_AGAIN = ("lm_head", "embed_tokens", "wte", "wpe")


def prepare_for_training(model: Any, how: str) -> None:
    """Cast what is not packed: "peft" makes it fp32, "trl" leaves embeddings and head in bf16.

    Source: peft@0.13.2:utils/other.py:prepare_model_for_kbit_training (not of GPTQ);
        trl@0.13.0:trainer/utils.py:peft_module_casting_to_bf16 (norms stay fp32).
    """
    for path, parameter in model.named_parameters():
        if parameter.dtype in _HALVES:
            narrow = how == "trl" and any(part in path for part in _NARROW_AGAIN) and "norm" not in path
            parameter.data = parameter.data.to(torch.bfloat16 if narrow else torch.float32)
