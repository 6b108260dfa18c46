"""Pair-aware GPTQ: second-order error compensation in which the two columns of a pair are decided together.

Rounding a column leaves an error in the layer's output; the columns that are not rounded yet are moved to
make up for it, as far as inputs are correlated. With H the second moment of the layer's inputs and U the
upper Cholesky factor of its inverse, rounding column j of a row by e_j U[j, j] costs e_j^2 and moves every
later column k by -e_j U[j, k].

Under the pair rule the columns 2 j and 2 j + 1 are one decision: (normal, normal), (outlier, victim) or
(victim, outlier). What a candidate costs is e_even^2 + e_odd^2 of this recursion, which is the squared error
of the output given that all later columns will make up for it. For each candidate the least cost is found,
not only the nearest codes: an outlier takes over part of what its victim loses.

Source: GPTQ, arXiv:2210.17323, for the recursion and its blocks; pairs, rules and scales by group: ours.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from olive import ops
from olive.formats.codebooks import IDENTIFIER, Codebook
from olive.formats.layout import PER_CHANNEL, expand_scale, pad_columns, scale_shape
from olive.formats.scales import pack_scale, unpack_scale
from olive.ptq.grids import search_grids

BLOCK = 128  # columns after which all later ones are updated at once; a multiple of every group size
MAX_DAMPING = 1.0  # of the mean of H's diagonal; beyond it nothing is left to compensate with
MULTIPLES = (1.0, 0.94, 1.06)  # of the scale that the search finds for a group, tried with compensation


class Compensated(NamedTuple):
    """A weight [N, K] in the stored form of `olive.formats`, with what it costs."""

    codes: Tensor  # uint8 [N, ceil(K / 2)]
    scale: Tensor  # int16 [N, G]
    loss: float  # tr((W - Q) H (W - Q)^T) / tr(W H W^T), the error of the output relative to its energy
    damping: float  # what was used, in units of the mean of H's diagonal


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


class _Swept(NamedTuple):
    """A run of n columns of R rows, rounded."""

    nibbles: Tensor  # uint8 [R, n]
    errors: Tensor  # float32 [R, n]: e_j
    loss: Tensor  # float32 [R]: sum of e_j^2


class _Sweep:
    """Rounds a run of columns pair by pair, each moved by what the ones before it left.

    Args:
        factor: float32 [n, n], U of these columns.
        tables: levels.
    """

    def __init__(self, factor: Tensor, tables: _Tables) -> None:
        self._factor, self._tables = factor, tables

    def __call__(self, values: Tensor, stored: Tensor) -> _Swept:
        """Round.

        Args:
            values: float32 [R, n], the columns as they are when the run is reached; not changed.
            stored: int16 [R, n / 2] or [R, 1], the scale of each pair with its rule bit.
        """
        values = values.clone()
        pairs = values.shape[1] // 2
        scale, plain = unpack_scale(stored)
        any_plain, all_plain = bool(plain.any()), bool(plain.all())
        scale, plain = scale.expand(-1, pairs), plain.expand(-1, pairs)
        nibbles = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
        errors = torch.empty_like(values)
        for pair in range(pairs):
            here = slice(2 * pair, 2 * pair + 2)
            step = (values[:, here], scale[:, pair], self._factor[here, here])
            if all_plain:
                found = self._plain(*step)
            else:
                found = self._pair(*step)
                if any_plain:
                    mask = plain[:, pair, None]
                    found = tuple(
                        torch.where(mask, one, other)
                        for one, other in zip(self._plain(*step), found, strict=True)
                    )
            nibbles[:, here], errors[:, here] = found
            if here.stop < values.shape[1]:
                values[:, here.stop :] -= errors[:, here] @ self._factor[here, here.stop :]
        return _Swept(nibbles, errors, errors.square().sum(1))

    def _pair(self, values: Tensor, scale: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        """Nibbles and errors [R, 2] of the candidate of the pair rule that costs least."""
        normal, outlier = self._tables.normal, self._tables.outlier
        even, odd = values[:, 0], values[:, 1]
        a, b, c = factor[0, 0], factor[0, 1], factor[1, 1]
        inverse = 1.0 / scale
        near = normal.nearest(even * inverse)
        normals = torch.stack((near, normal.beside(even * inverse, near)))
        # (outlier, victim): e_even^2 + ((odd - b e_even) / c)^2 is least at e_even = b odd / (b^2 + c^2).
        outliers = outlier.nearest((even - a * b / (b * b + c * c) * odd) * inverse)
        first_levels = torch.stack(
            (*normal.levels[normals], outlier.levels[outliers], torch.zeros_like(even))
        )
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
        nibbles = torch.cat((low.gather(0, choice), high.gather(0, choice))).T
        return nibbles, torch.cat((first.gather(0, choice), second.gather(0, choice))).T

    def _plain(self, values: Tensor, scale: Tensor, factor: Tensor) -> tuple[Tensor, ...]:
        """The same without the pair rule: the even column, then the odd one."""
        plain = self._tables.plain
        inverse = 1.0 / scale
        even = plain.nearest(values[:, 0] * inverse)
        first = (values[:, 0] - plain.levels[even] * scale) / factor[0, 0]
        rest = values[:, 1] - factor[0, 1] * first
        odd = plain.nearest(rest * inverse)
        second = (rest - plain.levels[odd] * scale) / factor[1, 1]
        return torch.stack((plain.nibbles[even], plain.nibbles[odd]), 1), torch.stack((first, second), 1)


def compensate(
    weight: Tensor,
    second_moment: Tensor,
    codebook: Codebook,
    group_size: int,
    *,
    damping: float = 0.01,
    activation_order: bool = False,
) -> Compensated:
    """Quantize one weight to 4 bits, with the errors of each column made up for by the later ones.

    In the natural order the scale and the rule of a group are chosen when the group is reached, for its
    columns
    as they are by then: of each rule the best scale of a search weighed by what errors cost there, and its
    neighbours, are swept, and a row keeps what loses least. With scales that go beyond a group of columns, or
    with `activation_order`, they are chosen at the start, weighed by the diagonal of H.

    Args:
        weight: float [N, K], finite.
        second_moment: float32 [K, K], H: sum or mean of x x^T over the layer's inputs; its scale does not
            matter.
        codebook: levels.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        damping: added to H's diagonal, in units of its mean; ten times as much, and again, where H is
            singular all the same.
        activation_order: pairs with the largest inputs first.

    Raises:
        ValueError: H is zero, not finite, or singular even with a damping of 1.
    """
    rows, columns = weight.shape
    values = pad_columns(weight.detach().float(), 2)
    values = values.clone() if values.data_ptr() == weight.data_ptr() else values
    width = values.shape[1]
    h = torch.nn.functional.pad(second_moment.float(), (0, width - columns, 0, width - columns))
    energy = float(((values @ h) * values).sum(dtype=torch.float64))
    order = _pair_order(h) if activation_order else torch.arange(width, device=h.device)
    factor, used = _factor(h[order][:, order], damping)
    table = codebook.tensor().to(values.device)
    by_group = group_size > 0 and not activation_order
    scale = torch.empty(scale_shape(rows, columns, group_size), dtype=torch.int16, device=values.device)
    if not by_group:
        grids = search_grids("search", codebook.name, group_size)
        importance = h.diagonal()[:columns] / h.diagonal().max()
        _, scale = ops.ovp_quantize(weight, table, group_size, *grids, importance.contiguous())
        by_pair = expand_scale(scale, rows, columns, group_size)[:, order][:, 0::2]
    values = values[:, order]
    tables = _Tables(codebook, values.device)
    nibbles = torch.empty(values.shape, dtype=torch.uint8, device=values.device)
    loss = 0.0
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        block = values[:, start:end].clone()
        errors = torch.empty_like(block)
        step = group_size if by_group else BLOCK
        for first in range(start, end, step):
            last = min(first + step, end)
            here = slice(first - start, last - start)
            inner = factor[first:last, first:last]
            if by_group:
                group = first // group_size
                swept, scale[:, group] = _best(block[:, here], inner, codebook, table, tables, group_size)
            else:
                swept = _Sweep(inner, tables)(block[:, here], by_pair[:, first // 2 : last // 2])
            nibbles[:, first:last], errors[:, here] = swept.nibbles, swept.errors
            loss += float(swept.loss.sum(dtype=torch.float64))
            block[:, here.stop :] -= swept.errors @ factor[first:last, last:end]
        values[:, end:] -= errors @ factor[start:end, end:]
    natural = torch.empty_like(nibbles)
    natural[:, order] = nibbles
    codes = natural[:, 0::2] | (natural[:, 1::2] << 4)
    return Compensated(codes.contiguous(), scale, loss / energy if energy else 0.0, used)


def _pair_order(h: Tensor) -> Tensor:
    """Columns by pairs, those of the largest inputs first."""
    pairs = h.diagonal().view(-1, 2).sum(1).argsort(descending=True, stable=True)
    return torch.stack((2 * pairs, 2 * pairs + 1), 1).flatten()


def _factor(h: Tensor, damping: float) -> tuple[Tensor, float]:
    """U, upper, with U^T U = (H + damping x mean of the diagonal)^-1, and the damping it took."""
    mean = h.diagonal().mean()
    if not bool(torch.isfinite(mean)) or float(mean) <= 0:
        raise ValueError(f"second_moment: expected a finite, positive diagonal, got a mean of {float(mean)}")
    while damping <= MAX_DAMPING:
        damped = h / mean
        damped.diagonal().add_(damping)
        # With the order of the columns turned round, H = M M^T with M upper, and U is M^-1.
        lower, failed = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if not bool(failed):
            upper = lower.flip(0, 1)
            identity = torch.eye(len(h), dtype=h.dtype, device=h.device)
            factor = torch.linalg.solve_triangular(upper, identity, upper=True) / mean.sqrt()
            if bool(torch.isfinite(factor).all()):
                return factor, damping
        damping = max(10 * damping, 1e-3)
    raise ValueError(
        f"second_moment: expected a positive definite matrix with damping {MAX_DAMPING}, got none"
    )


def _best(
    values: Tensor, factor: Tensor, codebook: Codebook, table: Tensor, tables: _Tables, group_size: int
) -> tuple[_Swept, Tensor]:
    """A group of columns [N, n] under the scale and rule of least loss, int16 [N]."""
    best: _Swept | None = None
    chosen = torch.empty(0)
    sweep = _Sweep(factor, tables)
    for stored in _candidates(values, factor, codebook, table, group_size):
        swept = sweep(values, stored[:, None])
        if best is None:
            best, chosen = swept, stored
            continue
        better = swept.loss < best.loss
        chosen = torch.where(better, stored, chosen)
        best = _Swept(
            torch.where(better[:, None], swept.nibbles, best.nibbles),
            torch.where(better[:, None], swept.errors, best.errors),
            torch.where(better, swept.loss, best.loss),
        )
    assert best is not None
    return best, chosen


def _candidates(
    values: Tensor, factor: Tensor, codebook: Codebook, table: Tensor, group_size: int
) -> Iterator[Tensor]:
    """Stored scales [N] worth trying for a group of columns: of each rule the best one and its neighbours."""
    importance = (
        factor.diagonal().square().reciprocal()
    )  # what an error costs while later columns make up for it
    importance = importance / importance.max()
    _, pair_grid, plain_grid = search_grids("search", codebook.name, group_size)
    grids: list[tuple[list[float], list[float]]] = [(pair_grid, [])]
    if codebook.has_plain:
        grids.append(([], plain_grid))
    for grid in grids:
        _, stored = ops.ovp_quantize(values, table, PER_CHANNEL, "optimal", *grid, importance)
        scale, plain = unpack_scale(stored[:, 0])
        for multiple in MULTIPLES:
            yield pack_scale(scale * multiple, plain)
