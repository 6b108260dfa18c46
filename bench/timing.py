"""Timing on a shared machine: candidates take turns, medians and quantiles, weights that come from memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

COLD_BYTES = 1_500_000_000  # weights are cycled through this much, far more than any cache

Clock = Callable[[Callable[[int], object], int], float]  # makes a call with its turn: the seconds it took


@dataclass(frozen=True)
class Timing:
    """Seconds per call."""

    median: float
    low: float  # 20 % quantile
    high: float  # 80 % quantile
    runs: int

    @classmethod
    def of(cls, seconds: Sequence[float], calls: int = 1) -> Timing:
        """From at least two measurements, each of so many calls."""
        fifths = statistics.quantiles(seconds, n=5)
        return cls(statistics.median(seconds) / calls, fifths[0] / calls, fifths[3] / calls, len(seconds))


def copies_for(bytes_each: int, cold_bytes: int = COLD_BYTES) -> int:
    """How many copies of a weight make up `cold_bytes`, at least two."""
    return max(2, -(-cold_bytes // bytes_each))


def host_seconds(call: Callable[[int], object], turn: int) -> float:
    """By the host's clock, for calls that are done when they return."""
    start = time.perf_counter()
    call(turn)
    return time.perf_counter() - start


def take_turns(
    candidates: Mapping[str, Callable[[int], object]],
    seconds: float,
    *,
    clock: Clock = host_seconds,
    calls: Mapping[str, int] | None = None,
) -> dict[str, Timing]:
    """Time candidates in turn (A B C A B C ...), so that a change in the machine's speed meets all of them.

    Args:
        candidates: name -> call with the number of the turn, by which it picks its copy of the weight.
        seconds: roughly how long to go on; at least 5 turns and at most 200 are taken.
        clock: how a call is timed.
        calls: name -> how many calls of the operator one call of the candidate makes; None = one each.
    """
    for call in candidates.values():  # warm-up
        call(0)
        call(1)
    times: dict[str, list[float]] = {name: [] for name in candidates}
    begin = time.perf_counter()
    for turn in count(2):
        for name, call in candidates.items():
            times[name].append(clock(call, turn))
        runs = turn - 1
        if runs >= 200 or (runs >= 5 and time.perf_counter() - begin > seconds):
            break
    return {name: Timing.of(values, calls[name] if calls else 1) for name, values in times.items()}
