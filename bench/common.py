"""What every bench shares: the machine and versions a figure was measured with, and the CSV it goes to."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"


def cpu_model() -> str:
    """Name of the processor, as the kernel gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    """Short commit of the working tree, with "+" where tracked files were changed; "unknown" outside git."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ("git", "-C", str(ROOT), *arguments), capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "-uno", "--", ".", ":!bench/results", ":!README.md") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def package_version(name: str) -> str:
    """Version of an installed distribution, "" where it is missing."""
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _processor() -> str:
    return f"{cpu_model()}, {os.cpu_count()} cores"


def _software() -> dict[str, str]:
    import torch

    import olive

    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": package_version("transformers"),
        "olive": olive.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def environment() -> dict[str, str]:
    """Columns that say where a figure comes from, the same in every CSV of a CPU."""
    import torch

    return {"machine": _processor(), "threads": str(torch.get_num_threads()), **_software()}


def driver_version() -> str:
    """Version of NVIDIA's driver, "" where there is none."""
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return answer.stdout.partition("\n")[0].strip()


def gpu_environment(device: torch.device) -> dict[str, str]:
    """The same for figures of a GPU; a smoke run on a CPU names the CPU."""
    import torch

    on_gpu = device.type == "cuda"
    return {
        "machine": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "driver": driver_version() if on_gpu else "",
        "cuda": str(torch.version.cuda or ""),
        "triton": package_version("triton"),
        **_software(),
    }


def append_csv(path: str | os.PathLike[str], rows: Iterable[Mapping[str, Any]]) -> None:
    """Append rows to a CSV file, which is made with a header where it is missing.

    Raises:
        ValueError: the rows' columns are not those of the file, or differ among themselves.
    """
    rows = list(rows)
    if not rows:
        return
    path = Path(path)
    columns = list(rows[0])
    exists = path.exists() and path.stat().st_size > 0
    if exists:
        with path.open(newline="") as file:
            columns = next(csv.reader(file))
    for row in rows:
        if set(row) != set(columns):
            raise ValueError(f"{path}: expected columns {columns}, got {list(row)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if not exists:
            writer.writeheader()
        writer.writerows(rows)
