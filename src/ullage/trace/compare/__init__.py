"""Traces beside what is known otherwise: the closed forms, and published measured runs."""
