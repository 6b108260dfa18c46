"""The wheel: what is in it, and that it quantizes in an environment of its own without a compiler."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

import olive
from tests.house.layers import ROOT

pytestmark = pytest.mark.slow

BUILD_REQUIRES = {"setuptools": 77, "scikit-build-core": 0, "pybind11": 2}  # with the major version
FILES = ("setup.py", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE")
FOLDERS = ("olive", "csrc", "tests", "bench", "examples")  # the last three must not get into the wheel

QUANTIZE = """
import json, shutil, sys
import torch
import olive
from olive import _cpu, ops

assert not any(shutil.which(name) for name in ("cc", "gcc", "g++", "c++", "clang", "cmake", "ninja"))
torch.manual_seed(0)
torch.set_num_threads(1)
model = torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.GELU(), torch.nn.Linear(64, 33)).eval()
x = torch.randn(5, 256)
with torch.no_grad():
    before = model(x)
    after = olive.quantize(model)(x)
    report = olive.report(model)
    page = report.html("report.html")
    decoded = olive.dequantize(model)(x)
print(json.dumps({
    "olive": olive.__file__,
    "_cpu": _cpu.__file__,
    "backend": ops.cpu_backend(),
    "version": olive.__version__,
    "bits": report.bits_per_weight,
    "page": page.stat().st_size,
    "error": float((after - before).norm() / before.norm()),
    "kernel_error": float((after - decoded).abs().max() / decoded.abs().max()),
}))
"""


def run(command: list[str], **options: object) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    return str(done.stdout)


def can_build_here() -> bool:
    """Whether the running environment has what the build requires."""
    try:
        found = [int(version(name).split(".")[0]) >= least for name, least in BUILD_REQUIRES.items()]
    except PackageNotFoundError:
        return False
    return all(found) and all(map(shutil.which, ("cmake", "ninja")))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources: builds leave files beside them."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in FOLDERS:
        ignored = shutil.ignore_patterns("*.so", "__pycache__")
        shutil.copytree(ROOT / name, folder / "source" / name, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, folder / "source")
    # Where the build's requirements are installed nothing has to be fetched.
    options = ["--no-build-isolation", "--no-index"] if can_build_here() else []
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--disable-pip-version-check", *options]
    # The CUDA module takes minutes to compile; its build is tested where the running environment has it.
    without_cuda = {**os.environ, "CMAKE_ARGS": "-DOLIVE_CUDA=OFF"}
    run([*build, "--wheel-dir", str(folder), str(folder / "source")], cwd=folder, env=without_cuda)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment that has the wheel, and torch from the running one."""
    folder = tmp_path_factory.mktemp("installed") / "venv"
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)])
    fresh = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(fresh), "--disable-pip-version-check"]
    run([*pip, "install", "--no-deps", "--no-index", str(wheel)])
    # Paths in a .pth file come after the environment's own, and .pth files in them are not read: so an olive
    # that is installed in the running environment, editable or not, cannot take the wheel's place.
    (packages,) = folder.glob("lib/python*/site-packages")
    others = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    (packages / "running.pth").write_text("\n".join(others) + "\n")
    return fresh


def test_contents(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    info = f"olive_quant-{olive.__version__}.dist-info"
    assert {name.split("/")[0] for name in names} == {"olive", info}
    compiled = [name for name in names if name.endswith((".so", ".pyd"))]
    assert [name.split(".")[0] for name in compiled] == ["olive/_cpu"]
    for expected in ("olive/reports/page.jinja", "olive/py.typed", f"{info}/licenses/LICENSE"):
        assert expected in names
    sources = {str(file.relative_to(ROOT)) for file in (ROOT / "olive").rglob("*.py")}
    assert sources <= set(names)
    left_out = (".cpp", ".cu", ".cuh", ".h", ".inl", ".csv", ".safetensors")
    assert [name for name in names if name.endswith(left_out) or "test" in name] == []


def test_metadata(wheel: Path) -> None:
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".dist-info/METADATA")]
    metadata = message_from_string(zipfile.ZipFile(wheel).read(name).decode())
    assert (metadata["Name"], metadata["Version"]) == ("olive-quant", olive.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    required = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert sorted(line.split(">")[0] for line in required) == ["numpy", "rich", "torch", "typer", "wrapt"]


def test_quantizes_without_a_compiler(python: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    dropped = ("PYTHON", "CC", "CXX", "LD_", "VIRTUAL_ENV", "COV_")
    clean = {key: value for key, value in os.environ.items() if not key.startswith(dropped)}
    # -I: neither the working directory nor PYTHONPATH nor the user's packages are searched.
    output = run(
        [str(python), "-I", "-c", QUANTIZE], cwd=tmp_path, env={**clean, "PATH": str(tmp_path / "empty")}
    )
    result = json.loads(output.splitlines()[-1])
    environment = python.parents[1]
    assert Path(result["olive"]).is_relative_to(environment)
    assert Path(result["_cpu"]).is_relative_to(environment)
    assert result["backend"] != "reference"
    assert result["version"] == olive.__version__
    assert 4.1 < result["bits"] < 4.5
    assert result["page"] > 1000
    assert 0 < result["error"] < 0.2  # two layers of 4-bit codes lose about 10 % each
    assert 0 <= result["kernel_error"] <= 1e-4  # the kernel against the decoded float layers
