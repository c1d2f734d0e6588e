"""Pages: one self-contained HTML file each, with figures, that opens without a network (extra ``html``)."""
