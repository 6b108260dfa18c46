"""The console command `olive-quant`, also `python -m olive`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(help="Outlier-aware quantization of Hugging Face models.", no_args_is_help=True)


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
    output: Annotated[Path, typer.Argument(help="Folder for the quantized checkpoint; must not exist.")],
    codebook: Annotated[
        str, typer.Option(help="adaptive, nf4, int4, flint4, learned, auto or paper; 8 bits have none.")
    ] = "adaptive",
    group_size: Annotated[int, typer.Option(help="32, 64, 128, -1 per channel, 0 per tensor.")] = 128,
    bits: Annotated[int, typer.Option(help="Per weight: 4 or 8.")] = 4,
    activations: Annotated[
        str | None, typer.Option(help="int8, ovp4 or ovp8; the default leaves them alone.")
    ] = None,
    activation_group_size: Annotated[int, typer.Option(help="-1 per token, 32, 64, 128, or 0: static.")] = -1,
    activation_codebook: Annotated[
        str, typer.Option(help="Of ovp4: int4, flint4, nf4 or adaptive.")
    ] = "int4",
    method: Annotated[
        str, typer.Option(help="search; gptq makes up for errors, and needs --calibration or --synthetic.")
    ] = "search",
    rotate: Annotated[
        bool, typer.Option(help="Spread outliers over all channels; Llama-like models.")
    ] = False,
    rotate_online: Annotated[
        bool, typer.Option(help="With --rotate: the inputs of down_proj too, while the model runs.")
    ] = False,
    calibration: Annotated[
        Path | None,
        typer.Option(help="Text file; the model is then loaded whole.", dir_okay=False, exists=True),
    ] = None,
    synthetic: Annotated[
        bool, typer.Option(help="Calibrate on text that the model writes itself; it is then loaded whole.")
    ] = False,
    window: Annotated[
        int | None, typer.Option(help="Tokens per window; 2048 of a text, 256 of the model's own.", min=1)
    ] = None,
    windows: Annotated[
        int | None, typer.Option(help="How many; at most 128 of a text, 64 of the model's own.", min=1)
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")] = "auto",
) -> None:
    """Quantize a checkpoint, while it is loaded where that can be, and save it with its tokenizer."""
    import olive

    try:
        config = olive.QuantConfig(
            bits=bits,
            codebook=codebook,
            group_size=group_size,
            activations=activations,
            activation_group_size=activation_group_size,
            activation_codebook=activation_codebook,
            method=method,
            rotate=rotate,
            rotate_online=rotate_online,
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    if config.needs_calibration and calibration is None and not synthetic:
        raise typer.BadParameter(
            f"expected a text file for {config.needs_calibration}, got none; or use --synthetic",
            param_hint="--calibration",
        )
    if calibration is not None and synthetic:
        raise typer.BadParameter("expected no --calibration beside it, got both", param_hint="--synthetic")
    if calibration is None and not synthetic and (window or windows):
        raise typer.BadParameter(
            "expected --calibration or --synthetic as well", param_hint="--window, --windows"
        )
    if output.exists():
        raise typer.BadParameter(
            f"expected a folder that does not exist yet, got {output}", param_hint="output"
        )
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise RuntimeError("transformers: expected to be installed; `pip install olive-quant[hf]`") from error
    if calibration is None and not synthetic and not rotate:
        loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, dtype=dtype)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
        data = olive.synthetic_windows(loaded, window=window, count=windows) if synthetic else None
        if calibration is not None:
            tokenizer = AutoTokenizer.from_pretrained(model)
            given = {key: size for key, size in (("window", window), ("count", windows)) if size is not None}
            data = olive.calibration_windows(calibration.read_text(), tokenizer, **given)
        olive.quantize(loaded, config, calibration=data)
    print(olive.report(loaded).table())
    loaded.save_pretrained(output)
    try:
        AutoTokenizer.from_pretrained(model).save_pretrained(output)
    except (OSError, ValueError) as error:  # a model without a tokenizer is a model all the same
        typer.echo(f"no tokenizer saved: {error}", err=True)


def main() -> None:
    """Entry point of `olive-quant`."""
    app()
