"""`uniform_linear` on 2, 4 and 8-bit weights against torch's linear in bfloat16, with cold weights.

W4A8 is a weight of 4 bits and an input quantized to signed 8; A16 an input that is not quantized. Beside
them: what reading as many bytes as the codes have takes. Each result is checked before it is timed.

    python -m bench.bench_uniform_linear            # all shapes, about 5 minutes on two cores
    python -m bench.bench_uniform_linear --tiny     # a smoke run
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import linear

from bench.bench_ovp_linear import check_error, linear_call, linear_row, memory_call, relative_error
from bench.common import RESULTS, append_csv
from bench.timing import copies_for, take_turns
from olive import ops
from olive.formats.uniform import pack_codes

SHAPES = ((4096, 4096), (4096, 11008), (14336, 4096))  # N, K
ROWS = (1, 16, 256)  # M
# name -> bits of the weight and of the input, None = it is not quantized
KINDS: dict[str, tuple[int, int | None]] = {
    "w4a16": (4, None),
    "w4a8": (4, 8),
    "w4a4": (4, 4),
    "w2a16": (2, None),
    "w2a8": (2, 8),
    "w2a4": (2, 4),
    "w2a2": (2, 2),
    "w8a16": (8, None),
    "w8a8": (8, 8),
}
COLD_BYTES = 600_000_000  # of each candidate's weights
Call = Callable[[int], Tensor]


def uniform_call(
    x: Tensor,
    copies: list[Tensor],
    scale: Tensor,
    bits: int,
    group_size: int,
    input_bits: int | None,
    first: int = 0,
) -> Call:
    """The operator over copies of one weight's codes, from copy number `first` on."""
    step = None if input_bits is None else torch.full((1,), 4 / 2**input_bits)

    def call(turn: int) -> Tensor:
        codes = copies[(first + turn) % len(copies)]
        how = (bits, True, group_size, step, None, input_bits or 8, True)
        out: Tensor = ops.uniform_linear(x, codes, scale, None, *how)
        return out

    return call


def expected(x: Tensor, weight: Tensor, input_bits: int | None) -> Tensor:
    """float64, with the input on its levels."""
    if input_bits is not None:
        x = ops.lsq(x.float(), torch.full((1,), 4 / 2**input_bits), input_bits, True, -1)
    return x.double() @ weight.double().t()


def bench_shape(
    n: int, k: int, rows: list[int], kinds: list[str], group_size: int, cold_bytes: int, seconds: float
) -> list[dict[str, Any]]:
    """Measure one weight shape: one row of the CSV per M and candidate."""
    generator = torch.Generator().manual_seed(n * 31 + k)
    stored: dict[int, tuple[list[Tensor], Tensor, Tensor]] = {}
    for bits in sorted({KINDS[kind][0] for kind in kinds}):
        codes = torch.randint(2**bits, (n, k), dtype=torch.uint8, generator=generator)
        scale = 0.01 + 0.01 * torch.rand(n, 1 if group_size < 0 else -(-k // group_size), generator=generator)
        packed = pack_codes(codes, bits)
        weight = ops.uniform_decode(packed, scale, k, bits, True, group_size, torch.float32)
        count = copies_for(packed.numel(), cold_bytes)
        stored[bits] = ([packed.clone() for _ in range(count)], scale, weight)
    half = torch.randn(n, k, generator=generator).bfloat16()
    halves = [half.clone() for _ in range(copies_for(2 * n * k, cold_bytes))]
    lines: list[dict[str, Any]] = []
    for m in rows:
        x = torch.randn(m, k, generator=generator).bfloat16()
        candidates: dict[str, Call] = {"torch_half": linear_call(x, halves)}
        bytes_read = {"torch_half": 2 * n * k}
        for kind in kinds:
            bits, input_bits = KINDS[kind]
            copies, scale, weight = stored[bits]
            # Kinds share the copies, but in a turn each reads another one, far from the others'.
            first = kinds.index(kind) * len(copies) // len(kinds)
            call = uniform_call(x, copies, scale, bits, group_size, input_bits, first)
            exact = expected(x, weight, input_bits)
            rounding = 2 * relative_error(linear(x, weight.bfloat16()), x.double() @ weight.double().t())
            check_error(kind, relative_error(call(0), exact), rounding + 1e-6)
            candidates[kind], bytes_read[kind] = call, copies[0].numel()
        if m == 1:
            for bits, (copies, _, _) in stored.items():
                name = f"memory_read_w{bits}"
                candidates[name] = memory_call(copies[0].numel(), cold_bytes)
                bytes_read[name] = copies[0].numel()
        timings = take_turns(candidates, seconds)
        for name, timing in timings.items():
            backend = f"{name} {ops.cpu_backend()}" if name in KINDS else name
            how = (m, n, k, torch.bfloat16, group_size, timing, timings["torch_half"], bytes_read[name])
            lines.append(linear_row("uniform_linear", backend, *how))
    return lines


def main(
    tiny: Annotated[bool, typer.Option(help="One small shape, warm, for a smoke test.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    group_size: Annotated[int, typer.Option(help="-1, or columns.")] = -1,
    seconds: Annotated[float, typer.Option(help="Roughly, per shape and M.")] = 8.0,
    rows: Annotated[list[int] | None, typer.Option("--m", help="Activation rows.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="NxK, e.g. 4096x4096.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="E.g. w4a8.")] = None,
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = RESULTS / "uniform_linear.csv",
) -> None:
    """Time every shape and M, print a table, append to the CSV."""
    torch.set_num_threads(threads)
    shapes = [(64, 256)] if tiny else list(SHAPES)
    if shape:
        shapes = [(int(n), int(k)) for n, k in (text.split("x") for text in shape)]
    table = Table("M", "N x K", "backend", "median ms", "q20-q80", "GB/s", "GFLOP/s", "speed-up")
    with torch.inference_mode():
        for n, k in shapes:
            lines = bench_shape(
                n, k, rows or list(ROWS), kind or list(KINDS), group_size, 10**5 if tiny else COLD_BYTES,
                0.05 if tiny else seconds,
            )  # fmt: skip
            for line in lines:
                table.add_row(
                    str(line["m"]), f"{n} x {k}", line["backend"], line["median_ms"],
                    f"{line['q20_ms']}-{line['q80_ms']}", line["weight_gb_s"], line["gflop_s"],
                    line["speedup"],
                )  # fmt: skip
            if output is not None and not tiny:
                append_csv(output, lines)
    Console(width=120).print(table)


if __name__ == "__main__":
    typer.run(main)
