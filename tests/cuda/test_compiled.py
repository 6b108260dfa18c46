"""`olive._cuda` as compiled for every architecture: no spills, and the instructions that were meant."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from functools import cache
from pathlib import Path

import pytest
import torch

from olive.ops import cuda

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100", "sm_120")
# Tiles of 16 and 64 activation rows, and of 8 with groups of activations, use all the registers they may
# have: on Blackwell a few values outside the loops are spilled. (That loops touch no local memory is a test
# of its own, without exceptions.)
SPILLING = ("sm_100", "sm_120"), r"Li1ELi8ELi2ELi8|Li1ELi2ELi2ELi4|ScalingE2.*Li1ELi1ELi4", 24
PRODUCTS = re.compile(r"\b(HMMA|HGMMA|IMMA|IGMMA)\b")


def _disassembler() -> str | None:
    """cuobjdump of a CUDA toolkit, or the one that Triton brings."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.origin is None:
        return None
    bundled = Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump"
    return str(bundled) if bundled.exists() else None


CUOBJDUMP = _disassembler()
pytestmark = [
    pytest.mark.skipif(cuda._MODULE is None, reason="olive._cuda is not built: no CUDA compiler was found"),
    pytest.mark.skipif(CUOBJDUMP is None, reason="needs cuobjdump"),
]


@cache
def _dump(*options: str) -> str:
    assert cuda._MODULE is not None and CUOBJDUMP is not None
    command = (CUOBJDUMP, *options, str(cuda._MODULE.__file__))
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _built_for() -> tuple[str, ...]:
    return tuple(name for name in ARCHITECTURES if re.search(rf"\.{name}\.cubin", _dump("--list-elf")))


def _resources(architecture: str) -> dict[str, dict[str, int]]:
    """Kernel -> REG, STACK, LOCAL and so on."""
    found: dict[str, dict[str, int]] = {}
    for name, line in re.findall(
        r"Function (\S+):\n\s*(REG:.*)", _dump("--dump-resource-usage", "-arch", architecture)
    ):
        found[name] = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", line)}
    return found


@cache
def _instructions(architecture: str) -> dict[str, list[str]]:
    """Kernel -> its machine code."""
    found: dict[str, list[str]] = {}
    for part in _dump("--dump-sass", "-arch", architecture).split("Function : ")[1:]:
        name = part.split("\n", 1)[0].strip()
        found[name] = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", part, re.MULTILINE)
    return found


def test_it_is_built_for_the_machines_that_it_says() -> None:
    """A build for one GPU has its own architecture only; the one that is shipped has all, and PTX."""
    assert _built_for()
    if cuda.architectures() == "80-real,90a-real,100,120-real":
        assert _built_for() == ARCHITECTURES
        assert ".sm_100.ptx" in _dump("--list-ptx")


def test_no_kernel_spills() -> None:
    architectures, pattern, most = SPILLING
    for architecture in _built_for():
        kernels = _resources(architecture)
        assert len(kernels) > 20
        for name, used in kernels.items():
            allowed = most if architecture in architectures and re.search(pattern, name) else 0
            assert used["STACK"] <= allowed, (architecture, name, used)
            assert used["LOCAL"] == 0, (architecture, name, used)


def test_loops_of_products_touch_no_local_memory() -> None:
    for architecture in _built_for():
        for name, code in _instructions(architecture).items():
            products = [index for index, line in enumerate(code) if PRODUCTS.search(line)]
            if products:
                loop = code[products[0] : products[-1]]
                assert not [line for line in loop if re.search(r"\b(LDL|STL)\b", line)], (architecture, name)


def _kernels(architecture: str, kernel: str) -> dict[str, str]:
    found = {name: "\n".join(code) for name, code in _instructions(architecture).items() if kernel in name}
    assert found
    return found


def test_few_rows_use_wide_loads_and_tensor_cores() -> None:
    for architecture in _built_for():
        for name, code in _kernels(architecture, "ovp_linear_mma_kernel").items():
            assert "HMMA.16816.F32" in code, name
            assert "LDG.E.NA.128" in code, name  # codes, past the first-level cache
            assert "LDSM.16.M88.4" in code and "LDGSTS" in code, name


def test_many_rows_use_warpgroup_products_on_hopper_only() -> None:
    for architecture in _built_for():
        for name, code in _kernels(architecture, "ovp_linear_wgmma_kernel").items():
            if architecture != "sm_90a":
                assert "HGMMA" not in code and len(code.splitlines()) < 100, name  # an empty kernel
                continue
            assert "HGMMA.64x" in code and "UTMALDG.2D" in code and "STSM.16.MT88.4" in code, name
            assert not re.search(r"\bHMMA\b", code), name
            assert "USETMAXREG" in code, name


def test_products_are_not_serialised_with_their_waits() -> None:
    """All products of a step are issued before the wait: eight for two row tiles, four for one."""
    if "sm_90a" not in _built_for():
        pytest.skip("not built for Hopper")
    for name, code in _kernels("sm_90a", "ovp_linear_wgmma_kernel").items():
        per_step = 8 if re.search(r"ShapeILi\dELi2E", name) else 4
        groups = re.split(r"WARPGROUP\.DEPBAR", code)[:-1]
        assert groups
        assert all(len(re.findall(r"HGMMA", group)) == per_step for group in groups), name


def test_integer_products_use_integer_tensor_cores() -> None:
    for architecture in _built_for():
        for name, code in _kernels(architecture, "ovp_linear_quantized_mma_kernel").items():
            assert "IMMA.16832.S8.S8" in code, name
            assert not re.search(r"\bHMMA\b", code), name
            assert "LDG.E.NA.128" in code and "LDSM.16.M88.4" in code and "LDGSTS" in code, name
            if "ScalingE0" not in name:  # sums become floats by a subtraction
                assert not re.search(r"I2FP?\.F32\.S32", code), name
        for name, code in _kernels(architecture, "ovp_linear_quantized_wgmma_kernel").items():
            if architecture != "sm_90a":
                assert "IGMMA" not in code and len(code.splitlines()) < 100, name  # an empty kernel
                continue
            assert "IGMMA.64x" in code and "UTMALDG.2D" in code and "USETMAXREG" in code, name
            assert ("UBLKCP" in code) == ("ScalingE2" in name), name  # scales of activations


def test_integer_products_go_on_while_sums_are_scaled() -> None:
    """Every unit but the last is scaled with the next one under way; without scales, one wait per step."""
    if "sm_90a" not in _built_for():
        pytest.skip("not built for Hopper")
    for name, code in _kernels("sm_90a", "ovp_linear_quantized_wgmma_kernel").items():
        found = re.search(r"ScalingE(\d)ELi(\d+)ELi(\d+)", name)
        assert found is not None
        scaling, block, tokens = map(int, found.groups())
        units = 1 if scaling == 0 else 128 // block * (tokens // 64)
        waits = re.findall(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x\d)", code)
        assert waits == ["0x1"] * (units - 1) + ["0x0"], name
        assert len(re.findall(r"IGMMA", code)) == (4 if scaling == 0 else 4 * (tokens // 64)), name


def test_a_call_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert cuda._MODULE is not None
    assert "CUDA says" in cuda._MODULE.unsupported(0)
    with pytest.raises(RuntimeError, match=r"device: CUDA says cuda\w+ .*needs an NVIDIA GPU and a driver"):
        cuda._MODULE.device_properties(0)
