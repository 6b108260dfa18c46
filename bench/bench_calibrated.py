"""How good the formats are with and without calibration data, each at its true bits per weight.

    python -m bench.bench_calibrated            # about half an hour on two cores
    python -m bench.bench_calibrated --quick    # tiny sizes: only shows that everything runs

The bundled language model: perplexity and divergence from the float32 model on its held-out text, whose first
64 windows calibrate and the others are measured; the same with `olive.eval.inject_outliers`. MiniLM: distance
of sentence embeddings; half of the sentences calibrates, the other half is measured. Drawn layers: error of
the output, with the second moments of inputs of the bundled model. Everything in float32, all groups of 128
columns unless a format has its own.

Rows are appended to `bench/results/quality.csv` as they are measured. Where bitsandbytes, hqq or gptqmodel is
installed, it measures NF4, HQQ and GPTQ with that; elsewhere with definitions of our own.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.bench_quality import FULL_PRECISION, PERPLEXITY, TINY_LLAMA, WINDOW, load_causal
from bench.common import RESULTS, append_csv, environment
from bench.quality_methods import NO_DATA, OWN, Method, methods, quick_methods
from bench.quality_subjects import CALIBRATION_WINDOWS, Causal, DrawnLayers, Subject, inputs_of, minilm

PARTS = ("causal", "minilm", "outliers", "layers")
DISTRIBUTIONS = ("Student-t(6)", "Student-t(4)")
Row = dict[str, Any]


def row(
    format: str, bits: float, group_size: int, metric: str, data: str, value: float, calibration: str, by: str
) -> Row:
    """One figure, without its origin."""
    return {
        "format": format,
        "bits_per_weight": f"{bits:.4f}",
        "group_size": group_size,
        "metric": metric,
        "data": data,
        "value": f"{value:.6g}",
        "calibration": calibration,
        "implementation": by,
    }


def rows_of(method: Method, subject: Subject) -> list[Row]:
    """Measure one method on one subject."""
    bits, figures = subject.measure(method)
    return [
        row(
            method.format,
            bits,
            method.group_size,
            metric,
            subject.data,
            value,
            method.calibration,
            method.implementation,
        )
        for metric, value in figures.items()
    ]


def subjects(
    model: str, text: Path, window: int, calibration_windows: int, parts: list[str], quick: bool
) -> Iterator[Subject]:
    """Those asked for, one after the other: none is needed after the next one has come."""
    plain: Any = None
    if set(parts) - {"minilm"}:
        loaded, tokens = load_causal(model, text)
        skip = ["lm_head"]
        if quick:
            calibration_windows = 2
            tokens = tokens[: 4 * window]
            blocks = [name for name, _ in loaded.named_modules() if name.rpartition(".")[2].isdigit()]
            skip += blocks[1:]
        plain = Causal(Path(model).name, loaded, tokens, window, calibration_windows, tuple(skip))
    if "causal" in parts:
        yield plain
    if "minilm" in parts:
        yield minilm(quick)
    if "outliers" in parts:
        yield plain.with_outliers()
    if "layers" in parts:
        inputs = inputs_of(plain)
        yield from (DrawnLayers(distribution, inputs) for distribution in DISTRIBUTIONS)


def table(rows: list[Row], data: str) -> Table:
    """What was measured on one subject, one line per method."""
    own = [one for one in rows if one["data"] == data]
    metrics = list(dict.fromkeys(one["metric"] for one in own))
    found = Table(title=f"{data}, lower is better")
    for title in ("format", "data used", "group", "implementation"):
        found.add_column(title)
    for title in ("bits", *metrics):
        found.add_column(title, justify="right")
    lines: dict[tuple[str, ...], dict[str, Row]] = {}
    for one in own:
        key = (one["format"], one["calibration"], str(one["group_size"]), one["implementation"])
        lines.setdefault(key, {})[one["metric"]] = one
    for titles, cells in lines.items():
        bits = next(iter(cells.values()))["bits_per_weight"]
        values = [f"{float(cells[metric]['value']):.5f}" if metric in cells else "" for metric in metrics]
        found.add_row(*titles, bits, *values)
    return found


def main(
    model: Annotated[str, typer.Option(help="Causal language model: path or hub id.")] = str(TINY_LLAMA),
    text: Annotated[Path, typer.Option(help="Text for its perplexity.")] = TINY_LLAMA / "heldout.txt",
    window: Annotated[int, typer.Option(help="Tokens per window of that text.")] = WINDOW,
    calibration_windows: Annotated[int, typer.Option(help="How many of them calibrate.")] = (
        CALIBRATION_WINDOWS
    ),
    parts: Annotated[str, typer.Option(help="Any of causal, minilm, outliers, layers; comma-separated.")] = (
        ",".join(PARTS)
    ),
    only: Annotated[str, typer.Option(help="Methods whose title holds this text.")] = "",
    output: Annotated[
        Path | None,
        typer.Option(help="CSV to append to; default bench/results/quality.csv, none with --quick."),
    ] = None,
    threads: Annotated[int, typer.Option(help="Torch threads; 0 keeps its own number.")] = 0,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: only shows that everything runs.")] = False,
) -> None:
    """Compare the methods and append the figures to a CSV."""
    chosen = parts.split(",")
    for part in chosen:
        if part not in PARTS:
            raise typer.BadParameter(f"parts: expected any of {', '.join(PARTS)}, got {part!r}")
    if threads:
        torch.set_num_threads(threads)
    if output is None and not quick:
        output = RESULTS / "quality.csv"
    console = Console(width=None if Console().is_terminal else 160)
    log = Console(stderr=True)
    where = environment()
    compared = [one for one in (quick_methods() if quick else methods()) if only in one.title]
    for subject in subjects(model, text, window, calibration_windows, chosen, quick):
        rows: list[Row] = []

        def keep(new: list[Row], rows: list[Row] = rows) -> None:
            rows += new
            if output is not None:
                append_csv(output, [{**one, **where} for one in new])

        if isinstance(subject, Causal):
            plain = subject.reference_perplexity()
            keep([row(FULL_PRECISION, 32.0, 0, PERPLEXITY, subject.data, plain, NO_DATA, OWN)])
        for method in compared:
            if method.rotates and not isinstance(subject, Causal):
                continue
            if method.calibrates_itself and isinstance(subject, DrawnLayers):
                continue
            start = time.perf_counter()
            keep(rows_of(method, subject))
            log.print(f"{subject.data}: {method.title}, {time.perf_counter() - start:.0f} s", highlight=False)
        console.print(table(rows, subject.data))


if __name__ == "__main__":
    typer.run(main)
