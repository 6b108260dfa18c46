"""The decode loop of the GPU bench generates what `model.generate` does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import olive
from bench.gpu.decoder import StaticDecoder
from bench.models import TINY, random_llama


@pytest.fixture(scope="module", params=["float", "quantized"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    made = random_llama(TINY).float()
    if request.param == "quantized":
        olive.quantize(made, progress=False)
    return made


def prompt(batch: int) -> Tensor:
    return torch.randint(0, TINY["vocab_size"], (batch, 5), generator=torch.Generator().manual_seed(batch))


@pytest.mark.parametrize("batch", [1, 3])
@torch.inference_mode()
def test_tokens_are_those_of_generate(model: Any, batch: int) -> None:
    tokens = prompt(batch)
    options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None
    expected = model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[:, 5:]
    decoder = StaticDecoder(model, batch, 5 + 12)
    assert torch.equal(decoder.generate(tokens, 12), expected)
    assert torch.equal(decoder.generate(tokens, 12), expected), "starting again forgets the first generation"


@torch.inference_mode()
def test_a_given_step_is_used(model: Any) -> None:
    decoder = StaticDecoder(model, 1, 32)
    steps = []

    def step() -> None:
        steps.append(decoder.tokens.data_ptr())
        decoder.step()

    plain = decoder.generate(prompt(1), 6)
    assert torch.equal(decoder.generate(prompt(1), 6, step), plain)
    assert len(steps) == 5
    assert len(set(steps)) == 1, "a graph reads and writes one tensor"
