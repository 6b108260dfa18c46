"""The CPU kernels for AVX-512, VNNI and AMX where the processor has none of them: built for AVX2, emulated.

The emulated module is olive._cpu from the same sources; `emulator/immintrin.h` stands in for the instructions
that are missing. conftest.py has the fixtures that tests use.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

HERE = Path(__file__).parent
CSRC = HERE.parents[1] / "csrc"
NAME = "emulated_cpu"  # csrc/bindings/cpu.cpp has it too
EMULATED_ISAS = ("avx512", "avx512_vnni", "amx")
JOBS = min(2, os.cpu_count() or 1)

# Without contraction and with OpenMP as in CMakeLists.txt: compiled with it, its symbols come from torch's.
# CXXFLAGS come last, e.g. -fsanitize=address, which finds what kernels read and write out of bounds.
COMMON = (
    "-std=gnu++17", "-O1", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fopenmp", "-w",
    *shlex.split(os.environ.get("CXXFLAGS", "")),
)  # fmt: skip
AVX2 = ("-mavx2", "-mfma", "-mf16c")
EMULATOR = (*AVX2, f"-I{HERE / 'emulator'}")
VNNI = "-DOLIVE_EMULATE_VNNI"
AMX = "-DOLIVE_EMULATE_AMX"
# What CMakeLists.txt gives a file as -mavx512vnni or -mamx-int8 is a macro of the emulator's here.
KERNELS = {
    "portable": (),
    "avx2": AVX2,
    "avx512": EMULATOR,
    "avx512_vnni": (*EMULATOR, VNNI),
    "amx": (*EMULATOR, VNNI, AMX),
}


class Unit(NamedTuple):
    """One file to compile."""

    source: Path
    flags: tuple[str, ...]


@cache
def compiler() -> str | None:
    """A gcc: clang's headers have other names, and its OpenMP needs a runtime other than torch's."""
    for name in (os.environ.get("CXX", ""), "c++", "g++"):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        command = (path, "-x", "c++", "-dM", "-E", "-")
        probe = subprocess.run(command, input="", capture_output=True, text=True)
        if probe.returncode == 0 and "__clang__" not in probe.stdout:
            return path
    return None


def _missing() -> str:
    if platform.machine() not in (
        "x86_64",
        "AMD64",
    ) or not torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        return "needs a processor with AVX2"
    if compiler() is None:
        return "needs gcc"
    return "" if importlib.util.find_spec("pybind11") else "needs pybind11"


NEEDS_EMULATOR = pytest.mark.skipif(bool(_missing()), reason=_missing() or "nothing is missing")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Other processes that want to build here wait."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@cache
def _version(gcc: str) -> bytes:
    return subprocess.run((gcc, "--version"), capture_output=True, check=True).stdout


class Object:
    """One file to compile, and whether that is due."""

    def __init__(self, unit: Unit, stem: Path, gcc: str):
        self.source = unit.source
        self.path, self._depends, self._key = (stem.with_suffix(end) for end in (".o", ".d", ".key"))
        options = (*COMMON, *unit.flags, f"-I{CSRC}", "-MMD", "-MF", str(self._depends))
        self._command = (gcc, *options, "-c", str(self.source), "-o", str(self.path))

    def _read(self) -> list[Path]:
        """The files that the compiler read, as its make rule lists them."""
        rule = self._depends.read_text().partition(":")[2]
        return [Path(path) for path in shlex.split(rule.replace("\\\n", " "))]

    def _current_key(self) -> str:
        digest = hashlib.sha256(_version(self._command[0]) + shlex.join(self._command).encode())
        for path in self._read():
            digest.update(path.read_bytes() if path.exists() else b"gone")
        return digest.hexdigest()

    def is_current(self) -> bool:
        known = self.path.exists() and self._depends.exists() and self._key.exists()
        return known and self._key.read_text() == self._current_key()

    def start(self) -> None:
        self._key.unlink(missing_ok=True)
        self._started = time.time()
        self._job = subprocess.Popen(self._command, stderr=subprocess.PIPE, text=True)

    def finish(self) -> None:
        errors = self._job.communicate()[1]
        assert self._job.returncode == 0, f"{self.source}: {errors}"
        # What was edited meanwhile may or may not be in the object.
        if all(path.exists() and path.stat().st_mtime < self._started for path in self._read()):
            self._key.write_text(self._current_key())


def build(library: str, units: Sequence[Unit], folder: Path) -> Path:
    """Compile and link; `folder` keeps the objects, and what has not changed since is not compiled again."""
    gcc = compiler()
    assert gcc is not None
    with _alone(folder):
        stems = (f"{library}_{unit.source.parent.name}_{unit.source.stem}" for unit in units)
        objects = [Object(unit, folder / stem, gcc) for unit, stem in zip(units, stems, strict=True)]
        running: list[Object] = []
        for due in (item for item in objects if not item.is_current()):
            if len(running) == JOBS:
                running.pop(0).finish()
            due.start()
            running.append(due)
        for job in running:
            job.finish()
        # Another process may have the old one open: that file stays as it is, this is a new one.
        fresh, path = folder / f"{library}.new", folder / f"{library}.so"
        subprocess.run((gcc, "-shared", "-o", fresh, *(item.path for item in objects)), check=True)
        fresh.replace(path)
    return path


@cache
def emulated_cpu(folder: Path) -> ModuleType:
    """The module with all instruction sets, those below AVX-512 native; built in `folder` where due."""
    import pybind11

    common = ("-DOLIVE_X86", "-DOLIVE_EMULATED")
    python = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}")
    # The slowest first: they decide when two at a time are done.
    units = [Unit(CSRC / f"cpu/{name}.cpp", (*common, *flags)) for name, flags in KERNELS.items()]
    bindings = sorted((CSRC / "bindings").glob("cpu*.cpp"))
    units += [Unit(path, (*common, *python)) for path in bindings]
    others = (path for path in sorted((CSRC / "cpu").glob("*.cpp")) if path.stem not in KERNELS)
    units += [Unit(path, common) for path in others]
    spec = importlib.util.spec_from_file_location(NAME, build(NAME, units, folder))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def intrinsics(folder: Path) -> ctypes.CDLL:
    """intrinsics.cpp on the emulator."""
    flags = (*EMULATOR, VNNI, AMX, "-DOLIVE_EMULATE_VBMI", "-DOLIVE_EMULATE_AMX_BF16")
    return ctypes.CDLL(str(build("emulated_intrinsics", [Unit(HERE / "intrinsics.cpp", flags)], folder)))


def native_intrinsics(folder: Path) -> ctypes.CDLL:
    """intrinsics.cpp on the processor's own instructions."""
    unit = Unit(HERE / "intrinsics.cpp", ("-march=native",))
    return ctypes.CDLL(str(build("native_intrinsics", [unit], folder)))
