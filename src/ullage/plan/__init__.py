"""Search: many layouts through the formulas that explain one. Needs the extra ``plan`` (NumPy)."""
