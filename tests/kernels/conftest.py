"""The Triton kernels run on CPU tensors under Triton's interpreter, and on a GPU where there is one.

Triton decides when it is imported whether it interprets, for the whole process, so a process does one or the
other: `test_triton_interpreter.py` starts one in which TRITON_INTERPRET is 1, and there `device` is "cpu".
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pytest
import torch

from olive.ops.rounding import fused_multiply_add

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
# The interpreter rounds to bfloat16 by cutting off bits, and multiplies bit patterns.
DTYPES = (torch.float16, torch.float32) if INTERPRETING else (torch.bfloat16, torch.float16, torch.float32)
DEVICE = (
    pytest.param("cpu")
    if INTERPRETING
    else pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    )
)

T = TypeVar("T")


def in_turn(items: Sequence[T], turn: int) -> Sequence[T]:
    """All of them on a GPU; one of them in turn under the interpreter, which takes tenths of seconds."""
    return [items[turn % len(items)]] if INTERPRETING else items


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`device` is where the kernels run in this process, `dtype` each type that they can be tested with."""
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", [DEVICE])
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is taken from, or left in, the user's cache of compiled kernels."""
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def _fused(self: Any, x: Any, y: Any, z: Any) -> Any:
    """`fma` of float32 for the interpreter, rounded once."""
    from triton.runtime.interpreter import TensorHandle

    factors = [torch.from_numpy(handle.data.copy()) for handle in (x, y, z)]
    return TensorHandle(fused_multiply_add(*factors).numpy(), z.dtype.scalar)


@pytest.fixture
def kernels(device: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """`olive.kernels`, imported by the tests that run it and by no other."""
    pytest.importorskip("triton")
    import olive.kernels

    if device == "cuda":
        yield olive.kernels
        return
    import numpy
    from triton.runtime.interpreter import InterpreterBuilder

    # Triton 3.6's interpreter rounds the product and then the sum.
    monkeypatch.setattr(InterpreterBuilder, "create_fma", _fused)
    with numpy.errstate(all="ignore"):  # what a GPU computes without a word, such as 1 / 0 in a masked lane
        yield olive.kernels
