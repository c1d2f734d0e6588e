"""SGLang's start arithmetic, release by release (see docs/engines/sglang.md)."""

from __future__ import annotations

from ullage.engines.sglang.start import start
from ullage.engines.sglang.versions import VERSIONS

__all__ = ["VERSIONS", "start"]
