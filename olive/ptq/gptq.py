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
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from olive import ops
from olive.formats.codebooks import Codebook
from olive.formats.layout import PER_CHANNEL, expand_scale, pad_columns, scale_shape
from olive.formats.scales import pack_scale, unpack_scale
from olive.ptq.grids import search_grids
from olive.ptq.moments import Drift

BLOCK = 128  # columns after which all later ones are updated at once; a multiple of every group size
MAX_DAMPING = 1.0  # of the mean of H's diagonal; beyond it nothing is left to compensate with
CORRELATED = 2.0  # rows that say as much as one that stood alone: tokens of a text resemble their neighbours
MULTIPLES = (1.0, 0.94, 1.06)  # of the scale that the search finds for a group, tried with compensation


class Compensated(NamedTuple):
    """A weight [N, K] in the stored form of `olive.formats`, with what it costs."""

    codes: Tensor  # uint8 [N, ceil(K / 2)]
    scale: Tensor  # int16 [N, G]
    loss: float  # tr((V - Q) H (V - Q)^T) / tr(W H W^T), H damped, V the weight W with `drift` made up for
    damping: float  # what was used, in units of the mean of H's diagonal


def compensate(
    weight: Tensor,
    second_moment: Tensor,
    codebook: Codebook,
    group_size: int,
    *,
    damping: float = 0.01,
    activation_order: bool = False,
    drift: Drift | None = None,
) -> Compensated:
    """Quantize one weight to 4 bits, with the errors of each column made up for by the later ones.

    In the natural order the scale and the rule of a group are chosen when the group is reached, for its
    columns as they are by then: of each rule the best scale of a search weighed by what errors cost there,
    and its neighbours, are swept, and a row keeps what loses least. With scales that go beyond a group of
    columns, or with `activation_order`, they are chosen at the start, weighed by the diagonal of H.

    Args:
        weight: float [N, K], finite.
        second_moment: float32 [K, K], H: sum or mean of x x^T over the layer's inputs; its scale does not
            matter. With `drift`, the sum over the same rows.
        codebook: levels.
        group_size: -1 per channel, 0 per tensor, else columns per group.
        damping: added to H's diagonal, in units of its mean; ten times as much, and again, where H is
            singular all the same.
        activation_order: pairs with the largest inputs first.
        drift: of the same inputs. What is quantized is then the weight whose outputs on them are nearest to
            the float weight's on what the float model has in their place: it makes up for what the layers
            before left as well, as far as the data show that (`_trust`).

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
    if drift is not None:
        padded = torch.nn.functional.pad(drift.products.float(), (0, width - columns, 0, width - columns))
        explained = padded[order][:, order] @ factor.T  # D U^T, of D H^-1 = D U^T U
        trust = _trust(drift, float(explained.square().sum(dtype=torch.float64)), columns)
        if trust > 0:
            values = values + trust * (values @ explained @ factor)
    codes = torch.empty((rows, width // 2), dtype=torch.uint8, device=values.device)
    loss = 0.0
    for start in range(0, width, BLOCK):
        end = min(start + BLOCK, width)
        block = values[:, start:end].clone()
        errors = torch.empty_like(block)
        step = group_size if by_group else BLOCK
        for first in range(start, end, step):
            last = min(first + step, end)
            here, pairs = slice(first - start, last - start), slice(first // 2, last // 2)
            inner = factor[first:last, first:last].contiguous()
            if by_group:
                swept, scale[:, first // group_size] = _best(
                    block[:, here], inner, codebook, table, group_size
                )
            else:
                swept = _Swept(*ops.ovp_compensate(block[:, here], by_pair[:, pairs], inner, table))
            codes[:, pairs], errors[:, here] = swept.codes, swept.errors
            loss += float(swept.loss.sum(dtype=torch.float64))
            block[:, here.stop :] -= swept.errors @ factor[first:last, last:end]
        values[:, end:] -= errors @ factor[start:end, end:]
    natural = torch.empty_like(codes)
    natural[:, order[0::2] // 2] = codes
    return Compensated(natural, scale, loss / energy if energy else 0.0, used)


def _trust(drift: Drift, explained: float, columns: int) -> float:
    """The part, 0 to 1, of what inputs explain of their drift that is no accident of the sample.

    With n rows, K columns explain K / n of anything, related to them or not, and leave the rest. So what is
    left tells how much of what is explained that is: the James-Stein estimator, its positive part.
    """
    share = columns * CORRELATED / drift.rows
    if share >= 1 or not 0 < explained < inf:
        return 0.0
    accident = share / (1 - share) * max(drift.energy - explained, 0.0)
    return max(0.0, 1 - accident / explained)


class _Swept(NamedTuple):
    """What `ovp_compensate` returns."""

    codes: Tensor
    errors: Tensor
    loss: Tensor


def _pair_order(h: Tensor) -> Tensor:
    """Columns by pairs, those of the largest inputs first."""
    pairs = h.diagonal().view(-1, 2).sum(1).argsort(descending=True, stable=True)
    return torch.stack((2 * pairs, 2 * pairs + 1), 1).flatten()


def _factor(h: Tensor, damping: float) -> tuple[Tensor, float]:
    """U, upper, with U^T U = (H + damping x mean of the diagonal)^-1, and the damping it took."""
    mean = h.diagonal().mean()
    if not bool(torch.isfinite(mean)) or float(mean) <= 0:
        raise ValueError(f"second_moment: expected a finite, positive diagonal, got a mean of {float(mean)}")
    while True:
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
        if damping >= MAX_DAMPING:
            raise ValueError(
                f"second_moment: expected a positive definite matrix with damping {MAX_DAMPING}, got none"
            )
        damping = min(max(10 * damping, 1e-3), MAX_DAMPING)


def _best(
    values: Tensor, factor: Tensor, codebook: Codebook, table: Tensor, group_size: int
) -> tuple[_Swept, Tensor]:
    """A group of columns [N, n] under the scale and rule of least loss, int16 [N]."""
    best: _Swept | None = None
    chosen = torch.empty(0)
    for stored in _candidates(values, factor, codebook, table, group_size):
        swept = _Swept(*ops.ovp_compensate(values, stored[:, None], factor, table))
        if best is None:
            best, chosen = swept, stored
            continue
        better = swept.loss < best.loss
        chosen = torch.where(better, stored, chosen)
        best = _Swept(
            torch.where(better[:, None], swept.codes, best.codes),
            torch.where(better[:, None], swept.errors, best.errors),
            torch.where(better, swept.loss, best.loss),
        )
    assert best is not None
    return best, chosen


def _candidates(
    values: Tensor, factor: Tensor, codebook: Codebook, table: Tensor, group_size: int
) -> Iterator[Tensor]:
    """Stored scales [N] worth trying for a group of columns: of each rule the best one and its neighbours."""
    importance = factor.diagonal().square().reciprocal()  # an error's cost, later columns making up for it
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
