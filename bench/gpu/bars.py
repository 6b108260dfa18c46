"""What the GPU kernels are to reach, beside what was measured: one short table.

python -m bench.gpu.bars bench/results/nvidia_h200.csv
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from bench.tables import Row, read_rows

BAR_ROWS = (1, 16, 64, 256, 4096)  # M
SPEEDUPS: dict[tuple[int, int], tuple[float, ...]] = {  # N, K: times cuBLAS bfloat16, at BAR_ROWS
    (4096, 4096): (2.2, 2.0, 1.5, 1.0, 1.0),
    (14336, 4096): (3.0, 2.8, 1.8, 1.0, 1.0),
    (4096, 14336): (3.0, 2.8, 1.8, 1.0, 1.0),
    (28672, 8192): (3.5, 3.2, 2.0, 1.0, 1.0),
    (73728, 12288): (3.5, 3.2, 2.0, 1.0, 1.0),
}
QUANTIZED_ROWS = (1, 16, 64, 1024, 4096)  # M
QUANTIZED_KINDS = {"olive_w4a8": "W4A8", "olive_w4a8_row": "W4A8, a scale per row"}
# Few rows: no slower than with 16-bit activations. Many: 1.4 times cuBLAS, of the 2 that int8 would give.
QUANTIZED_SPEEDUPS = {shape: (*bars[:3], 1.4, 1.4) for shape, bars in SPEEDUPS.items()}
_WEIGHTS_7B = 7e3  # millions


@dataclass(frozen=True)
class Bar:
    """A figure to reach.

    Args:
        title: what it is about.
        op, column: where it is in the CSV.
        bar: to reach, in the unit of the title.
        at_least: whether more is better.
        match: columns that the row must have.
        factor: from the column to the title's unit; with `inverse`, factor / column.
        inverse: see factor.
        backend: whose row counts.
    """

    title: str
    op: str
    column: str
    bar: float
    at_least: bool = True
    match: dict[str, int] = field(default_factory=dict)
    factor: float = 1.0
    inverse: bool = False
    backend: str = "olive"

    def measured(self, rows: Iterable[Row]) -> float | None:
        """The last figure among the rows; None if there is none."""
        values = [
            float(row[self.column])
            for row in rows
            if row["op"] == self.op and row["backend"] == self.backend and row[self.column]
            if all(row[name] == str(value) for name, value in self.match.items())
        ]
        if not values:
            return None
        return self.factor / values[-1] if self.inverse else self.factor * values[-1]

    def met(self, figure: float) -> bool:
        """Whether a figure reaches the bar."""
        return figure >= self.bar if self.at_least else figure <= self.bar

    def text(self, rows: Iterable[Row]) -> str:
        """Measured against the bar, and the verdict."""
        figure = self.measured(rows)
        if figure is None:
            return f"- / {self.bar:g}"
        return f"{figure:.2f} / {self.bar:g} {'met' if self.met(figure) else 'missed'}"


def speedup_bar(n: int, k: int, m: int, bar: float, backend: str = "olive") -> Bar:
    """Times cuBLAS at one shape and M."""
    match = {"m": m, "n": n, "k": k}
    return Bar(f"{n} x {k}, M {m}", "ovp_linear", "speedup", bar, match=match, backend=backend)


def bandwidth_bar(n: int, k: int) -> Bar:
    """Weight bytes per second at one row, in percent of a copy's bandwidth."""
    title, match = f"{n} x {k}, M 1: % of copy bandwidth", {"m": 1, "n": n, "k": k}
    return Bar(title, "ovp_linear", "of_copy", 80, match=match, factor=100)


OTHERS = (
    bandwidth_bar(28672, 8192),
    bandwidth_bar(73728, 12288),
    Bar("generation, batch 1: times bfloat16", "generate", "speedup", 2.5, match={"m": 1}),
    Bar("prompt of 4096 tokens, W4A8: times bfloat16", "prefill", "speedup", 1.3, backend="olive_w4a8"),
    Bar("ovp_encode: % of copy bandwidth", "ovp_encode", "of_copy", 60, factor=100),
    Bar(
        "default search, 7 B weights: seconds", "ovp_quantize", "mweights_s", 30, at_least=False,
        factor=_WEIGHTS_7B, inverse=True,
    ),
    Bar("GPTQ of an 8 B model: minutes", "gptq_model", "seconds", 15, at_least=False, factor=1 / 60),
)  # fmt: skip


def tables(rows: Sequence[Row]) -> tuple[Table, Table, Table]:
    """Shape by M, the same for quantized activations, and the others: measured / bar, met or missed."""
    linear = Table("N x K", *(f"M {m}" for m in BAR_ROWS), title="ovp_linear: times cuBLAS bfloat16 / bar")
    for (n, k), bars in SPEEDUPS.items():
        pairs = zip(BAR_ROWS, bars, strict=True)
        linear.add_row(f"{n} x {k}", *(speedup_bar(n, k, m, bar).text(rows) for m, bar in pairs))
    quantized = Table(
        "N x K",
        *(f"M {m}" for m in QUANTIZED_ROWS),
        title="ovp_linear_quantized: times cuBLAS bfloat16 / bar",
    )
    for backend, title in QUANTIZED_KINDS.items():
        for (n, k), bars in QUANTIZED_SPEEDUPS.items():
            pairs = zip(QUANTIZED_ROWS, bars, strict=True)
            cells = (speedup_bar(n, k, m, bar, backend).text(rows) for m, bar in pairs)
            quantized.add_row(f"{title}: {n} x {k}", *cells)
    others = Table("figure", "measured / bar")
    for other in OTHERS:
        others.add_row(other.title, other.text(rows))
    return linear, quantized, others


def show(rows: Sequence[Row]) -> None:
    """Print what was measured beside the bars, and what failed."""
    console = Console(width=110)
    for table in tables(rows):
        console.print(table)
    for row in rows:
        if row["note"].startswith("failed"):
            console.print(
                f"{row['op']} {row['backend']} {row['plan']} M {row['m']}: {row['note']}", markup=False
            )


def main(path: Annotated[Path, typer.Argument(help="CSV of a GPU.", exists=True)]) -> None:
    """Print the tables of a CSV; where a figure was measured more than once, the last one counts."""
    show(read_rows(path))


if __name__ == "__main__":
    typer.run(main)
