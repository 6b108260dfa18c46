"""A picture of how the weights of a model oscillate while it is trained on levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from olive.qat.tracking import Oscillations

OSCILLATING = "qat/oscillating"
AT_BOUNDARY = "qat/at_boundary"
_LABEL_LENGTH = 40


def draw_oscillations(
    found: Oscillations, path: str | Path, *, history: Sequence[Mapping[str, Any]] = ()
) -> None:
    """Draw where latent weights lie around their thresholds, what of each layer oscillates, and since when.

    Args:
        found: what a tracker's `snapshot` gives.
        path: of the picture; its ending says the kind (.png, .svg, .pdf).
        history: records with `step`, `qat/oscillating` and `qat/at_boundary`, as in the Trainer's
            `state.log_history`; without one that part is left out.

    Raises:
        RuntimeError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise RuntimeError("matplotlib is not installed: `pip install olive-quant[report]`") from None
    records = [one for one in history if OSCILLATING in one and "step" in one]
    parts = 2 + bool(records)
    figure = Figure(figsize=(5.2 * parts, max(3.8, 0.16 * len(found.layers) + 1.2)), layout="constrained")
    FigureCanvasAgg(figure)  # of this figure alone: the user's choice of a backend stays
    axes = figure.subplots(1, parts)
    _draw_histogram(axes[0], found)
    _draw_layers(axes[1], {name: one.oscillating for name, one in found.layers.items()}, found.threshold)
    if records:
        _draw_history(axes[2], records)
    figure.savefig(Path(path))


def _draw_histogram(axes: Axes, found: Oscillations) -> None:
    counts, total = found.histogram, max(sum(found.histogram), 1)
    width = 1 / len(counts)
    centres = [-0.5 + width * (place + 0.5) for place in range(len(counts))]
    axes.bar(centres, [100 * one / total for one in counts], width=width, color="#3f7d20")
    axes.axvspan(-found.boundary_range, found.boundary_range, color="#c0392b", alpha=0.5, lw=0)
    axes.set(
        title="Latent weights around their thresholds",
        xlabel="distance to the nearest threshold, steps (red: boundary range)",
        ylabel="% of weights",
        xlim=(-0.5, 0.5),
    )


def _draw_layers(axes: Axes, shares: Mapping[str, float], threshold: float) -> None:
    names = [name if len(name) <= _LABEL_LENGTH else f"...{name[3 - _LABEL_LENGTH :]}" for name in shares]
    axes.barh(range(len(names)), [100 * share for share in shares.values()], color="#666666")
    axes.set_yticks(range(len(names)), names, fontsize=6)
    axes.invert_yaxis()
    axes.set(title="Oscillating weights by layer", xlabel=f"% with frequency > {threshold}")


def _draw_history(axes: Axes, records: Sequence[Mapping[str, Any]]) -> None:
    for key, label, colour in (
        (OSCILLATING, "oscillating", "#666666"),
        (AT_BOUNDARY, "in the boundary range", "#c0392b"),
    ):
        points = [(one["step"], 100 * one[key]) for one in records if key in one]
        axes.plot(*zip(*points, strict=True), label=label, color=colour)
    axes.set(title="During training", xlabel="step", ylabel="% of weights", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
