"""The guard inside the loops of others: Hugging Face Trainer, Lightning, Accelerate."""
