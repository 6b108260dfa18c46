"""The formats that OVP is compared with, each as the pair (decoded weight, bits per weight).

Groups of `group_size` columns share a scale; -1 is one group per row, 0 one per tensor; the last group of a
row may be shorter. Bits count codes, scales and zero points, not the level table that a format shares.
All arithmetic is float32; codes are chosen for the scale as it is stored, unless stated otherwise.

Everything here is written from the definitions. Where the package that a format comes from is installed,
`bench.peers_quality` calls it, and a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# NF4: quantiles of a normal distribution, scaled to -1..1, asymmetric so that 0 is a level.
# Source: QLoRA, arXiv:2305.14314, appendix E, the values that bitsandbytes ships.
NF4_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
NF4_MULTIPLES = tuple(round(0.50 + 0.01 * step, 2) for step in range(61))  # of max|w|, for the best scale
E2M1_LEVELS = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E4M3_LARGEST = 448.0
MX_BLOCK, NV_BLOCK = 32, 16
HQQ_NORM, HQQ_BETA, HQQ_KAPPA, HQQ_ITERATIONS = 0.7, 10.0, 1.01, 20  # the solver's published settings


class Decoded(NamedTuple):
    """A weight as a format reproduces it."""

    weight: Tensor  # float32 [N, K]
    bits_per_weight: float


class _Groups:
    """A weight [N, K] as groups [G, width], the last of each row filled up with zeros.

    Zeros change no maximum of magnitudes, no range that holds zero, and no error: all formats here hold zero.
    """

    def __init__(self, weight: Tensor, group_size: int):
        if weight.dim() != 2 or 0 in weight.shape:
            raise ValueError(f"weight: expected shape [N, K] with N, K >= 1, got {tuple(weight.shape)}")
        if group_size < -1:
            raise ValueError(f"group_size: expected -1, 0 or columns per group, got {group_size}")
        self.shape = weight.shape
        self.weight = weight.float()
        if group_size == 0:
            self.values = self.weight.reshape(1, -1)
        else:
            width = self.shape[1] if group_size == -1 else group_size
            self.values = torch.nn.functional.pad(self.weight, (0, -self.shape[1] % width)).reshape(-1, width)
        self.whole = group_size == 0

    def inside(self) -> Tensor:
        """Which of `values` are the weight's own, bool [G, width]; the others fill up."""
        ones = torch.ones(self.shape, dtype=torch.bool)
        width = self.values.shape[1]
        if self.whole:
            return ones.reshape(1, -1)
        return torch.nn.functional.pad(ones, (0, -self.shape[1] % width)).reshape(-1, width)

    @property
    def count(self) -> int:
        return int(self.values.shape[0])

    def absmax(self) -> Tensor:
        """Largest magnitude of each group [G, 1]; 1 where all values are zero, so that it can divide."""
        largest = self.values.abs().amax(dim=1, keepdim=True)
        return torch.where(largest == 0, 1.0, largest)

    def decoded(self, values: Tensor, bits_per_group: float, bits_per_tensor: float = 0.0) -> Decoded:
        """Back to [N, K], with the bits of the codes and of what each group stores beside them."""
        rows, columns = self.shape
        matrix = values.reshape(rows, -1)[:, :columns].contiguous()
        overhead = self.count * bits_per_group + bits_per_tensor
        return Decoded(matrix, 4.0 + overhead / (rows * columns))


def _nearest(values: Tensor, levels: Tensor) -> Tensor:
    """The nearest of the rising levels; ties go to the lower one."""
    return levels[torch.bucketize(values.contiguous(), (levels[:-1] + levels[1:]) / 2)]


def nf4_absmax(weight: Tensor, group_size: int) -> Decoded:
    """NF4 as QLoRA defines it: value = level x max|w| of the group, the maximum stored in float32."""
    groups = _Groups(weight, group_size)
    scale = groups.absmax()
    return groups.decoded(_nearest(groups.values / scale, torch.tensor(NF4_LEVELS)) * scale, 32)


def nf4_double_quant(weight: Tensor, group_size: int) -> Decoded:
    """NF4 as QLoRA ships it, with double quantization: the groups' maxima in 8-bit dynamic floats.

    Their mean, one float32, is subtracted first; 256 maxima share one float32 scale. Codes are chosen
    for the maximum before it is quantized, as bitsandbytes does.
    """
    groups = _Groups(weight, group_size)
    scale = groups.absmax()
    codes = _nearest(groups.values / scale, torch.tensor(NF4_LEVELS))
    mean = scale.mean()
    centred = torch.nn.functional.pad((scale - mean).flatten(), (0, -groups.count % 256)).reshape(-1, 256)
    outer = centred.abs().amax(dim=1, keepdim=True)
    outer = torch.where(outer == 0, 1.0, outer)
    stored = (_nearest(centred / outer, dynamic_levels()) * outer).flatten()[: groups.count, None] + mean
    outer_bits = 32 * len(outer) + 32
    return groups.decoded(codes * stored, 8, outer_bits)


def dynamic_levels() -> Tensor:
    """The 256 levels of bitsandbytes' signed 8-bit dynamic data type, rising, within -1..1.

    In decade i of seven, 2^i fractions spaced evenly between 0.1 and 1 (midpoints), both signs; and 0 and 1.
    """
    levels = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        fractions = (edges[:-1] + edges[1:]) / 2.0 * 10.0 ** (exponent - 6)
        levels += fractions.tolist() + (-fractions).tolist()
    return torch.tensor(sorted(levels), dtype=torch.float32)


def _nf4_search(weight: Tensor, group_size: int, signs: tuple[float, ...]) -> Decoded:
    groups = _Groups(weight, group_size)
    levels, absmax = torch.tensor(NF4_LEVELS), groups.absmax()
    best = torch.zeros_like(groups.values)
    least = torch.full((groups.count, 1), float("inf"), dtype=torch.float64)
    for sign in signs:
        for multiple in NF4_MULTIPLES:
            scale = (absmax * (sign * multiple)).bfloat16().float()
            values = _nearest(groups.values / scale, levels) * scale
            error = (values - groups.values).square().sum(dim=1, keepdim=True, dtype=torch.float64)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, values, best)
    return groups.decoded(best, 16)


def nf4_best_scale(weight: Tensor, group_size: int) -> Decoded:
    """NF4 with the bfloat16 scale of least squared error among 0.50 .. 1.10 of max|w|, steps of 0.01."""
    return _nf4_search(weight, group_size, (1.0,))


def nf4_best_signed_scale(weight: Tensor, group_size: int) -> Decoded:
    """`nf4_best_scale` with negative scales as well, which mirror the asymmetric table; nobody ships this."""
    return _nf4_search(weight, group_size, (1.0, -1.0))


def int4_asymmetric(weight: Tensor, group_size: int) -> Decoded:
    """Round to nearest between the group's minimum and maximum, both taken to hold zero.

    scale = (max - min) / 15 in float16, zero = round(-min / scale) in 4 bits, code = round(w / scale) + zero
    clipped to 0..15; ties to even. The grid of GPTQ and AWQ without their optimization.
    """
    groups = _Groups(weight, group_size)
    low = groups.values.amin(dim=1, keepdim=True).clamp(max=0)
    high = groups.values.amax(dim=1, keepdim=True).clamp(min=0)
    scale = _float16_scale((high - low) / 15)
    zero = torch.round(-low / scale).clamp(0, 15)
    code = (torch.round(groups.values / scale) + zero).clamp(0, 15)
    return groups.decoded((code - zero) * scale, 16 + 4)


def int4_symmetric(weight: Tensor, group_size: int) -> Decoded:
    """Round to nearest with scale = max|w| / 7 in float16, codes -8..7; ties to even."""
    groups = _Groups(weight, group_size)
    scale = _float16_scale(groups.absmax() / 7)
    return groups.decoded(torch.round(groups.values / scale).clamp(-8, 7) * scale, 16)


def _float16_scale(scale: Tensor) -> Tensor:
    """Round to float16; 1 where that is zero."""
    rounded = scale.half().float()
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError(f"weight: expected scales within float16, got {float(scale.max())}")
    return torch.where(rounded == 0, 1.0, rounded)


def mxfp4(weight: Tensor, group_size: int = MX_BLOCK) -> Decoded:
    """OCP MXFP4: blocks of 32 E2M1 values under a power of two, 2^(floor(log2 max|w|) - 2); ties to even.

    Raises:
        ValueError: another group size: the format has only 32.
    """
    if group_size != MX_BLOCK:
        raise ValueError(f"group_size: expected {MX_BLOCK}, the only block of MXFP4, got {group_size}")
    groups = _Groups(weight, group_size)
    absmax = groups.absmax()
    exponent = torch.frexp(absmax).exponent - 1  # floor(log2), exact
    scale = torch.ldexp(torch.ones_like(absmax), (exponent - 2).clamp(-127, 127))
    return groups.decoded(_e2m1(groups.values / scale) * scale, 8)


def _e2m1(values: Tensor) -> Tensor:
    """The nearest E2M1 numbers, at most 6 in magnitude; ties to the even mantissa."""
    levels = torch.tensor(E2M1_LEVELS)
    middle = (levels[:-1] + levels[1:]) / 2
    magnitude = values.abs()
    below, above = torch.bucketize(magnitude, middle), torch.bucketize(magnitude, middle, right=True)
    index = torch.where(below % 2 == 0, below, above)  # an even index is an even mantissa
    return levels[index] * values.sign()


def nvfp4(weight: Tensor, group_size: int = NV_BLOCK) -> Decoded:
    """NVIDIA's NVFP4: blocks of 16 E2M1 values under an E4M3 scale, and one float32 scale per tensor.

    The tensor's scale is max|w| / (6 x 448), so that the block with the largest value gets the largest E4M3
    number. A block's scale is max|w| / 6 in units of it, rounded to E4M3; codes are the nearest E2M1 numbers
    under the product of the two as stored. Both roundings take ties to the even mantissa. A block whose scale
    rounds to zero is zero.

    Raises:
        ValueError: another group size: the format has only 16.

    Source: NVIDIA, Introducing NVFP4 for Efficient and Accurate Low-Precision Inference; arXiv:2509.25149.
    """
    if group_size != NV_BLOCK:
        raise ValueError(f"group_size: expected {NV_BLOCK}, the only block of NVFP4, got {group_size}")
    groups = _Groups(weight, group_size)
    tensor_scale = groups.absmax().amax() / (E2M1_LEVELS[-1] * E4M3_LARGEST)
    largest = groups.values.abs().amax(dim=1, keepdim=True)
    block_scale = (largest / E2M1_LEVELS[-1] / tensor_scale).clamp(max=E4M3_LARGEST)
    scale = block_scale.to(torch.float8_e4m3fn).float() * tensor_scale
    values = _e2m1(groups.values / torch.where(scale == 0, 1.0, scale)) * scale
    return groups.decoded(values, 8, bits_per_tensor=32)


def hqq(weight: Tensor, group_size: int) -> Decoded:
    """HQQ: integers 0..15 between minimum and maximum, with a zero point, no integer, that is optimized.

    w = (code - zero) x scale, both in float16. In turns the error is shrunk towards the few large values that
    a norm of 0.7 allows (they are outliers, and should not move the zero point), and the zero point becomes
    the mean that fits the rest. It ends when the mean absolute error of the tensor rises, after 20 turns at
    the latest. Codes are chosen before scale and zero point are stored.

    Source: Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023.
    """
    groups = _Groups(weight, group_size)
    inside = groups.inside()
    low = torch.where(inside, groups.values, torch.inf).amin(dim=1, keepdim=True)
    high = torch.where(inside, groups.values, -torch.inf).amax(dim=1, keepdim=True)
    inverse = torch.where(high - low <= 1e-4, 1.0, 15 / (high - low)).clamp(max=2e4)
    zero = torch.round(-low * inverse)
    least, beta = torch.inf, HQQ_BETA
    count = inside.sum(dim=1, keepdim=True)
    for _ in range(HQQ_ITERATIONS):
        code = torch.round(groups.values * inverse + zero).clamp(0, 15)
        error = groups.values - (code - zero) / inverse
        shrunk = (error.abs() - error.abs().pow(HQQ_NORM - 1) / beta).clamp(min=0) * error.sign()
        zero = ((code - (groups.values - shrunk) * inverse) * inside).sum(dim=1, keepdim=True) / count
        beta *= HQQ_KAPPA
        mean = float((error.abs() * inside).sum() / inside.sum())
        if mean >= least:
            break
        least = mean
    code = torch.round(groups.values * inverse + zero).clamp(0, 15)
    return groups.decoded((code - zero.half().float()) * _float16_scale(1 / inverse), 16 + 16)


BASELINES: dict[str, Callable[[Tensor, int], Decoded]] = {
    "NF4, absmax": nf4_absmax,
    "NF4, double quantization": nf4_double_quant,
    "NF4, best scale": nf4_best_scale,
    "NF4, best scale, both signs": nf4_best_signed_scale,
    "int4 asymmetric": int4_asymmetric,
    "int4 symmetric": int4_symmetric,
    "HQQ": hqq,
    "MXFP4": mxfp4,
    "NVFP4": nvfp4,
}
ONLY_BLOCK = {"MXFP4": MX_BLOCK, "NVFP4": NV_BLOCK}  # formats that have one block
