"""A report as plain text."""

from __future__ import annotations

import io
import shutil
from typing import Any

from olive.reports.records import LayerReport, Report
from olive.reports.summary import by_reason, decibels, groups, pattern, shape, size

LONG = 48  # more layers than this share lines
MINIMUM_WIDTH = 60


def render_table(report: Report, width: int | None, *, every_layer: bool) -> str:
    """See `Report.table`."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if width is None:
        width = max(MINIMUM_WIDTH, shutil.get_terminal_size((120, 24)).columns)
    if width < MINIMUM_WIDTH:
        raise ValueError(f"width: expected at least {MINIMUM_WIDTH}, got {width}")
    lines = _lines(report, every_layer)
    grouped = any(len(members) > 1 for _, members in lines)
    # Narrow terminals keep the columns that say most.
    details, extent = width >= 100, width >= 72
    style: dict[str, Any] = {"box": box.SIMPLE_HEAD, "pad_edge": False, "collapse_padding": True}
    layers = Table(title="Quantized layers", title_justify="left", **style)
    layers.add_column("layer", overflow="fold", min_width=12)
    if grouped:
        layers.add_column("count", justify="right", no_wrap=True)
    if extent:
        layers.add_column("shape", justify="right", no_wrap=True)
    if details:
        layers.add_column("codebook", no_wrap=True)
        layers.add_column("group", justify="right", no_wrap=True)
    for title in ("bits", "outlier\npairs", *(("plain\ngroups",) if extent else ()), "SQNR\ndB"):
        layers.add_column(title, justify="right", no_wrap=True)
    for name, members in lines:
        first = members[0]
        cells = [Text(name)]
        cells += [Text(str(len(members)))] if grouped else []
        cells += [Text(shape(first))] if extent else []
        cells += [Text(first.codebook), Text(groups(first))] if details else []
        values = sum(layer.parameters for layer in members)
        cells.append(Text(f"{8 * sum(layer.size_bytes for layer in members) / values:.3f}"))
        cells.append(Text(f"{_mean(members, 'outlier_share'):.2%}"))
        cells += [Text(f"{_mean(members, 'plain_share'):.1%}")] if extent else []
        cells.append(Text(_ratios(members)))
        layers.add_row(*cells)
    skipped = Table(title="Left as they are", title_justify="left", **style)
    skipped.add_column("reason", overflow="fold", ratio=2)
    skipped.add_column("modules", justify="right", no_wrap=True)
    skipped.add_column("parameters", justify="right", no_wrap=True)
    skipped.add_column("names", overflow="fold", ratio=3)
    for group in by_reason(report.skipped):
        names = ", ".join(group.names)
        skipped.add_row(Text(group.reason), str(group.modules), f"{group.parameters:,}", Text(names))
    inputs = _activation_table(lines, grouped, extent, style)
    stream = io.StringIO()
    console = Console(file=stream, width=width, color_system=None, highlight=False, legacy_windows=False)
    console.print(layers)
    if grouped:
        console.print("Layers whose names differ in numbers share a line: mean shares, least and mean SQNR.")
        console.print()
    if inputs is not None:
        console.print(inputs)
    if report.skipped:
        console.print(skipped)
    for line in totals(report):
        console.print(Text(line))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def _activation_table(
    lines: list[tuple[str, list[LayerReport]]], grouped: bool, extent: bool, style: dict[str, Any]
) -> Any:
    """What becomes of the layers' inputs; None where they are not quantized."""
    from rich.table import Table
    from rich.text import Text

    if all(layer.activations is None for _, members in lines for layer in members):
        return None
    table = Table(title="Inputs of quantized layers", title_justify="left", **style)
    table.add_column("layer", overflow="fold", min_width=12)
    if grouped:
        table.add_column("count", justify="right", no_wrap=True)
    table.add_column("activations", overflow="fold")
    for title in (*(("outlier\npairs", "clipped") if extent else ()), "SQNR\ndB"):
        table.add_column(title, justify="right", no_wrap=True)
    for name, members in lines:
        cells = [Text(name), *([Text(str(len(members)))] if grouped else [])]
        cells.append(Text(members[0].activations or "-"))
        if extent:
            cells.append(Text(_share(members, "activation_outlier_share", ".2%")))
            cells.append(Text(_share(members, "activation_clipped_share", ".3%")))
        cells.append(Text(_ratios(members, "activation_sqnr_db")))
        table.add_row(*cells)
    return table


def totals(report: Report) -> list[str]:
    """Sentences on the whole model."""
    return [
        f"{report.model}: {report.quantized_share:.1%} of the parameters are quantized, "
        f"in {len(report.layers)} weights, {report.bits_per_weight:.3f} bits each.",
        f"Quantized weights {size(report.quantized_bytes)}; whole model {size(report.model_bytes)}, "
        f"before quantization {size(report.float_bytes)}.",
    ]


def _lines(report: Report, every_layer: bool) -> list[tuple[str, list[LayerReport]]]:
    """Lines of the table: the name to show and the layers it stands for."""
    if every_layer or len(report.layers) <= LONG:
        return [(layer.name or "(model)", [layer]) for layer in report.layers]
    lines: dict[tuple[object, ...], list[LayerReport]] = {}
    for layer in report.layers:
        key = (
            pattern(layer.name),
            layer.kind,
            layer.shape,
            layer.codebook,
            layer.group_size,
            layer.activations,
        )
        lines.setdefault(key, []).append(layer)
    return [
        (members[0].name if len(members) == 1 else pattern(members[0].name), members)
        for members in lines.values()
    ]


def _mean(members: list[LayerReport], share: str) -> float:
    return float(sum(getattr(layer, share) for layer in members) / len(members))


def _share(members: list[LayerReport], share: str, digits: str) -> str:
    """Mean of those that are known; "-" if none is."""
    known = [found for layer in members if (found := getattr(layer, share)) is not None]
    return format(sum(known) / len(known), digits) if known else "-"


def _ratios(members: list[LayerReport], key: str = "sqnr_db") -> str:
    known = [ratio for layer in members if (ratio := getattr(layer, key)) is not None]
    if len(known) < 2:
        return decibels(known[0] if known else None)
    return f"{decibels(min(known))} / {decibels(sum(known) / len(known))}"
