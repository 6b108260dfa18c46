"""Orthogonal mixing by Hadamard matrices, in n log n steps: what spreads a channel's outliers over all
channels.

A Hadamard matrix of order n has entries of 1 and -1 and orthogonal rows; divided by sqrt(n) it is
orthogonal. Powers of two are Sylvester's, x -> (a + b, a - b). Others are a power of two times an order that
Paley's constructions
give for a prime: q + 1 for q = 3 mod 4, 2 (q + 1) for q = 1 mod 4. Source: R. E. A. C. Paley, "On orthogonal
matrices", 1933; rotation of language models: QuaRot, arXiv:2404.00456.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

_LARGEST_BASE = 1 << 13  # a product with the base is dense


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _is_base(order: int) -> bool:
    if order == 1:
        return True
    if order % 4 == 0 and _is_prime(order - 1):  # then order - 1 = 3 mod 4
        return True
    half = order // 2 - 1
    return order % 2 == 0 and half % 4 == 1 and _is_prime(half)


@lru_cache(maxsize=256)
def base_order(size: int) -> int | None:
    """The least b, size / b a power of two, that has a Hadamard matrix known here; None if none has."""
    if size < 1:
        raise ValueError(f"size: expected at least 1, got {size}")
    base = size >> ((size & -size).bit_length() - 1)
    while base <= min(size, _LARGEST_BASE):
        if _is_base(base):
            return base
        base *= 2
    return None


@lru_cache(maxsize=16)
def base_matrix(order: int) -> Tensor:
    """The matrix of a base: float64 [order, order], entries 1 and -1."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(order - 1) and order % 4 == 0:
        # H = I + S, S skew: S = [[0, 1], [-1, Q]] with Q the Jacobsthal matrix.
        skew = torch.zeros(order, order, dtype=torch.float64)
        skew[0, 1:], skew[1:, 0] = 1, -1
        skew[1:, 1:] = _jacobsthal(order - 1)
        return skew + torch.eye(order, dtype=torch.float64)
    half = order // 2
    conference = torch.zeros(half, half, dtype=torch.float64)  # symmetric
    conference[0, 1:] = conference[1:, 0] = 1
    conference[1:, 1:] = _jacobsthal(half - 1)
    off = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
    diagonal = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
    return torch.kron(conference, off) + torch.kron(torch.eye(half, dtype=torch.float64), diagonal)


def _jacobsthal(prime: int) -> Tensor:
    """Q[i, j] = 1 where i - j is a square modulo the prime, -1 where it is not, 0 on the diagonal."""
    squares = torch.full((prime,), -1.0, dtype=torch.float64)
    squares[(torch.arange(1, prime) ** 2) % prime] = 1
    squares[0] = 0
    index = torch.arange(prime)
    return squares[(index[:, None] - index[None, :]) % prime]


def hadamard(x: Tensor, *, transposed: bool = False) -> Tensor:
    """x H / sqrt(n) over the last dimension, H = base matrix (x) Sylvester's: the norm of a row stays.

    Args:
        x: float [..., n], n a size that `base_order` knows.
        transposed: multiply with the transpose, which is the inverse.

    Returns:
        Same shape and dtype; computed in float32 or wider.

    Raises:
        ValueError: no Hadamard matrix of this order is known.
    """
    size = x.shape[-1]
    base = base_order(size)
    if base is None:
        raise ValueError(f"x: expected a last dimension with a known Hadamard matrix, got {size}")
    wide = torch.promote_types(x.dtype, torch.float32)
    power = size // base
    mixed = x.to(wide).reshape(-1, base, power)
    step = 1
    while step < power:
        a, b = mixed.reshape(-1, base, power // (2 * step), 2, step).unbind(-2)
        mixed = torch.stack((a + b, a - b), dim=-2).reshape(-1, base, power)
        step *= 2
    if base > 1:
        matrix = base_matrix(base).to(device=x.device, dtype=wide)
        matrix = matrix if transposed else matrix.T
        mixed = torch.matmul(matrix, mixed)
    return (mixed / math.sqrt(size)).reshape(x.shape).to(x.dtype)
