"""Advice: the catalogue of changes that free memory, what each gains and costs, and in which order they are told."""
