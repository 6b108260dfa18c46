"""How the GPU benches time: medians from a clock of the test's own, and CUDA's calls by stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from bench.gpu import device
from bench.gpu.architecture import cmake_architecture
from bench.gpu.device import COLD_BYTES, calls_per_replay, cold_bytes, prepare
from bench.timing import Timing, host_seconds, take_turns

CUDA = torch.device("cuda")
CPU = torch.device("cpu")


def test_medians_are_of_the_clock_and_per_call() -> None:
    seconds = {"a": iter([5.0, 1.0, 4.0, 2.0, 3.0]), "b": iter([8.0] * 5)}

    def clock(call: Callable[[int], object], turn: int) -> float:
        name = call(turn)
        assert isinstance(name, str)
        return next(seconds[name])

    timings = take_turns({"a": lambda _: "a", "b": lambda _: "b"}, 0, clock=clock, calls={"a": 1, "b": 4})
    assert (timings["a"].median, timings["b"].median) == (3.0, 2.0)
    assert timings["a"].low < 3.0 < timings["a"].high
    assert timings["a"].runs == 5


def test_quantiles_are_divided_too() -> None:
    assert Timing.of([2.0, 2.0, 2.0], calls=4) == Timing(0.5, 0.5, 0.5, 3)


def test_the_host_clock_makes_the_call_once() -> None:
    turns: list[int] = []
    assert host_seconds(turns.append, 7) >= 0
    assert turns == [7]


@pytest.mark.parametrize(
    ("copies", "seconds", "calls"),
    [
        (47, 5e-6, 47),  # every copy once
        (13, 10e-6, 39),  # whole rotations, at least 32 calls
        (2, 10e-6, 32),
        (2, 1e-3, 20),  # 20 ms
        (2, 1.0, 2),
        (50, 0.0, 50),
    ],
)
def test_calls_per_replay(copies: int, seconds: float, calls: int) -> None:
    assert calls_per_replay(copies, seconds) == calls


def test_rotated_weights_exceed_the_cache_four_times(monkeypatch: pytest.MonkeyPatch) -> None:
    for cache, expected in ((50_000_000, COLD_BYTES), (126_000_000, 504_000_000)):
        properties = type("Properties", (), {"L2_cache_size": cache})()
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _, found=properties: found)
        assert cold_bytes(CUDA) == expected


def test_a_cpu_makes_plain_calls() -> None:
    turns: list[int] = []
    prepared = prepare(turns.append, 3, CPU)
    turns.clear()
    prepared.launch()
    assert (turns, prepared.calls, prepared.note) == ([0, 1, 2], 3, "")


class FakeGraph:
    """Remembers the calls made while it was captured, and makes them again."""

    captured: Callable[[], object]

    def replay(self) -> None:
        log.append("replay")


log: list[Any] = []


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for torch.cuda; the list takes what happens, in order."""
    log.clear()
    clock = iter(range(10_000))

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("record")
            self.time = next(clock)

        def synchronize(self) -> None:
            log.append("wait")

        def elapsed_time(self, end: Any) -> float:
            return 0.01 * (end.time - self.time)  # milliseconds

    class Stream:
        def wait_stream(self, other: Any) -> None:
            log.append("wait_stream")

    @contextmanager
    def on_stream(stream: Any) -> Any:
        log.append("enter")
        try:
            yield
        finally:
            log.append("leave")

    @contextmanager
    def capturing(graph: Any, *, stream: Any) -> Any:
        log.append("capture")
        yield
        log.append("captured")

    for name, fake in {
        "Event": Event,
        "CUDAGraph": FakeGraph,
        "graph": capturing,
        "stream": on_stream,
        "current_stream": Stream,
        "synchronize": lambda *_: log.append("synchronize"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(device, "_capture_stream", Stream)
    properties = type("Properties", (), {"L2_cache_size": 1})()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return log


def test_an_untimed_call_runs_ahead_of_the_timed_one(cuda: list[Any]) -> None:
    assert device.event_seconds(cuda.append, 4) == pytest.approx(1e-5)
    assert cuda == [4, "record", 4, "record", "wait"]


def test_rotating_calls_are_captured_after_a_warm_up(cuda: list[Any]) -> None:
    prepared = prepare(cuda.append, 40, CUDA)
    assert cuda[:2] == [0, 1]
    start = cuda.index("enter")
    assert cuda[start:] == ["enter", 0, 1, "capture", *range(40), "captured", "leave", "wait_stream"]
    cuda.clear()
    prepared.launch()
    assert (cuda, prepared.calls, prepared.note) == (["replay"], 40, "")


def test_what_cannot_be_captured_is_called_one_by_one(cuda: list[Any]) -> None:
    def call(turn: int) -> None:
        if "capture" in cuda:
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        cuda.append(turn)

    prepared = prepare(call, 40, CUDA)
    assert cuda[-2:] == ["leave", "synchronize"], "the capture's stream must be left"
    assert prepared.note == "called one by one: operation not permitted when stream is capturing"
    cuda.clear()
    prepared.launch()
    assert cuda == list(range(40))


def test_operators_that_wait_are_not_captured(cuda: list[Any]) -> None:
    prepared = prepare(cuda.append, 1, CUDA, waits=True)
    assert "capture" not in cuda
    assert prepared.note == "called one by one: waits for its result"


@pytest.mark.parametrize(
    ("capability", "name"),
    [
        ((8, 0), "80-real"), ((8, 9), "80-real"), ((9, 0), "90a-real"), ((10, 0), "100-real"),
        ((12, 0), "120-real"),
    ],
)  # fmt: skip
def test_only_the_local_architecture_is_compiled(capability: tuple[int, int], name: str) -> None:
    assert cmake_architecture(*capability) == name


def test_old_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match=r"GPU: expected compute capability 8.0 or newer, got 7.5"):
        cmake_architecture(7, 5)
