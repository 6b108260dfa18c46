"""Rows of figures: into the CSV of the GPU as soon as they are measured, and one printed line each."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from bench.common import RESULTS, append_csv, gpu_environment
from bench.tables import Row
from bench.timing import Timing

FIGURES = (
    "op",
    "backend",
    "plan",  # the kernel that was chosen, or asked for
    "m",  # activation rows; batch of a model, tokens of a prompt
    "n",
    "k",
    "dtype",
    "codebook",
    "group_size",
    "median_ms",
    "q20_ms",
    "q80_ms",
    "runs",
    "gb_s",  # of weight bytes; read and written for copy, encode and decode
    "of_copy",  # the same over the bandwidth of a copy in the same process
    "tflop_s",
    "speedup",  # over torch's bfloat16 in the same process
    "mweights_s",
    "tokens_s",
    "peak_gib",
    "seconds",  # of a whole model
    "note",
)


def file_name(gpu: str) -> str:
    """The CSV of a GPU, by its name: "NVIDIA H200" -> "nvidia_h200.csv"."""
    return re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_") + ".csv"


def output_file(output: Path | None, device: torch.device, tiny: bool) -> Path | None:
    """Where rows go: as asked, else to the file of the GPU; a smoke run writes only where it is asked to."""
    if output is not None or tiny or device.type != "cuda":
        return output
    return RESULTS / file_name(torch.cuda.get_device_name(device))


class Results:
    """Collects rows.

    Args:
        path: the CSV to append to; None = none.
        device: where the figures are measured.
    """

    def __init__(self, path: Path | None, device: torch.device) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.failed = False
        self._environment = gpu_environment(device)

    def add(self, op: str, backend: str, timing: Timing | None = None, **figures: Any) -> Row:
        """Append a row; figures that were not measured stay empty.

        Raises:
            ValueError: a figure that is no column.
        """
        if unknown := set(figures) - set(FIGURES):
            raise ValueError(f"figures: expected names among {FIGURES}, got {sorted(unknown)}")
        if timing is not None:
            figures.update(
                median_ms=f"{timing.median * 1e3:.5f}",
                q20_ms=f"{timing.low * 1e3:.5f}",
                q80_ms=f"{timing.high * 1e3:.5f}",
                runs=timing.runs,
            )
        figures.update(op=op, backend=backend)
        row = {name: _text(figures.get(name, "")) for name in FIGURES} | self._environment
        self.rows.append(row)
        if self.path is not None:
            append_csv(self.path, [row])
        print(line(row), flush=True)
        return row

    def fail(self, op: str, backend: str, reason: object, **figures: Any) -> None:
        """Append a row that says what went wrong, and remember it for the exit status."""
        self.failed = True
        self.add(op, backend, note=f"failed: {_first_line(reason)}", **figures)

    def missing(self, op: str, backend: str, reason: object, **figures: Any) -> None:
        """Append a row that says why a peer could not be measured."""
        self.add(op, backend, note=f"not available: {_first_line(reason)}", **figures)


def _text(value: object) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _first_line(reason: object) -> str:
    text = str(reason).strip().partition("\n")[0]
    return f"{type(reason).__name__}: {text}" if isinstance(reason, Exception) else text


def line(row: Row) -> str:
    """A row in words: what was measured, then every figure by its column."""
    shape = f"{row['n']} x {row['k']}" if row["n"] else ""
    what = f"{row['op']:<15} {row['backend']:<13} M {row['m'] or '-':<5} {shape:<14}"
    shown = (
        "median_ms",
        "gb_s",
        "of_copy",
        "tflop_s",
        "speedup",
        "mweights_s",
        "tokens_s",
        "peak_gib",
        "seconds",
    )
    figures = [f"{name} {row[name]}" for name in shown if row[name]]
    return "  ".join((what, *figures, *(row[name] for name in ("plan", "note") if row[name])))
