"""Spec → ledger: one file per memory term, each function one formula. Nothing here reads a file."""
