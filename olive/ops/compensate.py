"""`ovp_compensate`: round columns to outlier-victim pairs, each pair making up for the ones before it.

The schema, its checks, and the definition in plain PyTorch. The kernels (`csrc/cpu/compensate.inl`,
`csrc/cuda/compensate.cu`) fuse sums, so their last bits differ, and now and then a code on a threshold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from olive.formats.codebooks import IDENTIFIER, Codebook
from olive.formats.scales import unpack_scale
from olive.ops.cpu import cpu_kernels, has_cpu_kernels
from olive.ops.schemas import check_device, check_tensor, library

library.define(
    "ovp_compensate(Tensor values, Tensor scale, Tensor factor, Tensor codebook) "
    "-> (Tensor codes, Tensor errors, Tensor loss)"
)


def check_compensate(values: Tensor, scale: Tensor, factor: Tensor, codebook: Tensor) -> tuple[int, int]:
    """Check the arguments of `ovp_compensate`, not their values, and return (R, n)."""
    if values.dim() != 2 or 0 in values.shape or values.shape[1] % 2:
        raise ValueError(f"values: expected shape [R, n] with R >= 1 and n even, got {tuple(values.shape)}")
    rows, columns = int(values.shape[0]), int(values.shape[1])
    check_tensor("values", values, torch.float32, (rows, columns))
    check_tensor("factor", factor, torch.float32, (columns, columns))
    check_tensor("codebook", codebook, torch.int8, (32,))
    per_row = 1 if scale.dim() == 2 and scale.shape[1] == 1 else columns // 2
    check_tensor("scale", scale, torch.int16, (rows, per_row))
    check_device(values=values, scale=scale, factor=factor, codebook=codebook)
    return rows, columns


@torch.library.register_fake("olive::ovp_compensate", lib=library)
def _(values, scale, factor, codebook):  # type: ignore[no-untyped-def]
    rows, columns = check_compensate(values, scale, factor, codebook)
    codes = values.new_empty((rows, columns // 2), dtype=torch.uint8)
    return codes, torch.empty_like(values), values.new_empty((rows,))


class _Levels:
    """One table of a codebook as rising signed levels and the nibbles that stand for them."""

    def __init__(self, levels: list[int], nibbles: list[int], device: torch.device) -> None:
        order = sorted(range(len(levels)), key=levels.__getitem__)
        self.levels = torch.tensor([levels[i] for i in order], dtype=torch.float32, device=device)
        self.nibbles = torch.tensor([nibbles[i] for i in order], dtype=torch.uint8, device=device)
        self._middles = (self.levels[:-1] + self.levels[1:]) * 0.5

    def nearest(self, value: Tensor) -> Tensor:
        return torch.bucketize(value, self._middles)

    def beside(self, value: Tensor, nearest: Tensor) -> Tensor:
        """The nearest on the other side of the value, where there is one."""
        step = torch.where(value > self.levels[nearest], 1, -1)
        return (nearest + step).clamp(0, len(self.levels) - 1)


def _signed(magnitudes: tuple[int, ...], first: int, device: torch.device) -> _Levels:
    indices = range(first, 8)
    levels = [magnitudes[i] for i in indices] + [-magnitudes[i] for i in indices if magnitudes[i]]
    nibbles = [*indices] + [i | 8 for i in indices if magnitudes[i]]
    return _Levels(levels, nibbles, device)


class _Tables:
    def __init__(self, codebook: Codebook, device: torch.device) -> None:
        self.normal = _signed(codebook.normal, 0, device)
        self.outlier = _signed(codebook.outlier, 1, device)
        self.plain = _Levels(list(codebook.plain), list(range(16)), device)


class _Rounded(NamedTuple):
    """A pair of R rows."""

    codes: Tensor  # uint8 [R]
    errors: Tensor  # float32 [R, 2]


def _by_pair(values: Tensor, scale: Tensor, factor: Tensor, tables: _Tables) -> _Rounded:
    """The candidate of the pair rule that costs least."""
    normal, outlier = tables.normal, tables.outlier
    even, odd = values[:, 0], values[:, 1]
    a, b, c = factor[0, 0], factor[0, 1], factor[1, 1]
    inverse = 1.0 / scale
    near = normal.nearest(even * inverse)
    normals = torch.stack((near, normal.beside(even * inverse, near)))
    # (outlier, victim): e_even^2 + ((odd - b e_even) / c)^2 is least at e_even = b odd / (b^2 + c^2).
    outliers = outlier.nearest((even - a * b / (b * b + c * c) * odd) * inverse)
    first_levels = torch.stack((*normal.levels[normals], outlier.levels[outliers], torch.zeros_like(even)))
    first = (even - first_levels * scale) / a
    rest = odd - b * first
    second_normals = normal.nearest(rest[:2] * inverse)
    second_outliers = outlier.nearest(rest[3] * inverse)
    second_levels = torch.stack(
        (*normal.levels[second_normals], torch.zeros_like(even), outlier.levels[second_outliers])
    )
    second = (rest - second_levels * scale) / c
    choice = (first.square() + second.square()).argmin(0)[None]
    victim = torch.full_like(near, IDENTIFIER, dtype=torch.uint8)
    low = torch.stack((*normal.nibbles[normals], outlier.nibbles[outliers], victim))
    high = torch.stack((*normal.nibbles[second_normals], victim, outlier.nibbles[second_outliers]))
    codes = low.gather(0, choice)[0] | (high.gather(0, choice)[0] << 4)
    return _Rounded(codes, torch.cat((first.gather(0, choice), second.gather(0, choice))).T)


def _plainly(values: Tensor, scale: Tensor, factor: Tensor, tables: _Tables) -> _Rounded:
    """Without the pair rule: the even column, then the odd one."""
    plain = tables.plain
    inverse = 1.0 / scale
    even = plain.nearest(values[:, 0] * inverse)
    first = (values[:, 0] - plain.levels[even] * scale) / factor[0, 0]
    rest = values[:, 1] - factor[0, 1] * first
    odd = plain.nearest(rest * inverse)
    second = (rest - plain.levels[odd] * scale) / factor[1, 1]
    return _Rounded(plain.nibbles[even] | (plain.nibbles[odd] << 4), torch.stack((first, second), 1))


def ovp_compensate_reference(
    values: Tensor, scale: Tensor, factor: Tensor, codebook: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Round columns pair by pair, each pair moved by what the ones before it left.

    With U the factor, rounding column j to q costs e_j^2 with e_j = (w_j - q) / U[j, j], and every later
    column k moves by -e_j U[j, k]. Under the pair rule the columns 2 j and 2 j + 1 are one decision: of
    (normal, normal), (outlier, victim) and (victim, outlier) the one of least e_even^2 + e_odd^2, each at
    its best codes: an even normal is one of the two levels around its value; an even outlier is the nearest
    to the value that loses least once its victim is counted. Plain pairs take their nearest levels one after
    the other.

    Args:
        values: float32 [R, n], finite, n even.
        scale: int16, stored scales with their rule bits: [R, 1], or [R, n / 2], one per pair.
        factor: float32 [n, n], upper triangular, positive diagonal.
        codebook: int8 [32].

    Returns:
        codes uint8 [R, n / 2]; the errors e float32 [R, n]; their sum of squares float32 [R].

    Raises:
        TypeError, ValueError: a tensor of another type or shape, or on another device.

    Source: GPTQ, arXiv:2210.17323, for the recursion; decisions by pairs: ours.
    """
    rows, columns = check_compensate(values, scale, factor, codebook)
    tables = _Tables(Codebook.from_tensor(codebook), values.device)
    values, pairs = values.clone(), columns // 2
    value, plain = unpack_scale(scale)
    any_plain, all_plain = bool(plain.any()), bool(plain.all())
    value, plain = value.expand(-1, pairs), plain.expand(-1, pairs)
    codes = torch.empty((rows, pairs), dtype=torch.uint8, device=values.device)
    errors = torch.empty_like(values)
    for pair in range(pairs):
        here = slice(2 * pair, 2 * pair + 2)
        step = (values[:, here], value[:, pair], factor[here, here], tables)
        found = _plainly(*step) if all_plain else _by_pair(*step)
        if any_plain and not all_plain:
            other, mask = _plainly(*step), plain[:, pair]
            found = _Rounded(
                torch.where(mask, other.codes, found.codes),
                torch.where(mask[:, None], other.errors, found.errors),
            )
        codes[:, pair], errors[:, here] = found
        if here.stop < columns:
            values[:, here.stop :] -= errors[:, here] @ factor[here, here.stop :]
    return codes, errors, errors.square().sum(1)


def run_compensate(
    kernel: Callable[..., None],
    values: Tensor,
    scale: Tensor,
    factor: Tensor,
    codebook: Tensor,
    where: str | int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Call a kernel on checked tensors, the factor contiguous; `where` is its instruction set or stream."""
    values, scale, codebook = values.contiguous(), scale.contiguous(), codebook.contiguous()
    rows, columns = values.shape
    codes = torch.empty((rows, columns // 2), dtype=torch.uint8, device=values.device)
    errors = torch.empty_like(values)
    loss = torch.empty(rows, dtype=torch.float32, device=values.device)
    kernel(
        values.data_ptr(),
        scale.data_ptr(),
        int(scale.shape[1]),
        factor.data_ptr(),
        codebook.data_ptr(),
        rows,
        columns,
        codes.data_ptr(),
        errors.data_ptr(),
        loss.data_ptr(),
        where,
    )
    return codes, errors, loss


def ovp_compensate_cpu(
    values: Tensor, scale: Tensor, factor: Tensor, codebook: Tensor, isa: str = ""
) -> tuple[Tensor, Tensor, Tensor]:
    """`ovp_compensate` on the CPU kernels; `isa` names an instruction set, "" the best one."""
    check_compensate(values, scale, factor, codebook)
    return run_compensate(cpu_kernels().compensate, values, scale, factor.contiguous(), codebook, isa)


library.impl("ovp_compensate", ovp_compensate_reference, "CompositeExplicitAutograd")
if has_cpu_kernels():
    library.impl("ovp_compensate", ovp_compensate_cpu, "CPU")
