"""Multiples of a group's base scale that the searches try."""

from __future__ import annotations

from typing import NamedTuple

from olive.formats import Pairing

# Multiples of min(max|w|, 3 sigma) / normal[7] for the pair rule. Stored scales have 7 significant bits,
# neighbours 0.8 to 1.6 % apart, so steps of 2 % leave little between them; the optimum of groups of 32 to 128
# lies inside.
PAIR_GRID = tuple(round(0.30 + 0.02 * step, 2) for step in range(51))
# flint4's normals thin out above 8 of 16, so its optimum lies near 1.8 in every group size: up to 1.3 its
# error is 1.3 to 2 times as large. A whole row or tensor may hold values beyond O[7] * 1.3 * 3 sigma / N[7],
# 12 sigma for nf4.
WIDE_PAIR_GRID = PAIR_GRID + tuple(round(1.35 + 0.05 * step, 2) for step in range(44))
# Multiples of max|w| / 127 for plain groups, tried with both signs.
PLAIN_GRID = tuple(round(0.50 + 0.02 * step, 2) for step in range(31))
# OliVe, arXiv:2304.07493, section 3.4, searches around 3 sigma.
PAPER_GRID = tuple(round(0.75 + 0.05 * step, 2) for step in range(36))
# Multiples of 3 sigma / 127 for 8 bits, each bounded by max|w| / 127: the paper's, then on to 17.6 in steps
# of 5 %. An outlier keeps four significant bits and costs a neighbour: heavy tails want a wide normal range.
# The best single multiple is 1.25 to 1.5 on Gaussian values, 2 to 4 on MiniLM's weights, 3 to 6 on
# Student-t(3). Against steps of 2 % from 0.1 to 37 this loses up to 0.9 % on Gaussian values and MiniLM and
# up to 3 % on Student-t(3), whatever shares a scale; the paper's grid up to 20 % on MiniLM, 100 % on
# Student-t(3).
OVP8_GRID = PAPER_GRID + tuple(round(2.5 * 1.05**step, 3) for step in range(1, 41))


class Grids(NamedTuple):
    """Which pairs are made, and multiples of the base scales to try."""

    pairing: Pairing
    pair: list[float]
    plain: list[float]


def search_grids(method: str, codebook: str, group_size: int) -> Grids:
    """What `ovp_quantize` is to search for a method, a codebook's name and a group size."""
    if method == "paper":
        return Grids("paper", list(PAPER_GRID), [])
    wide = codebook == "flint4" or group_size <= 0
    return Grids("optimal", list(WIDE_PAIR_GRID if wide else PAIR_GRID), list(PLAIN_GRID))


def search_grids8(method: str) -> Grids:
    """The same for `ovp8_quantize`."""
    return (
        Grids("paper", list(PAPER_GRID), []) if method == "paper" else Grids("optimal", list(OVP8_GRID), [])
    )
