"""Draws the quality comparison from `bench/results/quality.csv`: error against bits per weight.

python -m bench.plot_quality
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import matplotlib
import typer

from bench.common import RESULTS, ROOT
from bench.quality_table import BUNDLED, MINILM, OUTLIERS, T4, Line, lines_of
from bench.tables import read_rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

PANELS = (  # metric, data, title
    ("KL divergence", BUNDLED, "bundled model: KL divergence from float32, nats"),
    ("embedding distance", MINILM, "MiniLM: distance of sentence embeddings"),
    ("KL divergence", OUTLIERS, "bundled model with outliers: KL divergence, nats"),
    ("output error", T4, "drawn weights, Student-t(4), real inputs: error of the output"),
)
OVP_COLOUR, OTHER_COLOUR = "#3f7d20", "#a03020"
MARKERS = {"none": "o", "importance": "D", "importance, own text": "D"}  # all others are GPTQ
GPTQ_MARKER = "s"
SPLIT = 4.2  # bits; labels of what is left of it stand on the left
LABEL_STEP = 0.03  # of a panel's height, between labels
EDGES = (3.45, 4.85)  # of the axis of bits; the points are between 4 and 4.5
LABELS_END, LABELS_START = (
    0.37,
    0.79,
)  # of a panel's width: those on the left end there, those on the right start
MARGIN = 0.02  # of a panel's height, without labels


def label(line: Line) -> str:
    """Short: format, what data do, group size if it is not 128."""
    data = {"none": "", "GPTQ, activation order": " GPTQ, ordered", "GPTQ, searched grids": " GPTQ, searched"}
    size = "" if line.group_size in ("128", "-1") or "FP4" in line.format else f" /{line.group_size}"
    package = " (gptqmodel)" if line.implementation.startswith("gptqmodel") else ""
    name = line.format.replace("double quantization", "double quant.")
    return f"{name}{size}{data.get(line.calibration, ' ' + line.calibration)}{package}"


def spread(heights: list[float], step: float, margin: float = 0.0) -> list[float]:
    """Rising heights, moved as little as possible (squared) to be a step apart, within 0..1 less margins."""
    # Less i steps, they only must not fall: neighbours that do are pooled and share their mean.
    pools: list[list[float]] = []
    for index, height in enumerate(heights):
        pools.append([height - index * step])
        while len(pools) > 1 and _mean(pools[-2]) > _mean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    room = 1.0 - margin - (len(heights) - 1) * step
    flat = [min(max(_mean(pool), margin), room) for pool in pools for _ in pool]
    return [height + index * step for index, height in enumerate(flat)]


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def draw_panel(axis: Any, lines: list[Line], metric: str, data: str, title: str) -> None:
    """Points, with their labels in two columns beside them."""
    found = [(line, line.cells[metric, data]) for line in lines if (metric, data) in line.cells]
    points = [(line, float(row["bits_per_weight"]), float(row["value"])) for line, row in found]
    axis.set(title=title, xlabel="bits per weight", xlim=EDGES, yscale="log")
    axis.grid(alpha=0.25, which="both")
    axis.set_xticks([4.0, 4.125, 4.25, 4.5], ["4", "4.125", "4.25", "4.5"])
    if not points:
        return
    low, high = min(value for *_, value in points), max(value for *_, value in points)
    axis.set_ylim(low / 1.15, high * 1.15)
    for line, bits, value in points:
        ours = line.format.startswith("OVP")
        marker = MARKERS.get(line.calibration, GPTQ_MARKER)
        colour = OVP_COLOUR if ours else OTHER_COLOUR
        axis.plot(bits, value, marker, color=colour, markersize=6, alpha=0.85)
    to_axes = axis.transAxes.inverted()
    for on_left in (True, False):
        side = sorted((point for point in points if (point[1] < SPLIT) is on_left), key=lambda one: one[2])
        heights = [float(to_axes.transform(axis.transData.transform(point[1:]))[1]) for point in side]
        for (line, bits, value), height in zip(side, spread(heights, LABEL_STEP, MARGIN), strict=True):
            axis.annotate(
                label(line),
                xy=(bits, value),
                xytext=(LABELS_END if on_left else LABELS_START, height),
                textcoords="axes fraction",
                ha="right" if on_left else "left",
                va="center",
                fontsize=8,
                color=OVP_COLOUR if line.format.startswith("OVP") else OTHER_COLOUR,
                arrowprops={
                    "arrowstyle": "-",
                    "color": "#999999",
                    "lw": 0.5,
                    "shrinkA": 1,
                    "shrinkB": 3,
                    "relpos": (1.0, 0.5) if on_left else (0.0, 0.5),  # lines leave labels where these end
                },
            )


def plot(source: Path, target: Path) -> None:
    """One panel for each kind of data."""
    rows = read_rows(source)
    # Points of "auto" lie on those of the best of the other codebooks, those of rotated models beside.
    lines = [
        line for line in lines_of(rows) if line.format != "OVP auto" and not line.format.endswith("rotated")
    ]
    figure, axes = plt.subplots(2, 2, figsize=(17, 15))
    for axis, (metric, data, title) in zip(axes.flat, PANELS, strict=True):
        draw_panel(axis, lines, metric, data, title)
    marks = {"no data": "o", "importance from data": "D", "GPTQ": "s"}
    handles = [
        Line2D([], [], marker=marker, linestyle="", color="#555555", label=name)
        for name, marker in marks.items()
    ]
    handles += [
        Line2D([], [], marker="o", linestyle="", color=colour, label=name)
        for name, colour in (("outlier-victim pairs", OVP_COLOUR), ("other formats", OTHER_COLOUR))
    ]
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False)
    figure.suptitle("Error against bits per weight: lower and further left is better", fontsize=13)
    figure.tight_layout(rect=(0, 0.025, 1, 0.99))
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=80, metadata={"Software": None})
    plt.close(figure)


def main(
    source: Annotated[Path, typer.Option(help="CSV file.")] = RESULTS / "quality.csv",
    target: Annotated[Path, typer.Option(help="Picture.")] = ROOT / "docs" / "images" / "quality.png",
) -> None:
    """Draw what there is."""
    plot(source, target)


if __name__ == "__main__":
    typer.run(main)
