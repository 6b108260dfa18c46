"""The emulated module's functions on CPU tensors; nothing may be written around their outputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from olive.formats import codes_shape, scale_shape
from olive.formats.layout import PER_TENSOR
from olive.ops.packed import CUDA_LAYOUT
from tests.cuda.module import emulated_cuda

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
GARBAGE, MARGIN = 0xAB, 256  # bytes around an output, a multiple of every alignment


def _addresses(*arguments: Tensor | int | None) -> list[int]:
    return [
        argument if isinstance(argument, int) else 0 if argument is None else argument.data_ptr()
        for argument in arguments
    ]


def steer(schedule: int = 0, multiprocessors: int = 4) -> None:
    """Choose the order in which threads run (0 rising, 1 falling, else shuffled) and the size of grids."""
    emulated_cuda().set_schedule(schedule)
    emulated_cuda().set_device(multiprocessors, 90, 227 * 1024)


def launched() -> list[str]:
    """Names of the kernels that ran since the last call."""
    names: list[str] = emulated_cuda().launched()
    return names


@contextmanager
def _guarded(*wanted: tuple[tuple[int, ...], torch.dtype]) -> Iterator[list[Tensor]]:
    """Output tensors of these shapes, full of garbage; nothing may be written before or after them."""
    buffers, views = [], []
    for shape, dtype in wanted:
        size = math.prod(shape) * dtype.itemsize
        buffers.append(torch.full((size + 2 * MARGIN,), GARBAGE, dtype=torch.uint8))
        views.append(buffers[-1][MARGIN : MARGIN + size].view(dtype).view(shape))
    yield views
    for buffer in buffers:
        assert bool((buffer[:MARGIN] == GARBAGE).all()), "written before the output"
        assert bool((buffer[-MARGIN:] == GARBAGE).all()), "written past the output"


def pack(codes: Tensor, scale: Tensor, columns: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Canonical to packed."""
    rows = int(codes.shape[0])
    size = (rows, columns, group_size)
    shapes = CUDA_LAYOUT.codes_shape(*size), CUDA_LAYOUT.scale_shape(*size)
    with _guarded((shapes[0], torch.uint8), (shapes[1], torch.int16)) as packed:
        emulated_cuda().pack(*_addresses(codes, scale, *size, *packed, 0))
    return packed[0], packed[1]


def unpack(codes: Tensor, scale: Tensor, rows: int, columns: int, group_size: int) -> tuple[Tensor, Tensor]:
    """Packed to canonical."""
    shapes = codes_shape(rows, columns), scale_shape(rows, columns, group_size)
    with _guarded((shapes[0], torch.uint8), (shapes[1], torch.int16)) as canonical:
        emulated_cuda().unpack(*_addresses(codes, scale, rows, columns, group_size, *canonical, 0))
    return canonical[0], canonical[1]


def decode(
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    rows: int,
    columns: int,
    group_size: int,
    dtype: torch.dtype,
) -> Tensor:
    """Canonical or packed (three dimensions) codes to [N, K]."""
    weight = _addresses(codes, scale, codebook, rows, columns, group_size)
    with _guarded(((rows, columns), dtype)) as out:
        emulated_cuda().decode(*weight, codes.dim() == 3, *_addresses(*out, TYPES[dtype], 0))
    return out[0]


def _source(weight: Tensor, codebook: Tensor, group_size: int, pairing: str) -> tuple[int, ...]:
    size = (TYPES[weight.dtype], *weight.shape, group_size)
    return (*_addresses(weight, *size, codebook), pairing == "paper")


def _check_finite(flag: Tensor) -> None:
    if flag.item():
        raise ValueError("weight: expected finite values, got NaN or Inf")


def encode(weight: Tensor, scale: Tensor, codebook: Tensor, group_size: int, pairing: str) -> Tensor:
    """Encode with scales given. A weight that is not finite raises ValueError."""
    flag = torch.zeros(1, dtype=torch.int32)
    with _guarded((codes_shape(*weight.shape), torch.uint8)) as codes:
        source = _source(weight, codebook, group_size, pairing)
        emulated_cuda().encode(*source, *_addresses(scale, *codes, flag, 0))
    _check_finite(flag)
    return codes[0]


def quantize(
    weight: Tensor,
    codebook: Tensor,
    group_size: int,
    pairing: str,
    pair_grid: list[float],
    plain_grid: list[float],
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Search scales and encode. A weight that is not finite raises ValueError."""
    rows, columns = weight.shape
    grids = [torch.tensor(grid, dtype=torch.float32) for grid in (pair_grid, plain_grid)]
    scratch = (rows, 2 + len(pair_grid) + 2 * len(plain_grid)) if group_size == PER_TENSOR else (0,)
    shapes = codes_shape(rows, columns), scale_shape(rows, columns, group_size)
    flag = torch.zeros(1, dtype=torch.int32)
    with _guarded((shapes[0], torch.uint8), (shapes[1], torch.int16), (scratch, torch.float64)) as out:
        search = (grids[0], len(pair_grid), grids[1], len(plain_grid), importance, out[2])
        source = _source(weight, codebook, group_size, pairing)
        emulated_cuda().quantize(*source, *_addresses(*search, out[0], out[1], flag, 0))
    _check_finite(flag)
    return out[0], out[1]
