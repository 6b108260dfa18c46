"""`QATConfig` refuses what makes no sense, and survives JSON."""

from __future__ import annotations

from typing import Any

import pytest

from olive.qat import QATConfig


def test_json_round_trip() -> None:
    config = QATConfig(2, 3, activation_granularity="per_token", qkr=True, skip=("lm_head",))
    assert QATConfig.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    ("values", "error", "words"),
    [
        ({"weight_bits": 0}, ValueError, "weight_bits: expected 1 to 8, got 0"),
        ({"weight_bits": 9}, ValueError, "weight_bits: expected 1 to 8, got 9"),
        ({"weight_bits": 2.0}, TypeError, "weight_bits: expected an int, got 2.0"),
        ({"weight_bits": True}, TypeError, "weight_bits: expected an int, got True"),
        ({"activation_bits": 16}, ValueError, "activation_bits: expected 1 to 8"),
        ({"first_last_bits": -1}, ValueError, "first_last_bits: expected 1 to 8"),
        ({"weights": "dorefa"}, ValueError, "weights: expected one of 'statsq', 'lsq', got 'dorefa'"),
        ({"activations": "pact"}, ValueError, "activations: expected one of 'lsq'"),
        ({"activation_granularity": "per_row"}, ValueError, "activation_granularity: expected one of"),
        ({"activation_granularity": "per_token"}, ValueError, "expected the default without activation_bits"),
        ({"activation_offsets": True}, ValueError, "expected the default without activation_bits"),
        ({"quantize_attention": True}, ValueError, "expected the default without activation_bits"),
        ({"quantize_attention": 1}, TypeError, "quantize_attention: expected a bool"),
        ({"qkr": 1}, TypeError, "qkr: expected a bool"),
        ({"qkr": True, "weights": "lsq"}, ValueError, "qkr: expected False with weights 'lsq'"),
        ({"group_size": 0}, ValueError, "group_size: expected -1 per channel"),
        ({"group_size": 32, "weights": "lsq"}, ValueError, "group_size: expected -1 with weights 'lsq'"),
        ({"skip": "lm_head"}, TypeError, "skip: expected a tuple"),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        QATConfig(**values)


def test_unknown_fields_are_named() -> None:
    with pytest.raises(ValueError, match=r"got unknown \['bits'\]"):
        QATConfig.from_dict({"bits": 4})


@pytest.mark.parametrize(("activation_bits", "expected"), [(None, False), (4, True)])
def test_qkr_quantizes_attention_where_activations_are_quantized(
    activation_bits: int | None, expected: bool
) -> None:
    assert QATConfig(activation_bits=activation_bits, qkr=True).quantize_attention is expected
