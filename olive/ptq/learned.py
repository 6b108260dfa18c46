"""The `learned` codebook: level tables fitted to one tensor by Lloyd's algorithm.

Starts from the tables of `adaptive` and alternates between choosing scale, rule and codes for fixed tables
and moving every level to the weighted mean of the values that took it. Levels are real numbers and are
rounded to int8 for each search. The best rounded tables are kept, `adaptive`'s own included: on the sample
the result is never worse than `adaptive`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from olive import ops
from olive.formats.codebooks import CODEBOOKS, IDENTIFIER, LEARNED, Codebook
from olive.formats.layout import expand_scale, pad_columns
from olive.formats.ovp4 import PairTables
from olive.formats.scales import unpack_scale
from olive.ops.schemas import FLOATS
from olive.ptq.grids import search_grids

SAMPLE_VALUES = 1 << 19  # weights that a fit looks at
LARGEST = 127  # the largest int8 magnitude: the top outlier and the top plain level sit there
LLOYD_STEPS = 4  # moves of the levels between two searches: the codes then hardly change any more
SMALLEST_GAIN = 1e-4  # of the error; less counts as no gain
PATIENCE = 2  # searches in a row without a gain that end the fit: rounding alone can hide one
# Cells of one histogram over all three tables: normal 0..7, outlier 8..15, plain 16..31.
_OUTLIER, _PLAIN, _CELLS = 8, 16, 32


@dataclass
class _Levels:
    """Real-valued tables, float32: normal [8] and outlier [8] magnitudes, plain [16] signed."""

    normal: Tensor
    outlier: Tensor
    plain: Tensor

    @classmethod
    def of(cls, codebook: Codebook, device: torch.device) -> _Levels:
        tables = PairTables(codebook, device)
        return cls(tables.normal, tables.outlier, tables.plain)

    def tables(self) -> PairTables:
        """An encoder with these levels."""
        tables = PairTables(CODEBOOKS["adaptive"], self.normal.device)
        tables.normal, tables.outlier, tables.plain = self.normal, self.outlier, self.plain
        return tables

    def stretched(self) -> _Levels:
        """The same levels in units that make the top outlier and top plain level 127, the finest rounding.

        A plain table whose negative end is the larger is mirrored: the search takes negative scales as well.
        """
        plain = self.plain if -self.plain[0] <= self.plain[15] else -self.plain.flip(0)
        pair_unit, plain_unit = LARGEST / self.outlier[7], LARGEST / plain[15]
        return _Levels(self.normal * pair_unit, self.outlier * pair_unit, plain * plain_unit)

    def rounded(self) -> Codebook:
        """The nearest valid int8 tables; call it on stretched levels."""
        pair = _rising_integers([*self.normal[1:].tolist(), *self.outlier[1:].tolist()])
        zero = int(self.plain.abs().argmin())
        negative = _rising_integers((-self.plain[:zero].flip(0)).tolist())
        positive = _rising_integers(self.plain[zero + 1 :].tolist())
        return Codebook(
            LEARNED,
            (0, *pair[:7]),
            (0, *pair[7:]),
            (*(-level for level in reversed(negative)), 0, *positive),
        )


def _rising_integers(levels: list[float]) -> list[int]:
    """Round to strictly rising integers within 1..127, moving as few levels as it takes."""
    rounded = [round(level) for level in levels]
    for index in range(len(rounded)):
        rounded[index] = max(rounded[index], rounded[index - 1] + 1 if index else 1)
    for index in reversed(range(len(rounded))):
        rounded[index] = min(rounded[index], LARGEST - (len(rounded) - 1 - index))
    return rounded


def _cells(codes: Tensor, plain: Tensor) -> Tensor:
    """Which level each column took, as an index into the histogram; victims count as normal 0."""
    low, high = (codes & 0x0F).long(), (codes >> 4).long()

    def cell(own: Tensor, partner: Tensor) -> Tensor:
        under_pair_rule = torch.where(partner == IDENTIFIER, _OUTLIER, 0) + (own & 7)
        return torch.where(plain, _PLAIN + own, under_pair_rule)

    return torch.stack((cell(low, high), cell(high, low)), dim=-1).flatten(-2)


def _move_levels(
    levels: _Levels, weight: Tensor, scale: Tensor, plain: Tensor, importance: Tensor | None
) -> _Levels:
    """One step of Lloyd's algorithm: codes for fixed levels, then each level to its least-squares optimum.

    With value w, scale s and importance v, the level that minimizes sum v (w - s level)^2 over the values
    that took it is sum v s w / sum v s^2. A level that no value took stays.

    Args:
        weight: float32 [R, 2 P].
        scale: float32 [R, 2 P], one per column; negative only where plain.
        plain: bool [R, 2 P].
        importance: float32 [2 P] or None.
    """
    t = weight * (1.0 / scale)
    tables = levels.tables()
    pair_codes, _ = tables.encode_pair_rule(t, "optimal", importance)
    plain_codes, _ = tables.encode_plain(t, importance)
    by_pair = plain[:, 0::2]
    cells = _cells(torch.where(by_pair, plain_codes, pair_codes), by_pair).flatten()
    value = torch.where(plain, t, t.abs()).double()
    mass = scale.double() ** 2
    if importance is not None:
        mass = mass * importance
    total = torch.bincount(cells, mass.flatten(), minlength=_CELLS)
    moment = torch.bincount(cells, (mass * value).flatten(), minlength=_CELLS)
    old = torch.cat((levels.normal, levels.outlier, levels.plain))
    new = torch.where(total > 0, moment / total, old.double()).float()
    new[0] = new[_OUTLIER] = 0.0
    new[_PLAIN:][levels.plain.abs().argmin()] = 0.0
    return _Levels(new[:_OUTLIER], new[_OUTLIER:_PLAIN], new[_PLAIN:])


class Sample:
    """Rows of a weight, and the best scales, rules and error that a codebook reaches on them."""

    def __init__(self, rows: Tensor, group_size: int, importance: Tensor | None, method: str = "search"):
        self.rows, self.group_size, self.importance = rows, group_size, importance
        self.method = method
        self.padded = pad_columns(rows, 2)
        self.padded_importance = importance
        if importance is not None:
            self.padded_importance = pad_columns(importance[None], 2)[0]

    def search(self, codebook: Codebook) -> tuple[float, Tensor, Tensor]:
        """Squared error, and for each column of the padded rows its scale and whether it is plain."""
        table = codebook.tensor().to(self.rows.device)
        grids = search_grids(self.method, codebook.name, self.group_size)
        codes, stored = ops.ovp_quantize(self.rows, table, self.group_size, *grids, self.importance)
        count, width = self.rows.shape
        decoded = ops.ovp_decode(codes, stored, table, width, self.group_size, torch.float32)
        squared = (decoded - self.rows).square_()
        if self.importance is not None:
            squared *= self.importance
        scale, plain = unpack_scale(expand_scale(stored, count, width, self.group_size))
        return float(squared.sum(dtype=torch.float64)), scale, plain


def sample_rows(weight: Tensor, sample_values: int, seed: int = 0) -> Tensor:
    """Rows drawn without replacement, as float32; whole ones, so that groups and importance stay in place."""
    rows, columns = weight.shape
    count = min(rows, max(1, -(-sample_values // columns)))
    if count < rows:
        order = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))
        weight = weight[order[:count].sort().values.to(weight.device)]
    return weight.detach().float().contiguous()


def fit_codebook(
    weight: Tensor,
    group_size: int,
    importance: Tensor | None = None,
    *,
    iterations: int = 6,
    sample_values: int = SAMPLE_VALUES,
    seed: int = 0,
) -> Codebook:
    """Fit the three tables of a codebook to a weight.

    Args:
        weight: float32, bfloat16 or float16 [N, K], finite.
        group_size: columns that share a scale; -1 per channel, 0 per tensor.
        importance: float32 [K], >= 0, weighs the squared error of each column; None = all alike.
        iterations: how many times at most the levels move and the scales are searched anew. The fit ends
            earlier when two searches in a row gain less than 0.01 % each.
        sample_values: about how many weights the fit looks at: whole rows are drawn until there are as many.
            Memory is a small multiple of this, whatever the size of the weight.
        seed: of that draw; the result depends on nothing else that is random.

    Returns:
        A codebook named "learned": int8 levels, the top outlier and the top plain level are 127. Its squared
        error on the sample is at most that of `adaptive`.

    Raises:
        TypeError: weight is not a supported float.
        ValueError: weight is not [N, K] or not finite, group_size or importance is not valid, iterations is
            negative, or sample_values is below 1.
    """
    for name, number, least in (("iterations", iterations, 0), ("sample_values", sample_values, 1)):
        if number < least:
            raise ValueError(f"{name}: expected at least {least}, got {number}")
    if weight.dtype not in FLOATS:
        raise TypeError(f"weight: expected float32, bfloat16 or float16, got {weight.dtype}")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ValueError(f"weight: expected shape [N, K] with N, K >= 1, got {tuple(weight.shape)}")
    sample = Sample(sample_rows(weight, sample_values, seed), group_size, importance)
    adaptive = CODEBOOKS["adaptive"]
    best = Codebook(LEARNED, adaptive.normal, adaptive.outlier, adaptive.plain)
    best_error, scale, plain = sample.search(best)
    levels = _Levels.of(best, sample.rows.device)
    without_gain = 0
    for _ in range(iterations):
        for _ in range(LLOYD_STEPS):
            levels = _move_levels(levels, sample.padded, scale, plain, sample.padded_importance)
        levels = levels.stretched()
        candidate = levels.rounded()
        error, scale, plain = sample.search(candidate)
        without_gain = 0 if error < best_error * (1.0 - SMALLEST_GAIN) else without_gain + 1
        if error < best_error:
            best, best_error = candidate, error
        if without_gain == PATIENCE:
            break
    return best
