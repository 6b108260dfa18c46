"""The quality comparison: its measures, and that it runs end to end on small models."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bench import bench_quality as quality
from bench.baselines import Decoded
from bench.common import append_csv, environment


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_every_linear_but_the_head_is_compared(tiny_llama: Any) -> None:
    names = set(quality.quantizable_weights(tiny_llama))
    assert len(names) == 2 * 7
    assert not any("lm_head" in name or "embed" in name for name in names)


def test_decoded_weights_are_put_in_place_and_taken_out_again(tiny_llama: Any) -> None:
    before = state(tiny_llama)
    weights = quality.quantizable_weights(tiny_llama)
    with quality.decoded_weights(weights, lambda w, _: Decoded(w * 0.5, 4.5), 128) as squares:
        name = "model.layers.1.mlp.down_proj.weight"
        assert tiny_llama.state_dict()[name].equal(before[name] * 0.5)
        assert tiny_llama.lm_head.weight.equal(before["lm_head.weight"])
        assert abs(squares.relative_error - 0.25) <= 1e-6
        assert squares.bits_per_weight == 4.5
    assert all(value.equal(before[key]) for key, value in tiny_llama.state_dict().items())


def test_weights_are_put_back_after_an_error(tiny_llama: Any) -> None:
    before = state(tiny_llama)

    def fails_late(weight: Tensor, group_size: int) -> Decoded:
        if weight.shape[1] == 48:
            raise RuntimeError("fails")
        return Decoded(weight * 0.5, 4.0)

    with (
        pytest.raises(RuntimeError, match="fails"),
        quality.decoded_weights(quality.quantizable_weights(tiny_llama), fails_late, 128),
    ):
        raise AssertionError("not reached")
    assert all(value.equal(before[key]) for key, value in tiny_llama.state_dict().items())


def test_embedding_distance_by_hand() -> None:
    a = nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), dim=1)
    b = nn.functional.normalize(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), dim=1)
    assert abs(quality.embedding_distance(a, b) - (1 - 0.5**0.5) / 2) <= 1e-6


def test_pooling_ignores_padding() -> None:
    hidden = torch.tensor([[[3.0, 4.0], [100.0, -7.0]]])
    model = type("Model", (), {"__call__": lambda self, **_: type("O", (), {"last_hidden_state": hidden})})()
    pooled = quality.mean_pooled(model, {"attention_mask": torch.tensor([[1, 0]])})
    torch.testing.assert_close(pooled, torch.tensor([[0.6, 0.8]]))


def test_there_are_enough_distinct_sentences() -> None:
    sentences = quality.SENTENCES.read_text().splitlines()
    assert len(set(sentences)) == len(sentences) >= 50
    assert all(sentences)


def test_ovp_formats_count_every_stored_bit() -> None:
    weight = torch.randn(8, 256, generator=torch.Generator().manual_seed(0))
    decoded = quality.ovp_format("adaptive")(weight, 128)
    assert decoded.bits_per_weight == 4 + 16 / 128 + 256 / weight.numel()


def test_causal_measures_of_a_random_model(tiny_llama: Any) -> None:
    tokens = torch.randint(64, (128,), generator=torch.Generator().manual_seed(0))
    out = quality.Rows(32)
    quality.measure_causal(out, tiny_llama, tokens, "random", window=64, limit=2)
    figures = {(row["format"], row["metric"]): float(row["value"]) for row in out.rows}
    plain = figures["float32", "perplexity"]
    for name in quality.formats_for(32):
        assert 0 < figures[name, "weight error"] < 0.1
        increase = figures[name, "perplexity"] - plain
        assert abs(figures[name, "perplexity increase"] - increase) <= 1e-3
    assert "MXFP4" in quality.formats_for(32)
    assert "MXFP4" not in quality.formats_for(128)
    assert out.table().row_count == len(quality.formats_for(32)) + 1


def test_command_appends_rows_with_their_origin(tmp_path: Path) -> None:
    app = quality.typer.Typer()
    app.command()(quality.main)
    output = tmp_path / "results" / "quality.csv"
    for _ in range(2):
        result = CliRunner().invoke(
            app, ["--quick", "--parts", "synthetic", "--group-size", "-1", "--output", str(output)]
        )
        assert result.exit_code == 0, result.output
    assert "OVP adaptive" in result.output
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 3 * len(quality.formats_for(-1))
    assert set(rows[0]) == {
        *("format", "bits_per_weight", "group_size", "metric", "data", "value"),
        *("calibration", "implementation"),
        *environment(),
    }
    assert rows[0]["torch"] == torch.__version__
    assert rows[0]["group_size"] == "-1"


def test_unknown_parts_are_refused() -> None:
    app = quality.typer.Typer()
    app.command()(quality.main)
    result = CliRunner().invoke(app, ["--parts", "everything"])
    assert result.exit_code == 2
    assert "synthetic, minilm or perplexity" in result.output


def test_bad_models_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="model: expected quantizable modules, got none in LayerNorm"):
        quality.quantizable_weights(nn.LayerNorm(4))
    append_csv(tmp_path / "a.csv", [{"x": 1}])
    with pytest.raises(ValueError, match=r"a.csv: expected columns \['x'\], got \['y'\]"):
        append_csv(tmp_path / "a.csv", [{"y": 1}])
