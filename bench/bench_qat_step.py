"""A training step with quantized weights and activations against the full-precision step, at
Llama-3.2-1B's shape.

python -m bench.bench_qat_step                               # CPU: one layer, 1024 tokens, float32
python -m bench.bench_qat_step --device cuda --layers 8 --tokens 8192 --autocast
python -m bench.bench_qat_step --tiny

A step is forward, backward and AdamW of the decoder layers, without embedding and head. All models take
turns.
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
from rich.table import Table
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaModel

from bench.common import RESULTS, append_csv, gpu_environment
from bench.timing import take_turns
from olive.qat import OscillationTracker, QATConfig, anneal, prepare

WINDOW = 512
BASELINE = "full precision"


@dataclass(frozen=True)
class Variant:
    """One way to train.

    Args:
        config: None = full precision.
        tracked: whether oscillations are followed.
        annealed: whether weights are frozen.
    """

    config: QATConfig | None = None
    tracked: bool = False
    annealed: bool = False


VARIANTS = {
    BASELINE: Variant(),
    "StatsQ + LSQ, W4A8": Variant(QATConfig(4, 8)),
    "StatsQ, W2": Variant(QATConfig(2)),
    "LSQ + LSQ, W4A8": Variant(QATConfig(4, 8, "lsq")),
    "StatsQ + LSQ, W4A8, tracked": Variant(QATConfig(4, 8), tracked=True),
    "StatsQ + LSQ, W4A8, tracked, CGA": Variant(QATConfig(4, 8), tracked=True, annealed=True),
}


def decoder(layers: int, tiny: bool) -> nn.Module:
    """The decoder layers alone."""
    size = (64, 128, 4, 2) if tiny else (2048, 8192, 32, 8)
    hidden, intermediate, heads, key_heads = size
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        use_cache=False,
    )
    return LlamaModel(config)


def step_of(variant: Variant, model: nn.Module, input: Tensor, autocast: bool) -> Callable[[int], None]:
    """A training step of a copy of the model."""
    model = copy.deepcopy(model)
    if variant.config is not None:
        prepare(model, variant.config, batch={"inputs_embeds": input})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if variant.tracked:
        OscillationTracker(model, optimizer=optimizer)
    if variant.annealed:
        anneal(model, optimizer)
    model.train()

    def step(_: int) -> None:
        optimizer.zero_grad()
        with torch.autocast(input.device.type, torch.bfloat16, enabled=autocast):
            output = model(inputs_embeds=input).last_hidden_state
        output.square().mean().backward()
        optimizer.step()

    return step


def _clock(device: torch.device) -> Callable[[Callable[[int], object], int], float]:
    def seconds(call: Callable[[int], object], turn: int) -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        call(turn)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return seconds


def main(
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    layers: Annotated[int, typer.Option(help="Decoder layers.")] = 1,
    tokens: Annotated[int, typer.Option(help="In a step.")] = 1024,
    autocast: Annotated[bool, typer.Option(help="bfloat16 for products.")] = False,
    tiny: Annotated[bool, typer.Option(help="A smoke run.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = RESULTS / "qat_step.csv",
) -> None:
    """Time, print a table, append to the CSV (not after a smoke run)."""
    torch.set_num_threads(threads)
    where = torch.device(device)
    window = 16 if tiny else min(WINDOW, tokens)
    model = decoder(layers, tiny).to(where)
    input = torch.randn(1 if tiny else tokens // window, window, model.config.hidden_size, device=where)  # type: ignore[union-attr, arg-type]
    steps = {name: step_of(variant, model, input, autocast) for name, variant in VARIANTS.items()}
    timings = take_turns(steps, 0.1 if tiny else 60.0, clock=_clock(where))
    table = Table("training step", "median ms", "q20-q80", "over full precision")
    rows: list[dict[str, Any]] = []
    for name, timing in timings.items():
        ratio = timing.median / timings[BASELINE].median
        rows.append(
            {
                "variant": name,
                "layers": layers,
                "tokens": input.shape[0] * window,
                "autocast": autocast,
                "median_ms": f"{timing.median * 1e3:.2f}",
                "q20_ms": f"{timing.low * 1e3:.2f}",
                "q80_ms": f"{timing.high * 1e3:.2f}",
                "runs": timing.runs,
                "over_full_precision": f"{ratio:.3f}",
                "threads": torch.get_num_threads(),
                **gpu_environment(where),
            }
        )
        entry = rows[-1]
        table.add_row(name, entry["median_ms"], f"{entry['q20_ms']}-{entry['q80_ms']}", f"{ratio:.2f}")
    Console(width=110).print(table)
    if output is not None and not tiny:
        append_csv(output, rows)


if __name__ == "__main__":
    typer.run(main)
