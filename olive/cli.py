"""The console command `olive-quant`, also `python -m olive`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="Outlier-aware 4-bit quantization of Hugging Face models.", no_args_is_help=True)


@app.command()
def doctor() -> None:
    """Print versions, backends and devices, and what is missing. Exit status 1 if something is."""
    from olive.doctor import examine

    found = examine()
    table = Table(show_header=False)
    for name, value in found.facts.items():
        table.add_row(name, value)
    console = Console()
    console.print(table)
    for problem in found.problems:
        console.print(f"- {problem}", soft_wrap=True)
    if found.problems:
        raise typer.Exit(1)
    console.print("Nothing is missing.")


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Hub id or folder of a causal language model.")],
    output: Annotated[Path, typer.Argument(help="Folder for the 4-bit checkpoint; must not exist.")],
    codebook: Annotated[str, typer.Option(help="adaptive, nf4, int4, flint4 or learned.")] = "adaptive",
    group_size: Annotated[int, typer.Option(help="32, 64, 128, -1 per channel, 0 per tensor.")] = 128,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Quantize a checkpoint while it is loaded, and save it with its tokenizer."""
    import olive

    config = olive.QuantConfig(codebook=codebook, group_size=group_size)
    if output.exists():
        raise typer.BadParameter(
            f"expected a folder that does not exist yet, got {output}", param_hint="output"
        )
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise RuntimeError("transformers: expected to be installed; `pip install olive-quant[hf]`") from error
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=dtype)
    print(olive.report(loaded).table())
    loaded.save_pretrained(output)
    try:
        AutoTokenizer.from_pretrained(model).save_pretrained(output)
    except (OSError, ValueError) as error:  # a model without a tokenizer is a model all the same
        typer.echo(f"no tokenizer saved: {error}", err=True)


def main() -> None:
    """Entry point of `olive-quant`."""
    app()
