"""`olive.eval.perplexity`: against a plain loop, its protocols, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import olive.eval.scoring
from olive.eval import perplexity
from tests import models
from tests.eval.fixed import Fixed, text


def by_hand(model: nn.Module, tokens: Tensor, window: int) -> float:
    losses = []
    for start in range(0, len(tokens) - window + 1, window):
        part = tokens[start : start + window]
        with torch.no_grad():
            log_p = model(part[None]).logits[0].double().log_softmax(-1)
        losses += [-log_p[i, part[i + 1]].item() for i in range(window - 1)]
    return math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_full_windows_are_scored_from_the_second_token_on(name: str, batch_size: int | None) -> None:
    model, tokens = models.build(name), text(3 * 16 + 7)
    expected = by_hand(model, tokens, 16)
    for shape in (tokens, tokens[None]):
        found = perplexity(model, shape, window=16, batch_size=batch_size)
        # Losses are rounded to float32; sums run in another order where windows are batched.
        assert abs(found - expected) <= 1e-5 * expected


def test_of_a_uniform_model_is_its_vocabulary() -> None:
    assert abs(perplexity(Fixed(torch.zeros(50)), text(64) % 50, window=32) - 50) <= 1e-4


def test_protocols_have_windows_of_their_own() -> None:
    model, tokens = Fixed(torch.randn(models.VOCABULARY)), text(2 * 2048 + 1500)
    figures = {}
    for protocol, count, window in (("standard", 2, 2048), ("paper", 5, 1024)):
        model.shapes.clear()
        figures[protocol] = perplexity(model, tokens, protocol=protocol)  # type: ignore[arg-type]
        assert sum(shape[0] for shape in model.shapes) == count
        assert {shape[1] for shape in model.shapes} == {window}
    assert figures["standard"] == perplexity(model, tokens)
    assert figures["standard"] != figures["paper"]


def test_windows_are_batched_up_to_a_number_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Fixed(torch.zeros(8))
    model.config = type("Config", (), {"vocab_size": 8})()  # type: ignore[assignment]
    monkeypatch.setattr(olive.eval.scoring, "_RUN_LOGITS", 8 * 16 * 3)
    perplexity(model, text(5 * 16) % 8, window=16)
    assert model.shapes == [(3, 16), (2, 16)]


def test_losses_in_chunks_add_up_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = models.build("llama"), text(64)
    expected = perplexity(model, tokens, window=32)
    for rows in (1, 5):
        monkeypatch.setattr(olive.eval.scoring, "_CHUNK_LOGITS", rows * models.VOCABULARY)
        assert abs(perplexity(model, tokens, window=32) - expected) <= 1e-6 * expected


def test_a_text_is_tokenized_without_special_tokens() -> None:
    def tokenizer(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens and not verbose
        return {"input_ids": [ord(letter) % 8 for letter in text]}

    model, words = Fixed(torch.arange(8.0)), "outliers and their victims"
    tokens = torch.tensor([ord(letter) % 8 for letter in words])
    assert perplexity(model, words, tokenizer=tokenizer, window=8) == perplexity(model, tokens, window=8)


def test_training_flags_are_restored_and_nothing_else_changes() -> None:
    model = models.build("llama").train()
    model.model.layers[0].eval()  # type: ignore[union-attr,index,operator]
    flags = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    perplexity(model, text(32), window=16)
    with pytest.raises(ValueError, match="tokens: expected ids"):
        perplexity(model, text(32) + 1000, window=16)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(value.grad is None and not value.is_inference() for value in model.parameters())


def test_nan_is_an_error_that_names_the_window() -> None:
    model = models.build("llama")
    tokens = text(48) % 90
    tokens[40] = 95
    with torch.no_grad():
        model.get_input_embeddings().weight[95] = math.nan  # type: ignore[operator]
    with pytest.raises(ValueError, match="model: expected a finite loss, got NaN in window 2; a weight or"):
        perplexity(model, tokens, window=16)
    assert math.isfinite(perplexity(model, tokens[:32], window=16))


@pytest.mark.parametrize("worst", [-math.inf, -5000.0])
def test_ruled_out_tokens_are_infinitely_perplexing(worst: float) -> None:
    logits = torch.full((8,), worst)
    logits[0] = 0.0
    assert perplexity(Fixed(logits), torch.arange(8), window=8) == math.inf


def test_a_short_context_needs_a_window() -> None:
    model = models.build("llama")  # of 64 positions
    message = "window: expected at most the model's max_position_embeddings, 64, got 1024 of protocol"
    with pytest.raises(ValueError, match=message):
        perplexity(model, text(4096), protocol="paper")
    assert perplexity(model, text(128), window=64) > 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": text(15)}, ValueError, "tokens: expected at least one window of 16, got 15"),
        ({"tokens": torch.full((16,), -1)}, ValueError, "tokens: expected ids from 0, below 97, got -1"),
        ({"tokens": text(32).int()}, TypeError, "tokens: expected int64, got torch.int32"),
        ({"tokens": text(32).view(2, 16)}, ValueError, r"tokens: .* \[T\] or \[1, T\], got \[2, 16\]"),
        ({"tokens": [1, 2]}, TypeError, "tokens: expected a tensor or a text, got list"),
        ({"tokens": "a text"}, TypeError, "tokenizer: expected one, because tokens is a text, got None"),
        ({"window": 1}, ValueError, "window: expected at least 2 tokens, got 1"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"protocol": "fast"}, ValueError, "protocol: expected 'standard' or 'paper', got 'fast'"),
        ({"model": len}, TypeError, "model: expected a torch.nn.Module, got builtin_function_or_method"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments = {"model": models.build("llama"), "tokens": text(32), "window": 16, **options}
    with pytest.raises(error, match=message):
        perplexity(**arguments)


def test_models_without_logits_are_refused() -> None:
    class Encoder(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return input_ids.float()

    with pytest.raises(TypeError, match=r"model: expected a causal language model, .* got Encoder"):
        perplexity(Encoder(), text(32), window=16)
