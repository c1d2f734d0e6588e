"""One traced step: what it runs under, its loop, its optimizer."""
