"""Tiny checkpoints for the transformers integration. The scale search tries few candidates."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from torch import nn

import olive
from tests.hf.tiny import tiny_llama


@pytest.fixture(autouse=True)
def quick_and_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("olive.ptq.grids.PAIR_GRID", (0.6, 0.9))
    monkeypatch.setattr("olive.ptq.grids.PLAIN_GRID", (0.8,))
    transformers.utils.logging.disable_progress_bar()


@pytest.fixture
def config() -> olive.QuantConfig:
    return olive.QuantConfig(group_size=32)


@pytest.fixture
def llama() -> nn.Module:
    return tiny_llama()


@pytest.fixture
def stored(llama: nn.Module, config: olive.QuantConfig, tmp_path: Path) -> Path:
    """A saved quantized Llama."""
    olive.quantize(llama, config).save_pretrained(tmp_path / "stored")
    return tmp_path / "stored"
