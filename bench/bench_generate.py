"""Tokens per second of a whole language model, random weights, bfloat16 and quantized, greedy.

On a CPU: batch 1, both models take turns. On a GPU: `bench.gpu.generate`.

    python -m bench.bench_generate                    # 1.1 B parameters (TinyLlama's shape), about 3 minutes
    python -m bench.bench_generate --device cuda      # Llama 3 8B's shape, about a minute on an H200
    python -m bench.bench_generate --tiny
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import olive
from bench.common import RESULTS, append_csv, environment
from bench.gpu import generate as gpu
from bench.models import TINY, TINYLLAMA, random_llama
from bench.timing import take_turns
from olive import QuantConfig, ops


def generator(model: Any, prompt: torch.Tensor, tokens: int) -> Any:
    """A call that generates exactly `tokens` tokens after the prompt."""

    def call(_: int) -> Any:
        return model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            pad_token_id=0,
        )

    return call


def main(
    tiny: Annotated[bool, typer.Option(help="A smoke run.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 16,
    tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 32,
    seconds: Annotated[float, typer.Option(help="Roughly, for the timed turns.")] = 60.0,
    device: Annotated[str, typer.Option(help="cpu or cuda, where the options above do not count.")] = "cpu",
    output: Annotated[Path | None, typer.Option(help="CSV to append to, by default the device's.")] = None,
) -> None:
    """Build, quantize, generate in turns, print a table, append to the CSV."""
    if device != "cpu":
        gpu.main(tiny=tiny, device=device, output=output)
        return
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = random_llama(TINY if tiny else TINYLLAMA)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    quantized = copy.deepcopy(model)
    start = time.perf_counter()
    olive.quantize(quantized, QuantConfig(), progress=False)
    took = time.perf_counter() - start
    prompt = torch.randint(0, model.config.vocab_size, (1, prompt_tokens))
    with torch.inference_mode():
        timings = take_turns(
            {
                "bfloat16": generator(model, prompt, tokens),
                f"olive {ops.cpu_backend()}": generator(quantized, prompt, tokens),
            },
            0.01 if tiny else seconds,
        )
    lines = []
    table = Table("model", "tokens/s", "q20-q80", "speed-up")
    for name, timing in timings.items():
        speedup = timings["bfloat16"].median / timing.median
        lines.append(
            {
                "bench": "generate",
                "backend": name,
                "parameters": parameters,
                "prompt_tokens": prompt_tokens,
                "new_tokens": tokens,
                "tokens_s": f"{tokens / timing.median:.2f}",
                "q20": f"{tokens / timing.high:.2f}",
                "q80": f"{tokens / timing.low:.2f}",
                "runs": timing.runs,
                "speedup": f"{speedup:.2f}",
                "quantize_s": f"{took:.1f}",
                **environment(),
            }
        )
        entry = lines[-1]
        table.add_row(name, entry["tokens_s"], f"{entry['q20']}-{entry['q80']}", entry["speedup"])
    console = Console(width=100)
    console.print(table)
    console.print(f"{parameters / 1e9:.2f} B parameters, quantized in {took:.0f} s")
    if not tiny:
        append_csv(output or RESULTS / "generate.csv", lines)


if __name__ == "__main__":
    typer.run(main)
