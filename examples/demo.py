"""From a full-precision language model to a 4-bit one, with figures before and after.

    python examples/demo.py                        # the bundled model
    python examples/demo.py path/or/hub-id         # any causal language model of transformers

Quantizes, saves, loads the saved checkpoint as any program would, checks that it gives the same logits, and
writes the checkpoint and an HTML report into `--output`. Everything runs on the CPU.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import olive  # before or after transformers, but before a quantized checkpoint is loaded
from olive.eval import perplexity

HERE = Path(__file__).resolve().parent
BUNDLED = HERE / "tiny_llama"
BUNDLED_WINDOW = 256  # tokens: the rule of its README
LARGE = 100_000_000  # parameters; larger models are not read through the whole text
LARGE_WINDOWS = 16
PROMPT = 'def read_lines(path):\n    """'
MIN_RUNS, MAX_RUNS, SECONDS = 3, 10, 6.0  # of generation

console = Console(highlight=False, width=max(80, Console().width))


@dataclass
class Figures:
    """What is measured before and after.

    Args:
        quantized_bytes: size of the layers that are quantized.
        model_bytes: size of the whole model.
        bits: per weight of those layers.
        perplexity: on the text.
        speed: tokens per second, batch of one.
    """

    quantized_bytes: int
    model_bytes: int
    bits: float
    perplexity: float
    speed: float


@contextmanager
def step(title: str, *, spinner: bool = True) -> Iterator[None]:
    """Show what is going on, then how long it took. Steps with a bar of their own have no spinner."""
    start = time.perf_counter()
    if spinner:
        with console.status(title):
            yield
    else:
        yield
    console.print(f"[green]done[/green] {title} ({time.perf_counter() - start:.1f} s)")


def check_model(name: str) -> Any:
    """The config of a causal language model in full precision.

    Raises:
        typer.BadParameter: another kind of model, a quantized one, or nothing of that name.
    """
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise typer.BadParameter(f"model: expected a path or a hub id, got {name!r}: {reason}") from None
    known = {
        member
        for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
        for member in ((names,) if isinstance(names, str) else names)
    }
    found = config.architectures or [f"{config.model_type}, without an architecture in its config"]
    if not known.intersection(found):
        raise typer.BadParameter(
            f"model: expected a causal language model (a class in AutoModelForCausalLM), "
            f"got {', '.join(found)}; olive.quantize takes other models, but this demo generates text"
        )
    if getattr(config, "quantization_config", None) is not None:
        raise typer.BadParameter("model: expected a full-precision checkpoint, got one that is quantized")
    return config


def load(name: str | Path) -> Any:
    """A model for inference in bfloat16; a quantized checkpoint stays as it is stored."""
    model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=torch.bfloat16)
    return model.eval()


def whole_windows(tokens: Tensor, window: int, limit: int | None) -> Tensor:
    """The tokens [T] of the first full windows; what is left at the end does not count."""
    count = min(len(tokens) // window, limit or len(tokens))
    if not count:
        raise typer.BadParameter(f"text: expected at least {window} tokens, got {len(tokens)}")
    return tokens[: count * window]


def generate(
    model: Any, prompt: dict[str, Tensor], new_tokens: int, repetition_penalty: float = 1.0
) -> tuple[Tensor, float]:
    """Greedy continuation, and the tokens per second it was written with."""
    options = GenerationConfig(
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,  # every run writes as many, whatever the model says
        do_sample=False,
        repetition_penalty=repetition_penalty,
        eos_token_id=model.generation_config.eos_token_id,
        pad_token_id=0,  # nothing is padded
    )
    start = time.perf_counter()
    written = model.generate(**prompt, generation_config=options)
    return written[0], new_tokens / (time.perf_counter() - start)


def speeds(models: tuple[Any, ...], prompt: dict[str, Tensor], new_tokens: int) -> list[float]:
    """Tokens per second of each model: the best of several runs, in turns: other load hits all alike."""
    best = [0.0] * len(models)
    start = time.perf_counter()
    run = 0
    while run < MIN_RUNS or (run < MAX_RUNS and time.perf_counter() - start < SECONDS):
        now = [generate(model, prompt, new_tokens)[1] for model in models]
        best = [max(speed) for speed in zip(best, now, strict=True)]
        run += 1
    return best


def sizes_on_disk(folder: Path) -> tuple[int, int]:
    """Bytes of packed weights, and of all weight files, from the headers of the checkpoint."""
    packed = total = 0
    for file in folder.glob("*.safetensors"):
        total += file.stat().st_size
        with file.open("rb") as stream:
            header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
        for name, entry in header.items():
            if name.rpartition(".")[2] in ("codes", "scale", "codebook"):
                packed += entry["data_offsets"][1] - entry["data_offsets"][0]
    return packed, total


def megabytes(count: int) -> str:
    """Bytes as text."""
    return f"{count / 1e6:,.2f} MB"


def result_table(name: str, before: Figures, after: Figures) -> Table:
    """One line per figure."""
    table = Table(title=f"{name}, before and after", title_justify="left", box=box.SIMPLE_HEAD)
    for column in ("", "bfloat16", "4-bit", "ratio"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    sizes = (("quantized layers on disk", "quantized_bytes"), ("whole model on disk", "model_bytes"))
    for title, key in sizes:
        old, new = getattr(before, key), getattr(after, key)
        table.add_row(title, megabytes(old), megabytes(new), f"{new / old:.3f}")
    others = (("bits per weight", "bits", 3), ("perplexity", "perplexity", 3))
    for title, key, digits in (*others, ("tokens per second", "speed", 1)):
        old, new = getattr(before, key), getattr(after, key)
        table.add_row(title, f"{old:.{digits}f}", f"{new:.{digits}f}", f"{new / old:.3f}")
    return table


def main(
    model: Annotated[str, typer.Argument(help="Causal language model: path or hub id.")] = str(BUNDLED),
    output: Annotated[Path, typer.Option(help="Folder for checkpoint and report.")] = Path("demo-output"),
    text: Annotated[Path, typer.Option(help="Text for the perplexity.")] = BUNDLED / "heldout.txt",
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of text to read; default all, 16 for large models.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
) -> None:
    """Quantize a language model and show what it costs and gains."""
    transformers.logging.set_verbosity_error()
    if Path(model).is_dir():
        transformers.logging.disable_progress_bar()  # of downloads there is none
    config = check_model(model)
    bundled = Path(model).resolve() == BUNDLED
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or 512
    window = BUNDLED_WINDOW if bundled else min(512, positions)

    with step(f"load {model} in bfloat16"):
        tokenizer = AutoTokenizer.from_pretrained(model)
        network = load(model)
        content = text.read_text(encoding="utf-8")
        tokens = tokenizer(content, add_special_tokens=False, verbose=False)["input_ids"]
        prompt = dict(tokenizer(PROMPT, return_tensors="pt", return_token_type_ids=False))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    large = parameters > LARGE
    limit = windows or (LARGE_WINDOWS if large else None)
    part = whole_windows(torch.tensor(tokens), window, limit)
    count = len(part) // window
    new_tokens = min(new_tokens, max(1, positions - prompt["input_ids"].shape[1]))

    with step(f"perplexity of the bfloat16 model, {count} windows of {window} tokens", spinner=False):
        perplexity_before = perplexity(network, part, window=window)
    try:
        with step("quantize to 4 bits with olive.quantize", spinner=False):
            olive.quantize(network)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
    with step(f"save to {output}"):
        network.save_pretrained(output)
        tokenizer.save_pretrained(output)
    with step("load it back and compare logits"):
        loaded = load(output)
        with torch.inference_mode():
            same = torch.equal(network(**prompt).logits, loaded(**prompt).logits)
        if not same:
            raise RuntimeError("logits: expected those of the model before saving, got others after loading")
        del network
        gc.collect()
    with step("perplexity of the 4-bit model", spinner=False):
        perplexity_after = perplexity(loaded, part, window=window)
    with step(f"generate {new_tokens} tokens with both models, several times"):
        # With a penalty: small models go in circles.
        written, _ = generate(loaded, prompt, new_tokens, repetition_penalty=1.3)
        # olive.quantize held both as well, so this takes no more memory than that.
        speed_before, speed_after = speeds((load(model), loaded), prompt, new_tokens)
    with step("write the report"):
        report = olive.report(loaded, progress=False)
        page = report.html(output / "report.html")

    packed, total = sizes_on_disk(output)
    before = Figures(2 * report.parameters, report.float_bytes, 16.0, perplexity_before, speed_before)
    after = Figures(packed, total, 8 * packed / report.parameters, perplexity_after, speed_after)
    console.print()
    console.print(result_table(Path(model).name, before, after))
    console.print(
        f"\n{report.quantized_share:.1%} of the parameters are quantized; {page} says which, how well, "
        f"and why the others are not.\nThe logits after loading equal those before saving, bit for bit."
    )
    if not large:
        console.print(
            "In a model this small most of the time goes into calling operators, not into reading weights: "
            "for the speed of layers of usual size see `make bench`."
        )
    console.print("\nThe 4-bit model writes (greedy, repetition penalty 1.3):\n")
    console.print(tokenizer.decode(written, skip_special_tokens=True), markup=False)
    console.print(
        f"\nNext: open {page}; load the model with `import olive` and "
        f'`AutoModelForCausalLM.from_pretrained("{output}")`; or run `make demo MODEL=<path or hub id>`.',
        markup=False,
    )


if __name__ == "__main__":
    sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # terminals without UTF-8
    typer.run(main)
