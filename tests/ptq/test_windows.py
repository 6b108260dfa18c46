"""Calibration windows: which tokens they hold, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import olive


def letters(text: str, **options: Any) -> dict[str, list[int]]:
    """A tokenizer of one token per character."""
    assert options == {"add_special_tokens": False, "verbose": False}
    return {"input_ids": [ord(letter) for letter in text]}


def _texts(windows: list[torch.Tensor]) -> list[str]:
    assert all(one.dtype == torch.int64 and one.shape[0] == 1 for one in windows)
    return ["".join(map(chr, one[0].tolist())) for one in windows]


def test_windows_follow_each_other() -> None:
    assert _texts(olive.calibration_windows("abcdefgh", letters, window=3)) == ["abc", "def"]


def test_too_many_are_taken_evenly() -> None:
    text = "".join(chr(97 + index // 2) for index in range(20))
    assert _texts(olive.calibration_windows(text, letters, window=2, count=4)) == ["aa", "cc", "ff", "hh"]


def test_several_texts_are_joined() -> None:
    assert _texts(olive.calibration_windows(("ab", "cd"), letters, window=6)) == ["ab\n\ncd"]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="text: expected at least one window of 9 tokens, got 3 tokens"):
        olive.calibration_windows("abc", letters, window=9)
    with pytest.raises(ValueError, match="window: expected at least 1, got 0"):
        olive.calibration_windows("abc", letters, window=0)
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        olive.calibration_windows("abc", letters, window=1, count=0)
    with pytest.raises(TypeError, match="text: expected a str or several, got int"):
        olive.calibration_windows([1], letters)  # type: ignore[list-item]


def test_a_tokenizer_of_another_model_is_found_out() -> None:
    from tests import models

    class Foreign:
        model_max_length = 64

        def __call__(self, text: str, **options: Any) -> dict[str, torch.Tensor]:
            return {"input_ids": torch.tensor([[5, 4000]])}

    with pytest.raises(ValueError, match="whose 97 tokens it embeds, got one that gives token 4000"):
        olive.quantize(
            models.llama(), olive.QuantConfig(method="gptq"), calibration=["text"], tokenizer=Foreign()
        )
