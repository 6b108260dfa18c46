"""`ovp_linear`, `ovp_linear_quantized` on a GPU: cuBLAS, other 4-bit kernels; weights from memory.

python -m bench.gpu.linear            # about a minute and a half on an H200
python -m bench.gpu.linear --tiny --device cpu
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.gpu.candidates import BASELINE, OURS, PEERS, Candidate, torch_bf16
from bench.gpu.ceilings import copy_bandwidth, product_rate
from bench.gpu.data import Problem
from bench.gpu.measure import measure
from bench.gpu.quantized import QUANTIZED
from bench.gpu.results import Results, output_file

OP = "ovp_linear"
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (28672, 8192), (73728, 12288))  # N, K
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)  # M
MANY_ROWS = 8192
MANY_ROWS_SHAPES = ((14336, 4096), (4096, 14336))
SECONDS = 0.15  # per shape and M, for all candidates


def rows_of(n: int, k: int) -> tuple[int, ...]:
    """M for a shape."""
    return (*ROWS, MANY_ROWS) if (n, k) in MANY_ROWS_SHAPES else ROWS


def build(problem: Problem, results: Results) -> dict[str, Candidate]:
    """Every candidate there is; the others get a row that says why not."""
    candidates = {BASELINE: torch_bf16(problem)}
    shape = {"n": problem.n, "k": problem.k}
    ours = OURS | QUANTIZED
    for key, builder in (ours | PEERS).items():
        try:
            candidates[key] = builder(problem)
        except (ImportError, NotImplementedError) as error:
            results.missing(OP, key, error, **shape)
        except Exception as error:
            (results.fail if key in ours else results.missing)(OP, key, error, **shape)
    return candidates


def main(
    tiny: Annotated[bool, typer.Option(help="One small shape, for a smoke test.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a smoke test.")] = "cuda",
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = None,
) -> None:
    """Measure every shape and M; exit status 1 if a kernel of ours is wrong or fails."""
    place = torch.device(device)
    results = Results(output_file(output, place, tiny), place)
    with torch.inference_mode():
        copy = copy_bandwidth(results, place, tiny)
        product_rate(results, place, tiny)
        for n, k in ((64, 256),) if tiny else SHAPES:
            problem = Problem(n, k, place)
            candidates = build(problem, results)
            for m in (1, 3) if tiny else rows_of(n, k):
                measure(OP, problem, m, candidates, results, copy=copy, seconds=0 if tiny else SECONDS)
    raise typer.Exit(int(results.failed))


if __name__ == "__main__":
    typer.run(main)
