"""How a call is timed on a GPU: many calls in one CUDA graph, between two events, on weights from memory.

A graph's replay has no gaps between kernels for the host to fill, so that short kernels are compared, not the
speed at which Python launches them. On a CPU the same functions make plain calls by the host's clock: enough
for a smoke run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from bench.timing import Clock, host_seconds

COLD_BYTES = 400_000_000  # an L2 cache of 100 MB four times
LEAST_CALLS = 32  # of a kernel of 6 us: 200 us per replay, against the resolution of an event, 0.5 us
LONGEST_REPLAY = 0.02  # seconds; slow calls are few per replay

Call = Callable[[int], object]  # with the number of the call, by which it picks its copy of the weight


class Prepared(NamedTuple):
    """A candidate ready to be timed."""

    launch: Callable[[], object]
    calls: int  # per launch
    note: str = ""  # how it is timed, if not as a graph


def cold_bytes(device: torch.device) -> int:
    """Weights that are rotated must add up to this, so that none is still in the L2 cache."""
    if device.type != "cuda":
        return 10**6
    return max(COLD_BYTES, 4 * int(torch.cuda.get_device_properties(device).L2_cache_size))


def calls_per_replay(copies: int, seconds_per_call: float) -> int:
    """Whole rotations of the copies, at least LEAST_CALLS; fewer, at least 2, if that takes too long."""
    rotations = copies * -(-LEAST_CALLS // copies)
    return max(2, min(rotations, int(LONGEST_REPLAY / max(seconds_per_call, 1e-9))))


def event_seconds(call: Callable[[int], object], turn: int) -> float:
    """By events on the device. An untimed call runs ahead and hides what it takes to launch the timed one."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    call(turn)
    start.record()
    call(turn)
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


def device_clock(device: torch.device) -> Clock:
    """How calls on a device are timed."""
    return event_seconds if device.type == "cuda" else host_seconds


def synchronize(device: torch.device) -> None:
    """Wait for the device; raises what went wrong there."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@lru_cache
def _capture_stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()  # one for all, so that cuBLAS has one workspace for graphs


def capture(step: Callable[[], object], warm_up: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `step`; nothing of it runs yet.

    Args:
        step: launches kernels and waits for none.
        warm_up: runs first, on the stream of the capture: makes handles and workspaces, loads kernels.
    """
    graph, stream = torch.cuda.CUDAGraph(), _capture_stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # left even when the capture fails, which `graph` alone does not do
        warm_up()
        with torch.cuda.graph(graph, stream=stream):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    return graph


def prepare(call: Call, copies: int, device: torch.device, *, waits: bool = False) -> Prepared:
    """Warm up, and put the calls into a graph.

    Args:
        call: the operator on one copy of its weight.
        copies: how many copies it rotates through.
        device: where it runs.
        waits: the operator waits for its result, which a graph cannot hold: it is called one by one.
    """
    call(0)
    call(1)
    if device.type != "cuda" or waits:
        note = "called one by one: waits for its result" if waits else ""
        return Prepared(lambda: _make_calls(call, copies), copies, note)
    calls = calls_per_replay(copies, event_seconds(call, 0))
    try:
        graph = capture(lambda: _make_calls(call, calls), lambda: _make_calls(call, 2))
    except RuntimeError as error:
        torch.cuda.synchronize()  # raises if more went wrong than the capture
        reason = str(error.__context__ or error).partition("\n")[0]
        return Prepared(lambda: _make_calls(call, calls), calls, f"called one by one: {reason}")
    return Prepared(graph.replay, calls)


def _make_calls(call: Call, calls: int) -> None:
    for turn in range(calls):
        call(turn)
