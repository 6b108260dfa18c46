"""Where the tests of the CUDA kernels run: on the emulator, and on a GPU where there is one.

The emulated module is the same .cu files and bindings, built by a C++ compiler, on CPU addresses.
`cuda_on_cpu` puts it into `olive.ops.cuda`, whose functions then work on CPU tensors.
"""

from __future__ import annotations

import atexit
import importlib.util
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from olive.ops import cuda

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
NAME = "emulated_cuda"
SOURCES = (
    HERE / "emulator/machine.cpp",
    HERE / "emulator/module.cpp",
    CSRC / "bindings/cuda.cpp",
    *(
        CSRC / "cuda" / f"{name}.cu"
        for name in ("pack", "decode", "encode", "search", "compensate", "quantize_activations")
    ),
    *(CSRC / "cuda" / f"linear_{name}.cu" for name in ("mma", "quantized_mma")),
    *(CSRC / "cuda" / f"linear_{name}_sm90.cu" for name in ("wgmma", "quantized_wgmma")),
)
# Without contraction, as nvcc's -fmad=false for the encoders.
FLAGS = (
    "-std=gnu++17", "-O1", "-fPIC", "-ffp-contract=off", "-fvisibility=hidden", "-w", "-DOLIVE_EMULATED",
    '-DOLIVE_CUDA_ARCHITECTURES="emulated"',
)  # fmt: skip
COMPILER = shutil.which(os.environ.get("CXX", "") or "c++")
SCHEDULES = (0, 1, 7)  # threads run in rising order, in falling order, shuffled
AMPERE, HOPPER = 80, 90


def _missing() -> str:
    if COMPILER is None:
        return "needs a C++ compiler"
    return "" if importlib.util.find_spec("pybind11") else "needs pybind11"


NEEDS_COMPILER = pytest.mark.skipif(bool(_missing()), reason=_missing() or "nothing is missing")


@cache
def emulated_cuda() -> Any:
    """The module; compiled once per process, two files at a time."""
    import pybind11

    assert COMPILER is not None
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    includes = (HERE, CSRC, pybind11.get_include(), sysconfig.get_path("include"))
    command = (COMPILER, *FLAGS, *(f"-I{path}" for path in includes), "-x", "c++", "-c")
    objects = {source: folder / f"{source.parent.name}_{source.stem}.o" for source in SOURCES}
    running: list[tuple[Path, subprocess.Popen[bytes]]] = []

    def finish() -> None:
        source, job = running.pop(0)
        errors = job.communicate()[1].decode()
        assert job.returncode == 0, f"{source}: {errors}"

    for source, target in objects.items():
        if len(running) == (os.cpu_count() or 1):
            finish()
        running.append((source, subprocess.Popen((*command, source, "-o", target), stderr=subprocess.PIPE)))
    while running:
        finish()
    library = folder / f"{NAME}.so"
    subprocess.run((COMPILER, "-shared", "-o", library, *objects.values()), check=True)
    spec = importlib.util.spec_from_file_location(NAME, library)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def cuda_on_cpu(
    *,
    schedule: int = 0,
    multiprocessors: int = 4,
    capability: int = HOPPER,
    shared_per_block: int = 227 * 1024,
) -> Iterator[Any]:
    """`olive.ops.cuda` on CPU tensors, as on a GPU of this size; yields the emulated module."""
    module = emulated_cuda()
    module.set_schedule(schedule)
    module.set_device(multiprocessors, capability, shared_per_block)
    module.launched()  # forget
    cuda.gpu_of.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_MODULE", module)
        patch.setattr(cuda, "on_device", lambda device: nullcontext())
        patch.setattr(cuda, "stream_of", lambda device: 0)
        yield module
    cuda.gpu_of.cache_clear()


def _gpu_missing() -> str:
    if not torch.cuda.is_available():
        return "needs a CUDA device"
    return cuda.missing(torch.device("cuda", torch.cuda.current_device()))


NEEDS_GPU = (
    pytest.mark.gpu,
    pytest.mark.skipif(bool(_gpu_missing()), reason=_gpu_missing() or "nothing is missing"),
)


class Target:
    """The emulator ("cpu") or a GPU ("cuda")."""

    def __init__(self, device: str):
        self.device = device

    @contextmanager
    def kernels(self, **options: int) -> Iterator[list[str] | None]:
        """The CUDA kernels on tensors of this device; options are those of `cuda_on_cpu`, a GPU is as it is.

        Yields a list that afterwards holds the names of the kernels that ran; None on a GPU.
        """
        if self.device != "cpu":
            yield None
            torch.cuda.synchronize()
            return
        with cuda_on_cpu(**options) as module:
            ran: list[str] = []
            yield ran
            ran += module.launched()

    def runs_wgmma(self) -> bool:
        """Whether the device has wgmma; the emulator has."""
        return self.device == "cpu" or torch.cuda.get_device_capability() == (9, 0)


TARGETS = (
    pytest.param(Target("cpu"), id="emulated", marks=NEEDS_COMPILER),
    pytest.param(Target("cuda"), id="gpu", marks=NEEDS_GPU),
)
EACH_TARGET = pytest.mark.parametrize("target", TARGETS)


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` returns: with NaN, or with a pattern of bits."""
    empty = torch.empty

    def poisoned(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = empty(*arguments, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else 0x55)

    monkeypatch.setattr(torch, "empty", poisoned)
