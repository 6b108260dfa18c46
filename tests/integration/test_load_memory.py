"""Peak memory of quantizing while loading, of loading and of saving, measured in processes of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

MIB = 1 << 20
SCRIPT = Path(__file__).with_name("load_memory.py")
SLACK = 500 * MIB  # what quantizing may take above the result and one shard

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory figures are read from /proc")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random bf16 checkpoint of about 580 MB in shards of at most 200 MB: wide layers, few words."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("full_precision")
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=3,
        num_attention_heads=24,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=generator).to(torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            # The same numbers over and over: making 300 M new ones takes longer than the test.
            parameter.copy_(
                noise.repeat(-(-parameter.numel() // noise.numel()))[: parameter.numel()].view_as(parameter)
            )
    model.save_pretrained(path, max_shard_size="200MB")
    return path


def measure(mode: str, path: Path, target: Path) -> dict[str, int]:
    """Run the script and return its figures in bytes."""
    command = [sys.executable, str(SCRIPT), mode, str(path), str(target)]
    environment = {"PYTHONPATH": ":".join(sys.path), "OMP_NUM_THREADS": "2", "PATH": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    assert done.returncode == 0, done.stderr
    figures: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    print(mode, {key: f"{value / MIB:.0f} MiB" for key, value in figures.items()})
    return figures


def largest_shard(path: Path) -> int:
    shards = sorted(path.glob("*.safetensors"))
    assert len(shards) > 2
    return max(shard.stat().st_size for shard in shards)


def test_peak_memory_of_quantizing_while_loading_of_loading_and_of_saving(
    checkpoint: Path, tmp_path: Path
) -> None:
    figures = measure("quantize_while_loading", checkpoint, tmp_path / "stored")
    total = sum(shard.stat().st_size for shard in checkpoint.glob("*.safetensors"))
    assert figures["model"] < 0.27 * total
    above = figures["peak"] - figures["before"] - figures["model"]
    assert above < largest_shard(checkpoint) + SLACK

    figures = measure("load_and_save", tmp_path / "stored", tmp_path / "again")
    above = figures["peak"] - figures["before"] - figures["model"]
    assert above < 0.8 * figures["model"], "loading held the model in both layouts"
    assert figures["save_peak"] - figures["save_before"] < 80 * MIB, "saving copied the model"
