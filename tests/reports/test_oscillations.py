"""The picture of oscillations is drawn of plain values."""

from __future__ import annotations

from pathlib import Path

import pytest

from olive.qat.tracking import LayerOscillation, Oscillations
from olive.reports.oscillations import draw_oscillations

pytest.importorskip("matplotlib")
LAYERS = {
    "first.weight": LayerOscillation(64, 0.25, 0.5),
    f"{'x' * 60}.weight": LayerOscillation(8, 0.0, 0.0),
}
HISTORY = [{"step": 2, "qat/oscillating": 0.1, "qat/at_boundary": 0.2}, {"step": 3, "loss": 1.0}]


@pytest.mark.parametrize("counts", [[1.0, 5.0, 2.0, 0.0], [0.0] * 4])
def test_picture_of_values_alone(counts: list[float], tmp_path: Path) -> None:
    found = Oscillations(LAYERS, counts, 0.005, 0.01)
    file = tmp_path / "oscillations.svg"
    draw_oscillations(found, file)
    without = file.read_text()
    draw_oscillations(found, file, history=HISTORY)
    assert len(file.read_text()) > len(without) > 0
