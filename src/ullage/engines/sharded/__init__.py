"""What the sharded PyTorch engines share: one walk of a training step over groups, blocks, loss and optimizer."""
