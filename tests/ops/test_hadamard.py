"""Hadamard matrices: orthogonal, their fast product equals the dense one, and unknown orders are refused."""

from __future__ import annotations

import pytest
import torch

from olive.ops.hadamard import base_matrix, base_order, hadamard


@pytest.mark.parametrize("order", [1, 12, 20, 28, 36, 60, 76, 104, 140])
def test_bases_are_hadamard_matrices(order: int) -> None:
    assert base_order(order) == order
    matrix = base_matrix(order)
    assert set(matrix.unique().tolist()) <= {1.0, -1.0}
    assert torch.equal(matrix @ matrix.T, order * torch.eye(order, dtype=torch.float64))


@pytest.mark.parametrize(
    ("size", "base"),
    [
        (1, 1),
        (2, 1),
        (4096, 1),
        (24, 12),
        (96, 12),
        (576, 36),
        (896, 28),
        (5120, 20),
        (14336, 28),
        (11008, 5504),
    ],
)
def test_sizes_of_models(size: int, base: int) -> None:
    assert base_order(size) == base


@pytest.mark.parametrize("size", [3, 7, 172, 18])
def test_unknown_orders(size: int) -> None:
    assert base_order(size) is None
    with pytest.raises(ValueError, match=f"known Hadamard matrix, got {size}"):
        hadamard(torch.randn(2, size))


def test_sizes_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="size: expected at least 1, got 0"):
        base_order(0)


@pytest.mark.parametrize("size", [1, 2, 64, 12, 96, 576])
def test_fast_product_is_the_dense_one(size: int) -> None:
    base = base_order(size)
    assert base is not None
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    while len(sylvester) < size // base:
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
    dense = torch.kron(base_matrix(base), sylvester) / size**0.5
    x = torch.randn(3, 5, size, dtype=torch.float64)
    assert torch.allclose(hadamard(x), x @ dense, atol=1e-12)
    assert torch.allclose(hadamard(x, transposed=True), x @ dense.T, atol=1e-12)
    assert torch.allclose(hadamard(hadamard(x), transposed=True), x, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_types_and_norm(dtype: torch.dtype) -> None:
    x = torch.randn(7, 96).to(dtype)
    y = hadamard(x)
    assert y.dtype == dtype and y.shape == x.shape
    norm = x.float().norm(dim=1)
    assert torch.allclose(y.float().norm(dim=1), norm, rtol=4 * torch.finfo(dtype).eps)
