"""Quantization-aware training of a vision transformer on scikit-learn's digits: what each part of it brings.

python -m bench.bench_qat_digits
python -m bench.bench_qat_digits --bits 2 --seed 0     # repeated: those alone
python -m bench.bench_qat_digits --tiny

Every method starts from the same full-precision model of its seed, which is its teacher too, and sees the
same number of batches; rows that are in the CSV file already are not measured again.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from bench.common import RESULTS, append_csv, environment
from bench.tables import read_rows
from examples.qat_digits import (
    BATCH,
    Digits,
    accuracy,
    optimizer_for,
    train,
    vision_transformer,
    warm_cosine,
)
from olive.qat import (
    CosineSchedule,
    IterativeFreezing,
    OscillationTracker,
    QATConfig,
    anneal,
    dampening_loss,
    distill,
    prepare,
)

FULL_PRECISION = "full precision"
RATE, LAST_RATE = 1e-3, 1e-5
# While weights are frozen: large enough to carry those near a threshold out of the boundary range, 0.005
# steps to either side (about 2e-4 here).
ANNEALING_RATE = 2e-4
MOMENTUM = 0.01  # of the moving average of oscillations: the trainings are too short for 0.001
DAMPENING = 0.1
FREEZING = (0.1, 0.01)


@dataclass(frozen=True)
class Method:
    """One way of training.

    Args:
        name: as in the table.
        weights: the quantizer.
        qkr, dampening, freezing, annealing: what is added.
    """

    name: str
    weights: str
    qkr: bool = False
    dampening: bool = False
    freezing: bool = False
    annealing: bool = False


METHODS = (
    Method("LSQ", "lsq"),
    Method("LSQ + dampening", "lsq", dampening=True),
    Method("LSQ + freezing", "lsq", freezing=True),
    Method("StatsQ", "statsq"),
    Method("StatsQ + QKR", "statsq", qkr=True),
    Method("StatsQ + QKR + CGA", "statsq", qkr=True, annealing=True),
)


@dataclass(frozen=True)
class Epochs:
    """How long.

    Args:
        full: in full precision.
        quantized: with a falling learning rate.
        last: after that with the smallest, where annealing happens.
    """

    full: int
    quantized: int
    last: int


def quantized_run(
    float_model: nn.Module, method: Method, bits: int, seed: int, epochs: Epochs, data: tuple[Digits, Digits]
) -> dict[str, Any]:
    """Train one model on `bits` bits: columns of its row."""
    train_set, test_set = data
    model = copy.deepcopy(float_model)
    config = QATConfig(
        bits,
        bits,
        method.weights,
        activation_granularity="per_token",
        activation_offsets=True,
        quantize_attention=True,
        qkr=method.qkr,
    )
    prepare(model, config, batch={"pixel_values": train_set.images[: 4 * BATCH]})
    distill(model, copy.deepcopy(float_model), weight=0.5)
    optimizer = optimizer_for(model, RATE)
    tracker = OscillationTracker(model, momentum=MOMENTUM)
    steps = (epochs.quantized + epochs.last) * (len(train_set.labels) // BATCH)
    last_rate = ANNEALING_RATE if method.annealing else LAST_RATE
    if method.freezing:
        IterativeFreezing(model, optimizer, tracker, CosineSchedule(*FREEZING, first=steps // 4, last=steps))
    else:
        tracker.attach(optimizer)
    if method.dampening:
        _dampen(model, CosineSchedule(0.0, DAMPENING, first=steps // 4, last=steps))
    start = time.perf_counter()
    train(model, train_set, optimizer, warm_cosine(RATE, LAST_RATE), epochs.quantized, seed)
    if method.annealing:
        anneal(model, optimizer)
    train(model, train_set, optimizer, lambda _: last_rate, epochs.last, seed + 100)
    seconds = (time.perf_counter() - start) / steps
    shares = tracker.shares()
    return {
        "accuracy": f"{accuracy(model, test_set):.4f}",
        "oscillating": f"{shares['oscillating']:.5f}",
        "at_boundary": f"{shares['at_boundary']:.5f}",
        "ms_per_step": f"{1e3 * seconds:.1f}",
    }


def _dampen(model: nn.Module, factor: Callable[[int], float | None]) -> None:
    """Add the dampening loss to the model's loss, times a factor that follows the steps."""
    step = 0

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        nonlocal step
        if module.training:
            weight = factor(step)
            step += 1
            if weight:
                output["loss"] = output["loss"] + weight * dampening_loss(module)
        return output

    model.register_forward_hook(add)


def float_run(seed: int, epochs: Epochs, data: tuple[Digits, Digits]) -> tuple[nn.Module, dict[str, Any]]:
    """Train the full-precision model of a seed: it, and columns of its row."""
    train_set, test_set = data
    torch.manual_seed(seed)
    model = vision_transformer()
    start = time.perf_counter()
    train(model, train_set, optimizer_for(model, RATE), warm_cosine(RATE, LAST_RATE), epochs.full, seed)
    seconds = (time.perf_counter() - start) / (epochs.full * (len(train_set.labels) // BATCH))
    found = {"accuracy": f"{accuracy(model, test_set):.4f}", "ms_per_step": f"{1e3 * seconds:.1f}"}
    return model, {**found, "oscillating": "", "at_boundary": ""}


def main(
    bits: Annotated[list[int] | None, typer.Option(help="Of weights and activations.")] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Of initialization and order.")] = None,
    method: Annotated[list[str] | None, typer.Option(help="Names as in the table.")] = None,
    tiny: Annotated[bool, typer.Option(help="A smoke run.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 1,
    output: Annotated[Path, typer.Option(help="CSV to append to.")] = RESULTS / "qat_digits.csv",
) -> None:
    """Train, print a line for each model, append to the CSV (not after a smoke run)."""
    torch.set_num_threads(threads)
    epochs = Epochs(1, 1, 1) if tiny else Epochs(80, 30, 10)
    data = Digits.load()
    console = Console(width=110)
    done = (
        {(row["method"], row["bits"], row["seed"]) for row in read_rows(output)} if output.exists() else set()
    )
    chosen = [one for one in METHODS if method is None or one.name in method]
    for one_seed in seed or ((0,) if tiny else (0, 1, 2)):
        wanted = [
            (one, width)
            for width in bits or ((2,) if tiny else (2, 3, 4))
            for one in chosen
            if (one.name, str(width), str(one_seed)) not in done
        ]
        if not wanted:
            continue
        model, found = float_run(one_seed, epochs, data)

        def write(name: str, width: int, columns: dict[str, Any], one_seed: int = one_seed) -> None:
            row = {"method": name, "bits": width, "seed": one_seed, **columns, **environment()}
            if not tiny:
                append_csv(output, [row])
            console.print(f"{name}, {width} bits, seed {one_seed}: {columns}")

        if (FULL_PRECISION, "32", str(one_seed)) not in done:
            write(FULL_PRECISION, 32, found)
        for one, width in wanted:
            write(one.name, width, quantized_run(model, one, width, one_seed, epochs, data))


if __name__ == "__main__":
    typer.run(main)
