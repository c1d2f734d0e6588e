"""Small steps whose peaks are measured: dense, mixture of experts and latent attention, in several set-ups.

The dimensions are ours, chosen so that a step takes 2 to 7 GiB: large enough that rounding does not hide an error of a
per cent, small enough for a GPU of 8 GiB.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

_COMMON = {
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}
DENSE: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    **_COMMON,
    "num_hidden_layers": 6,
    "intermediate_size": 2816,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
}
MIXTURE: dict[str, Any] = {
    "model_type": "mixtral",
    "architectures": ["MixtralForCausalLM"],
    **_COMMON,
    "num_hidden_layers": 4,
    "intermediate_size": 1408,
    "num_key_value_heads": 4,
    "hidden_act": "silu",
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "output_router_logits": False,
}
LATENT: dict[str, Any] = {
    "model_type": "deepseek_v3",
    "architectures": ["DeepseekV3ForCausalLM"],
    **_COMMON,
    "num_hidden_layers": 4,
    "intermediate_size": 2816,
    "num_key_value_heads": 16,
    "hidden_act": "silu",
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 704,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0,
    "num_nextn_predict_layers": 0,
    "attention_bias": False,
}
MODELS = {"dense": DENSE, "mixture": MIXTURE, "latent": LATENT}
EXPANDABLE = "expandable_segments:True"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step to measure; ``alloc_conf`` is PYTORCH_ALLOC_CONF."""

    model: str
    dtype: str = "bf16"
    recompute: bool = False
    lora: int = 0
    grad_accum: int = 1
    optimizer: str = "adamw"
    micro_batch: int = 4
    seq: int = 1024
    alloc_conf: str = ""

    @property
    def name(self) -> str:
        """Return a short name of what differs."""
        words = [
            self.model,
            self.dtype,
            "recompute" if self.recompute else "",
            f"lora{self.lora}" if self.lora else "",
            f"accum{self.grad_accum}" if self.grad_accum > 1 else "",
            self.optimizer if self.optimizer != "adamw" else "",
            f"{self.micro_batch}x{self.seq}",
            "expandable" if self.alloc_conf else "",
        ]
        return "-".join(word for word in words if word)


def matrix(models: Sequence[str] = tuple(MODELS)) -> list[Case]:
    """Return the steps of a calibration: each model x recompute x bf16, fp32 x expandable segments or not."""
    return [
        Case(model=model, dtype=dtype, recompute=recompute, alloc_conf=conf)
        for model in models
        for dtype in ("bf16", "fp32")
        for recompute in (False, True)
        for conf in ("", EXPANDABLE)
    ]


def further() -> list[Case]:
    """Return steps with adapters, accumulation, mixed precision, another optimizer and other shapes."""
    dense = Case(model="dense")
    return [
        replace(dense, lora=16),
        replace(dense, lora=16, recompute=True),
        replace(dense, grad_accum=4),
        replace(dense, dtype="bf16-mixed"),
        replace(dense, dtype="bf16-mixed", recompute=True),
        replace(dense, optimizer="sgd"),
        replace(dense, micro_batch=1, seq=4096),
        replace(dense, micro_batch=16, seq=256),
        Case(model="mixture", grad_accum=2),
        Case(model="latent", lora=8),
        Case(model="latent", grad_accum=2, recompute=True),
        Case(model="latent", micro_batch=2, seq=2048),
    ]
