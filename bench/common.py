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
from typing import Any

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


def environment() -> dict[str, str]:
    """Columns that say where a figure comes from, the same in every CSV."""
    import torch

    import olive

    return {
        "machine": f"{cpu_model()}, {os.cpu_count()} cores",
        "threads": str(torch.get_num_threads()),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": package_version("transformers"),
        "olive": olive.__version__,
        "commit": commit(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
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
