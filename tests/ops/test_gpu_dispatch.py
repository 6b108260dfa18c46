"""`choose_linear`, `choose_linear_quantized`: choices can run where they are made, and fill the GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olive.ops import gpu_dispatch
from olive.ops.gpu_dispatch import Gpu, Plan, choose_linear, choose_linear_quantized
from tests.cuda.module import NEEDS_COMPILER, emulated_cuda

H200 = Gpu(90, 132, True, 227 * 1024, 228 * 1024)
A100 = Gpu(80, 108, False, 163 * 1024, 164 * 1024)
RTX4090 = Gpu(89, 128, False, 99 * 1024, 100 * 1024)
B200 = Gpu(100, 148, True, 227 * 1024, 228 * 1024)
TURING = Gpu(75, 68, False, 64 * 1024, 64 * 1024)
GPUS = (H200, A100, RTX4090, B200, TURING)
TILES = {tile.tokens: tile for tile in gpu_dispatch.MMA_TILES}


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 20_000),
    n=st.integers(1, 100_000),
    k=st.integers(1, 100_000),
    dtype=st.sampled_from((torch.bfloat16, torch.float16, torch.float32)),
    gpu=st.sampled_from(GPUS),
)
def test_every_choice_can_run(m: int, n: int, k: int, dtype: torch.dtype, gpu: Gpu) -> None:
    plan = choose_linear(m, n, k, dtype, gpu)
    if dtype == torch.float32:
        assert plan == Plan("decode")
    if plan.kernel == "mma":
        tile = TILES[plan.tokens]
        assert tile.shared <= gpu.shared_per_block
        assert plan.split in (1, 2, 4, 8)
    if plan.kernel == "wgmma":
        assert gpu.capability == 90
        assert (plan.rows, plan.tokens) in {(tile.rows, tile.tokens) for tile in gpu_dispatch.WGMMA_TILES}


@pytest.mark.parametrize(
    ("m", "shape", "plan"),
    [
        (1, (4096, 4096), Plan("mma", tokens=8, split=2)),
        (8, (14336, 4096), Plan("mma", tokens=8)),
        (16, (4096, 4096), Plan("mma", tokens=8)),
        (16, (14336, 4096), Plan("mma", tokens=16, split=2)),
        (16, (28672, 8192), Plan("mma", tokens=16)),
        (32, (14336, 4096), Plan("wgmma", rows=128, tokens=64)),
        (1, (28672, 8192), Plan("mma", tokens=8)),
        (64, (4096, 4096), Plan("mma", tokens=32, split=2)),
        (128, (14336, 4096), Plan("wgmma", rows=128, tokens=128)),
        (128, (28672, 8192), Plan("wgmma", rows=256, tokens=128)),
        (1024, (14336, 4096), Plan("wgmma", rows=128, tokens=256)),
    ],
    ids=str,
)
def test_the_choice_is_what_was_measured_to_be_the_fastest(
    m: int, shape: tuple[int, int], plan: Plan
) -> None:
    """On an H100, which has the same multiprocessors."""
    assert choose_linear(m, *shape, torch.bfloat16, H200) == plan


@pytest.mark.parametrize("m", [1, 16, 32])
@pytest.mark.parametrize("gpu", [H200, A100, B200], ids=str)
def test_small_matrices_fill_the_gpu(m: int, gpu: Gpu) -> None:
    plan = choose_linear(m, 4096, 4096, torch.bfloat16, gpu)
    tile = TILES[plan.tokens]
    blocks = -(-4096 // tile.rows) * -(-m // tile.tokens) * plan.split
    assert blocks >= gpu.multiprocessors // 2
    fitting = gpu.shared_per_processor // (tile.shared + gpu_dispatch.RESERVED_BYTES)
    assert blocks <= gpu.multiprocessors * min(tile.blocks, fitting)


def test_many_rows_take_wgmma_on_hopper_and_decoding_elsewhere() -> None:
    for m in (128, 256, 1024):
        assert choose_linear(m, 4096, 4096, torch.float16, H200).kernel == "wgmma"
    assert choose_linear(4096, 4096, 4096, torch.float16, H200).kernel == "decode"
    assert choose_linear(100, 4096, 4096, torch.float16, A100).kernel == "mma"
    for gpu in (A100, RTX4090, B200):
        assert choose_linear(4096, 4096, 4096, torch.float16, gpu).kernel == "decode"


def test_a_gpu_without_the_shared_memory_decodes() -> None:
    assert choose_linear(1, 4096, 4096, torch.float16, TURING) == Plan("decode")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    m=st.integers(1, 20_000),
    n=st.integers(1, 100_000),
    k=st.integers(1, 100_000),
    group_size=st.sampled_from((-1, 0, 32, 64, 128)),
    activation_group_size=st.sampled_from((-1, 0, 32, 64, 128)),
    gpu=st.sampled_from((H200, A100, RTX4090, B200)),
)
def test_every_choice_for_integers_can_run(
    m: int, n: int, k: int, group_size: int, activation_group_size: int, gpu: Gpu
) -> None:
    plan = choose_linear_quantized(m, n, k, group_size, activation_group_size, gpu)
    if plan.kernel == "wgmma":
        assert gpu.capability == 90
        tiles = gpu_dispatch.quantized_wgmma_tiles(group_size, activation_group_size)
        assert (plan.rows, plan.tokens) in {(tile.rows, tile.tokens) for tile in tiles}
    else:
        (tile,) = (tile for tile in gpu_dispatch.QUANTIZED_MMA_TILES if tile.tokens == plan.tokens)
        assert plan.kernel == "mma"
        assert tile.shared <= gpu.shared_per_block
        assert plan.split in (1, 2, 4, 8)


def test_integers_take_the_kernels_that_16_bit_products_take() -> None:
    for m, tokens in ((1, 8), (16, 16)):
        plan = choose_linear_quantized(m, 14336, 4096, 128, -1, H200)
        assert (plan.kernel, plan.tokens) == ("mma", tokens)
    assert choose_linear_quantized(32, 4096, 4096, 128, -1, H200).kernel == "mma", "too few tiles"
    assert choose_linear_quantized(64, 14336, 4096, 128, -1, H200) == Plan("wgmma", tokens=64, rows=128)
    for m in (1024, 4096):
        assert choose_linear_quantized(m, 4096, 4096, 128, -1, H200) == Plan("wgmma", tokens=256, rows=128)
    assert choose_linear_quantized(4096, 4096, 4096, 128, 32, H200).tokens == 128
    assert choose_linear_quantized(4096, 4096, 4096, 128, -1, A100).kernel == "mma"


@NEEDS_COMPILER
@pytest.mark.parametrize("name", ["mma_shapes", "quantized_mma_shapes"])
def test_tiles_are_those_of_the_kernels(name: str) -> None:
    tiles = gpu_dispatch.MMA_TILES if name == "mma_shapes" else gpu_dispatch.QUANTIZED_MMA_TILES
    expected = [(tile.tokens, tile.rows, tile.warps_along_k, tile.blocks, tile.shared) for tile in tiles]
    assert getattr(emulated_cuda(), name)() == expected
