"""A saved model in a new process, and what a killed save leaves behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import olive
from tests.hf.tiny import logits, tiny_llama

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("save_load.py")
SHARDS = 5
MIXED = [
    "generation config",
    *(f"shard {number}" for number in range(SHARDS)),
]  # killed just before it wrote these
POINTS = ["config", "text of config", *MIXED, "index"]


@pytest.fixture(autouse=True, scope="module")
def quick() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("olive.ptq.grids.PAIR_GRID", (0.6, 0.9))
        patch.setattr("olive.ptq.grids.PLAIN_GRID", (0.8,))
        yield


def run(*arguments: object) -> None:
    command = [sys.executable, "-W", "error", str(SCRIPT), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr


def quantized(seed: int) -> nn.Module:
    return olive.quantize(tiny_llama(seed), olive.QuantConfig(group_size=32))


def save(model: nn.Module, path: Path) -> None:
    model.save_pretrained(path, max_shard_size="16KB")
    assert len(list(path.glob("*.safetensors"))) == SHARDS


@pytest.mark.parametrize("order", ["before", "after"])
def test_logits_in_a_new_process_are_the_same_bits(order: str, tmp_path: Path) -> None:
    model = quantized(0)
    save(model, tmp_path / "stored")
    run("load", tmp_path / "stored", order, tmp_path / "logits")
    many, single = torch.load(tmp_path / "logits")
    assert torch.equal(many, logits(model))
    with torch.no_grad():
        assert torch.equal(single, torch.cat([model(torch.tensor([[token]])).logits for token in (5, 9)]))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """For each point of a save: what a kill there left in an empty folder, and on top of an older save."""
    base = tmp_path_factory.mktemp("killed")
    save(quantized(0), base / "older")
    found: dict[str, tuple[Path, Path]] = {}
    for point in POINTS:
        found[point] = base / f"{point} empty", base / f"{point} over"
        shutil.copytree(base / "older", found[point][1])
    run("save", 1, *(f"{point}:{path}" for point, paths in found.items() for path in paths))
    return found


@pytest.mark.parametrize("point", POINTS)
def test_a_killed_save_into_an_empty_folder_does_not_load(
    killed: dict[str, tuple[Path, Path]], point: str
) -> None:
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(killed[point][0])


def test_a_save_killed_before_it_wrote_anything_leaves_the_older_one(
    killed: dict[str, tuple[Path, Path]],
) -> None:
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(killed["config"][1])), logits(quantized(0))
    )


@pytest.mark.parametrize("point", MIXED)
def test_a_save_killed_on_top_of_an_older_one_does_not_load(
    killed: dict[str, tuple[Path, Path]], point: str
) -> None:
    with pytest.raises(ValueError, match=r"safetensors: expected a file of save .* save the model again"):
        AutoModelForCausalLM.from_pretrained(killed[point][1])


@pytest.mark.parametrize("point", ["text of config", "index"])
def test_a_save_killed_inside_a_json_file_does_not_load(
    killed: dict[str, tuple[Path, Path]], point: str
) -> None:
    with pytest.raises((OSError, ValueError)):
        AutoModelForCausalLM.from_pretrained(killed[point][1])


def test_a_single_file_left_over_from_an_older_save_is_found(tmp_path: Path) -> None:
    quantized(0).save_pretrained(tmp_path)
    save_over = quantized(1)
    save_over.save_pretrained(
        tmp_path, max_shard_size="16KB"
    )  # transformers leaves model.safetensors, and prefers it
    assert (tmp_path / "model.safetensors").exists()
    with pytest.raises(ValueError, match=r"model\.safetensors: expected a file of save"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
