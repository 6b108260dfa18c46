"""`ovp_decode` on CPU: codes that come from memory to float32, bfloat16 and float16.

python -m bench.bench_ovp_decode
python -m bench.bench_ovp_decode --tiny
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.common import RESULTS, append_csv, environment
from bench.timing import copies_for, take_turns
from olive import QuantConfig, ops
from olive.ops.reference import ovp_decode_reference
from olive.ptq import quantize_weight

GROUP = 128


def main(
    tiny: Annotated[bool, typer.Option(help="A smoke run.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = RESULTS / "ovp_decode.csv",
) -> None:
    """Check against the reference, time, print a table, append to the CSV. Baseline: a copy of the output."""
    torch.set_num_threads(threads)
    n, k = (64, 256) if tiny else (4096, 4096)
    codes, scale, book = quantize_weight(torch.randn(n, k) * 0.02, QuantConfig(group_size=GROUP))
    copies = [codes.clone() for _ in range(copies_for(codes.numel(), 10**6 if tiny else 1_500_000_000))]
    table = Table("dtype", "median ms", "q20-q80", "GB/s read and written", "time over that of a copy")
    lines: list[dict[str, Any]] = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        decoded = ops.ovp_decode(codes, scale, book, k, GROUP, dtype)
        if not torch.equal(decoded, ovp_decode_reference(codes, scale, book, k, GROUP, dtype)):
            raise RuntimeError(f"ovp_decode: expected the reference's values in {dtype}, got others")

        def copy(_: int, source: Tensor) -> Tensor:
            return source.clone()

        def decode(turn: int, dtype: torch.dtype) -> Tensor:
            out: Tensor = ops.ovp_decode(copies[turn % len(copies)], scale, book, k, GROUP, dtype)
            return out

        timings = take_turns(
            {"olive": partial(decode, dtype=dtype), "copy": partial(copy, source=decoded)},
            0.05 if tiny else 4.0,
        )
        timing = timings["olive"]
        moved = n * k * (0.5 + decoded.element_size())
        lines.append(
            {
                "op": "ovp_decode",
                "backend": f"olive {ops.cpu_backend()}",
                "n": n,
                "k": k,
                "dtype": str(dtype).removeprefix("torch."),
                "group_size": GROUP,
                "median_ms": f"{timing.median * 1e3:.3f}",
                "q20_ms": f"{timing.low * 1e3:.3f}",
                "q80_ms": f"{timing.high * 1e3:.3f}",
                "runs": timing.runs,
                "gb_s": f"{moved / timing.median / 1e9:.2f}",
                "over_copy": f"{timing.median / timings['copy'].median:.2f}",
                **environment(),
            }
        )
        entry = lines[-1]
        table.add_row(
            entry["dtype"], entry["median_ms"], f"{entry['q20_ms']}-{entry['q80_ms']}", entry["gb_s"],
            entry["over_copy"],
        )  # fmt: skip
    Console(width=110).print(table)
    if output is not None and not tiny:
        append_csv(output, lines)


if __name__ == "__main__":
    typer.run(main)
