"""Outlier-victim pairs keep a model with large activation outliers; plain integers do not. Short text."""

from __future__ import annotations

import copy

import pytest
import torch
from typer.testing import CliRunner

typer = pytest.importorskip("typer")

from bench import bench_activations  # noqa: E402
from bench.bench_activations import (  # noqa: E402
    CALIBRATION_WINDOWS,
    SETTINGS,
    causal_comparisons,
    inject_before_down,
)
from bench.bench_quality import TINY_LLAMA, WINDOW, load_causal  # noqa: E402
from olive.eval import inject_outliers  # noqa: E402


def test_pairs_keep_an_outlier_injected_model_and_plain_integers_break_it() -> None:
    model, tokens = load_causal(str(TINY_LLAMA), TINY_LLAMA / "heldout.txt")
    inject_outliers(model)
    names = (
        "full precision",
        "W4A16",
        "W4A8, ovp8 static",
        "W8A8, ovp8 static",
        "paper_w8a8()",
        "plain int8, W8A8 per tensor",
        "plain int4 weights, int8 activations, per tensor",
    )
    settings = {name: SETTINGS[name] for name in names}
    compared = causal_comparisons(model, tokens[: (CALIBRATION_WINDOWS + 8) * WINDOW], settings)
    found = {name: one.perplexity for name, one in compared.items()}
    full = found["full precision"]
    assert found["W8A8, ovp8 static"] <= 1.01 * full
    assert found["paper_w8a8()"] <= 1.02 * full
    assert found["W4A8, ovp8 static"] <= 1.02 * found["W4A16"]
    assert found["plain int8, W8A8 per tensor"] >= 1.2 * full
    assert found["plain int4 weights, int8 activations, per tensor"] >= 1.4 * full


def test_outliers_before_down_projections_keep_the_function() -> None:
    model, tokens = load_causal(str(TINY_LLAMA), TINY_LLAMA / "heldout.txt")
    injected = copy.deepcopy(model)
    read: list[torch.Tensor] = []
    injected.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    inject_before_down(injected)
    with torch.no_grad():
        before, after = (one(tokens[None, :64]).logits for one in (model, injected))
    assert torch.allclose(before, after, atol=1e-3)
    energy = read[0].square().mean((0, 1)).sort().values
    assert float(energy[-1]) > 100 * float(energy[len(energy) // 2])


def test_plain_settings_leave_the_given_model_alone() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4))
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(5, 8)
    rounded = bench_activations.apply(model, bench_activations.Plain(4, 4), [x])
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert not torch.equal(rounded(x), model(x))
    assert len(rounded[0].weight.unique()) <= 15


def test_quick_run_prints_a_table_and_writes_nothing(tmp_path) -> None:
    app = typer.Typer()
    app.command()(bench_activations.main)
    result = CliRunner().invoke(app, ["--quick", "--output", str(tmp_path / "out.csv")])
    assert result.exit_code == 0, result.output
    assert "W4A16" in result.output
    assert not list(tmp_path.iterdir())
