"""Fixtures of all tests."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state; the value is for generators of a test's own."""
    torch.manual_seed(0)
    return 0
