"""The formats OVP is compared with: each against an independent, slow or hand-made result."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from torch import Tensor

from bench.baselines import (
    BASELINES,
    NF4_LEVELS,
    ONLY_BLOCK,
    Decoded,
    dynamic_levels,
    hqq,
    int4_asymmetric,
    int4_symmetric,
    mxfp4,
    nf4_absmax,
    nf4_best_scale,
    nf4_best_signed_scale,
    nf4_double_quant,
    nvfp4,
)

# Published with QLoRA (arXiv:2305.14314, appendix E), rounded to 7 digits.
PUBLISHED_NF4 = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip


def draw(rows: int, columns: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def nearest(value: float, levels: list[float]) -> float:
    return min(levels, key=lambda level: abs(level - value))


def error(weight: Tensor, decoded: Decoded) -> float:
    return float((decoded.weight - weight).double().square().sum())


def test_nf4_levels_are_the_published_ones() -> None:
    assert len(NF4_LEVELS) == 16
    assert all(abs(own - published) <= 5e-8 for own, published in zip(NF4_LEVELS, PUBLISHED_NF4, strict=True))


def test_nf4_levels_are_quantiles_of_a_normal_distribution() -> None:
    # QLoRA's recipe: 8 positive and 7 negative levels evenly spaced in probability from an offset, and zero.
    normal = torch.distributions.Normal(0.0, 1.0)
    offset = 0.5 * (1 / 32 + 1 / 30)
    positive = normal.icdf(torch.linspace(1 - offset, 0.5, 9, dtype=torch.float64)[:-1])
    negative = -normal.icdf(torch.linspace(1 - offset, 0.5, 8, dtype=torch.float64)[:-1])
    levels = torch.cat((positive, negative, torch.zeros(1))).sort().values
    levels = levels / levels.max()
    # bitsandbytes' offset is 0.9677083, so the published values differ from these in the sixth digit.
    assert (levels - torch.tensor(NF4_LEVELS, dtype=torch.float64)).abs().max() <= 5e-6


def test_nf4_absmax_matches_a_loop() -> None:
    weight = draw(3, 20)
    decoded, bits = nf4_absmax(weight, 8)
    for row in range(3):
        for start in (0, 8, 16):
            group = weight[row, start : start + 8].tolist()
            scale = max(abs(value) for value in group)
            expected = [nearest(value / scale, list(NF4_LEVELS)) * scale for value in group]
            torch.testing.assert_close(
                decoded[row, start : start + 8], torch.tensor(expected), rtol=1e-6, atol=0
            )
    assert bits == 4 + 3 * 32 / 20


def test_nf4_best_scale_matches_a_loop() -> None:
    weight = draw(2, 6)
    for function, signs in ((nf4_best_scale, (1,)), (nf4_best_signed_scale, (1, -1))):
        decoded, bits = function(weight, 4)
        for row in range(2):
            for start in (0, 4):
                group = weight[row, start : start + 4].tolist()
                least, best = math.inf, []
                for sign in signs:
                    for percent in range(50, 111):
                        product = torch.tensor(max(map(abs, group))) * (sign * percent / 100)
                        scale = float(product.bfloat16())
                        candidate = [nearest(value / scale, list(NF4_LEVELS)) * scale for value in group]
                        squared = sum((a - b) ** 2 for a, b in zip(candidate, group, strict=True))
                        if squared < least:
                            least, best = squared, candidate
                torch.testing.assert_close(
                    decoded[row, start : start + 4], torch.tensor(best), rtol=1e-5, atol=0
                )
        assert bits == 4 + 2 * 16 / 6


def test_better_nf4_scales_lower_the_error() -> None:
    weight = draw(64, 256)
    absmax, best, signed = (
        error(weight, f(weight, 128)) for f in (nf4_absmax, nf4_best_scale, nf4_best_signed_scale)
    )
    assert signed <= best <= absmax


def test_nf4_levels_reproduce_themselves() -> None:
    weight = torch.tensor([NF4_LEVELS]) * 3.0
    torch.testing.assert_close(nf4_absmax(weight, 16).weight, weight, rtol=1e-7, atol=0)
    assert nf4_best_scale(weight, 16).weight.equal(weight)


def test_dynamic_levels_match_the_definition() -> None:
    # Decade i holds the midpoints of 2^i equal parts of [0.1, 1], times 10^(i - 6); computed here exactly.
    expected = {Fraction(0), Fraction(1)}
    for decade in range(7):
        parts = 2**decade
        for part in range(parts):
            middle = Fraction(1, 10) + Fraction(9, 10) * (Fraction(part) + Fraction(1, 2)) / parts
            expected |= {middle * Fraction(10) ** (decade - 6), -middle * Fraction(10) ** (decade - 6)}
    assert len(expected) == 256
    reference = torch.tensor([float(level) for level in sorted(expected)])
    torch.testing.assert_close(dynamic_levels(), reference, rtol=1e-6, atol=0)


def test_nf4_double_quantization_matches_a_loop() -> None:
    weight = draw(40, 64) * torch.linspace(0.1, 2, 40)[:, None]
    decoded, bits = nf4_double_quant(weight, 8)  # 320 groups: one block of 256 and a shorter one
    groups = weight.reshape(-1, 8)
    maxima = groups.abs().amax(1)
    mean = maxima.mean()
    levels = dynamic_levels().tolist()
    for start in (0, 256):
        block = (maxima[start : start + 256] - mean).tolist()
        outer = max(map(abs, block))
        for offset, value in enumerate(block):
            scale = nearest(value / outer, levels) * outer + float(mean)
            group = groups[start + offset]
            codes = [nearest(float(v / maxima[start + offset]), list(NF4_LEVELS)) for v in group]
            torch.testing.assert_close(
                decoded.reshape(-1, 8)[start + offset],
                torch.tensor([code * scale for code in codes]),
                rtol=1e-5,
                atol=1e-6,
            )
    assert bits == 4 + (320 * 8 + 2 * 32 + 32) / weight.numel()


def test_int4_asymmetric_by_hand() -> None:
    # Range -1 .. 2: scale 3 / 15 = 0.2 -> float16 0.199951171875, zero point round(5.001) = 5.
    weight = torch.tensor([[-1.0, 2.0, 0.29, 0.0, 0.31, -0.11, 1.0, 0.09]])
    scale = 0.199951171875
    expected = torch.tensor([[-5, 10, 1, 0, 2, -1, 5, 0]]) * scale
    decoded, bits = int4_asymmetric(weight, 8)
    torch.testing.assert_close(decoded, expected, rtol=1e-6, atol=0)
    assert bits == 4 + 20 / 8


def test_int4_asymmetric_range_holds_zero() -> None:
    # All positive: the range is 0 .. 15 and zero is exact, so 7.4 rounds to 7.
    weight = torch.tensor([[7.4, 15.0, 1.0, 8.6]])
    torch.testing.assert_close(
        int4_asymmetric(weight, 4).weight, torch.tensor([[7.0, 15.0, 1.0, 9.0]]), rtol=0, atol=0
    )


def test_int4_asymmetric_error_is_at_most_a_step() -> None:
    weight = draw(32, 128)
    step = (weight.amax(1) - weight.amin(1)) / 15
    # Half a step inside; the rounded zero point moves the ends by half a step more.
    assert ((int4_asymmetric(weight, 128).weight - weight).abs().amax(1) <= step * 1.01).all()


def test_int4_symmetric_by_hand() -> None:
    weight = torch.tensor([[-7.0, 3.4, 2.5, 0.4], [14.0, -1.2, 5.1, 0.0]])
    decoded, bits = int4_symmetric(weight, 4)
    assert decoded.tolist() == [[-7.0, 3.0, 2.0, 0.0], [14.0, -2.0, 6.0, 0.0]]
    assert bits == 4 + 16 / 4


def test_mxfp4_by_hand() -> None:
    values = [7.0, -6.0, 5.0, 2.5, 3.5, -0.25, 0.75, 1.75, 0.26, 4.9, 5.1, 0.0]
    # max 7: exponent 2, scale 1, saturates at 6. Ties to the even mantissa: 5 -> 4, 2.5 -> 2, 3.5 -> 4,
    # 0.25 -> 0, 0.75 -> 1, 1.75 -> 2.
    expected = [6.0, -6.0, 4.0, 2.0, 4.0, 0.0, 1.0, 2.0, 0.5, 4.0, 6.0, 0.0]
    for power in (1.0, 2.0**-9):
        decoded, bits = mxfp4(torch.tensor([values]) * power)
        assert decoded.equal(torch.tensor([expected]) * power)
    assert bits == 4 + 8 / 12


def nearest_even(value: float, levels: list[float]) -> float:
    """Rising levels; a tie goes to the one with an even index, whose mantissa is even."""
    return min(levels, key=lambda level: (abs(level - value), levels.index(level) % 2))


def test_nvfp4_matches_a_loop() -> None:
    # E4M3 by its definition: 3 bits of mantissa, exponents -6..8, subnormals of 2^-9; 480 is NaN.
    e4m3 = [step * 2.0**-9 for step in range(8)]
    e4m3 += [(8 + step) * 2.0 ** (power - 3) for power in range(-6, 9) for step in range(8)][:-1]
    assert e4m3[-1] == 448
    e2m1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    weight = draw(5, 40) * torch.logspace(-4, 0, 5)[:, None]  # the last block of a row has 8 values
    decoded, bits = nvfp4(weight)
    tensor_scale = float(weight.abs().max()) / (6 * 448)
    for row in range(5):
        for start in (0, 16, 32):
            block = weight[row, start : start + 16].tolist()
            scale = nearest_even(max(map(abs, block)) / 6 / tensor_scale, e4m3) * tensor_scale
            expected = [
                math.copysign(nearest_even(abs(value) / scale, e2m1), value) * scale if scale else 0.0
                for value in block
            ]
            torch.testing.assert_close(
                decoded[row, start : start + 16], torch.tensor(expected), rtol=1e-5, atol=0
            )
    assert bits == 4 + (15 * 8 + 32) / weight.numel()


def test_nvfp4_by_hand() -> None:
    # The tensor's scale is 2688 / 2688 = 1. Second block: its scale, 1.0625, lies between E4M3's 1 and 1.125
    # and goes to 1, whose mantissa is even. Ties of values: 2.5 -> 2, 5 -> 4, 0.25 -> 0, 0.75 -> 1.
    weight = torch.zeros(1, 32)
    weight[0, 0] = 2688.0
    weight[0, 16:22] = torch.tensor([6.375, -2.5, 5.0, 0.25, 0.75, -3.6])
    expected = torch.zeros(1, 32)
    expected[0, 0] = 2688.0
    expected[0, 16:22] = torch.tensor([6.0, -2.0, 4.0, 0.0, 1.0, -4.0])
    assert nvfp4(weight).weight.equal(expected)


def test_hqq_matches_a_loop() -> None:
    weight = torch.distributions.StudentT(4.0).sample((4, 24))
    decoded, bits = hqq(weight, 16)  # the last group of a row has 8 values
    groups = [weight[row, start : start + 16].double() for row in range(4) for start in (0, 16)]
    steps = [float(group.max() - group.min()) / 15 for group in groups]
    zeros = [round(-float(group.min()) / step) for group, step in zip(groups, steps, strict=True)]
    least, beta = math.inf, 10.0

    def codes(index: int) -> Tensor:
        return torch.round(groups[index] / steps[index] + zeros[index]).clamp(0, 15)

    for _ in range(20):
        total = 0.0
        for index, group in enumerate(groups):
            code = codes(index)
            error = group - (code - zeros[index]) * steps[index]
            total += float(error.abs().sum())
            shrunk = error.sign() * (error.abs() - error.abs() ** -0.3 / beta).clamp(min=0)
            zeros[index] = float((code - (group - shrunk) / steps[index]).mean())
        beta *= 1.01
        if total >= least:
            break
        least = total
    expected = torch.stack(
        [
            torch.cat([(codes(index) - zeros[index]) * steps[index] for index in (row * 2, row * 2 + 1)])
            for row in range(4)
        ]
    )
    # Scales and zero points are stored in float16, which moves values by up to 2^-11 of 15 steps or so.
    torch.testing.assert_close(decoded.double(), expected, rtol=0, atol=15 * max(steps) / 1024)
    assert bits == 4 + 8 * 32 / weight.numel()


def test_hqq_loses_less_of_what_is_common_than_rounding_does() -> None:
    weight = torch.distributions.StudentT(4.0).sample((64, 256))
    for size in (64, 128):
        errors = [(f(weight, size).weight - weight).abs().mean() for f in (hqq, int4_asymmetric)]
        assert errors[0] < errors[1]


@pytest.mark.parametrize("name", [name for name in BASELINES if name not in ONLY_BLOCK])
@pytest.mark.parametrize("group_size", [128, 32, -1, 0])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (5, 131), (2, 256)])
def test_shapes_and_ragged_groups(name: str, group_size: int, shape: tuple[int, int]) -> None:
    weight = draw(*shape)
    decoded, bits = BASELINES[name](weight, group_size)
    assert decoded.shape == weight.shape
    assert decoded.dtype == torch.float32
    assert float((decoded - weight).square().sum()) <= 0.15 * float(weight.square().sum())
    assert bits > 4
    if shape[1] > 128 and group_size == 128:  # a ragged group is quantized as if it stood alone
        alone = BASELINES[name](weight[:, 128:], 128).weight
        if name not in ("NF4, double quantization", "HQQ"):  # where the whole tensor has a say
            assert decoded[:, 128:].equal(alone)


@pytest.mark.parametrize("name", BASELINES)
def test_zeros_decode_to_zeros(name: str) -> None:
    weight = torch.zeros(2, 32)
    assert BASELINES[name](weight, ONLY_BLOCK.get(name, 32)).weight.equal(weight)


def test_errors_of_a_gaussian_are_those_known() -> None:
    # Measured when the OVP format was chosen, groups of 128.
    weight = draw(256, 1024)
    energy = float(weight.double().square().sum())
    for function, known in ((int4_asymmetric, 0.0101), (nf4_absmax, 0.0092), (nf4_best_scale, 0.0081)):
        assert abs(error(weight, function(weight, 128)) / energy - known) <= 0.0003


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"weight: expected shape \[N, K\] with N, K >= 1, got \(4,\)"):
        nf4_absmax(torch.ones(4), 4)
    with pytest.raises(ValueError, match="group_size: expected -1, 0 or columns per group, got -2"):
        nf4_absmax(torch.ones(4, 4), -2)
    with pytest.raises(ValueError, match="weight: expected scales within float16, got"):
        int4_symmetric(torch.full((1, 4), 1e6), 4)
    with pytest.raises(ValueError, match="group_size: expected 32, the only block of MXFP4, got 128"):
        mxfp4(torch.ones(1, 128), 128)
    with pytest.raises(ValueError, match="group_size: expected 16, the only block of NVFP4, got 32"):
        nvfp4(torch.ones(1, 32), 32)
