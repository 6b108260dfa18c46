"""`ovp_encode` (scale given) and `ovp_quantize` (scale search) on CPU, weights that come from memory.

The last line extrapolates the default search to 7 B weights, from at least 500 M weights that were really
quantized.

    python -m bench.bench_ovp_encode
    python -m bench.bench_ovp_encode --tiny
"""

from __future__ import annotations

import resource
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from bench.common import RESULTS, append_csv, environment
from bench.timing import Timing, copies_for, take_turns
from olive import QuantConfig, ops
from olive.ops.reference import ovp_encode_reference
from olive.ptq import quantize_weight


def line(op: str, n: int, k: int, config: QuantConfig, dtype: torch.dtype, timing: Timing) -> dict[str, Any]:
    """One line of the CSV; GB/s counts the weight read and the codes written."""
    size = torch.empty(0, dtype=dtype).element_size()
    return {
        "op": op,
        "backend": f"olive {ops.cpu_backend()}",
        "n": n,
        "k": k,
        "dtype": str(dtype).removeprefix("torch."),
        "codebook": config.codebook,
        "group_size": config.group_size,
        "median_ms": f"{timing.median * 1e3:.3f}",
        "q20_ms": f"{timing.low * 1e3:.3f}",
        "q80_ms": f"{timing.high * 1e3:.3f}",
        "runs": timing.runs,
        "gb_s": f"{n * k * (size + 0.5) / timing.median / 1e9:.3f}",
        "mweights_s": f"{n * k / timing.median / 1e6:.2f}",
        **environment(),
    }


def bench_encode(
    n: int, k: int, config: QuantConfig, seconds: float, cold_bytes: int
) -> list[dict[str, Any]]:
    """Encode with scales given: checked against the reference on a slice, then timed."""
    dtype = torch.bfloat16
    weight = (torch.randn(n, k) * 0.02).to(dtype)
    codes, scale, book = quantize_weight(weight, config)
    expected = ovp_encode_reference(weight[:16], scale[:16], book, config.group_size, "optimal")
    if not torch.equal(codes[:16], expected):
        raise RuntimeError("ovp_encode: expected the reference's codes, got others")
    copies = [weight.clone() for _ in range(copies_for(2 * n * k, cold_bytes))]
    timings = take_turns(
        {
            "ovp_encode": lambda turn: ops.ovp_encode(
                copies[turn % len(copies)], scale, book, config.group_size, "optimal"
            )
        },
        seconds,
    )
    return [line("ovp_encode", n, k, config, dtype, timings["ovp_encode"])]


def bench_search(n: int, k: int, config: QuantConfig, weights: int) -> list[dict[str, Any]]:
    """Quantize fresh random tensors until `weights` weights are done; only the quantizing is timed."""
    dtype = torch.bfloat16
    times = []
    done = 0
    while done < weights:
        weight = (torch.randn(n, k) * 0.02).to(dtype)
        start = time.perf_counter()
        quantize_weight(weight, config)
        times.append(time.perf_counter() - start)
        done += n * k
    ordered = sorted(times)
    mean = sum(times) / len(times)
    timing = Timing(mean, ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5], len(times))
    return [line("ovp_quantize", n, k, config, dtype, timing)]


def main(
    tiny: Annotated[bool, typer.Option(help="A smoke run.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    weights: Annotated[int, typer.Option(help="Weights to quantize with the default search.")] = 520_000_000,
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = RESULTS / "ovp_encode.csv",
) -> None:
    """Time both operators, print a table, append to the CSV."""
    torch.set_num_threads(threads)
    n, k = (64, 256) if tiny else (4096, 4096)
    lines = []
    for codebook in ("adaptive", "int4"):
        config = QuantConfig(codebook=codebook)
        lines += bench_encode(n, k, config, 0.05 if tiny else 5.0, 10**6 if tiny else 1_500_000_000)
    for config, share in (
        (QuantConfig(), 1.0),
        (QuantConfig(group_size=32), 0.1),
        (QuantConfig(codebook="int4"), 0.1),
    ):
        lines += bench_search(n, k, config, int((64 * 256 if tiny else weights) * share))
    table = Table("op", "codebook", "group", "median or mean ms", "GB/s", "M weights/s")
    for entry in lines:
        table.add_row(
            *(str(entry[key]) for key in ("op", "codebook", "group_size", "median_ms", "gb_s", "mweights_s"))
        )
    console = Console(width=110)
    console.print(table)
    rate = next(float(entry["mweights_s"]) for entry in lines if entry["op"] == "ovp_quantize") * 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.print(
        f"7 B weights, adaptive, groups of 128: {7e9 / rate:.0f} s; peak memory of this run {peak:.1f} GiB"
    )
    if output is not None and not tiny:
        append_csv(output, lines)


if __name__ == "__main__":
    typer.run(main)
