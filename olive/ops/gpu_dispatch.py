"""Which CUDA kernel multiplies: the one of least predicted time, by M, N, K and the GPU.

A prediction counts rounds of tiles and steps along K, each with the time that was measured for its tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import ceil
from typing import Literal

import torch

HOPPER = 90  # compute capability 9.0, the one with wgmma


@dataclass(frozen=True)
class Gpu:
    """What the choice depends on.

    Args:
        capability: 10 major + minor, of the code that runs there.
        multiprocessors: how many.
        clusters: whether blocks can add up through each other's shared memory.
        shared_per_block: bytes of shared memory that a block may ask for.
        shared_per_processor: bytes that the blocks of a multiprocessor share.
    """

    capability: int
    multiprocessors: int
    clusters: bool
    shared_per_block: int
    shared_per_processor: int


@dataclass(frozen=True)
class Plan:
    """A kernel and its tile.

    Args:
        kernel: "mma" (tensor cores through mma.sync, any GPU), "wgmma" (Hopper), or "decode": decode to the
            activations' type, then torch's own linear.
        tokens: activation rows per block.
        rows: weight rows per block ("wgmma").
        split: blocks that share the columns of a tile ("mma").
    """

    kernel: Literal["mma", "wgmma", "decode"]
    tokens: int = 0
    rows: int = 0
    split: int = 1


@dataclass(frozen=True)
class MmaTile:
    """A shape of csrc/cuda/linear_mma.cu or linear_quantized_mma.cu, for groups of 64 and more.

    Args:
        tokens, rows: activation and weight rows of a block.
        warps_along_k: each has 64 columns of a step.
        blocks: resident per multiprocessor.
        shared: bytes of shared memory.
        start: of a launch.
        step: of a block that has its multiprocessor for itself.
        busy_step: the same where blocks share it, divided by their number.
        adding: what it takes 2, 4 and 8 blocks to add up a tile.
    """

    tokens: int
    rows: int
    warps_along_k: int
    blocks: int
    shared: int
    start: float
    step: float
    busy_step: float
    adding: tuple[float, float, float]


@dataclass(frozen=True)
class WgmmaTile:
    """A shape of csrc/cuda/linear_wgmma_sm90.cu or linear_quantized_wgmma_sm90.cu.

    Args:
        rows, tokens: weight and activation rows of a block.
        start: of a launch.
        step: of 64 columns; 128 with int8 products.
    """

    rows: int
    tokens: int
    start: float
    step: float


# Times are microseconds, fitted to those of plans on an H100 (`bench.gpu.sweep`, `bench.gpu.linear`). Only
# their ratios matter. Adding up between 8 blocks was measured for 16 activation rows only, and is set high
# for others. On GPUs other than Hopper nothing was measured.
MMA_TILES = (
    MmaTile(8, 64, 8, 2, 98_816, start=3.5, step=0.92, busy_step=0.75, adding=(2.2, 5.0, 10.0)),
    MmaTile(16, 128, 2, 2, 98_816, start=2.0, step=0.68, busy_step=0.52, adding=(2.5, 7.8, 14.4)),
    MmaTile(32, 128, 2, 1, 132_096, start=2.0, step=0.93, busy_step=0.93, adding=(2.7, 11.7, 25.0)),
    MmaTile(64, 256, 1, 1, 164_864, start=2.0, step=1.34, busy_step=1.34, adding=(5.8, 60.0, 80.0)),
)
WGMMA_TILES = (
    WgmmaTile(128, 64, start=2.0, step=0.430),
    WgmmaTile(128, 128, start=2.0, step=0.485),
    WgmmaTile(128, 256, start=2.0, step=0.750),
    WgmmaTile(256, 128, start=2.0, step=0.855),
)

# With quantizing the activations, one scale per token, in the start.
QUANTIZED_MMA_TILES = (
    MmaTile(8, 64, 8, 2, 86_528, start=6.9, step=1.06, busy_step=0.80, adding=(2.0, 6.0, 10.0)),
    MmaTile(16, 128, 2, 2, 90_624, start=6.0, step=0.70, busy_step=0.51, adding=(2.9, 8.5, 19.9)),
    MmaTile(32, 128, 2, 1, 115_712, start=5.7, step=0.87, busy_step=0.87, adding=(3.2, 12.0, 25.0)),
    MmaTile(64, 256, 1, 1, 148_480, start=6.0, step=1.15, busy_step=1.19, adding=(9.1, 60.0, 80.0)),
)
QUANTIZED_WGMMA_TILES = (
    WgmmaTile(128, 64, start=7.5, step=0.588),
    WgmmaTile(128, 128, start=7.7, step=0.780),
    WgmmaTile(128, 256, start=7.5, step=1.360),
)

# Decoding to a buffer costs 4 bytes per weight of memory traffic, however many rows follow. Measured on an
# H100: at 4096 rows 2 to 8 % faster than the fused kernel on four of five shapes, at 1024 a tenth slower.
HOPPER_DECODE_FROM_ROWS = 4096
# mma.sync reaches about two thirds of what cuBLAS does on Ampere, and a third to a half on Blackwell, whose
# own matrix instructions it does not use: predicted from instruction counts, not measured.
AMPERE_DECODE_FROM_ROWS = 1024
BLACKWELL_DECODE_FROM_ROWS = 256
# GPUs with 99 KiB of shared memory decode each weight once per 16 activation rows.
SMALL_DECODE_FROM_ROWS = 96

RESERVED_BYTES = 1024  # of shared memory, per resident block
SPLITS = (1, 2, 4, 8)


def _mma_time(m: int, n: int, k: int, tile: MmaTile, split: int, gpu: Gpu) -> float:
    """Blocks go round by round, and a multiprocessor's blocks share it: whichever takes longer."""
    blocks = ceil(n / tile.rows) * ceil(m / tile.tokens) * split
    steps = ceil(ceil(k / (64 * tile.warps_along_k)) / split)
    fitting = gpu.shared_per_processor // (tile.shared + RESERVED_BYTES)
    resident = max(1, min(tile.blocks, fitting))
    adding = 0.0 if split == 1 else tile.adding[SPLITS.index(split) - 1]
    alone = ceil(blocks / (gpu.multiprocessors * resident)) * (steps * tile.step + adding)
    shared = ceil(blocks / gpu.multiprocessors) * (steps * tile.busy_step + adding / resident)
    return tile.start + max(alone, shared)


def _wgmma_time(m: int, n: int, k: int, tile: WgmmaTile, columns: int, gpu: Gpu) -> float:
    """`columns` of a step."""
    tiles = ceil(n / tile.rows) * ceil(m / tile.tokens)
    return tile.start + ceil(tiles / gpu.multiprocessors) * ceil(k / columns) * tile.step


def _fastest(
    m: int,
    n: int,
    k: int,
    mma: tuple[MmaTile, ...],
    wgmma: tuple[WgmmaTile, ...],
    columns: int,
    gpu: Gpu,
) -> Plan | None:
    """The plan of least predicted time; None if no tile fits the GPU."""
    times: dict[Plan, float] = {}
    for tile in mma:
        if tile.shared <= gpu.shared_per_block:
            steps = ceil(k / (64 * tile.warps_along_k))
            for split in SPLITS:
                if split <= steps:
                    plan = Plan("mma", tokens=tile.tokens, split=split)
                    times[plan] = _mma_time(m, n, k, tile, split, gpu)
    if gpu.capability == HOPPER:
        for shape in wgmma:
            plan = Plan("wgmma", tokens=shape.tokens, rows=shape.rows)
            times[plan] = _wgmma_time(m, n, k, shape, columns, gpu)
    return min(times, key=times.__getitem__, default=None)


def _decode_from_rows(gpu: Gpu) -> int:
    if gpu.capability == HOPPER:
        return HOPPER_DECODE_FROM_ROWS
    if gpu.shared_per_block < MMA_TILES[-1].shared:
        return SMALL_DECODE_FROM_ROWS
    return BLACKWELL_DECODE_FROM_ROWS if gpu.capability > HOPPER else AMPERE_DECODE_FROM_ROWS


@lru_cache(maxsize=4096)
def choose_linear(m: int, n: int, k: int, dtype: torch.dtype, gpu: Gpu) -> Plan:
    """The kernel for activations [M, K] and a weight [N, K].

    Args:
        m: rows, >= 1.
        n: output features.
        k: input features.
        dtype: of the activations. float32 has no fused kernel: it is decoded and multiplied by torch.
        gpu: where it runs.
    """
    if dtype == torch.float32 or m >= _decode_from_rows(gpu):
        return Plan("decode")
    return _fastest(m, n, k, MMA_TILES, WGMMA_TILES, 64, gpu) or Plan("decode")


def quantized_wgmma_tiles(group_size: int, activation_group_size: int) -> tuple[WgmmaTile, ...]:
    """The tiles that the integer wgmma kernel has for these groups."""
    has_wide = group_size != 32 and activation_group_size <= 0
    return QUANTIZED_WGMMA_TILES if has_wide else QUANTIZED_WGMMA_TILES[:-1]


@lru_cache(maxsize=4096)
def choose_linear_quantized(
    m: int, n: int, k: int, group_size: int, activation_group_size: int, gpu: Gpu
) -> Plan:
    """The kernel for int8 levels of activations [M, K] and of a weight [N, K].

    Args:
        m: rows, >= 1.
        n: output features.
        k: input features.
        group_size: of the weight.
        activation_group_size: of the activations.
        gpu: where it runs; "mma" runs everywhere, however many rows there are.
    """
    wgmma = quantized_wgmma_tiles(group_size, activation_group_size)
    return _fastest(m, n, k, QUANTIZED_MMA_TILES, wgmma, 128, gpu) or Plan(
        "mma", tokens=QUANTIZED_MMA_TILES[0].tokens
    )
