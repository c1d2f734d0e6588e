"""Measured runs: what a record holds, how it becomes a job, and how far the predictions are from what was measured."""
