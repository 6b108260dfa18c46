"""Writes the tables of docs/quality.md from `bench/results/quality.csv`: no figure is typed in by hand.

python -m bench.quality_page            # write
python -m bench.quality_page --check    # exit status 1 if the page is not what the CSV file says
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.common import RESULTS, ROOT
from bench.quality_table import (
    FLOAT,
    OUTPUT_COLUMNS,
    WEIGHT_COLUMNS,
    calibrated,
    data_free_table,
    losses_table,
    method_table,
)
from bench.readme import fill, measured, write_page
from bench.tables import Row, markdown, read_rows


def float_table(rows: list[Row]) -> str:
    """Perplexity of the float32 models, by name."""
    found = {row["data"]: float(row["value"]) for row in calibrated(rows) if row["format"] == FLOAT}
    return markdown(["model", "perplexity"], [[name, f"{value:.3f}"] for name, value in found.items()])


def render(text: str, rows: list[Row]) -> str:
    """The page with its tables."""
    output, used = method_table(rows, OUTPUT_COLUMNS)
    weights, _ = method_table(rows, WEIGHT_COLUMNS)
    data_free, old = data_free_table(rows)
    sections = {
        "quality_float": float_table(rows),
        "quality_output": f"{output}\n\n{measured(used, 'make quality')}",
        "quality_losses": losses_table(rows),
        "quality_weights": weights,
        "quality_data_free": f"{data_free}\n\n{measured(old, 'python -m bench.bench_quality')}",
    }
    for name, content in sections.items():
        text = fill(text, name, content)
    return text


def main(
    check: Annotated[bool, typer.Option(help="Write nothing; exit status 1 if it is outdated.")] = False,
    page: Annotated[Path, typer.Option(help="File to fill.")] = ROOT / "docs" / "quality.md",
    results: Annotated[Path, typer.Option(help="CSV file.")] = RESULTS / "quality.csv",
) -> None:
    """Fill the tables of the page."""
    after = render(page.read_text(encoding="utf-8"), read_rows(results))
    write_page(page, after, results, "python -m bench.quality_page", check=check)


if __name__ == "__main__":
    typer.run(main)
