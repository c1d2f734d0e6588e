"""DeepSpeed: ZeRO stages 0 to 3 around a Transformers model, with offload and ZeRO++."""

from ullage.engines.deepspeed.step import VERSIONS, step

__all__ = ["VERSIONS", "step"]
