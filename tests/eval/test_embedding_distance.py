"""`olive.eval.mean_pooled` and `embedding_distance`: by hand, on an encoder, and what they refuse."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import olive
from olive.eval import embedding_distance, mean_pooled
from tests import models


class Encoder(nn.Module):
    """Gives what it is told to, whatever it is asked."""

    def __init__(self, hidden: Any) -> None:
        super().__init__()
        self.hidden = hidden

    def forward(self, **batch: Any) -> Any:
        assert not self.training
        return type("Output", (), {"last_hidden_state": self.hidden})


def sentences() -> dict[str, Tensor]:
    """Two sentences of eleven and of five tokens."""
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, 5:] = 0
    return {**models.inputs(models.build("bert")), "attention_mask": mask}


def encoder() -> Any:
    return models.build("bert").bert  # type: ignore[union-attr]


def test_pooling_is_that_of_numpy() -> None:
    model, batch = encoder(), sentences()
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state.numpy().astype(np.float64)
    means = np.stack([hidden[0].mean(0), hidden[1, :5].mean(0)])
    expected = means / np.linalg.norm(means, axis=1, keepdims=True)
    found = mean_pooled(model, batch)
    assert found.dtype == torch.float32 and found.shape == (2, 96)
    assert not found.requires_grad and not found.is_inference()
    assert np.abs(found.numpy() - expected).max() <= 1e-6


def test_padding_does_not_matter() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [100.0, -7.0]]])
    found = mean_pooled(Encoder(hidden), {"attention_mask": torch.tensor([[1, 0]])})
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8]]))


def test_16_bit_states_are_averaged_in_float32() -> None:
    hidden = 100 + torch.randn(1, 1000, 8, generator=torch.Generator().manual_seed(0))
    hidden = hidden.half()
    mask = {"attention_mask": torch.ones(1, 1000, dtype=torch.int64)}
    found = mean_pooled(Encoder(hidden), mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, mean_pooled(Encoder(hidden.float()), mask), rtol=0, atol=0)
    assert mean_pooled(Encoder(hidden.double()), mask).dtype == torch.float64


def test_anything_called_like_an_encoder_is_pooled() -> None:
    hidden, mask = torch.randn(2, 3, 4), torch.ones(2, 3)
    batch = {"attention_mask": mask, "input_ids": mask.long()}
    model = Encoder(hidden).eval()
    assert mean_pooled(lambda **batch: model(**batch), batch).equal(mean_pooled(model, batch))


def test_training_flags_are_restored() -> None:
    model = models.build("bert", seed=0).bert  # type: ignore[union-attr]
    quiet = mean_pooled(model, sentences())
    model.train()
    model.encoder.eval()
    flags = [module.training for module in model.modules()]
    assert mean_pooled(model, sentences()).equal(quiet), "dropout is off"
    with pytest.raises(ValueError, match="attention_mask"):
        mean_pooled(model, {**sentences(), "attention_mask": torch.zeros(2, 11)})
    assert [module.training for module in model.modules()] == flags


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        ([1], TypeError, "batch: expected a mapping, got list"),
        ({"input_ids": torch.ones(1, 2)}, TypeError, "batch: .* called attention_mask, got NoneType"),
        ({"attention_mask": [[1, 1]]}, TypeError, "batch: expected a tensor called attention_mask, got list"),
        ({"attention_mask": torch.ones(2, 2)}, ValueError, r"attention_mask: .* \[1, 3, 2\], got \[2, 2\]"),
        ({"attention_mask": torch.ones(3)}, ValueError, r"attention_mask: expected shape .* got \[3\]"),
        ({"attention_mask": torch.zeros(1, 3)}, ValueError, "attention_mask: .* at least one token .* row 0"),
    ],
)  # fmt: skip
def test_bad_batches_are_named(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mean_pooled(Encoder(torch.ones(1, 3, 2)), batch)


def test_models_without_hidden_states_are_refused() -> None:
    mask = {"attention_mask": torch.ones(1, 3)}
    with pytest.raises(TypeError, match=r"model: expected an encoder, .* got Encoder"):
        mean_pooled(Encoder(None), mask)
    with pytest.raises(ValueError, match=r"attention_mask: .* \[1, 3\], got \[1, 3\]"):
        mean_pooled(Encoder(torch.ones(1, 3)), mask)


def test_distance_by_hand() -> None:
    rows = torch.tensor([[1.0, 0.0], [1.0, 1.0], [0.0, 2.0], [3.0, 0.0]])
    others = torch.tensor([[5.0, 0.0], [1.0, 0.0], [7.0, 0.0], [-1.0, 0.0]])
    expected = (0 + (1 - 0.5**0.5) + 1 + 2) / 4
    assert abs(embedding_distance(rows, others) - expected) <= 1e-15
    assert abs(embedding_distance(others.double(), rows.half()) - expected) <= 1e-15


def test_distance_is_that_of_numpy() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 33, generator=generator)
    others = rows + 0.3 * torch.randn(50, 33, generator=generator)
    a, b = (one.numpy().astype(np.float64) for one in (rows, others))
    cosines = (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
    assert abs(embedding_distance(rows, others) - (1 - cosines).mean()) <= 1e-14


def test_equal_rows_have_no_distance() -> None:
    rows = torch.randn(20, 384, generator=torch.Generator().manual_seed(0))
    assert embedding_distance(rows, rows) == 0
    assert 0 <= embedding_distance(rows, 3 * rows) <= 1e-15


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.zeros(2, 3), ValueError, "{}: expected rows with a direction, got zeros in row 0"),
        (torch.tensor([[1.0, 0, 0], [0, 0, 0]]), ValueError, "{}: expected rows .* got zeros in row 1"),
        (torch.full((2, 3), math.nan), ValueError, "{}: expected rows .* got NaN or Inf in row 0"),
        (torch.full((2, 3), math.inf), ValueError, "{}: expected rows .* got NaN or Inf in row 0"),
        (torch.ones(3), ValueError, r"{}: expected shape \[B, H\] with at least one row, got \[3\]"),
        (torch.ones(0, 3), ValueError, r"{}: expected shape \[B, H\] with at least one row, got \[0, 3\]"),
        (torch.ones(2, 3).long(), TypeError, "{}: expected a float tensor, got torch.int64"),
        ([[1.0]], TypeError, "{}: expected a float tensor, got list"),
    ],
)  # fmt: skip
def test_bad_embeddings_are_named(rows: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match="^" + message.format("embeddings")):
        embedding_distance(rows, torch.ones(2, 3))
    with pytest.raises(error, match="^" + message.format("reference")):
        embedding_distance(torch.ones(2, 3), rows)


def test_shapes_must_agree() -> None:
    with pytest.raises(
        ValueError, match=r"reference: expected the shape of embeddings, \[2, 3\], got \[1, 3\]"
    ):
        embedding_distance(torch.ones(2, 3), torch.ones(1, 3))


def test_a_quantized_encoder_stays_close() -> None:
    reference = encoder()
    model = olive.quantize(copy.deepcopy(reference))
    original, batch = mean_pooled(reference, sentences()), sentences()
    assert 0 < embedding_distance(mean_pooled(model, batch), original) < 0.1
