"""A report as one self-contained HTML page."""

from __future__ import annotations

import contextlib
import math
import os
import secrets
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from olive.reports.records import LayerReport, Report
from olive.reports.summary import decibels, groups, shape, size

_TEMPLATE = "page.jinja"


@dataclass(frozen=True)
class Bar:
    """A horizontal bar: its length from 0 to 1, None if there is no value, and the text beside it."""

    length: float | None
    text: str


def write_page(report: Report, path: Path) -> Path:
    """See `Report.html`."""
    page = render_page(report)
    # Beside the target, so that replacing is one step: a reader sees the old page or the whole new one.
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    return path


def render_page(report: Report) -> str:
    """The page's text.

    Raises:
        RuntimeError: jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
    except ImportError as error:
        raise RuntimeError(
            "jinja2: expected an installed package, got none; run `pip install olive-quant[report]`"
        ) from error
    import olive

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = resources.files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8")
    return environment.from_string(source).render(
        report=report,
        version=olive.__version__,
        size=size,
        shape=shape,
        groups=groups,
        sqnr=dict(zip(report.layers, _sqnr_bars(report.layers), strict=True)),
        outliers=dict(zip(report.layers, _outlier_bars(report.layers), strict=True)),
        has_activations=any(layer.activations is not None for layer in report.layers),
        activation_sqnr=dict(
            zip(report.layers, _sqnr_bars(report.layers, "activation_sqnr_db"), strict=True)
        ),
    )


def _sqnr_bars(layers: tuple[LayerReport, ...], key: str = "sqnr_db") -> list[Bar]:
    """The longest bar is the best finite ratio; an exact weight has a full one."""
    ratios: list[float | None] = [getattr(layer, key) for layer in layers]
    finite = [ratio for ratio in ratios if ratio is not None and math.isfinite(ratio)]
    longest = max([ratio for ratio in finite if ratio > 0], default=1.0)
    bars = []
    for ratio in ratios:
        length = None if ratio is None else min(1.0, max(0.0, ratio / longest))
        bars.append(Bar(length, decibels(ratio)))
    return bars


def _outlier_bars(layers: tuple[LayerReport, ...]) -> list[Bar]:
    """The longest bar is the largest share."""
    longest = max(layer.outlier_share for layer in layers) or 1.0
    return [Bar(layer.outlier_share / longest, f"{layer.outlier_share:.2%}") for layer in layers]
