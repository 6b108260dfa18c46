"""Train the bundled model: a small Llama on the sources of the Python standard library.

The text is on every machine that has Python, so the checkpoint in ``examples/tiny_llama`` can be made again
anywhere, without a download:

    python examples/train_tiny_llama.py --minutes 44 --out my_tiny_llama

The held-out text is the exception: it is bundled as ``heldout.txt``, because the standard library differs
from one Python version to the next and the perplexity has to be the same figure everywhere.
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import math
import platform
import shutil
import sysconfig
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

BUNDLED = Path(__file__).resolve().parent / "tiny_llama"
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 1024
WINDOW = 256
PROGRESS = "progress.json"  # beside an unfinished checkpoint, so that --resume can count on

# Directories that are not the library itself: its tests, what is installed beside it, and build leftovers.
SKIPPED_DIRECTORIES = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
HELDOUT_ONE_IN = 25
HELDOUT_BYTES = 180_000
HELDOUT_FILE_BYTES = (2_000, 40_000)


# --- text -------------------------------------------------------------------------------------------------


def is_library_file(name: str, text: str) -> bool:
    """Leave out what no one wrote by hand: code-page tables, and build settings that hold local paths."""
    parts = name.split("/")
    if SKIPPED_DIRECTORIES & set(parts) or any(
        part.startswith(("config-", "_sysconfigdata")) for part in parts
    ):
        return False
    return "gencodec.py" not in text


def as_text(name: str, source: str) -> str:
    """Return the source itself, or for the language reference the prose that its string literals hold."""
    if name != "pydoc_data/topics.py":
        return source
    tables = [node.value for node in ast.parse(source).body if isinstance(node, ast.Assign | ast.AnnAssign)]
    topics: dict[str, str] = ast.literal_eval(tables[0])  # type: ignore[arg-type]
    return "\n\n".join(text.strip() for text in topics.values()) + "\n"


def read_library() -> dict[str, str]:
    """Map the relative path of each file of the standard library to its text, in a stable order."""
    root = Path(sysconfig.get_paths()["stdlib"])
    library: dict[str, str] = {}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a few old files declare another encoding
            continue
        if source.strip() and is_library_file(name, source):
            library[name] = as_text(name, source)
    return library


def path_hash(name: str) -> int:
    """Hash a relative path the same way in every process and on every machine (``hash()`` does not)."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def is_held_out(name: str) -> bool:
    """Choose whole files by name alone, so that the choice survives edits and other Python versions."""
    return path_hash(name) % HELDOUT_ONE_IN == 0


def choose_heldout(library: dict[str, str]) -> list[str]:
    """Pick the files of the bundled sample; the size limits keep one file from dominating the figure."""
    names: list[str] = []
    total = 0
    smallest, largest = HELDOUT_FILE_BYTES
    for name in sorted(filter(is_held_out, library), key=path_hash):
        size = len(library[name].encode())
        if smallest <= size <= largest and total + size <= HELDOUT_BYTES:
            names.append(name)
            total += size
    return names


def long_lines(text: str) -> list[str]:
    """Return the lines that are long enough to tell one file from another."""
    return [line for line in map(str.strip, text.splitlines()) if len(line) > 40]


def training_files(library: dict[str, str], heldout: str) -> dict[str, str]:
    """Drop the held-out files by name, and by content those that another Python version has moved."""
    known = set(long_lines(heldout))
    kept: dict[str, str] = {}
    for name, text in library.items():
        if is_held_out(name):
            continue
        lines = long_lines(text)
        shared = sum(line in known for line in lines)
        if shared > max(8, len(lines) // 5):  # a few shared lines are boilerplate
            print(f"left out of training, {shared} of {len(lines)} long lines are held out: {name}")
            continue
        kept[name] = text
    return kept


# --- tokenizer --------------------------------------------------------------------------------------------


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: from bytes any text can be made, so decoding gives back what went in."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        clean_up_tokenization_spaces=False,
        model_max_length=512,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Save the tokenizer under the class name that old and new versions of transformers both know."""
    tokenizer.save_pretrained(out)
    path = out / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def encode(tokenizer: Any, text: str) -> torch.Tensor:
    """Encode without special tokens; the backend is called directly because a long text is meant here."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def encode_files(tokenizer: Any, files: dict[str, str]) -> torch.Tensor:
    """Encode the files as one stream in which the end-of-text token marks where each one begins."""
    start = torch.tensor([tokenizer.bos_token_id])
    return torch.cat([part for text in files.values() for part in (start, encode(tokenizer, text))])


# --- model and training -----------------------------------------------------------------------------------


def build_model(end_of_text: int) -> LlamaForCausalLM:
    """Build the untrained model: a real Llama block (grouped queries, gated MLP), only small."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
        use_cache=True,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=end_of_text, pad_token_id=end_of_text
    )
    return model


def save_model(model: LlamaForCausalLM, out: Path) -> None:
    """Save a bfloat16 copy and leave the float32 master weights as they are."""
    copy.deepcopy(model).bfloat16().save_pretrained(out)


def build_optimizers(
    model: LlamaForCausalLM, kind: str, lr: float, workers: int
) -> list[torch.optim.Optimizer]:
    """Decay the matrices only: shrinking norm gains or embeddings of rare tokens does not regularise."""
    embedding = model.get_input_embeddings().weight
    matrices = [p for p in model.parameters() if p.ndim == 2 and p is not embedding]
    others = [p for p in model.parameters() if p.ndim != 2 or p is embedding]
    if kind == "muon":
        adamw = torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        shares = [matrices[first::workers] for first in range(workers)]  # Muon is dear: one share per worker
        return [
            adamw,
            *(torch.optim.Muon(m, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw") for m in shares),
        ]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), fused=True)]


def batches(tokens: torch.Tensor, size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Yield shuffled windows for ever; a new offset per epoch cuts the stream at other places each time."""
    while True:
        offset = int(torch.randint(WINDOW, (1,), generator=generator))
        count = (len(tokens) - offset - 1) // WINDOW
        order = torch.randperm(count, generator=generator)
        for chosen in order[: count - count % size].split(size):
            yield torch.stack([tokens[offset + i * WINDOW :][: WINDOW + 1] for i in chosen.tolist()])


def schedule(progress: float, warmup: float = 0.02, floor: float = 0.02) -> float:
    """Return the factor on the learning rate: linear warmup, then a cosine down to a small floor."""
    if progress < warmup:
        return max(progress / warmup, 0.01)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


@torch.no_grad()
def mean_loss(model: Any, tokens: torch.Tensor, batch: int = 32) -> float:
    """Return the mean negative log-likelihood, in nats, of every token but the first of each full window."""
    model.eval()
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    total = 0.0
    for part in windows.split(batch):
        logits = model(input_ids=part, use_cache=False).logits[:, :-1].float()
        total += F.cross_entropy(
            logits.reshape(-1, VOCAB_SIZE), part[:, 1:].reshape(-1), reduction="sum"
        ).item()
    model.train()
    return total / (windows.shape[0] * (WINDOW - 1))


@dataclass
class Run:
    """What training has used up so far."""

    steps: int = 0
    tokens: int = 0
    minutes: float = 0.0


def train(
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    heldout: torch.Tensor,
    args: argparse.Namespace,
    before: Run,
) -> Run:
    """Train until the minutes or the steps are used up; the schedule follows whichever is further on.

    Each worker thread takes a slice of the batch through forward and backward, and autograd adds up the
    gradients. The workers meet once a step, where threads inside the operators would meet at every operator,
    so a core that is busy with something else holds up far less.
    """
    forward = torch.compile(model) if args.compile else model
    optimizers = build_optimizers(model, args.optimizer, args.lr, args.threads)

    def backward(part: torch.Tensor) -> float:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.autocast):
            logits = forward(input_ids=part[:, :-1], use_cache=False).logits
            loss = F.cross_entropy(logits.float().view(-1, VOCAB_SIZE), part[:, 1:].reshape(-1))
        loss = loss * (len(part) / args.batch)
        loss.backward()
        return float(loss.item())

    generator = torch.Generator().manual_seed(args.seed + before.steps)
    sample = heldout[: 64 * WINDOW]  # a part is enough to watch, and costs little of the time
    running, logged, step = 0.0, 0, 0
    run = before
    started = time.monotonic()
    next_log = started + args.log_seconds
    model.train()
    with ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for batch in batches(tokens, args.batch, generator):
            elapsed = (time.monotonic() - started) / 60
            run = Run(
                before.steps + step, before.tokens + step * args.batch * WINDOW, before.minutes + elapsed
            )
            progress = max(elapsed / args.minutes, step / args.steps if args.steps else 0.0)
            if progress >= 1:
                break
            if time.monotonic() >= next_log:
                print(
                    f"{run.minutes:6.2f} min  step {run.steps:6d}  {run.tokens / 1e6:6.2f} M tokens  "
                    f"lr {args.lr * schedule(progress):.2e}  train {running / max(logged, 1):.4f}  "
                    f"held-out {mean_loss(model, sample):.4f}",
                    flush=True,
                )
                save_model(model, args.out)
                (args.out / PROGRESS).write_text(json.dumps(asdict(run)), encoding="utf-8")
                running, logged = 0.0, 0
                next_log = time.monotonic() + args.log_seconds
            running += sum(pool.map(backward, batch.chunk(args.threads)))
            logged, step = logged + 1, step + 1
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = args.lr * schedule(progress)
            list(pool.map(lambda optimizer: optimizer.step(), optimizers))
            model.zero_grad()
    return run


# --- figures ----------------------------------------------------------------------------------------------


def unigram_loss(train_tokens: torch.Tensor, heldout: torch.Tensor) -> float:
    """Score the same held-out tokens by their frequency in training (add-one): what a model must beat."""
    counts = torch.bincount(train_tokens, minlength=VOCAB_SIZE).double() + 1
    windows = heldout[: len(heldout) // WINDOW * WINDOW].view(-1, WINDOW)
    return -(counts / counts.sum()).log()[windows[:, 1:]].mean().item()


def figures(loss: float, tokens_per_byte: float) -> dict[str, float]:
    """Express a mean loss per token as perplexity, and per byte so that other tokenizers can be compared."""
    return {
        "perplexity": round(math.exp(loss), 4),
        "nats_per_token": round(loss, 5),
        "bits_per_byte": round(loss / math.log(2) * tokens_per_byte, 4),
    }


def evaluate(out: Path, train_tokens: torch.Tensor, heldout: str) -> dict[str, Any]:
    """Score the checkpoint as it was saved, through the same calls that a user of it makes."""
    tokens = encode(AutoTokenizer.from_pretrained(out), heldout)
    size = len(heldout.encode())
    ratio = len(tokens) / size
    return {
        "heldout_bytes": size,
        "heldout_tokens": len(tokens),
        "scored_tokens": len(tokens) // WINDOW * (WINDOW - 1),
        "window": WINDOW,
        "unigram": figures(unigram_loss(train_tokens, tokens), ratio),
        "trained_float32": figures(
            mean_loss(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), tokens), ratio
        ),
        "trained_bfloat16": figures(
            mean_loss(AutoModelForCausalLM.from_pretrained(out, dtype=torch.bfloat16), tokens), ratio
        ),
    }


def print_table(result: dict[str, Any]) -> None:
    """Print the figures side by side."""
    print(f"\n{'held-out text':<34}{'perplexity':>12}{'bits/byte':>12}")
    for key, label in {
        "unigram": "unigram",
        "trained_float32": "trained, bf16 weights in float32",
        "trained_bfloat16": "trained, bf16 weights in bfloat16",
    }.items():
        print(f"{label:<34}{result[key]['perplexity']:>12.3f}{result[key]['bits_per_byte']:>12.4f}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=44.0, help="training time, wall-clock")
    parser.add_argument("--steps", type=int, default=0, help="stop after so many steps (0: by time alone)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=BUNDLED, help="directory of the checkpoint")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, default=16, help="windows of 256 tokens per step")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="muon")
    parser.add_argument(
        "--autocast", action=argparse.BooleanOptionalAction, default=True, help="compute in bfloat16"
    )
    parser.add_argument(
        "--compile", action="store_true", help="use torch.compile (a fifth faster, needs a C++ compiler)"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the weights in --out (new schedule, fresh optimizer)",
    )
    parser.add_argument("--log-seconds", type=float, default=60.0, help="time between log lines and saves")
    return parser.parse_args()


def main() -> None:
    """Read the text, train the tokenizer and the model, then score what was saved."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    transformers.logging.disable_progress_bar()
    args.out.mkdir(parents=True, exist_ok=True)

    library = read_library()
    bundled = BUNDLED / "heldout.txt"
    if not bundled.exists():
        names = choose_heldout(library)
        bundled.parent.mkdir(parents=True, exist_ok=True)
        bundled.write_bytes("".join(library[name] for name in names).encode())
        print("held-out sample:", *names, sep="\n  ")
    if not (args.out / bundled.name).exists():
        shutil.copyfile(bundled, args.out / bundled.name)
    heldout = bundled.read_bytes().decode()  # as bytes: line ends must not be translated
    files = training_files(library, heldout)

    save_tokenizer(train_tokenizer(iter(files.values())), args.out)
    tokenizer = AutoTokenizer.from_pretrained(args.out)
    tokens = encode_files(tokenizer, files)
    heldout_tokens = encode(tokenizer, heldout)
    if tokenizer.decode(heldout_tokens.tolist()) != heldout:
        raise RuntimeError("the tokenizer does not give back the text it encoded")
    model = build_model(tokenizer.bos_token_id)
    size = sum(len(text.encode()) for text in files.values())
    print(
        f"{len(files)} files, {size / 1e6:.2f} MB, {len(tokens) / 1e6:.2f} M tokens to train on; "
        f"{len(heldout_tokens)} tokens held out; {model.num_parameters() / 1e6:.2f} M parameters",
        flush=True,
    )

    before = Run()
    if args.resume:
        model.load_state_dict(
            AutoModelForCausalLM.from_pretrained(args.out, dtype=torch.float32).state_dict()
        )
        before = Run(**json.loads((args.out / PROGRESS).read_text(encoding="utf-8")))
    run = train(model, tokens, heldout_tokens, args, before)
    save_model(model, args.out)
    result = evaluate(args.out, tokens, heldout)
    print_table(result)
    record = {
        "parameters": model.num_parameters(),
        "training": {
            "files": len(files),
            "bytes": size,
            "tokens": len(tokens),
            "tokens_seen": run.tokens,
            "epochs": round(run.tokens / len(tokens), 2),
            "steps": run.steps,
            "resumed_at_step": before.steps,
            "minutes": round(run.minutes, 1),
            "threads": args.threads,
            "seed": args.seed,
            "optimizer": args.optimizer,
            "learning_rate": args.lr,
            "batch_windows": args.batch,
            "bfloat16_autocast": args.autocast,
        },
        "heldout": result,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
    }
    (args.out / PROGRESS).unlink(missing_ok=True)
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"\n{run.tokens / 1e6:.1f} M tokens in {run.minutes:.1f} minutes")


if __name__ == "__main__":
    main()
