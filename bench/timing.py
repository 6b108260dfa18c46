"""Timing on a shared machine: candidates take turns, medians and quantiles, weights that come from memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import count

COLD_BYTES = 1_500_000_000  # weights are cycled through this much, far more than any cache


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    low: float  # 20 % quantile
    high: float  # 80 % quantile
    runs: int


def copies_for(bytes_each: int, cold_bytes: int = COLD_BYTES) -> int:
    """How many copies of a weight make up `cold_bytes`, at least two."""
    return max(2, -(-cold_bytes // bytes_each))


def take_turns(candidates: Mapping[str, Callable[[int], object]], seconds: float) -> dict[str, Timing]:
    """Time candidates in turn (A B C A B C ...), so that a change in the machine's speed meets all of them.

    Args:
        candidates: name -> call with the number of the turn, by which it picks its copy of the weight.
        seconds: roughly how long to go on; at least 5 turns and at most 200 are taken.
    """
    for call in candidates.values():  # warm-up
        call(0)
        call(1)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for turn in count(2):
        for name, call in candidates.items():
            start = time.perf_counter()
            call(turn)
            times[name].append(time.perf_counter() - start)
        runs = turn - 1
        if runs >= 200 or (runs >= 5 and time.perf_counter() - begin > seconds):
            break

    def summary(values: list[float]) -> Timing:
        fifths = statistics.quantiles(values, n=5)
        return Timing(statistics.median(values), fifths[0], fifths[3], len(values))

    return {name: summary(values) for name, values in times.items()}
