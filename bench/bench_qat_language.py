"""Quantization-aware training of the bundled language model, with the model itself as its teacher.

python -m bench.bench_qat_language
python -m bench.bench_qat_language --run W2      # repeated: those alone
python -m bench.bench_qat_language --tiny

The text is the standard library's of the running Python, as in examples/train_tiny_llama.py, and the
held-out text the bundled one. Beside the trained models stand those that are rounded without training,
and GPTQ of two and three bits. Rows that are in the CSV file already are not measured again.
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.bench_qat_digits import MOMENTUM
from bench.common import RESULTS, ROOT, append_csv, environment
from bench.gptq_int import gptq_int
from bench.tables import read_rows
from examples.train_tiny_llama import (
    WINDOW,
    batches,
    encode,
    encode_files,
    mean_loss,
    read_library,
    schedule,
    training_files,
)
from olive.qat import OscillationTracker, QATConfig, convert, distill, prepare

MODEL = ROOT / "examples" / "tiny_llama"
BATCH = 8  # windows
GPTQ_GROUP = 128
CALIBRATION_WINDOWS = 64


@dataclass(frozen=True)
class Run:
    """One model to train.

    Args:
        name: as in the table.
        bits: of the weights.
        activation_bits: of what layers read; None = as it is.
        weights: the quantizer.
        rate: learning rate.
    """

    name: str
    bits: int
    activation_bits: int | None = None
    weights: str = "statsq"
    rate: float = 1e-3

    def config(self) -> QATConfig:
        """What the model is prepared with."""
        return QATConfig(self.bits, self.activation_bits, self.weights)


RUNS = (
    Run("W2", 2, rate=2e-3),
    Run("W3", 3),
    Run("W4", 4, rate=5e-4),
    Run("W4A8", 4, 8, rate=5e-4),
    Run("W2, LSQ", 2, weights="lsq", rate=2e-3),
)


@dataclass(frozen=True)
class Texts:
    """Tokens to train on, and the held-out ones."""

    training: Tensor
    heldout: Tensor

    @staticmethod
    def load() -> Texts:
        """The standard library, without what is held out."""
        tokenizer = AutoTokenizer.from_pretrained(MODEL)
        heldout = (MODEL / "heldout.txt").read_text(encoding="utf-8")
        files = training_files(read_library(), heldout)
        return Texts(encode_files(tokenizer, files), encode(tokenizer, heldout))


def load_model() -> Any:
    """The bundled model in float32."""
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


def perplexity(model: Any, texts: Texts, tiny: bool) -> float:
    """On the held-out text."""
    return math.exp(mean_loss(model, texts.heldout[: 16 * WINDOW] if tiny else texts.heldout))


def trained(run: Run, texts: Texts, steps: int, tiny: bool) -> dict[str, Any]:
    """Prepare, train, convert: columns of the row."""
    model = load_model()
    teacher = copy.deepcopy(model)
    model.config.use_cache = False
    generator = torch.Generator().manual_seed(0)
    stream = batches(texts.training, BATCH, generator)
    prepare(model, run.config(), batch={"input_ids": next(stream)[:, :-1]})
    before = perplexity(model, texts, tiny)
    distill(model, teacher)
    groups: list[dict[str, Any]] = [
        {"params": [one for one in model.parameters() if one.dim() >= 2], "weight_decay": 0.01},
        {"params": [one for one in model.parameters() if one.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=run.rate, betas=(0.9, 0.95), fused=True)
    tracker = OscillationTracker(model, momentum=MOMENTUM, optimizer=optimizer)
    model.train()
    start = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = run.rate * schedule(step / steps)
        optimizer.zero_grad()
        model(input_ids=next(stream)[:, :-1]).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    seconds = (time.perf_counter() - start) / max(steps, 1)
    shares = tracker.shares()
    fake = perplexity(model, texts, tiny)
    convert(model)
    return {
        "untrained": f"{before:.4f}",
        "trained": f"{fake:.4f}",
        "converted": f"{perplexity(model, texts, tiny):.4f}",
        "oscillating": f"{shares['oscillating']:.5f}",
        "steps": steps,
        "ms_per_step": f"{1e3 * seconds:.0f}",
    }


def rounded_by_gptq(bits: int, texts: Texts, tiny: bool) -> dict[str, Any]:
    """The linear layers but the head by GPTQ with asymmetric integers in groups: columns of the row."""
    model = load_model()
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    }
    moments: dict[str, Tensor] = {}

    def collect(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            rows = args[0].flatten(0, -2).double()
            moments[name] = moments.get(name, 0) + rows.T @ rows

        return hook

    handles = [module.register_forward_pre_hook(collect(name)) for name, module in chosen.items()]
    generator = torch.Generator().manual_seed(0)
    windows = 4 if tiny else CALIBRATION_WINDOWS
    with torch.no_grad():
        for batch in next(batches(texts.training, windows, generator)).split(BATCH):
            model(input_ids=batch[:, :-1], use_cache=False)
    for handle in handles:
        handle.remove()
    with torch.no_grad():
        for name, module in chosen.items():
            module.weight.copy_(gptq_int(module.weight, moments[name], GPTQ_GROUP, bits=bits).weight)
    found = f"{perplexity(model, texts, tiny):.4f}"
    empty = {"untrained": found, "trained": "", "oscillating": "", "steps": 0, "ms_per_step": ""}
    return {**empty, "converted": found}


def main(
    run: Annotated[list[str] | None, typer.Option(help="Names as in the table.")] = None,
    steps: Annotated[int, typer.Option(help="Of the optimizer.")] = 400,
    tiny: Annotated[bool, typer.Option(help="A smoke run.")] = False,
    threads: Annotated[int, typer.Option(help="Torch threads.")] = 2,
    output: Annotated[Path, typer.Option(help="CSV to append to.")] = RESULTS / "qat_language.csv",
) -> None:
    """Train, print a line for each model, append to the CSV (not after a smoke run)."""
    torch.set_num_threads(threads)
    texts = Texts.load()
    console = Console(width=110)
    done = {row["run"] for row in read_rows(output)}

    def write(name: str, bits: int, columns: dict[str, Any]) -> None:
        if not tiny:
            append_csv(output, [{"run": name, "bits": bits, **columns, **environment()}])
        console.print(f"{name}: {columns}")

    if run is None and "full precision" not in done:
        found = f"{perplexity(load_model(), texts, tiny):.4f}"
        same = {"untrained": found, "trained": "", "converted": found, "oscillating": ""}
        write("full precision", 32, {**same, "steps": 0, "ms_per_step": ""})
    for bits in (2, 3) if run is None else ():
        if f"GPTQ, {bits} bits" not in done:
            write(f"GPTQ, {bits} bits", bits, rounded_by_gptq(bits, texts, tiny))
    for one in RUNS:
        if one.name not in done and (run is None or one.name in run):
            write(one.name, one.bits, trained(one, texts, 2 if tiny else steps, tiny))


if __name__ == "__main__":
    typer.run(main)
