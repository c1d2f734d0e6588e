"""FSDP1 and FSDP2 around a Transformers model: blocks are units, the rest is the root's, adapters are units apart."""

from ullage.engines.fsdp.step import VERSIONS, step

__all__ = ["VERSIONS", "step"]
