"""Tokens per second of a whole language model, random weights, bfloat16 and quantized, batch 1, greedy.

Random weights generate nonsense at the speed of real ones. Both models take turns.

    python -m bench.bench_generate                    # 1.1 B parameters (TinyLlama's shape), about 3 minutes
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
from bench.timing import take_turns
from olive import QuantConfig, ops

SHAPE: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
TINY = {**SHAPE, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "vocab_size": 256}


def random_llama(shape: dict[str, Any]) -> Any:
    """A Llama of that shape with random bfloat16 weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**shape, dtype=torch.bfloat16, max_position_embeddings=2048)
    model: Any = LlamaForCausalLM(config)
    return model.to(torch.bfloat16).eval()


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
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = RESULTS / "generate.csv",
) -> None:
    """Build, quantize, generate in turns, print a table, append to the CSV."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = random_llama(TINY if tiny else SHAPE)
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
    if output is not None and not tiny:
        append_csv(output, lines)


if __name__ == "__main__":
    typer.run(main)
