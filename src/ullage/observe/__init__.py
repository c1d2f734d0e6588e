"""REAL FILES to EVENTS: what a run left behind, read without trusting it."""
