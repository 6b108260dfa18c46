"""The operators of training on CPU: StatsQ, LSQ and oscillations of a weight, LSQ of activations.

python -m bench.bench_training_ops
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 python -m bench.bench_training_ops
python -m bench.bench_training_ops --tiny

Results of tens of megabytes are in memory that is new to the process, whose pages the system clears: that
takes several times as long as to write them. With the variables of the second line glibc keeps what is freed,
so that the figures are those of the kernels.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.common import RESULTS, append_csv, environment
from bench.timing import take_turns
from olive import ops
from olive.ops.lsq import lsq_backward_reference, lsq_reference
from olive.ops.oscillation import oscillation_reference_
from olive.ops.statsq import statsq_codes_reference, statsq_margin_reference, statsq_reference

BITS = 4
ATOL, RTOL = 1e-3, 1e-3  # of a scale's gradient, which the reference sums in float32


class Case(NamedTuple):
    """An operator and its definition on the same arguments."""

    op: str
    scales: str
    run: Callable[[], Any]
    reference: Callable[[], Any]
    source: Tensor  # what a copy is timed of
    moved: int  # bytes that have to be read and written


def weight_cases(weight: Tensor) -> list[Case]:
    """StatsQ per channel and in groups; oscillations with a step per channel."""
    values, size = weight.numel(), weight.element_size()
    step = torch.full((weight.shape[0], 1), 0.01)
    state, other = (
        [torch.zeros(weight.shape, dtype=kind) for kind in (torch.int8, torch.int8, torch.float32)]
        for _ in range(2)
    )
    how = (weight, step, 0.0, -8, 7, 0.02, 0.005)
    return [
        Case(
            "statsq",
            name,
            partial(ops.statsq, weight, BITS, group),
            partial(statsq_reference, weight, BITS, group),
            weight,
            2 * size * values,
        )
        for name, group in (("per channel", -1), ("groups of 128", 128))
    ] + [
        Case(
            "statsq_codes",
            "per channel",
            partial(ops.statsq_codes, weight, BITS, -1),
            partial(statsq_codes_reference, weight, BITS, -1),
            weight,
            (size + 1) * values,
        ),
        Case(
            "statsq_margin",
            "per channel",
            partial(ops.statsq_margin, weight, BITS, -1),
            partial(statsq_margin_reference, weight, BITS, -1),
            weight,
            (size + 4) * values,
        ),
        Case(
            "oscillation_",
            "per channel",
            partial(ops.oscillation_, *how, *state),
            partial(oscillation_reference_, *how, *other),
            weight,
            (size + 13) * values,
        ),
    ]


def activation_cases(input: Tensor) -> list[Case]:
    """LSQ with one scale, one per token and one per column."""
    moved, grad = input.numel() * input.element_size(), torch.randn_like(input)
    cases = []
    for name, dim, count in (("per tensor", 0, 1), ("per token", 1, input.shape[1]), ("per column", 2, -1)):
        scale = torch.full((input.shape[2] if count < 0 else count,), 0.3)
        how = (input, scale, BITS, True, dim)
        cases += [
            Case(
                "lsq",
                name,
                partial(ops.lsq, *how),
                partial(lsq_reference, *how),
                input,
                2 * moved,
            ),
            Case(
                "lsq_backward",
                name,
                partial(torch.ops.olive.lsq_backward, grad, *how),
                partial(lsq_backward_reference, grad, *how),
                input,
                3 * moved,
            ),
        ]
    return cases


def check(case: Case) -> None:
    """Stop where the results are not the reference's."""
    found, expected = case.run(), case.reference()
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for position, (one, other) in enumerate(pairs):
        summed = case.op == "lsq_backward" and position == 1
        same = torch.allclose(one, other, RTOL, ATOL) if summed else torch.equal(one, other)
        if not same:
            raise RuntimeError(f"{case.op}: expected the reference's values, got others")


def measure(case: Case, seconds: float) -> dict[str, Any]:
    """Time it beside its reference and a copy of its input."""
    check(case)
    timings = take_turns(
        {
            "olive": lambda _: case.run(),
            "reference": lambda _: case.reference(),
            "copy": lambda _: case.source.clone(),
        },
        seconds,
    )
    timing = timings["olive"]
    return {
        "op": case.op,
        "backend": f"olive {ops.cpu_backend()}",
        "shape": "x".join(map(str, case.source.shape)),
        "dtype": str(case.source.dtype).removeprefix("torch."),
        "scales": case.scales,
        "memory": "kept" if os.environ.get("MALLOC_MMAP_MAX_") == "0" else "new",
        "median_ms": f"{timing.median * 1e3:.3f}",
        "q20_ms": f"{timing.low * 1e3:.3f}",
        "q80_ms": f"{timing.high * 1e3:.3f}",
        "runs": timing.runs,
        "gb_s": f"{case.moved / timing.median / 1e9:.2f}",
        "over_copy": f"{timing.median / timings['copy'].median:.2f}",
        "reference_over_olive": f"{timings['reference'].median / timing.median:.1f}",
        **environment(),
    }


def main(
    tiny: Annotated[bool, typer.Option(help="A smoke run.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = RESULTS / "training_ops.csv",
) -> None:
    """Check against the references, time, print a table, append to the CSV.

    Baselines: the reference in plain PyTorch, and a copy of the input.
    """
    torch.set_num_threads(threads)
    shown = ("op", "scales", "dtype", "median_ms", "gb_s", "over_copy", "reference_over_olive")
    table = Table(*(name.replace("_", " ") for name in shown))
    lines = []
    for dtype in (torch.float32, torch.bfloat16):
        weight = (torch.randn((64, 256) if tiny else (4096, 4096)) * 0.02).to(dtype)
        input = torch.randn((2, 8, 64) if tiny else (8, 512, 4096)).to(dtype)
        for case in (*weight_cases(weight), *activation_cases(input)):
            lines.append(measure(case, 0.02 if tiny else 2.5))
            table.add_row(*(lines[-1][name] for name in shown))
    Console(width=120).print(table)
    if output is not None and not tiny:
        append_csv(output, lines)


if __name__ == "__main__":
    typer.run(main)
