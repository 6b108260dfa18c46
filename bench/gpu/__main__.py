"""Runs every GPU bench and prints what was measured beside what is to be reached.

Each section is a process of its own with a time limit: a kernel that crashes or hangs takes no other section
with it. Rows are in the CSV as soon as they are measured.

    python -m bench.gpu                   # into bench/results/<gpu>.csv
    python -m bench.gpu --sweep           # and every plan of the CUDA kernels, for the thresholds
    python -m bench.gpu --tiny --device cpu --output smoke.csv
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.common import ROOT
from bench.gpu.bars import show
from bench.gpu.results import output_file
from bench.tables import read_rows

# Seconds, about twice what each should take on an H200: with the build and the tests, `make gpu` must end
# within 10 minutes even if kernels hang.
SECTIONS = {
    "bench.gpu.linear": 120,
    "bench.gpu.generate": 150,
    "bench.gpu.quantize": 40,
    "bench.gpu.gptq": 80,
}
SWEEP = {"bench.gpu.sweep": 240}


def run(sections: Mapping[str, int], arguments: list[str]) -> dict[str, str]:
    """Run sections one after another.

    Returns:
        Section -> what went wrong, for those where something did.
    """
    failures = {}
    for module, limit in sections.items():
        command = (sys.executable, "-m", module, *arguments)
        print(f"== {module}", flush=True)
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=limit).returncode
        except subprocess.TimeoutExpired:
            failures[module] = f"took more than {limit} s"
            continue
        if status:
            failures[module] = f"exit status {status}"
    return failures


def main(
    tiny: Annotated[bool, typer.Option(help="Small problems, for a smoke test.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a smoke test.")] = "cuda",
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = None,
    sweep: Annotated[bool, typer.Option(help="Measure every plan of the CUDA kernels as well.")] = False,
) -> None:
    """Run the sections and print the tables; exit status 1 if a section failed."""
    path = output_file(output, torch.device(device), tiny)
    if path is None:
        raise typer.BadParameter("a smoke run needs a file to write to", param_hint="--output")
    path = path.absolute()
    before = len(read_rows(path))
    arguments = ["--output", str(path)]
    failures = run(SECTIONS, [*arguments, "--device", device, *(["--tiny"] if tiny else [])])
    if sweep:
        failures |= run(SWEEP, arguments)
    show(read_rows(path)[before:])
    for module, reason in failures.items():
        print(f"{module}: {reason}", flush=True)
    print(f"Figures: {path}", flush=True)
    raise typer.Exit(int(bool(failures)))


if __name__ == "__main__":
    typer.run(main)
