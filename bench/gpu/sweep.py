"""Every plan of the CUDA kernels at several M: what the thresholds of `olive.ops.gpu_dispatch` are set by.

python -m bench.gpu.sweep             # about two minutes on an H200
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from bench.gpu.candidates import BASELINE, olive_plans, torch_bf16
from bench.gpu.ceilings import copy_bandwidth
from bench.gpu.data import Problem
from bench.gpu.measure import measure
from bench.gpu.quantized import KINDS, Kind, quantized_plans
from bench.gpu.results import Results, output_file
from olive.ops import cuda, gpu_dispatch
from olive.ops.gpu_dispatch import HOPPER, Gpu, Plan

OP = "ovp_linear_plan"
QUANTIZED_OP = "ovp_linear_quantized_plan"
SHAPES = ((4096, 4096), (14336, 4096), (28672, 8192))  # N, K
ROWS = (1, 8, 16, 32, 64, 96, 128, 256, 1024, 4096)  # M
QUANTIZED_KINDS = ("olive_w4a8", "olive_w4a8_g128", "olive_w4a8_row")
SECONDS = 0.15  # per shape and M, for all plans
_MOST_REREADS = 16  # blocks of activation rows, each of which decodes the weight again


def plans(m: int, gpu: Gpu) -> list[Plan]:
    """The plans worth timing at M rows: none whose tile is much too wide or much too narrow."""
    fitting = [tile for tile in gpu_dispatch.MMA_TILES if tile.shared <= gpu.shared_per_block]
    tiles = [
        tile.tokens
        for tile in fitting
        if tile.tokens < 4 * max(m, 4) and (m <= _MOST_REREADS * tile.tokens or tile is fitting[-1])
    ]
    found = [Plan("mma", tokens=tokens, split=split) for tokens in tiles for split in gpu_dispatch.SPLITS]
    if gpu.capability == HOPPER:
        found += [
            Plan("wgmma", tokens=tile.tokens, rows=tile.rows)
            for tile in gpu_dispatch.WGMMA_TILES
            if tile.tokens < 4 * m
        ]
    return [*found, Plan("decode")]


def quantized_plans_of(m: int, gpu: Gpu, kind: Kind) -> list[Plan]:
    """The same for quantized activations: the tiles of the integer kernels, and nothing to decode to."""
    wide = {plan.tokens for plan in plans(m, gpu) if plan.kernel == "wgmma"}
    tiles = gpu_dispatch.quantized_wgmma_tiles(kind.group_size, kind.activations.group_size)
    return [
        *(plan for plan in plans(m, gpu) if plan.kernel == "mma"),
        *(Plan("wgmma", tokens=tile.tokens, rows=tile.rows) for tile in tiles if tile.tokens in wide),
    ]


def main(output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = None) -> None:
    """Measure every plan; exit status 1 if one is wrong or fails."""
    device = torch.device("cuda")
    if reason := cuda.missing(device):
        raise RuntimeError(f"olive._cuda: expected kernels for this GPU, got none: {reason}; run `make gpu`")
    results = Results(output_file(output, device, tiny=False), device)
    gpu = cuda.gpu_of(device)
    with torch.inference_mode():
        copy = copy_bandwidth(results, device, tiny=False)
        for n, k in SHAPES:
            problem = Problem(n, k, device)
            every = list(dict.fromkeys(plan for m in ROWS for plan in plans(m, gpu)))
            built = dict(zip(every, olive_plans(problem, every), strict=True))
            baseline = torch_bf16(problem)
            for m in ROWS:
                candidates = {BASELINE: baseline} | {str(plan): built[plan] for plan in plans(m, gpu)}
                measure(
                    OP, problem, m, candidates, results, copy=copy, seconds=SECONDS,
                    name=lambda key: key if key == BASELINE else "olive",
                )  # fmt: skip
            del built
            for kind in QUANTIZED_KINDS:
                wanted = {m: quantized_plans_of(m, gpu, KINDS[kind]) for m in ROWS}
                every = list(dict.fromkeys(plan for found in wanted.values() for plan in found))
                built = dict(zip(every, quantized_plans(kind, problem, every), strict=True))
                for m in ROWS:
                    candidates = {BASELINE: baseline} | {str(plan): built[plan] for plan in wanted[m]}
                    measure(
                        QUANTIZED_OP, problem, m, candidates, results, copy=copy, seconds=SECONDS,
                        name=lambda key, kind=kind: key if key == BASELINE else kind,  # type: ignore[misc]
                    )  # fmt: skip
                del built
    raise typer.Exit(int(results.failed))


if __name__ == "__main__":
    typer.run(main)
