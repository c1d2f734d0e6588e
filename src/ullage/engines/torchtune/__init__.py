"""torchtune: one device or FSDP2, adapters, NF4 bases, the output in chunks."""

from ullage.engines.torchtune.defaults import VERSIONS
from ullage.engines.torchtune.step import step

__all__ = ["VERSIONS", "step"]
