"""`ovp_linear` (W4A16) and `ovp_linear_quantized` (W4A8, W4A4) against other linears, with cold weights.

Peers: `torch.nn.functional.linear` in bfloat16 and float32, torch's int4 CPU operator
`aten::_weight_int4pack_mm_for_cpu`, torchao's W4A8 operator where a torchao with its CPU kernel is installed,
ggml's Q4_0 and Q4_K where `OLIVE_GGML` names its library (`bench.ggml_peer`; both are W4A8: ggml quantizes
activations to 8 bits); and what reading as many bytes from memory takes.
Each result is checked against the decoded weight before it is timed.

    python -m bench.bench_ovp_linear            # all shapes, about 15 minutes on two cores
    python -m bench.bench_ovp_linear --tiny     # a smoke run
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

from bench import ggml_peer
from bench.common import RESULTS, append_csv, environment
from bench.quantized_linears import ACTIVATIONS, da8w4_call, quantized_call, quantized_input
from bench.timing import Timing, copies_for, host_seconds, take_turns
from olive import QuantConfig, ops
from olive.ptq import quantize_weight

SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008), (14336, 4096))  # N, K
ROWS = (1, 16, 256, 1024)  # M
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
GGML_BLOCK = 256  # columns that Q4_K packs together
Call = Callable[[int], Tensor]


def relative_error(got: Tensor, expected: Tensor) -> float:
    """|got - expected| / |expected| in float64; NaN if anything is NaN."""
    return float((got.double() - expected.double()).norm() / expected.double().norm())


def ovp_call(x: Tensor, packed: list[tuple[Tensor, Tensor]], book: Tensor, n: int, group_size: int) -> Call:
    """Our operator over copies of one packed weight."""

    def call(turn: int) -> Tensor:
        codes, scale = packed[turn % len(packed)]
        out: Tensor = ops.ovp_linear(x, codes, scale, book, None, n, group_size)
        return out

    return call


def linear_call(x: Tensor, weights: list[Tensor]) -> Call:
    """torch's linear over copies of one weight."""
    return lambda turn: linear(x, weights[turn % len(weights)])


def int4_call(x: Tensor, n: int, k: int, group_size: int, cold_bytes: int) -> tuple[Call, float]:
    """torch's int4 operator on random codes, and its error against its own decoded weight."""
    codes = torch.randint(0, 16, (n, k), dtype=torch.int32)
    scale = torch.rand(n, k // group_size) * 0.01 + 0.001
    zero = torch.randn(n, k // group_size) * 0.01
    scales_and_zeros = torch.stack((scale, zero), dim=-1).transpose(0, 1).contiguous().to(x.dtype)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    stored = scales_and_zeros.float().transpose(0, 1).repeat_interleave(group_size, dim=1)
    decoded = (codes - 8) * stored[..., 0] + stored[..., 1]
    run = torch.ops.aten._weight_int4pack_mm_for_cpu
    error = relative_error(run(x, packed, group_size, scales_and_zeros), x.float() @ decoded.T)
    copies = [packed.clone() for _ in range(copies_for(packed.numel(), cold_bytes))]
    return lambda turn: run(x, copies[turn % len(copies)], group_size, scales_and_zeros), error


def memory_call(bytes_each: int, cold_bytes: int) -> Call:
    """Reads as many bytes as a weight's codes have, and adds them up: what memory gives."""
    copies = [torch.ones(bytes_each // 4) for _ in range(copies_for(bytes_each, cold_bytes))]
    return lambda turn: copies[turn % len(copies)].sum()


def check_error(name: str, error: float, limit: float) -> None:
    """Refuse to time a wrong result.

    Raises:
        RuntimeError: the error is above the limit, or NaN.
    """
    if not error <= limit:
        raise RuntimeError(f"{name}: expected an error of at most {limit:.2g}, got {error:.2g}")


def bench_shape(
    n: int, k: int, rows: list[int], dtype: torch.dtype, group_size: int, cold_bytes: int, seconds: float
) -> list[dict[str, Any]]:
    """Measure one weight shape: one row of the CSV per M and candidate."""
    generator = torch.Generator().manual_seed(n * 31 + k)
    weight = torch.randn(n, k, generator=generator) * 0.02
    quantized = quantize_weight(weight, QuantConfig(group_size=group_size))
    ovp_bytes = quantized.codes.numel() + 2 * quantized.scale.numel()
    # Packed one by one, as a model's weights are: packing asks for huge pages, cloning would not.
    ovp_copies = [
        ops.ovp_pack(quantized.codes, quantized.scale, k, group_size)
        for _ in range(copies_for(ovp_bytes, cold_bytes))
    ]
    decoded = ops.ovp_decode(
        quantized.codes, quantized.scale, quantized.codebook, k, group_size, torch.float32
    )
    ggml: dict[str, ggml_peer.GgmlWeight] = {}
    if ggml_peer.ggml_version() and k % GGML_BLOCK == 0:
        copies = copies_for(n * k // 2, cold_bytes)
        ggml = {f"ggml_{kind}": ggml_peer.GgmlWeight(weight, kind, copies) for kind in ggml_peer.KINDS}
    halves = [weight.to(dtype) for _ in range(copies_for(2 * n * k, cold_bytes))]
    singles = [weight.clone() for _ in range(copies_for(4 * n * k, cold_bytes))]
    lines: list[dict[str, Any]] = []
    for m in rows:
        x = torch.randn(m, k, generator=generator).to(dtype)
        call = ovp_call(x, ovp_copies, quantized.codebook, n, group_size)
        exact = x.double() @ decoded.double().T
        rounding = 2 * relative_error(linear(x, decoded.to(dtype)), exact) + 1e-6
        check_error("ovp_linear", relative_error(call(0), exact), rounding)
        candidates: dict[str, Call] = {"olive": call, "torch_half": linear_call(x, halves)}
        for name, how in ACTIVATIONS.items():
            call = quantized_call(x, ovp_copies, quantized.codebook, n, group_size, how)
            exact = quantized_input(x, how).double() @ decoded.double().T
            check_error(name, relative_error(call(0), exact), rounding)
            candidates[name] = call
        candidates["torch_float32"] = linear_call(x.float(), singles)
        candidates["memory_read"] = memory_call(ovp_bytes, cold_bytes)
        if group_size > 0 and k % group_size == 0 and n % 16 == 0:
            candidates["torch_int4"], error = int4_call(x, n, k, group_size, cold_bytes)
            check_error("torch_int4", error, 0.02)
            torchao_call = da8w4_call(x, n, k, group_size, cold_bytes)
            if torchao_call is not None:
                candidates["torchao_w4a8"] = torchao_call
        for name, peer in ggml.items():
            candidates[name] = call = peer.call(x, torch.get_num_threads())
            check_error(name, relative_error(call(0), x.double() @ peer.decoded.double().T), 0.02)
        timings = take_turns(candidates, seconds, clock=ggml_peer.seconds if ggml else host_seconds)
        bytes_read = {name: ovp_bytes for name in ("olive", "memory_read", *ACTIVATIONS)}
        bytes_read.update({"torch_half": 2 * n * k, "torch_float32": 4 * n * k})
        bytes_read.update({name: peer.bytes_per_copy for name, peer in ggml.items()})
        for name, timing in timings.items():
            size = bytes_read.get(name, n * k // 2)
            baseline = timings["torch_half"]
            op = "ovp_linear_quantized" if name in ACTIVATIONS else "ovp_linear"
            backend = f"{name} {ops.cpu_backend()}" if name.startswith("olive") else name
            lines.append(linear_row(op, backend, m, n, k, dtype, group_size, timing, baseline, size))
    return lines


def linear_row(
    op: str,
    backend: str,
    m: int,
    n: int,
    k: int,
    dtype: torch.dtype,
    group_size: int,
    timing: Timing,
    baseline: Timing,
    bytes_read: int,
) -> dict[str, Any]:
    """One line of a CSV of linear layers; speed-up is against `baseline`, torch's linear."""
    return {
        "op": op,
        "backend": backend,
        "m": m,
        "n": n,
        "k": k,
        "dtype": str(dtype).removeprefix("torch."),
        "group_size": group_size,
        "median_ms": f"{timing.median * 1e3:.4f}",
        "q20_ms": f"{timing.low * 1e3:.4f}",
        "q80_ms": f"{timing.high * 1e3:.4f}",
        "runs": timing.runs,
        "weight_gb_s": f"{bytes_read / timing.median / 1e9:.2f}",
        "gflop_s": f"{2 * m * n * k / timing.median / 1e9:.1f}",
        "speedup": f"{baseline.median / timing.median:.3f}",
        **environment(),
    }


def main(
    tiny: Annotated[bool, typer.Option(help="One small shape, warm, for a smoke test.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    group_size: Annotated[int, typer.Option(help="32, 64, 128, -1 or 0.")] = 128,
    seconds: Annotated[float, typer.Option(help="Roughly, per shape and M.")] = 8.0,
    rows: Annotated[list[int] | None, typer.Option("--m", help="Activation rows.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="NxK, e.g. 4096x4096.")] = None,
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = RESULTS / "ovp_linear.csv",
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
                n, k, rows or list(ROWS), DTYPES[dtype], group_size, 10**6 if tiny else 1_500_000_000,
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
