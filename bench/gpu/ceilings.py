"""What the GPU can do at best, measured in the process that measures the rest: copying, and multiplying."""

from __future__ import annotations

import torch

from bench.gpu.device import device_clock, prepare
from bench.gpu.results import Results
from bench.timing import Timing, take_turns

COPIED_BYTES = 2 << 30
PRODUCT = 8192  # M = N = K


def _timed(call: object, device: torch.device, seconds: float) -> Timing:
    assert callable(call)
    prepared = prepare(call, 1, device)
    launches = {"it": lambda _: prepared.launch()}
    return take_turns(launches, seconds, clock=device_clock(device), calls={"it": prepared.calls})["it"]


def copy_bandwidth(results: Results, device: torch.device, tiny: bool) -> float:
    """Bytes per second, read and written, of a copy from device memory to device memory."""
    size = 1 << 16 if tiny else COPIED_BYTES
    source = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    timing = _timed(lambda _: target.copy_(source), device, 0.2)
    rate = 2 * size / timing.median
    results.add("copy", "torch", timing, gb_s=rate / 1e9, of_copy=1.0)
    return rate


def product_rate(results: Results, device: torch.device, tiny: bool) -> None:
    """A large bfloat16 product of random numbers."""
    size = 64 if tiny else PRODUCT
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    timing = _timed(lambda _: a @ b, device, 0.2)
    shape = {"m": size, "n": size, "k": size, "dtype": "bfloat16"}
    results.add("product", "torch_bf16", timing, tflop_s=2 * size**3 / timing.median / 1e12, **shape)
