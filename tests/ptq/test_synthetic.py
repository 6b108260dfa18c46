"""Calibration data out of the model: who writes it, what it holds, what it is good for, what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import olive
from olive.eval import compare_causal
from olive.nn import OVPExperts
from tests import models
from tests.models import VOCABULARY

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "tiny_llama"


class Counting(nn.Module):
    """Predicts the successor of each token, without a cache; has more logits than tokens."""

    def __init__(self, bos: int | None = 3, best: float = 1e4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.config = SimpleNamespace(bos_token_id=bos, max_position_embeddings=8)
        self.best = best
        self.lengths: list[int] = []

    def can_generate(self) -> bool:
        return True

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.lengths.append(input_ids.shape[1])
        logits = self.best * nn.functional.one_hot((input_ids + 1) % 10, 12).float()
        logits[..., 10:] = 2 * abs(self.best)
        return SimpleNamespace(logits=logits)


def _tokens(windows: list[Tensor]) -> list[list[int]]:
    assert all(one.dtype == torch.int64 and one.shape[0] == 1 for one in windows)
    return [one[0].tolist() for one in windows]


def test_a_causal_model_writes_from_its_first_token() -> None:
    model = Counting()
    assert model.training
    assert _tokens(olive.synthetic_windows(model, window=5, count=2)) == 2 * [[3, 4, 5, 6, 7]]
    assert model.training
    assert model.lengths == [1, 2, 3, 4]


@pytest.mark.parametrize("bos", [None, 11])
def test_without_a_first_token_one_is_drawn(bos: int | None) -> None:
    found = _tokens(olive.synthetic_windows(Counting(bos), window=3, count=40))
    assert all(one == [one[0], (one[0] + 1) % 10, (one[0] + 2) % 10] for one in found)
    assert len(found) == 40  # more than are written at once, and no multiple
    assert {one[0] for one in found} == set(range(10))


def test_tokens_are_drawn_by_their_probability() -> None:
    # The successor with odds of e^2 against each of nine others: 0.45.
    found = _tokens(olive.synthetic_windows(Counting(best=2.0), window=8, count=100))
    share = sum(one[i + 1] == (one[i] + 1) % 10 for one in found for i in range(7)) / 700
    assert abs(share - 0.451) <= 4 * (0.451 * 0.549 / 700) ** 0.5  # four standard deviations


@pytest.mark.parametrize("make", [models.llama, models.qwen3, models.gpt2, models.bloom])
def test_a_cache_changes_nothing(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make().double()
    state = torch.random.get_rng_state()
    expected = _tokens(olive.synthetic_windows(model, window=12, count=3, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert expected != _tokens(olive.synthetic_windows(model, window=12, count=3, seed=2))
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda **given: SimpleNamespace(logits=forward(**{**given, "use_cache": False}).logits),
    )
    assert _tokens(olive.synthetic_windows(model, window=12, count=3, seed=1)) == expected


@pytest.mark.parametrize("make", [models.bert, models.bart])
def test_other_models_get_random_tokens(make: Any) -> None:
    model = make()
    found = olive.synthetic_windows(model, window=50, count=20)
    assert [tuple(one.shape) for one in found] == 20 * [(1, 50)]
    counts = torch.bincount(torch.cat(found, 1)[0], minlength=VOCABULARY)
    assert len(counts) == VOCABULARY
    assert bool((counts > 0).all())  # 1000 draws of 97: one is left out once in 300 seeds
    assert _tokens(found) == _tokens(olive.synthetic_windows(model, window=50, count=20))


def test_as_many_windows_as_hold_16384_tokens() -> None:
    drawn = olive.synthetic_windows(models.bert())
    assert [tuple(one.shape) for one in drawn] == 512 * [(1, 32)]
    written = olive.synthetic_windows(Counting())  # its context holds 8 tokens
    assert [tuple(one.shape) for one in written] == 2048 * [(1, 8)]


def test_every_expert_is_reached() -> None:
    model = models.mixtral()
    data = olive.synthetic_windows(model, window=64, count=8)
    # An expert with too little data would be a warning, and warnings are errors.
    olive.quantize(model, olive.QuantConfig(method="gptq"), calibration=data)
    assert any(isinstance(module, OVPExperts) for module in model.modules())


def test_gptq_on_its_own_text_loses_less_than_half() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reference = AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    data = olive.synthetic_windows(reference, window=128, count=8)
    text = (TINY_LLAMA / "heldout.txt").read_text()[-4000:]
    skip = ("lm_head", "layers.1", "layers.2", "layers.3")  # one layer of four will do
    found = []
    for method, calibration in (("search", None), ("gptq", data)):
        model = copy.deepcopy(reference)
        olive.quantize(model, olive.QuantConfig(method=method, skip=skip), calibration=calibration)
        tokenizer = AutoTokenizer.from_pretrained(TINY_LLAMA)
        found.append(compare_causal(model, reference, text, tokenizer=tokenizer, window=256).kl_divergence)
    assert found[1] <= 0.5 * found[0]  # 0.24 with windows of 256 tokens


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"model: expected a torch.nn.Module, got str"):
        olive.synthetic_windows("model")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model: expected one with a vocabulary to draw from, got Linear"):
        olive.synthetic_windows(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="model: expected one with a vocabulary to draw from, got ViT"):
        olive.synthetic_windows(models.vit())
    with pytest.raises(ValueError, match="model: expected weights with values, got the meta device"):
        olive.synthetic_windows(Counting().to("meta"))
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        olive.synthetic_windows(Counting(), window=0)
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        olive.synthetic_windows(Counting(), window=1, count=0)
    with pytest.raises(ValueError, match="window: expected at most the model's context of 8 tokens, got 9"):
        olive.synthetic_windows(Counting(), window=9)
    with pytest.raises(ValueError, match="model: expected finite predictions, got NaN or Inf"):
        olive.synthetic_windows(Counting(best=float("nan")), window=2)
