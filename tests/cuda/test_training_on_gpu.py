"""The operators of training on a GPU, as they are dispatched there: the CPU's bits, without waiting."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from olive import ops
from tests.ops.cpu_cases import DTYPES, heavy_tailed
from tests.ops.fixed_point import assert_same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@contextmanager
def _without_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _state(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    codes = torch.zeros(weight.shape, dtype=torch.int8, device=weight.device)
    return codes, torch.zeros_like(codes), torch.zeros(weight.shape, device=weight.device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_training_gives_the_cpus_bits(dtype: torch.dtype) -> None:
    weight = heavy_tailed(130, 1100).to(dtype)
    moved = weight.cuda()
    for group_size in (-1, 128):
        assert_same_bits(ops.statsq(moved, 3, group_size).cpu(), ops.statsq(weight, 3, group_size))
        scale = ops.statsq_codes(weight, 3, group_size)[1]
        step = scale[:, :1] / 4
        on_cpu, on_gpu = _state(weight), _state(moved)
        for turn in range(3):
            how = (0.0, -4, 3, 0.1, 0.05)
            near = ops.oscillation_(weight * (1 + turn), step, *how, *on_cpu)
            found = ops.oscillation_(moved * (1 + turn), step.cuda(), *how, *on_gpu)
            assert torch.equal(found.cpu(), near)
        for expected, got in zip(on_cpu, on_gpu, strict=True):
            assert torch.equal(got.cpu(), expected)
    for dim, size in ((0, 1), (0, 130), (1, 1100)):
        scale = torch.full((size,), 0.01)
        results = []
        for device in ("cpu", "cuda"):
            leaves = [part.to(device).requires_grad_() for part in (weight, scale)]
            out = ops.lsq(*leaves, 3, True, dim)
            results.append([out, *torch.autograd.grad(out, leaves, out.detach())])
        expected, got = ([part.detach().cpu() for part in result] for result in results)
        assert_same_bits(got[0], expected[0])
        assert_same_bits(got[1], expected[1])
        assert torch.allclose(got[2], expected[2], rtol=1e-4, atol=1e-5 * float(expected[2].abs().max()))


def test_training_waits_for_nothing() -> None:
    weight = torch.randn(300, 700, device="cuda")
    step, scale, state = torch.ones(300, 1, device="cuda"), torch.ones(700, device="cuda"), _state(weight)

    def everything() -> None:
        ops.statsq(weight, 4, -1)
        ops.statsq_codes(weight, 4, 64)
        ops.statsq_margin(weight, 4, -1)
        ops.lsq(weight, scale, 4, True, 1)
        torch.ops.olive.lsq_backward(weight, weight, scale, 4, True, 1)
        ops.oscillation_(weight, step, 0.5, -8, 7, 0.02, 0.01, *state)

    everything()  # compiles
    with _without_waiting():
        everything()
