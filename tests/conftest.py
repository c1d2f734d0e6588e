"""What all tests share: where the figures lie that are never copied into the project."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ["ULLAGE_CALIBRATION"] = "off"  # what was measured on this machine must not move what is tested

pytest_plugins = ["small_models"]

SHARED = Path(__file__).resolve().parents[2] / "shared"


def shared_path(*parts: str) -> Path:
    """Return a path under ``../shared``, beside the project; it may be missing."""
    return SHARED.joinpath(*parts)


def need_shared(*parts: str) -> Path:
    """Return a path under ``../shared``, and skip the test where it is missing."""
    path = shared_path(*parts)
    if not path.exists():
        pytest.skip(f"{path.name} is not there: the shared figures are not beside this checkout")
    return path
