"""The table in text: complete, within the width, long models on few lines."""

from __future__ import annotations

import pytest

from olive.walk import Skipped
from tests.reports.fabricated import layer, long_report, report


@pytest.mark.parametrize("width", [60, 72, 80, 100, 160])
@pytest.mark.parametrize("every_layer", [False, True])
def test_no_line_is_wider_than_asked_and_names_are_complete(width: int, every_layer: bool) -> None:
    text = long_report().table(width, every_layer=every_layer)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    first_column = "".join(line[1:].split(" ")[0] for line in text.splitlines() if line.startswith(" "))
    assert "model.projection" in first_column  # a long name goes on in the next line


def test_long_models_share_lines() -> None:
    lines = long_report(32).table(120).splitlines()
    (shared,) = [line for line in lines if "self_attn.q_proj" in line]
    assert shared.split()[:2] == ["model.layers.*.self_attn.q_proj", "32"]
    assert shared.endswith("20.0 / 35.5")  # least and mean of 20 .. 51
    assert "1.55%" in shared  # mean of 0 .. 31 per mille
    assert any(line.split()[:2] == ["model.projection", "1"] for line in lines)
    assert len(lines) < 20


def test_every_layer_on_a_line_of_its_own() -> None:
    text = long_report(32).table(120, every_layer=True)
    for index in range(32):
        assert f" model.layers.{index}.mlp.down_proj " in text


def test_layers_that_differ_in_more_than_numbers_stay_apart() -> None:
    layers = [layer(f"blocks.{index}.fc", codebook="int4" if index < 30 else "nf4") for index in range(60)]
    lines = [line for line in report(*layers).table(120).splitlines() if "blocks.*.fc" in line]
    assert [line.split()[1] for line in lines] == ["30", "30"]


def test_numbers_inside_words_stay() -> None:
    layers = [layer(f"blocks.{index}.fc{1 + index % 2}") for index in range(60)]
    text = report(*layers).table(120)
    assert "blocks.*.fc1" in text
    assert "blocks.*.fc2" in text


def test_short_models_keep_every_layer() -> None:
    text = report(*(layer(f"layers.{index}") for index in range(48))).table(100)
    assert all(f" layers.{index} " in text for index in range(48))
    assert "share a line" not in text


def test_skipped_modules_with_reason() -> None:
    skipped = (Skipped("head", 4_000, 'skip holds "head"'), Skipped("layers.3.norm", 64, "vectors only"))
    lines = report(layer("fc"), skipped=skipped).table(120).splitlines()
    assert any(line.split() == ["skip", "holds", '"head"', "1", "4,000", "head"] for line in lines)
    assert any(line.split() == ["vectors", "only", "1", "64", "layers.3.norm"] for line in lines)


def test_names_are_no_markup() -> None:
    text = report(layer("[bold]fc[/bold]"), skipped=(Skipped("[red]x", 1, "[link=y]why"),)).table(120)
    assert "[bold]fc[/bold]" in text
    assert "[red]x" in text
    assert "[link=y]why" in text


def test_totals() -> None:
    text = str(report(layer("fc")))
    assert "Model: 90.0% of the parameters are quantized, in 1 weights, 4.156 bits each." in text
    assert "Quantized weights 4.26 kB; whole model 1.00 MB, before quantization 3.00 MB." in text


def test_printed_width_is_that_of_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "64")
    assert max(map(len, long_report().table().splitlines())) <= 64
    monkeypatch.setenv("COLUMNS", "7")
    assert max(map(len, long_report().table().splitlines())) <= 60


def test_too_narrow_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"width: expected at least 60, got 59"):
        report(layer("fc")).table(59)
