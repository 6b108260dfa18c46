"""A pytest plugin: tests that ask `olive.ops.cpu` for its instruction sets run on the emulated ones as well.

python -m pytest -p tests.avx512.everywhere tests/ops -k linear
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest

from olive.ops import cpu
from tests.avx512.module import emulated_cpu


def pytest_configure(config: pytest.Config) -> None:
    """Before any test module is imported: they ask when they are."""
    keep = getattr(config, "cache", None)
    if keep is not None:
        folder = keep.mkdir("emulated_cpu")
    else:
        folder = Path(tempfile.mkdtemp())
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    cpu._MODULE = emulated_cpu(folder)
