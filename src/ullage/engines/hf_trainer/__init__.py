"""The Hugging Face Trainer family: Trainer, TRL, PEFT, and plain PyTorch loops, on one GPU or with DDP."""

from ullage.engines.hf_trainer.step import step

#: transformers versions whose sources the rules were read in; others get the rules of the nearest one below.
VERSIONS = ("4.45.2", "4.48.1", "4.49.0", "4.50.0", "5.23.0")

__all__ = ["VERSIONS", "step"]
