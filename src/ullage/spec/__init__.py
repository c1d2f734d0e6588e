"""What is asked: frozen keyword-only dataclasses, without arithmetic and without I/O."""
