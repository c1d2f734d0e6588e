"""Layers that repeat: few are run, and their events repeated."""
