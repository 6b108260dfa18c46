"""Pictures from the CSV files in bench/results/: nothing is measured here.

python -m bench.plots
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Annotated

import matplotlib
import typer

from bench.common import RESULTS

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {"olive": "#3f7d20", "torch_half": "#666666", "torch_float32": "#aaaaaa", "torch_int4": "#c0392b"}


def read(path: Path) -> list[dict[str, str]]:
    """Rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def plot_linear(source: Path, target: Path) -> None:
    """Speed-up of every backend over torch's bfloat16 linear, by M; the newest run of each point counts."""
    rows = [row for row in read(source) if row["dtype"] == "bfloat16" and row["group_size"] == "128"]
    shapes = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    figure, axes = plt.subplots(1, len(shapes), figsize=(4 * len(shapes), 3.6), sharey=True, squeeze=False)
    for axis, (n, k) in zip(axes[0], shapes, strict=True):
        points: dict[str, dict[int, float]] = {}
        for row in rows:
            if (row["n"], row["k"]) == (n, k):
                points.setdefault(row["backend"], {})[int(row["m"])] = float(row["speedup"])
        for backend, speedups in points.items():
            ordered = sorted(speedups.items())
            colour = COLOURS.get(backend.split()[0])
            axis.plot(*zip(*ordered, strict=True), marker="o", label=backend, color=colour)
        axis.set(title=f"N {n}, K {k}", xlabel="activation rows M", xscale="log", yscale="log")
        axis.set_xticks([1, 16, 256, 1024], ["1", "16", "256", "1024"])
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("speed-up over torch bfloat16")
    axes[0][0].legend(fontsize=8)
    figure.suptitle(rows[-1]["machine"] + f", {rows[-1]['threads']} threads, cold weights", fontsize=10)
    figure.tight_layout()
    figure.savefig(target)
    plt.close(figure)


def main(results: Annotated[Path, typer.Option(help="Folder with the CSV files.")] = RESULTS) -> None:
    """Draw what there is."""
    if (results / "ovp_linear.csv").exists():
        plot_linear(results / "ovp_linear.csv", results / "ovp_linear.svg")


if __name__ == "__main__":
    typer.run(main)
