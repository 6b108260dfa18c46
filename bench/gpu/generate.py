"""Tokens per second of a whole model on a GPU, random weights, bfloat16 and quantized, greedy.

A step of generation is one CUDA graph of the model's own kernels (no compiler), with a static cache; batch 1
also without the graph. A prompt of 4096 tokens is timed on its own, with 16-bit and with int8 activations.
Peak memory is that of the model and its generation.

    python -m bench.gpu.generate          # Llama 3 8B's shape, about a minute on an H200
    python -m bench.gpu.generate --tiny --device cpu
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import olive
from bench.gpu.decoder import StaticDecoder, repeat
from bench.gpu.device import device_clock, synchronize
from bench.gpu.results import Results, output_file
from bench.models import LLAMA_3_8B, TINY, random_llama
from bench.timing import Clock, Timing, take_turns
from olive import QuantConfig
from olive.formats import ActivationFormat
from olive.nn import OVPLinear

BATCHES = (1, 8, 32)
_ROUNDS = 3
_COMPARED = 8  # tokens of a captured step and of the plain one


@dataclass(frozen=True)
class Lengths:
    """How many tokens are read and generated."""

    prompt: int = 16
    steps: int = 64  # timed together
    prefill: int = 4096


def step_timing(
    decoder: StaticDecoder, prompt: torch.Tensor, step: Callable[[], object], steps: int, clock: Clock
) -> Timing:
    """Seconds per step: rounds of `steps` steps after the prompt."""
    times = []
    for _ in range(_ROUNDS + 1):
        decoder.start(prompt)
        times.append(clock(lambda _: repeat(step, steps), 0))
    return Timing.of(times[1:], steps)  # the first round is a warm-up


class Section:
    """Measures one model after another.

    Args:
        results: where rows go.
        device: where it runs.
        lengths: of prompts and generations.
    """

    def __init__(self, results: Results, device: torch.device, lengths: Lengths) -> None:
        self.results, self.device, self.lengths = results, device, lengths
        self.clock = device_clock(device)
        self._baseline: dict[tuple[str, int], float] = {}

    def _prompt(self, model: Any, batch: int, tokens: int) -> torch.Tensor:
        generator = torch.Generator(self.device).manual_seed(batch)
        size = (batch, tokens)
        return torch.randint(0, model.config.vocab_size, size, generator=generator, device=self.device)

    def _add(self, op: str, backend: str, m: int, timing: Timing, tokens: int, note: str = "") -> None:
        baseline = self._baseline.setdefault((op, m), timing.median)  # the first model is the bfloat16 one
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30 if self.device.type == "cuda" else ""
        self.results.add(
            op, backend, timing, m=m, dtype="bfloat16", tokens_s=tokens / timing.median,
            speedup=baseline / timing.median, peak_gib=peak, note=note,
        )  # fmt: skip

    def _reset_peak(self) -> None:
        if self.device.type == "cuda":
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def generation(self, model: Any, backend: str, batch: int) -> None:
        """Time the steps of a batch. A captured step must generate the tokens that the plain one does."""
        self._reset_peak()
        prompt, steps = self._prompt(model, batch, self.lengths.prompt), self.lengths.steps
        # event_seconds runs twice what it times, so the cache must hold two rounds.
        decoder = StaticDecoder(model, batch, self.lengths.prompt + 2 * max(steps, _COMPARED))
        if batch == 1:
            timing = step_timing(decoder, prompt, decoder.step, steps, self.clock)
            self._add("generate_eager", backend, batch, timing, batch, "without a CUDA graph")
        step = decoder.captured(prompt) if self.device.type == "cuda" else decoder.step
        timing = step_timing(decoder, prompt, step, steps, self.clock)
        self._add("generate", backend, batch, timing, batch)
        plain, replayed = decoder.generate(prompt, _COMPARED), decoder.generate(prompt, _COMPARED, step)
        if not torch.equal(plain, replayed):
            self.results.fail("generate", backend, "a replayed step generates other tokens", m=batch)

    def prefill(self, model: Any, backend: str) -> None:
        """Time the reading of a long prompt."""
        self._reset_peak()
        prompt = self._prompt(model, 1, self.lengths.prefill)
        read = {"it": lambda _: model(prompt, use_cache=True, logits_to_keep=1)}
        timing = take_turns(read, 0, clock=self.clock)["it"]
        self._add("prefill", backend, self.lengths.prefill, timing, self.lengths.prefill)

    def model(self, model: Any, backend: str, batches: tuple[int, ...]) -> None:
        """Everything of one model."""
        for batch in batches:
            self.generation(model, backend, batch)
        self.prefill(model, backend)

    def quantize(self, model: Any) -> None:
        """Quantize in place, timed once: what a user waits for."""
        synchronize(self.device)
        start = time.perf_counter()
        olive.quantize(model, QuantConfig(), progress=False)
        synchronize(self.device)
        took = time.perf_counter() - start
        note = f"olive.quantize of the model: {took:.1f} s"
        self.results.add("quantize_model", "olive", mweights_s=self._quantized(model) / took / 1e6, note=note)

    def integer_prefill(self, model: Any) -> None:
        """The same weights with int8 activations, one scale per token: W4A8."""
        for module in model.modules():
            if isinstance(module, OVPLinear):
                module.activations = ActivationFormat("int8")
                module.refresh_activations_()
        self.prefill(model, "olive_w4a8")

    @staticmethod
    def _quantized(model: Any) -> int:
        layers = (module for module in model.modules() if isinstance(module, OVPLinear))
        return sum(layer.quantized_values for layer in layers)


def main(
    tiny: Annotated[bool, typer.Option(help="A small model, for a smoke test.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a smoke test.")] = "cuda",
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = None,
) -> None:
    """Build, measure, quantize, measure again; exit status 1 if a captured step generates other tokens."""
    place = torch.device(device)
    results = Results(output_file(output, place, tiny), place)
    section = Section(results, place, Lengths(4, 3, 8) if tiny else Lengths())
    batches = (1, 2) if tiny else BATCHES
    torch.manual_seed(0)
    with torch.inference_mode():
        model = random_llama(TINY if tiny else LLAMA_3_8B, place)
        section.model(model, "torch_bf16", batches)
        section.quantize(model)
        section.model(model, "olive", batches)
        section.integer_prefill(model)
    raise typer.Exit(int(results.failed))


if __name__ == "__main__":
    typer.run(main)
