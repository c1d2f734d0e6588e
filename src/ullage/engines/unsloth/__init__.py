"""Unsloth: adapters on one GPU with kernels, checkpoints and a loss of its own around Hugging Face's Trainer."""

from ullage.engines.unsloth.step import step

#: Releases (year.month) whose sources the rules were read in; others get the rules of the nearest one before.
VERSIONS = ("2024.1", "2024.4", "2024.11", "2025.3", "2025.8", "2025.9", "2026.5", "2026.8")

__all__ = ["VERSIONS", "step"]
