"""`OliveConfig`: JSON and back, and what it refuses."""

from __future__ import annotations

import json
import math

import pytest

import olive
from olive.config import FORMAT_VERSION
from olive.hf.config import OliveConfig


def test_json_round_trip_keeps_every_field() -> None:
    quant = olive.QuantConfig(codebook="nf4", group_size=-1, skip=("lm_head", "score"))
    config = OliveConfig(quant, olive_version="0.1.0", sqnr_db={"a.weight": 20.125, "b": None}, save_id="ab")
    values = json.loads(json.dumps(config.to_dict()))
    again = OliveConfig.from_dict(values)
    assert again.quant == quant
    assert vars(again) == vars(config)
    assert values["quant_method"] == "olive"
    assert values["format_version"] == FORMAT_VERSION
    assert json.loads(config.to_json_string()) == values


def test_a_ratio_that_is_not_finite_is_written_as_null() -> None:
    config = OliveConfig(olive.QuantConfig(), sqnr_db={"a": math.inf, "b": 1.0})
    assert config.to_dict()["sqnr_db"] == {"a": None, "b": 1.0}


def test_unused_keyword_arguments_come_back() -> None:
    values = OliveConfig(olive.QuantConfig()).to_dict()
    config, unused = OliveConfig.from_dict(values, return_unused_kwargs=True, other=1)
    assert config.quant == olive.QuantConfig()
    assert unused == {"other": 1}


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"format_version": FORMAT_VERSION + 1, "new": 1},
            ValueError,
            r"format_version: expected at most .* upgrade",
        ),
        ({"format_version": None}, ValueError, r"quantization_config\.format_version: expected an integer"),
        ({"quant_method": "awq"}, ValueError, r"quant_method: expected 'olive', got 'awq'"),
        ({"sqnr_db": None}, TypeError, r"quantization_config\.sqnr_db: expected an object"),
        ({"bits": 3}, ValueError, r"bits: expected one of 4, 8, got 3"),
        ({"group_size": 48}, ValueError, r"group_size: expected one of"),
        ({"colour": "red"}, ValueError, r"got unknown \['colour'\]"),
    ],
)
def test_bad_values_are_errors(changes: dict[str, object], error: type[Exception], message: str) -> None:
    values = OliveConfig(olive.QuantConfig()).to_dict() | changes
    with pytest.raises(error, match=message):
        OliveConfig.from_dict(values)


def test_a_quant_config_is_enough_for_transformers() -> None:
    assert olive.QuantConfig().quant_method == "olive"
    assert "quant_method" not in olive.QuantConfig().to_dict()
