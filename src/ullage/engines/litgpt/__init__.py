"""litgpt: LoRA, adapters and full fine-tuning with Lightning Fabric, the head and the loss in chunks."""

from ullage.engines.litgpt.step import VERSIONS, step

__all__ = ["VERSIONS", "step"]
