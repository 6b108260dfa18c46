"""`olive.eval.compare_causal`: against NumPy in float64, in chunks, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import olive
import olive.eval.scoring
from olive.eval import CausalComparison, compare_causal, perplexity
from tests import models
from tests.eval.fixed import Fixed, text


def pair(noise: float = 0.03) -> tuple[Any, Any]:
    """A tiny Llama whose weights are a little off, and the Llama itself."""
    reference = models.build("llama")
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
    return model, reference


def log_probabilities(model: Any, tokens: Tensor, window: int) -> np.ndarray:
    """float64 [windows, W - 1, V], of the predictions that are scored."""
    with torch.no_grad():
        logits = model(tokens[: len(tokens) // window * window].view(-1, window)).logits
    wide = logits.numpy().astype(np.float64)[:, :-1]
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


def by_hand(model: Any, reference: Any, tokens: Tensor, window: int) -> CausalComparison:
    log_q, log_p = (log_probabilities(one, tokens, window) for one in (model, reference))
    expected = tokens[: len(tokens) // window * window].view(-1, window)[:, 1:, None].numpy()
    losses = [-np.take_along_axis(one, expected, -1).mean() for one in (log_q, log_p)]
    return CausalComparison(
        perplexity=math.exp(losses[0]),
        reference_perplexity=math.exp(losses[1]),
        kl_divergence=float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean()),
        agreement=float((log_q.argmax(-1) == log_p.argmax(-1)).mean()),
        windows=len(expected),
        tokens=expected.size,
    )


def check_close(found: CausalComparison, expected: CausalComparison) -> None:
    assert (found.windows, found.tokens) == (expected.windows, expected.tokens)
    assert found.agreement == expected.agreement
    # Logits of a few units are rounded to float32, at another place where windows are batched.
    assert abs(found.perplexity - expected.perplexity) <= 1e-5 * expected.perplexity
    assert abs(found.reference_perplexity - expected.reference_perplexity) <= 1e-5 * expected.perplexity
    assert abs(found.kl_divergence - expected.kl_divergence) <= 1e-4 * expected.kl_divergence


@pytest.mark.parametrize("batch_size", [None, 1, 2])
def test_figures_are_those_of_numpy(batch_size: int | None) -> None:
    model, reference = pair()
    tokens = text(3 * 16 + 7)
    expected = by_hand(model, reference, tokens, 16)
    assert expected.kl_divergence > 1e-3 and 0.1 < expected.agreement < 1, "the models differ"
    for shape in (tokens, tokens[None]):
        check_close(compare_causal(model, reference, shape, window=16, batch_size=batch_size), expected)


def test_divergence_has_a_direction() -> None:
    model, reference = pair(0.1)
    there = compare_causal(model, reference, text(64), window=32)
    back = compare_causal(reference, model, text(64), window=32)
    assert abs(there.kl_divergence - back.kl_divergence) > 1e-3 * there.kl_divergence
    assert there.agreement == back.agreement
    assert (there.perplexity, there.reference_perplexity) == (back.reference_perplexity, back.perplexity)


def test_perplexities_are_those_of_perplexity() -> None:
    model, reference = pair()
    for window in (16, 24):
        found = compare_causal(model, reference, text(100), window=window)
        assert found.perplexity == perplexity(model, text(100), window=window)
        assert found.reference_perplexity == perplexity(reference, text(100), window=window)


def test_equal_models_do_not_differ() -> None:
    reference = models.build("llama")
    found = compare_causal(copy.deepcopy(reference), reference, text(64), window=32)
    assert found.kl_divergence == 0 and found.agreement == 1
    assert found.perplexity == found.reference_perplexity
    assert (found.windows, found.tokens) == (2, 62)


def test_a_divergence_below_the_rounding_of_probabilities_is_right() -> None:
    logits = 4 * torch.randn(1000, generator=torch.Generator().manual_seed(2))
    shift = 2e-4 * torch.randn(1000, generator=torch.Generator().manual_seed(3))
    log_p, log_q = (one.double().log_softmax(-1) for one in (logits, logits + shift))
    expected = float((log_p.exp() * (log_p - log_q)).sum())
    assert 1e-9 < expected < 1e-7
    found = compare_causal(Fixed(logits + shift), Fixed(logits), torch.arange(32), window=32)
    # The float32 logarithms are off by 5e-7, the shift is 2e-4.
    assert abs(found.kl_divergence - expected) <= 1e-2 * expected


def test_chunks_of_rows_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, reference = pair()
    expected = compare_causal(model, reference, text(64), window=32)
    for rows in (1, 5):
        monkeypatch.setattr(olive.eval.scoring, "_CHUNK_LOGITS", rows * models.VOCABULARY)
        check_close(compare_causal(model, reference, text(64), window=32), expected)


def test_rows_are_compared_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from olive.eval import comparison

    rows: list[int] = []
    divergence = comparison._divergence

    def counting(log_q: Tensor, log_p: Tensor) -> Tensor:
        rows.append(len(log_q))
        assert log_q.dtype is log_p.dtype is torch.float32
        return divergence(log_q, log_p)

    monkeypatch.setattr(comparison, "_divergence", counting)
    monkeypatch.setattr(olive.eval.scoring, "_CHUNK_LOGITS", 5 * 8)
    compare_causal(Fixed(torch.ones(8)), Fixed(torch.zeros(8)), torch.arange(8).repeat(4), window=16)
    assert rows == [5, 5, 5] * 2


def test_windows_are_batched_up_to_a_number_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    both = [Fixed(torch.zeros(8)), Fixed(torch.ones(8))]
    for one in both:
        one.config = type("Config", (), {"vocab_size": 8})()  # type: ignore[assignment]
    monkeypatch.setattr(olive.eval.scoring, "_RUN_LOGITS", 8 * 16 * 3)
    compare_causal(*both, text(5 * 16) % 8, window=16)
    assert [one.shapes for one in both] == [[(3, 16), (2, 16)]] * 2


def test_16_bit_logits_are_compared_in_float32() -> None:
    logits = torch.randn(64, generator=torch.Generator().manual_seed(0))
    half, wide = Fixed(logits.bfloat16()), Fixed(logits.bfloat16().float())
    found = compare_causal(half, wide, torch.arange(64), window=64)
    assert (
        found.kl_divergence == 0 and found.agreement == 1 and found.perplexity == found.reference_perplexity
    )


def test_tokens_ruled_out_by_both_do_not_count() -> None:
    ruled_out = torch.tensor([1.0, 2.0, 3.0, -math.inf])
    there = compare_causal(Fixed(ruled_out.flip(0)[1:]), Fixed(ruled_out[:3]), torch.arange(3), window=3)
    both = [
        Fixed(torch.cat((one, torch.tensor([-math.inf])))) for one in (ruled_out[:3].flip(0), ruled_out[:3])
    ]
    assert compare_causal(*both, torch.arange(3), window=3).kl_divergence == there.kl_divergence > 0


def test_tokens_ruled_out_by_the_model_alone_are_infinitely_far() -> None:
    ruled_out = torch.tensor([1.0, 2.0, 3.0, -math.inf])
    plain = torch.tensor([1.0, 2.0, 3.0, 0.0])
    assert compare_causal(Fixed(ruled_out), Fixed(plain), torch.arange(3), window=3).kl_divergence == math.inf
    # The other way round it is the logarithm of what the rest gains.
    found = compare_causal(Fixed(plain), Fixed(ruled_out), torch.arange(3), window=3).kl_divergence
    expected = float(plain.double().logsumexp(0) - plain[:3].double().logsumexp(0))
    assert abs(found - expected) <= 1e-6


def test_a_text_is_tokenized_for_both() -> None:
    def tokenizer(text: str, *, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens and not verbose
        return {"input_ids": [ord(letter) % 8 for letter in text]}

    both, words = (Fixed(torch.arange(8.0)), Fixed(torch.zeros(8))), "outliers and their victims"
    tokens = torch.tensor([ord(letter) % 8 for letter in words])
    assert compare_causal(*both, words, tokenizer=tokenizer, window=8) == compare_causal(
        *both, tokens, window=8
    )


def test_protocols_have_windows_of_their_own() -> None:
    both = (Fixed(torch.arange(8.0)), Fixed(torch.zeros(8)))
    tokens = torch.zeros(2048, dtype=torch.int64)
    assert compare_causal(*both, tokens).windows == 1
    assert compare_causal(*both, tokens, protocol="paper").windows == 2


def test_training_flags_are_restored_and_nothing_else_changes() -> None:
    model, reference = pair()
    model.train()
    model.model.layers[0].eval()
    reference.train().lm_head.eval()
    both = (model, reference)
    flags = [[module.training for module in one.modules()] for one in both]
    before = [{key: value.clone() for key, value in one.state_dict().items()} for one in both]
    compare_causal(model, reference, text(32), window=16)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        compare_causal(model, reference, text(32), window=16)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = before[0]["lm_head.weight"][0, 0]
    assert [[module.training for module in one.modules()] for one in both] == flags
    for one, values in zip(both, before, strict=True):
        assert all(torch.equal(value, values[key]) for key, value in one.state_dict().items())
        assert all(value.grad is None and not value.is_inference() for value in one.parameters())


@pytest.mark.parametrize("which", ["model", "reference"])
def test_nan_is_an_error_that_names_model_and_window(which: str) -> None:
    model, reference = pair()
    tokens = text(48) % 90
    tokens[40] = 95
    with torch.no_grad():
        {"model": model, "reference": reference}[which].get_input_embeddings().weight[95] = math.nan
    with pytest.raises(
        ValueError, match=f"^{which}: expected a finite loss, got NaN in window 2; a weight or"
    ):
        compare_causal(model, reference, tokens, window=16)
    assert math.isfinite(compare_causal(model, reference, tokens[:32], window=16).kl_divergence)


def test_the_model_itself_is_no_reference() -> None:
    model = models.build("llama")
    with pytest.raises(ValueError, match=r"reference: expected the model's original, got the model itself"):
        compare_causal(model, model, text(32), window=16)


def test_other_vocabularies_are_refused() -> None:
    larger = models.llama(vocab_size=98)
    with pytest.raises(ValueError, match="reference: expected the model's vocabulary of 97 tokens, got 98"):
        compare_causal(models.llama(), larger, text(32), window=16)
    with pytest.raises(ValueError, match="reference: expected the model's vocabulary of 8 tokens, got 9"):
        compare_causal(Fixed(torch.ones(8)), Fixed(torch.ones(9)), torch.arange(8), window=8)


def test_a_context_too_short_in_either_needs_a_window() -> None:
    short, long = models.llama(), models.llama(max_position_embeddings=4096)
    for both in ((short, long), (long, short)):
        with pytest.raises(
            ValueError, match="window: expected at most the model's max_position_embeddings, 64"
        ):
            compare_causal(*both, text(4096))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": text(15)}, ValueError, "tokens: expected at least one window of 16, got 15"),
        ({"tokens": torch.full((16,), -1)}, ValueError, "tokens: expected ids from 0, below 97, got -1"),
        ({"tokens": torch.full((16,), 97)}, ValueError, "tokens: expected ids from 0, below 97, got 97"),
        ({"tokens": text(32).int()}, TypeError, "tokens: expected int64, got torch.int32"),
        ({"tokens": "a text"}, TypeError, "tokenizer: expected one, because tokens is a text, got None"),
        ({"window": 1}, ValueError, "window: expected at least 2 tokens, got 1"),
        ({"batch_size": 0}, ValueError, "batch_size: expected at least 1, got 0"),
        ({"protocol": "fast"}, ValueError, "protocol: expected 'standard' or 'paper', got 'fast'"),
        ({"model": len}, TypeError, "model: expected a torch.nn.Module, got builtin_function_or_method"),
        ({"reference": None}, TypeError, "reference: expected a torch.nn.Module, got NoneType"),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model, reference = pair()
    arguments = {"model": model, "reference": reference, "tokens": text(32), "window": 16, **options}
    with pytest.raises(error, match=message):
        compare_causal(**arguments)


@pytest.mark.parametrize("which", [0, 1])
def test_models_without_logits_are_refused(which: int) -> None:
    class Encoder(nn.Module):
        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            return input_ids.float()

    both: list[nn.Module] = [models.llama(), models.llama()]
    both[which] = Encoder()
    name = ("model", "reference")[which]
    with pytest.raises(TypeError, match=f"^{name}: expected a causal language model, .* got Encoder"):
        compare_causal(both[0], both[1], text(32), window=16)


def test_eight_bits_are_closer_than_four() -> None:
    reference = models.build("llama")
    four, eight = (
        compare_causal(
            olive.quantize(copy.deepcopy(reference), olive.QuantConfig(bits=bits)),
            reference,
            text(128),
            window=64,
        )
        for bits in (4, 8)
    )
    assert 0 < eight.kl_divergence < 0.1 * four.kl_divergence < 0.1
    assert 0.5 < four.agreement <= 1 and 0.9 < eight.agreement <= 1
    for one in (four, eight):
        assert abs(one.perplexity - one.reference_perplexity) <= 0.1 * one.reference_perplexity
