"""The rules of one rank's cache as numbers."""

from __future__ import annotations

import math
from fractions import Fraction

from ullage.engines.sglang.segments import reserved_bytes
from ullage.frozen import Frozen
from ullage.units import cdiv


class Window(Frozen):
    """Layers that keep ``tokens`` at most, and what one token costs over them."""

    tokens: int
    bytes_per_token: Fraction


class Pool(Frozen):
    """How bytes become tokens.

    Attributes:
        cell, fixed: what the configurator counts per token, and beside.
        real: bytes that the buffers hold per token; draft: those of a draft's cache.
        slope, windows, request_bytes: what one request costs: per token, in windows, and at once.
        page: tokens are handed out in pages of this many.
        swa_ratio: tokens of window layers per token.
        buffers: bytes per token of each buffer (keys and values apart), for the allocator's rounding.
    """

    cell: Fraction
    real: Fraction
    page: int
    slope: Fraction
    windows: tuple[Window, ...]
    buffers: tuple[Fraction, ...]
    fixed: int = 0
    draft: Fraction = Fraction(0)
    request_bytes: int = 0
    swa_ratio: Fraction = Fraction(1)
    formula: str = ""
    source: str = ""

    def tokens(self, available: int) -> int:
        """Return max_total_num_tokens for ``available`` bytes, a multiple of the page; 0 where nothing fits."""
        if self.cell <= 0:
            return 0
        tokens = max(math.floor((available - self.fixed) / self.cell), 0)
        return tokens // self.page * self.page

    def num_bytes(self, tokens: int) -> int:
        """Return the bytes of the target's buffers for ``tokens``, with the one page of padding they all have."""
        return self.fixed + math.ceil(self.real * (tokens + self.page)) if tokens else 0

    def draft_bytes(self, tokens: int) -> int:
        """Return the bytes of the draft's buffers."""
        return math.ceil(self.draft * (tokens + self.page)) if tokens else 0

    def rounding(self, tokens: int) -> int:
        """Return what the allocator's segments take beyond the buffers."""
        if not tokens:
            return 0
        sizes = [math.ceil(each * (tokens + self.page)) for each in self.buffers]
        return reserved_bytes(sizes) - sum(sizes)

    def request(self, tokens: int) -> int:
        """Return what a request of ``tokens`` costs, in whole pages."""
        pages = cdiv(max(tokens, 0), self.page) * self.page
        windows = sum((min(pages, w.tokens + self.page) * w.bytes_per_token for w in self.windows), Fraction(0))
        return math.ceil(pages * self.slope + windows) + self.request_bytes
