"""Pair-aware GPTQ on a GPU: the steps of one layer, and a model of Llama 3 8B's shape by two of its layers.

    python -m bench.gpu.gptq              # about half a minute on an H100
    python -m bench.gpu.gptq --tiny --device cpu

The model has random weights and reads random tokens, 128 windows of 2048. It is quantized with one decoder
layer and with three: what a layer more takes, times the layers there are, is the whole. Peak memory is what
quantizing three takes beyond the float model: moments, hidden states, one layer at work, packed weights.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import olive
from bench.bench_gptq import ROWS, SHAPES, measure
from bench.gpu.device import synchronize
from bench.gpu.results import Results, output_file
from bench.models import LLAMA_3_8B, TINY, random_llama
from bench.timing import Timing
from olive import QuantConfig

WINDOWS, LENGTH = 128, 2048
BATCH = 4  # windows
ROUNDS = 3
FEW_LAYERS, MORE_LAYERS = 1, 3


def layer_steps(results: Results, rows: int, columns: int, device: torch.device) -> None:
    """The second moments of a batch, and the whole of one layer."""
    measure(rows, columns, device)  # libraries start up
    runs = [measure(rows, columns, device) for _ in range(ROUNDS)]
    for step in runs[0]:
        timing = Timing.of([run[step] for run in runs])
        shape = {"plan": step, "n": rows, "k": columns, "dtype": "float32"}
        if step == "moments":
            rate = 2 * ROWS * columns**2 / timing.median
            results.add("gptq", "olive", timing, m=ROWS, tflop_s=rate / 1e12, **shape)
        else:
            results.add("gptq", "olive", timing, mweights_s=rows * columns / timing.median / 1e6, **shape)


def quantized_in(shape: dict[str, Any], windows: int, length: int, device: torch.device) -> tuple[float, int]:
    """Seconds, and bytes beyond the float model's at the peak."""
    torch.manual_seed(0)
    model = random_llama(shape, device)
    tokens = torch.randint(0, shape["vocab_size"], (windows, length), device=device)
    gc.collect()
    before = 0
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    synchronize(device)
    start = time.perf_counter()
    olive.quantize(model, QuantConfig(method="gptq"), calibration=tokens.split(BATCH), progress=False)
    synchronize(device)
    took = time.perf_counter() - start
    return took, torch.cuda.max_memory_allocated(device) - before if device.type == "cuda" else 0


def whole_model(
    results: Results, shape: dict[str, Any], windows: int, length: int, device: torch.device
) -> None:
    """By the difference of two depths."""
    few, more = ({**shape, "num_hidden_layers": layers} for layers in (FEW_LAYERS, MORE_LAYERS))
    quantized_in(few, BATCH, length, device)  # libraries start up
    least, _ = quantized_in(few, windows, length, device)
    most, peak = quantized_in(more, windows, length, device)
    per_layer = (most - least) / (MORE_LAYERS - FEW_LAYERS)
    layers = shape["num_hidden_layers"]
    results.add(
        "gptq_model", "olive", plan="adaptive", m=windows * length, dtype="bfloat16",
        peak_gib=peak / 2**30, seconds=least + (layers - FEW_LAYERS) * per_layer,
        note=f"{per_layer:.2f} s a layer, {layers} layers; peak of {MORE_LAYERS}, beyond the float model",
    )  # fmt: skip


def main(
    tiny: Annotated[bool, typer.Option(help="Small shapes, for a smoke test.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a smoke test.")] = "cuda",
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = None,
) -> None:
    """Measure; an error ends the section."""
    place = torch.device(device)
    results = Results(output_file(output, place, tiny), place)
    for rows, columns in ((32, 128),) if tiny else SHAPES:
        layer_steps(results, rows, columns, place)
    if tiny:
        whole_model(results, TINY, 8, 64, place)
    else:
        whole_model(results, LLAMA_3_8B, WINDOWS, LENGTH, place)


if __name__ == "__main__":
    typer.run(main)
