"""torchtitan: FSDP2 over tensor, context, pipeline and expert parallelism, with op-wise activation checkpointing."""

from ullage.engines.torchtitan.defaults import VERSIONS
from ullage.engines.torchtitan.step import step

__all__ = ["VERSIONS", "step"]
