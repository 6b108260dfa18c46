"""The comparison with calibration data: its sequence, its measures, and that it runs end to end."""

from __future__ import annotations

import copy
import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from bench import bench_calibrated as bench
from bench.baselines import Decoded, int4_asymmetric
from bench.common import environment
from bench.quality_methods import GPTQ, IMPORTANCE, NO_DATA, OLIVE, DataFree, Inputs, methods, quick_methods
from bench.quality_subjects import Causal, DrawnLayers, Encoder, Remembered, energy, inputs_of, weight_error
from bench.sequential import quantizable_layers, quantize_in_sequence, second_moment, stages
from olive.eval import perplexity


@pytest.fixture
def llama(tiny_llama: Any) -> Any:
    return tiny_llama


@pytest.fixture
def encoder() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    return BertModel(config).eval()


def text(windows: int, window: int = 32) -> Tensor:
    return torch.randint(64, (windows * window,))


def names(found: list[list[Any]]) -> list[list[str]]:
    return [[layer.name.split(".")[-2] for layer in stage] for stage in found]


def test_stages_of_a_llama(llama: Any) -> None:
    found = stages(llama, quantizable_layers(llama), text(1)[None])
    block = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
    assert names(found) == 2 * block


def test_stages_of_a_bert(encoder: Any) -> None:
    batch = {"input_ids": text(1)[None], "attention_mask": torch.ones(1, 32, dtype=torch.int64)}
    found = stages(encoder, quantizable_layers(encoder, ("pooler",)), batch)
    assert names(found) == [["query", "key", "value"], ["dense"], ["dense"], ["dense"]]
    assert [stage[0].name.split(".")[3] for stage in found] == [
        "attention",
        "attention",
        "intermediate",
        "output",
    ]


def test_a_layer_that_no_data_reach_is_named() -> None:
    class TwoHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = TwoHeads()
    with pytest.raises(
        ValueError, match="batches: expected data that reaches every layer, got none at unused"
    ):
        stages(model, quantizable_layers(model), torch.ones(1, 4))


def test_second_moment_counts_every_row_of_every_batch() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    batches = [torch.randn(2, 4, 3), torch.randn(1, 4, 3)]
    moment, rows = second_moment(model, quantizable_layers(model)[1], batches)
    inputs = torch.cat([model[0](batch).detach().reshape(-1, 5) for batch in batches])
    torch.testing.assert_close(moment, inputs.T @ inputs)
    assert rows == 12


def test_each_layer_sees_what_its_quantized_predecessors_give() -> None:
    model = nn.Sequential(nn.Linear(3, 5, bias=False), nn.Linear(5, 2, bias=False))
    batch = torch.randn(6, 3)
    halved = model[0].weight.detach() * 0.5
    expected = (batch @ halved.T).T @ (batch @ halved.T)
    seen = []

    def halve(weight: Tensor, moment: Tensor) -> Decoded:
        seen.append(moment)
        return Decoded(weight * 0.5, 4.0)

    decoded = quantize_in_sequence(model, halve, [batch])
    torch.testing.assert_close(seen[0], batch.T @ batch)
    torch.testing.assert_close(seen[1], expected)
    assert model[0].weight.equal(halved)
    assert list(decoded) == ["0.weight", "1.weight"]


def test_models_are_left_alone(llama: Any) -> None:
    before = copy.deepcopy(llama.state_dict())
    subject = Causal("random", llama, text(6), 32, calibration_windows=4)
    for method in quick_methods():
        found = subject.measure(method)
        assert 4 < found.bits_per_weight < 7, method.title
        assert set(found.figures) == {
            "perplexity",
            "perplexity increase",
            "KL divergence",
            "weight error",
        }
        assert found.figures["KL divergence"] > 0
        assert 0 < found.figures["weight error"] < 0.1
    assert all(value.equal(before[key]) for key, value in llama.state_dict().items())


def test_calibration_windows_are_not_measured(llama: Any) -> None:
    tokens = text(5)
    subject = Causal("random", llama, tokens, 32, calibration_windows=3)
    assert torch.cat([batch.flatten() for batch in subject.batches]).equal(tokens[: 3 * 32])
    expected = perplexity(llama, tokens[3 * 32 :], window=32)
    assert abs(subject.reference_perplexity() - expected) <= 1e-5 * expected


def test_outliers_change_no_output(llama: Any) -> None:
    subject = Causal("random", llama, text(5), 32, calibration_windows=3)
    other = subject.with_outliers()
    assert other.data == "random, outliers x 50"
    assert other.tokens.equal(subject.tokens) and len(other.batches) == len(subject.batches)
    difference = other.reference_perplexity() / subject.reference_perplexity() - 1
    assert abs(difference) <= 1e-4
    weights = [next(iter(quantizable_layers(one.model))).weight for one in (subject, other)]
    assert not weights[0].equal(weights[1])


def test_what_is_remembered_is_what_the_model_says(llama: Any) -> None:
    remembered, part = Remembered(llama), text(2).view(2, 32)
    with torch.no_grad():
        expected = llama(input_ids=part).logits
        for _ in range(2):
            assert remembered(part).logits.equal(expected)


def test_encoder_is_measured(encoder: Any) -> None:
    tokens = {"input_ids": text(2).view(2, 32), "attention_mask": torch.ones(2, 32, dtype=torch.int64)}
    batches = [{key: value[:1] for key, value in tokens.items()}]
    subject = Encoder("random", encoder, batches, tokens, ("pooler",))
    method = DataFree("int4", NO_DATA, "own", 32, int4_asymmetric)
    found = subject.measure(method)
    assert 0 < found.figures["embedding distance"] < 0.1
    nothing = DataFree("float32", NO_DATA, "own", 32, lambda weight, _: Decoded(weight, 32.0))
    assert subject.measure(nothing) == (32.0, {"embedding distance": 0.0, "weight error": 0.0})


def test_output_error_by_hand() -> None:
    weight, moment = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 3.0]])
    assert energy(weight, moment) == 2 + 2 * 2 + 3 * 4
    assert weight_error({"a": weight + 1}, {"a": weight}) == 2 / 5
    subject = DrawnLayers("Student-t(4)", [((4, 2), Inputs(moment, 9))] * 2)
    found = subject.measure(DataFree("half", NO_DATA, "own", 2, lambda w, _: Decoded(w * 0.5, 4.5)))
    assert found.bits_per_weight == 4.5
    assert abs(found.figures["output error"] - 0.25) <= 1e-6
    assert abs(found.figures["weight error"] - 0.25) <= 1e-6


def test_ovp_layers_gain_from_data() -> None:
    mixed = torch.randn(500, 64) @ (torch.eye(64) + 0.3 * torch.randn(64, 64))
    mixed[:, ::5] *= 5
    subject = DrawnLayers("Student-t(4)", [((16, 64), Inputs(mixed.T @ mixed, 500))])
    errors = {
        method.calibration: subject.measure(method).figures["output error"]
        for method in quick_methods()
        if method.implementation == OLIVE
    }
    assert errors[GPTQ] < 0.8 * errors[IMPORTANCE] < 0.8 * errors[NO_DATA]


def test_inputs_of_the_first_and_the_last_block(llama: Any) -> None:
    subject = Causal("random", llama, text(5), 32, calibration_windows=3)
    found = inputs_of(subject)
    assert [shape for shape, _ in found] == 2 * [(32, 32), (32, 32), (48, 32), (32, 48)]
    assert all(known.rows == 3 * 32 for _, known in found)
    assert not found[0][1].second_moment.equal(found[4][1].second_moment)


def test_methods_have_titles_of_their_own() -> None:
    titles = [method.title for method in methods()]
    assert len(titles) == len(set(titles)) >= 25
    for expected in (
        "OVP paper preset, group -1",
        "OVP adaptive",
        "OVP learned, GPTQ, activation order",
        "OVP auto, importance",
        "int4 asymmetric, GPTQ",
        "NVFP4, group 16",
    ):
        assert expected in titles


def test_command_appends_rows_with_their_origin(tmp_path: Path) -> None:
    app = bench.typer.Typer()
    app.command()(bench.main)
    output = tmp_path / "results" / "quality.csv"
    arguments = ["--quick", "--parts", "causal,layers", "--only", "int4", "--output", str(output)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert set(rows[0]) == {
        *("format", "bits_per_weight", "group_size", "metric", "data", "value"),
        *("calibration", "implementation"),
        *environment(),
    }
    assert rows[0]["format"] == "float32"
    assert {row["data"] for row in rows} == {
        "tiny_llama",
        "Student-t(6), real inputs",
        "Student-t(4), real inputs",
    }
    assert {row["calibration"] for row in rows} == {"none", "GPTQ", "GPTQ, activation order"}


def test_unknown_parts_are_refused() -> None:
    app = bench.typer.Typer()
    app.command()(bench.main)
    result = CliRunner().invoke(app, ["--parts", "everything"])
    assert result.exit_code == 2
    assert "causal, minilm, outliers, layers" in result.output
