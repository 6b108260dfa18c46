"""How long pair-aware GPTQ takes: weights per second of one layer, and rows per second of its second moments.

    python -m bench.bench_gptq            # about 2 minutes on two cores
    python -m bench.bench_gptq --quick    # a tiny shape: only shows that it runs

Random weights with heavy tails and correlated inputs, `adaptive` codes in groups of 128. `compensate` is the
whole of a layer: factor, scales and codes. Rows are appended to `bench/results/gptq.csv`; on a GPU
`bench.gpu.gptq` measures the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.common import RESULTS, append_csv, environment
from bench.gpu.device import synchronize
from olive.formats import get_codebook
from olive.ptq.gptq import compensate
from olive.ptq.moments import SecondMoment

SHAPES = ((4096, 4096), (4096, 14336))  # N, K
ROWS = 2048  # tokens of one batch


def measure(rows: int, columns: int, device: torch.device) -> dict[str, float]:
    """Seconds of each step."""
    options: dict[str, Any] = {"generator": torch.Generator(device).manual_seed(0), "device": device}
    x = torch.randn(ROWS, columns, **options)
    x = x + x @ torch.randn(columns, columns, **options) / columns**0.5
    normal = torch.randn(rows, columns, **options)
    weight = normal / torch.rand(rows, columns, **options).clamp(min=0.05).sqrt()
    moment = SecondMoment().updated(x)  # warms up

    def seconds(work: Callable[[], object]) -> float:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - start

    gathered = seconds(lambda: moment.updated(x))
    total = moment.total
    assert total is not None
    book = get_codebook("adaptive")
    natural = seconds(lambda: compensate(weight, total, book, 128))
    ordered = seconds(lambda: compensate(weight, total, book, 128, activation_order=True))
    return {"moments": gathered, "compensate": natural, "compensate, activation order": ordered}


def main(
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = RESULTS / "gptq.csv",
    quick: Annotated[bool, typer.Option(help="A tiny shape.")] = False,
) -> None:
    """Time both shapes, print a table, append to the CSV."""
    table = Table("N x K", "step", "seconds", "per second")
    lines = []
    for rows, columns in ((32, 128),) if quick else SHAPES:
        for step, took in measure(rows, columns, torch.device("cpu")).items():
            values, unit = (ROWS, "rows") if step == "moments" else (rows * columns, "weights")
            lines.append(
                {
                    "step": step,
                    "n": rows,
                    "k": columns,
                    "device": "cpu",
                    "seconds": f"{took:.4g}",
                    "per_second": f"{values / took:.4g}",
                    "unit": unit,
                }
            )
            table.add_row(f"{rows} x {columns}", step, f"{took:.3f}", f"{values / took:.3g} {unit}")
    Console().print(table)
    if output is not None and not quick:
        where = environment()
        append_csv(output, [{**line, **where} for line in lines])


if __name__ == "__main__":
    typer.run(main)
