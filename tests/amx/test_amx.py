"""The AMX kernels, as compiled, on any processor with AVX512-VNNI: a signal handler does the tiles' work.

Where the processor has AMX the same comparison runs on the real tiles.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from olive.ops import cpu

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
# As in CMakeLists.txt. OpenMP's symbols come from torch: compiled with it, not linked.
COMMON = ("-std=gnu++17", "-O3", "-fPIC", "-ffp-contract=off", "-fopenmp", "-DOLIVE_X86", "-w")
AVX512 = (
    "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mprefer-vector-width=512"
)
AMX = ("-mamx-tile", "-mamx-int8")


def _compiler() -> str | None:
    """A gcc that knows AMX; clang's OpenMP needs a runtime other than torch's."""
    for name in (os.environ.get("CXX", ""), "c++", "g++"):
        path = shutil.which(name) if name else None
        if path is None:
            continue
        command = [path, *AMX, "-x", "c++", "-dM", "-E", "-"]
        probe = subprocess.run(command, input="", capture_output=True, text=True)
        if probe.returncode == 0 and "__clang__" not in probe.stdout:
            return path
    return None


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Compiles the kernels and the emulator, compares, and returns the process's result."""
    if "avx512_vnni" not in cpu.cpu_isas():
        pytest.skip("needs AVX512-VNNI, which this processor or build lacks")
    compiler = _compiler()
    if compiler is None:
        pytest.skip("needs a gcc that knows AMX")
    folder = tmp_path_factory.mktemp("amx")
    sources = {
        "amx": (ROOT / "csrc/cpu/amx.cpp", (*AVX512.split(), *AMX)),
        "avx512_vnni": (ROOT / "csrc/cpu/avx512_vnni.cpp", tuple(AVX512.split())),
        "linear": (ROOT / "csrc/cpu/linear.cpp", ()),
        "kernels": (HERE / "kernels.cpp", ()),
        "emulator": (HERE / "emulator.cpp", ()),
    }
    jobs = []
    for name, (source, flags) in sources.items():
        command = [compiler, *COMMON, *flags, f"-I{ROOT / 'csrc'}", "-c", str(source)]
        command += ["-o", str(folder / f"{name}.o")]
        jobs.append((name, subprocess.Popen(command, stderr=subprocess.PIPE)))
    for name, job in jobs:
        errors = job.communicate()[1].decode()
        assert job.returncode == 0, f"{name}: {errors}"
    kernels, emulator = folder / "libkernels.so", folder / "libemulator.so"
    objects = [str(folder / f"{name}.o") for name in ("amx", "avx512_vnni", "linear", "kernels")]
    subprocess.run([compiler, "-shared", "-o", str(kernels), *objects], check=True)
    subprocess.run([compiler, "-shared", "-o", str(emulator), str(folder / "emulator.o")], check=True)
    return subprocess.run(
        [sys.executable, str(HERE / "compare.py"), str(kernels), str(emulator), "misuse"],
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=300,
    )


def test_amx_gives_the_bits_of_vnni(run: Any) -> None:
    assert run.stdout, f"exit status {run.returncode}: {run.stderr}"
    result = json.loads(run.stdout)
    assert result["differences"] == []
    assert result["cases"] > 500
    assert (result["emulated"] > 100_000) == ("amx" not in cpu.cpu_isas())


def test_a_tile_that_is_not_configured_is_refused(run: Any) -> None:
    """The last thing the process does: what a processor refuses, the emulator does too."""
    assert run.returncode == -signal.SIGILL
    if "amx" not in cpu.cpu_isas():
        assert "a tile is used before ldtilecfg" in run.stderr
