"""Runs this folder's tests once more, in a process in which Triton interprets the kernels on CPU tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.conftest import INTERPRETING

HERE = Path(__file__).resolve().parent


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETING, reason="this is the process that interprets")
def test_kernels_are_right_under_the_interpreter() -> None:
    pytest.importorskip("triton")
    # What Triton 3.6's interpreter does to numpy arrays; 3.9's does not.
    ignored = "ignore:Conversion of an array with ndim > 0:DeprecationWarning"
    options = ["-q", "-p", "no:cacheprovider", "-W", ignored, "--durations=5", str(HERE)]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
    print(run.stdout)
    assert run.returncode == 0, run.stdout
    assert " passed" in run.stdout
