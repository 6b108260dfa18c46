"""Which CUDA kernel multiplies: one function of M, N, K and the GPU, with named thresholds.

No threshold has been measured yet: each says what it was predicted from (docs/gpu_kernels.md has the counts).
`bench/GPU_QUEUE.md` holds the runs that will confirm or move them.
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
class _MmaTile:
    tokens: int
    rows: int
    warps_along_k: int
    blocks: int  # resident per multiprocessor
    shared: int  # bytes


# Shapes of csrc/cuda/linear_mma.cu, for groups of 64 and more.
MMA_TILES = (
    _MmaTile(8, 64, 8, 2, 98_816),
    _MmaTile(16, 128, 2, 2, 98_816),
    _MmaTile(32, 128, 2, 1, 132_096),
    _MmaTile(64, 256, 1, 1, 164_864),
)
WGMMA_TILES = ((128, 64), (128, 128), (128, 256), (256, 128))  # rows, tokens

# The same for csrc/cuda/linear_quantized_mma.cu and linear_quantized_wgmma_sm90.cu.
QUANTIZED_MMA_TILES = (
    _MmaTile(8, 64, 8, 2, 86_528),
    _MmaTile(16, 128, 2, 2, 90_624),
    _MmaTile(32, 128, 2, 1, 115_712),
    _MmaTile(64, 256, 1, 1, 148_480),
)
QUANTIZED_WGMMA_TILES = ((128, 64), (128, 128), (128, 256))

# mma.sync is bound by its products from 64 rows on, at half of memory speed; wgmma has twice the rate.
# Predicted; below 33 rows both are bound by memory, and mma.sync needs no whole 64 rows.
WGMMA_FROM_ROWS = 33
# Below this share of the multiprocessors with a tile, splitting the columns (mma) uses more of the GPU.
WGMMA_LEAST_FILLED = 0.75
# Decoding to a buffer costs 4 bytes per weight of memory traffic, however many rows follow: 4 % of the
# product at 8192 rows on an H200. Predicted: less than what the fused kernel's decoding costs from there on.
HOPPER_DECODE_FROM_ROWS = 8192
# mma.sync reaches about two thirds of what cuBLAS does on Ampere, and a third to a half on Blackwell, whose
# own matrix instructions it does not use. Predicted from instruction counts.
AMPERE_DECODE_FROM_ROWS = 1024
BLACKWELL_DECODE_FROM_ROWS = 256
# GPUs with 99 KiB of shared memory decode each weight once per 16 activation rows.
SMALL_DECODE_FROM_ROWS = 96

# As WGMMA_FROM_ROWS. Predicted: up to here the integer kernels are bound by memory and look-ups alike.
QUANTIZED_WGMMA_FROM_ROWS = 33

RESERVED_BYTES = 1024  # of shared memory, per resident block
SPLITS = (8, 4, 2, 1)
_DECODE_CLOCKS = 180  # per warpgroup, 64 rows and 64 columns: counted instructions and their latencies
_L2_BYTES_PER_CLOCK = 32  # per multiprocessor
_INT8_DECODE_CLOCKS = 200  # per warpgroup, 64 rows and 128 columns: 128 of look-ups, and latencies
_LANES = 128  # instructions per clock and multiprocessor


def _mma_plan(m: int, n: int, k: int, gpu: Gpu, tiles: tuple[_MmaTile, ...]) -> Plan | None:
    fitting = [tile for tile in tiles if tile.shared <= gpu.shared_per_block]
    if not fitting:
        return None
    tile = next((tile for tile in fitting if tile.tokens >= m), fitting[-1])
    tasks = ceil(n / tile.rows) * ceil(m / tile.tokens)
    steps = ceil(k / (64 * tile.warps_along_k))
    fitting_blocks = gpu.shared_per_processor // (tile.shared + RESERVED_BYTES)
    resident = gpu.multiprocessors * max(1, min(tile.blocks, fitting_blocks))
    split = next(split for split in SPLITS if split == 1 or (tasks * split <= resident and split <= steps))
    return Plan("mma", tokens=tile.tokens, split=split)


def _wgmma_clocks(m: int, n: int, rows: int, tokens: int, gpu: Gpu) -> float:
    """Predicted clocks per 64 columns: rounds of tiles times the slowest of products, a warpgroup, and L2."""
    rounds = ceil(ceil(n / rows) * ceil(m / tokens) / gpu.multiprocessors)
    per_warpgroup = rows // 128
    products = rows // 64 * tokens * 2
    warpgroup = per_warpgroup * (tokens * 2 + _DECODE_CLOCKS)
    traffic = (tokens * 128 + rows * 32) / _L2_BYTES_PER_CLOCK
    return rounds * max(products, warpgroup, traffic)


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
    if gpu.capability == HOPPER and m >= WGMMA_FROM_ROWS:
        rows, tokens = min(WGMMA_TILES, key=lambda tile: _wgmma_clocks(m, n, tile[0], tile[1], gpu))
        filled = ceil(n / rows) * ceil(m / tokens) / gpu.multiprocessors
        if m > MMA_TILES[-1].tokens or filled >= WGMMA_LEAST_FILLED:
            return Plan("wgmma", tokens=tokens, rows=rows)
    return _mma_plan(m, n, k, gpu, MMA_TILES) or Plan("decode")


def quantized_wgmma_tiles(group_size: int, activation_group_size: int) -> tuple[tuple[int, int], ...]:
    """Rows and tokens of the tiles that the integer wgmma kernel has for these groups."""
    has_wide = group_size != 32 and activation_group_size <= 0
    return QUANTIZED_WGMMA_TILES if has_wide else QUANTIZED_WGMMA_TILES[:-1]


def _quantized_wgmma_clocks(
    m: int, n: int, rows: int, tokens: int, group_size: int, activation_group_size: int, gpu: Gpu
) -> float:
    """Predicted clocks per 128 columns, as `_wgmma_clocks`: besides, the instructions that scale sums."""
    rounds = ceil(ceil(n / rows) * ceil(m / tokens) / gpu.multiprocessors)
    groups = [size for size in (group_size, activation_group_size) if size > 0]
    runs = 128 // min(groups) if groups else 0
    scaling = runs * 64 * (3 if activation_group_size > 0 else 2) / _LANES  # clocks per token, a warpgroup
    products = tokens * 2  # of a warpgroup
    last = min(tokens, 64) * scaling / max(runs, 1)  # which no product hides
    issue = 2 * (tokens * scaling + 64 * 128 * 5 / 4 / _LANES)
    traffic = (tokens * 128 + rows * 64) / _L2_BYTES_PER_CLOCK
    return rounds * max(2 * products, issue, products + _INT8_DECODE_CLOCKS + last, traffic)


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
    if gpu.capability == HOPPER and m >= QUANTIZED_WGMMA_FROM_ROWS:
        rows, tokens = min(
            quantized_wgmma_tiles(group_size, activation_group_size),
            key=lambda tile: _quantized_wgmma_clocks(
                m, n, tile[0], tile[1], group_size, activation_group_size, gpu
            ),
        )
        filled = ceil(n / rows) * ceil(m / tokens) / gpu.multiprocessors
        if m > QUANTIZED_MMA_TILES[-1].tokens or filled >= WGMMA_LEAST_FILLED:
            return Plan("wgmma", tokens=tokens, rows=rows)
    return _mma_plan(m, n, k, gpu, QUANTIZED_MMA_TILES) or Plan("mma", tokens=QUANTIZED_MMA_TILES[0].tokens)
