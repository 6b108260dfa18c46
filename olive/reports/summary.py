"""Words and figures that the table and the page have in common."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from olive.reports.records import LayerReport
from olive.walk import Skipped

_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")  # a whole part of a name, as in model.layers.3.mlp


def pattern(name: str) -> str:
    """A module's name with * for every part that is a number."""
    return _NUMBER.sub("*", name)


def size(count: int) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= factor:
            return f"{count / factor:.2f} {unit}"
    return f"{count} B"


def shape(layer: LayerReport) -> str:
    """E x N x K."""
    return " x ".join(str(extent) for extent in layer.shape)


def decibels(ratio: float | None) -> str:
    """One decimal; "-" if it is not known."""
    if ratio is None:
        return "-"
    return f"{ratio:.1f}" if math.isfinite(ratio) else ("exact" if ratio > 0 else "-inf")


def groups(layer: LayerReport) -> str:
    """The group size in words."""
    return {-1: "channel", 0: "tensor"}.get(layer.group_size, str(layer.group_size))


@dataclass(frozen=True)
class SkippedGroup:
    """Modules left alone for one reason.

    Args:
        reason: why.
        names: their names; those that differ only in numbers as one, with * for the numbers.
        modules: how many.
        parameters: their values, those that count elsewhere excepted.
    """

    reason: str
    names: tuple[str, ...]
    modules: int
    parameters: int


def by_reason(skipped: tuple[Skipped, ...]) -> list[SkippedGroup]:
    """Skipped modules put together by reason, those with most parameters first."""
    reasons: dict[str, list[Skipped]] = {}
    for one in skipped:
        reasons.setdefault(one.reason, []).append(one)
    found = [
        SkippedGroup(reason, _names(members), len(members), sum(one.parameters for one in members))
        for reason, members in reasons.items()
    ]
    return sorted(found, key=lambda group: -group.parameters)


def _names(members: list[Skipped]) -> tuple[str, ...]:
    patterns: dict[str, list[str]] = {}
    for one in members:
        patterns.setdefault(pattern(one.name), []).append(one.name or "(model)")
    return tuple(names[0] if len(names) == 1 else short for short, names in patterns.items())
