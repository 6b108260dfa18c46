"""Tables of quantization-aware training, and of the layers it ends in, for the README."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from bench.tables import Row, markdown

FULL_PRECISION = "full precision"


def _mean_and_spread(values: Sequence[float], scale: float, digits: int) -> str:
    mean = scale * statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:.{digits}f}"
    return f"{mean:.{digits}f} ± {scale * statistics.stdev(values):.{digits}f}"


def digits_table(rows: Sequence[Row]) -> str:
    """Accuracy and oscillating weights by method and bits: mean and standard deviation over seeds."""
    widths = sorted({row["bits"] for row in rows if row["method"] != FULL_PRECISION}, key=int)
    columns = [column for bits in widths for column in (f"W{bits}A{bits} accuracy, %", "oscillating, %")]
    header = ["method", *columns, "step over full precision"]
    base = {row["seed"]: float(row["ms_per_step"]) for row in rows if row["method"] == FULL_PRECISION}
    lines = []
    for method in dict.fromkeys(row["method"] for row in rows):
        cells, ratios = [method], []
        own = [row for row in rows if row["method"] == method]
        for bits in widths:
            found = own if method == FULL_PRECISION else [row for row in own if row["bits"] == bits]
            for key, digits in (("accuracy", 1), ("oscillating", 2)):
                values = [float(row[key]) for row in found if row[key]]
                cells.append(_mean_and_spread(values, 100, digits) if values else "")
        ratios = [float(row["ms_per_step"]) / base[row["seed"]] for row in own if row["seed"] in base]
        lines.append([*cells, f"{statistics.median(ratios):.2f}" if ratios else ""])
    return markdown(header, lines)


def language_table(rows: Sequence[Row]) -> str:
    """Perplexity before and after training, and of the converted model."""
    header = ["weights", "rounded, not trained", "trained", "integers", "oscillating, %", "steps"]
    lines = [
        [
            row["run"],
            row["untrained"],
            row["trained"],
            row["converted"] if row["trained"] else "",
            f"{100 * float(row['oscillating']):.2f}" if row["oscillating"] else "",
            row["steps"] if row["trained"] else "",
        ]
        for row in rows
    ]
    return markdown(header, lines)


def step_table(rows: Sequence[Row]) -> str:
    """Training steps against full precision; of several runs the last."""
    last = {(row["machine"], row["variant"]): row for row in rows}
    header = ["training step", "machine", "median, ms", "over full precision"]
    lines = [
        [row["variant"], row["machine"], row["median_ms"], row["over_full_precision"]]
        for row in last.values()
    ]
    return markdown(header, lines)


KINDS = ("w2a16", "w2a8", "w2a2", "w4a16", "w4a8", "w4a4", "w8a8")


def uniform_table(rows: Sequence[Row]) -> str:
    """Speed-up over torch's bfloat16 linear by shape and rows; of several runs the last."""
    found = {(row["m"], row["n"], row["k"], row["backend"].split()[0]): row["speedup"] for row in rows}
    places = dict.fromkeys((m, n, k) for m, n, k, _ in found)
    header = ["M, N x K", *(kind.upper() for kind in KINDS)]
    lines = [
        [
            f"{m}, {n} x {k}",
            *(f"{float(found[m, n, k, kind]):.2f}" if (m, n, k, kind) in found else "" for kind in KINDS),
        ]
        for m, n, k in places
    ]
    return markdown(header, lines)
