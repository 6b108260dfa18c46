"""`block_hadamard`: orthogonal, its own inverse, in every dtype, differentiable; what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from olive import ops
from olive.ops.online_hadamard import MAX_BLOCK


def _dense(block: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < block:
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix / block**0.5


@pytest.mark.parametrize(
    ("columns", "block"),
    [(1, 1), (33, 1), (96, 32), (176, 16), (768, 256), (11008, 256), (14336, 256), (29568, 128)],
)
def test_block_is_the_power_of_two_in_the_columns(columns: int, block: int) -> None:
    assert ops.block_size(columns) == block
    assert MAX_BLOCK == 256  # of stored weights


@pytest.mark.parametrize("block", [2, 4, 32, 128, 256])
def test_blocks_are_multiplied_by_the_dense_matrix(block: int) -> None:
    x = torch.randn(3, 2, 3 * block, dtype=torch.float64)
    expected = x @ torch.block_diag(*[_dense(block)] * 3)
    assert torch.allclose(ops.block_hadamard(x, block), expected, atol=1e-12)
    assert torch.allclose(ops.block_hadamard(expected, block), x, atol=1e-12)


@pytest.mark.parametrize("shape", [(96,), (1, 96), (0, 96), (2, 0, 96), (5, 3, 96)])
def test_shapes_stay(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    found = ops.block_hadamard(x, 32)
    assert found.shape == x.shape and found.is_contiguous()


def test_input_may_be_strided() -> None:
    x = torch.randn(96, 5)
    assert torch.equal(ops.block_hadamard(x.T, 32), ops.block_hadamard(x.T.contiguous(), 32))


@pytest.mark.parametrize("block", [128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_rounding_the_result(dtype: torch.dtype, block: int) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = ops.block_hadamard(x.double(), block)
    error = (ops.block_hadamard(x, block).double() - exact).abs()
    # Half a unit of the last place of a result, the sums of 256 products in float32, and the entries'
    # rounding where sqrt(block) is no power of two.
    rounding = torch.finfo(dtype).eps / 2 + (0.0 if dtype == torch.float32 else 1.1e-4)
    limit = rounding * exact.abs() + 256 * torch.finfo(torch.float32).eps * x.double().abs().max()
    assert bool((error <= limit).all())


def test_float16_holds_what_its_blocks_norm_holds() -> None:
    x = torch.full((1, 256), 4000.0, dtype=torch.float16)  # norm 64000
    assert ops.block_hadamard(x, 256)[0, 0] == 64000
    one = torch.zeros(1, 256, dtype=torch.float16)
    one[0, 3] = 65504
    assert ops.block_hadamard(one, 256).abs().max() == 4094


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operator_is_registered_properly(dtype: torch.dtype) -> None:
    x = torch.randn(3, 64, dtype=dtype, requires_grad=True)
    torch.library.opcheck(ops.block_hadamard.default, (x, 32))


def test_gradient_is_the_transform_of_the_gradient() -> None:
    x = torch.randn(2, 64, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda one: ops.block_hadamard(one, 16), (x,))


def test_a_matrix_made_in_inference_mode_serves_training() -> None:
    with torch.inference_mode():
        ops.block_hadamard(torch.randn(2, 64), 64)
    x = torch.randn(2, 64, requires_grad=True)
    ops.block_hadamard(x, 64).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("x", "block", "error", "message"),
    [
        (torch.ones(2, 64, dtype=torch.int32), 16, TypeError, "x: expected float64, .* got torch.int32"),
        (torch.ones(2, 64), 1, ValueError, "block: expected a power of two of at least 2, got 1"),
        (torch.ones(2, 96), 48, ValueError, "block: expected a power of two of at least 2, got 48"),
        (torch.ones(2, 96), 64, ValueError, r"x: expected a last dimension that 64 divides, .* \(2, 96\)"),
        (torch.tensor(1.0), 2, ValueError, r"x: expected a last dimension that 2 divides, got shape \(\)"),
    ],
)
def test_bad_arguments(x: Tensor, block: int, error: type[Exception], message: str) -> None:
    for device in ("cpu", "meta"):
        with pytest.raises(error, match=message):
            ops.block_hadamard(x.to(device), block)


def test_autocast_does_not_reach_inside() -> None:
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(4))
    with torch.autocast("cpu", torch.bfloat16):
        inside = ops.block_hadamard(x, 32)
    assert torch.equal(inside, ops.block_hadamard(x, 32))
