"""`QuantConfig`: which values go together, and JSON and back."""

from __future__ import annotations

from typing import Any

import pytest

from olive.config import QuantConfig
from olive.formats import ActivationFormat


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"bits": 8},
        {"bits": 8, "codebook": "ovp8", "method": "paper", "group_size": -1},
        {"codebook": "paper", "method": "paper"},
        {"codebook": "paper", "group_size": 0},
        {"activations": "int8"},
        {"activations": "int8", "activation_group_size": 0},
        {"activations": "ovp4", "activation_codebook": "adaptive", "activation_group_size": 64},
        {"activations": "ovp4", "activation_codebook": "paper", "activation_group_size": 0},
        {"activations": "ovp8", "bits": 8, "activation_group_size": 128},
        {"rotate": True, "rotate_online": True},
    ],
)
def test_json_round_trip(values: dict[str, Any]) -> None:
    config = QuantConfig(**values)
    assert QuantConfig.from_json(config.to_json()) == config
    assert QuantConfig.from_dict(config.to_dict()) == config
    assert QuantConfig(**{field: getattr(config, field) for field in config.to_dict()}) == config


def test_configurations_written_before_activations_still_load() -> None:
    before = {
        "bits": 4,
        "codebook": "adaptive",
        "group_size": 128,
        "activations": None,
        "method": "search",
        "skip": ["lm_head"],
    }
    assert QuantConfig.from_dict(before) == QuantConfig()


def test_eight_bits_have_no_codebook() -> None:
    assert QuantConfig(bits=8).codebook == "ovp8"
    assert QuantConfig(bits=8) == QuantConfig(bits=8, codebook="ovp8")


@pytest.mark.parametrize("method", ["search", "paper"])
def test_activation_format(method: str) -> None:
    assert QuantConfig(bits=8, method=method).activation_format is None
    config = QuantConfig(
        codebook="int4",
        method=method,
        activations="ovp4",
        activation_group_size=64,
        activation_codebook="nf4",
    )
    pairing = "paper" if method == "paper" else "optimal"
    assert config.activation_format == ActivationFormat("ovp4", 64, "nf4", pairing)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"bits": 3}, ValueError, "bits: expected one of 4, 8, got 3"),
        ({"bits": True}, ValueError, "bits: expected one of 4, 8, got True"),
        ({"bits": 8, "codebook": "nf4"}, ValueError, "codebook: expected 'ovp8' with bits=8, because 8-bit"),
        (
            {"bits": 8, "codebook": "paper"},
            ValueError,
            "codebook: expected 'ovp8' with bits=8, because 8-bit",
        ),
        ({"codebook": "ovp8"}, ValueError, "codebook: expected a 4-bit codebook with bits=4, got 'ovp8'"),
        ({"codebook": "int5"}, ValueError, "codebook: expected one of 'int4', .*'paper', 'auto', got 'int5'"),
        (
            {"method": "paper"},
            ValueError,
            "codebook: expected 'int4', 'flint4' or 'paper' with method 'paper'",
        ),
        (
            {"activations": "int4"},
            ValueError,
            "activations: expected one of None, 'int8', 'ovp4', 'ovp8', got",
        ),
        (
            {"activations": "int8", "activation_group_size": 16},
            ValueError,
            "activation_group_size: expected one",
        ),
        (
            {"activations": "int8", "activation_group_size": True},
            TypeError,
            "activation_group_size: expected int",
        ),
        ({"activation_group_size": 0}, ValueError, "activation_group_size: expected -1 without activations"),
        (
            {"activation_codebook": "nf4"},
            ValueError,
            "activation_codebook: expected 'int4' unless activations",
        ),
        (
            {"activations": "int8", "activation_codebook": "nf4"},
            ValueError,
            "activation_codebook: expected 'int4' unless activations is 'ovp4', got 'nf4'",
        ),
        (
            {"activations": "ovp4", "activation_codebook": "learned"},
            ValueError,
            "activation_codebook: expected one of 'int4', .* got 'learned'",
        ),
        (
            {"activations": "ovp4", "activation_codebook": "paper"},
            ValueError,
            "activation_codebook: expected .* got 'paper', which is chosen from calibration data",
        ),
        ({"rotate_online": True}, ValueError, "rotate_online: expected False without rotate=True, got True"),
        ({"rotate": True, "rotate_online": 1}, ValueError, "rotate_online: expected one of False, True, got"),
    ],
)
def test_what_does_not_go_together(values: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QuantConfig(**values)
