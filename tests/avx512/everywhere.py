"""A pytest plugin: tests that ask `olive.ops.cpu` for its instruction sets run on the emulated ones as well.

python -m pytest -p tests.avx512.everywhere tests/ops -k linear
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from olive.ops import cpu
from tests.avx512.module import emulated_cpu


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported: they ask when they are."""
    keep = getattr(config, "cache", None)
    folder = Path(tempfile.mkdtemp()) if keep is None else keep.mkdir("emulated_cpu")
    cpu._MODULE = emulated_cpu(folder)
