"""Static scales of activations, found on a calibration sample, and how well the sample survives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from olive import ops
from olive.config import PAPER_CODEBOOKS
from olive.formats import (
    PAPER,
    PER_TENSOR,
    ActivationFormat,
    Codebook,
    get_codebook,
    outlier_pairs,
    pack_scale,
    unpack_scale,
)
from olive.formats.activations import DYNAMIC_GRIDS
from olive.formats.layout import expand_scale, pad_columns
from olive.formats.scales import TINY
from olive.nn import ActivationFigures, OVPWeight
from olive.ptq.calibration import InputSample
from olive.ptq.grids import search_grids, search_grids8
from olive.ptq.noise import column_energies, decibels

_INT8_LARGEST = 127
_OVP8_LARGEST, _OVP8_STEP = 32768, 2048


class StaticScale(NamedTuple):
    """What a layer stores of its input."""

    scale: Tensor  # int16 [1]
    codebook: Tensor | None  # int8 [32] of "ovp4"


def static_scale(
    sample: InputSample, format: ActivationFormat, weight_energy: Tensor | None, device: torch.device
) -> StaticScale:
    """The scale of a whole input: the one that costs the layer's output least, by the sample.

    The mean squared error of an output is the sum over the columns of the input's error times the energy of
    the weight there, as long as errors of different columns are independent. A channel of huge values that
    meets small weights, as a norm's largest channels do, so decides no more than its share. Candidates are
    multiples of 3 sigma (weighed alike), as a weight's scale is searched. "int8" takes max |x| / 127 of
    everything that was seen. Static scales follow the pair rule: plain levels are not tried.

    Args:
        sample: of the layer's input.
        format: static; codebook "paper" takes int4 or flint4, whichever loses less.
        weight_energy: float32 [K], sum of squares of each column of the layer's weight; None: all columns
            count alike, which is the paper's mean squared error.
        device: where to search and to put the result.
    """
    assert sample.rows is not None
    if format.name == "int8":
        largest = torch.tensor(sample.largest, dtype=torch.float32, device=device)
        return StaticScale(_stored(torch.where(largest < TINY, 1.0, largest / _INT8_LARGEST)), None)
    rows = sample.rows.to(device).float()
    energy = torch.ones(rows.shape[1], device=device) if weight_energy is None else weight_energy.to(device)
    if not bool(energy.any()):  # a weight of zeros: nothing can be lost
        energy = torch.ones_like(energy)
    if format.name == "ovp8":
        return _searched(rows, energy, format, None)[1]
    names = PAPER_CODEBOOKS if format.codebook == PAPER else (format.codebook,)
    found = [_searched(rows, energy, format, name) for name in names]
    return min(found, key=lambda one: one[0])[1]


def _searched(
    rows: Tensor, energy: Tensor, format: ActivationFormat, codebook: str | None
) -> tuple[float, StaticScale]:
    """The least weighed squared error, and what has it; no codebook means 8 bits."""
    method = "paper" if format.pairing == "paper" else "search"
    table, normal, grids = None, _INT8_LARGEST, search_grids8(method)
    if codebook is not None:
        book = get_codebook(codebook)
        table, normal = book.tensor().to(rows.device), book.normal[7]
        grids = search_grids(method, codebook, PER_TENSOR)
    largest = rows.abs().max()
    if float(largest) < TINY:
        return 0.0, StaticScale(_stored(torch.ones_like(largest)), table)
    share = energy.double() / energy.double().sum()
    three_sigma = 3 * (rows.double().square().mean(0) @ share).sqrt().float()
    best: tuple[float, StaticScale] | None = None
    for multiple in grids.pair:
        # Four bits need no bound: their grid ends before the largest value would be a normal.
        base = torch.minimum(largest, three_sigma) * multiple
        scale = _stored((base if codebook is not None else torch.minimum(largest, base)) / normal)
        levels, step = ops.quantize_activations(
            rows, format.name, PER_TENSOR, format.pairing, table, scale, torch.float32
        )
        noise = float((rows - levels * step).square().sum(0).double() @ share)
        if best is None or noise < best[0]:
            best = noise, StaticScale(scale, table)
    assert best is not None
    return best


def _stored(scale: Tensor) -> Tensor:
    """One scale under the pair rule, int16 [1]."""
    return pack_scale(scale.reshape(1), torch.zeros(1, dtype=torch.bool, device=scale.device))


def activation_figures(
    sample: InputSample, format: ActivationFormat, codebook: Tensor | None, scale: Tensor | None
) -> ActivationFigures:
    """How well a sample survives.

    Args:
        sample: of the layer's input.
        format: as the layer computes.
        codebook: int8 [32] of "ovp4", else None.
        scale: int16 [1] if the format is static, else None.
    """
    assert sample.rows is not None
    device = next((tensor.device for tensor in (codebook, scale) if tensor is not None), sample.rows.device)
    rows = sample.rows.to(device)
    levels, found = ops.quantize_activations(
        rows, format.name, format.group_size, format.pairing, codebook, scale, torch.float32
    )
    columns = rows.shape[1]
    steps = found if format.group_size <= 0 else found.repeat_interleave(format.group_size, 1)[:, :columns]
    x = rows.double()
    noise = (x - (levels * steps).double()).square().sum()
    clipped = x.abs() > steps.double().abs() * _clips_at(format, codebook)
    return ActivationFigures(
        sqnr_db=decibels(float(x.square().sum()), float(noise)),
        outlier_share=_outlier_share(rows, levels, format, codebook, scale),
        clipped_share=float(clipped.double().mean()),
    )


def _clips_at(format: ActivationFormat, codebook: Tensor | None) -> float:
    """Magnitude in units of the scale past which a value loses more than rounding takes."""
    if format.name == "int8":
        return _INT8_LARGEST + 0.5
    if codebook is None:
        return _OVP8_LARGEST + _OVP8_STEP / 2
    outlier = Codebook.from_tensor(codebook).outlier
    return outlier[7] + (outlier[7] - outlier[6]) / 2


def _outlier_share(
    rows: Tensor, levels: Tensor, format: ActivationFormat, codebook: Tensor | None, scale: Tensor | None
) -> float:
    """Share of pairs that hold an outlier. Four-bit codes are made anew: plain levels can be as large."""
    if codebook is None:
        past = pad_columns(levels, 2).unflatten(1, (-1, 2)).abs() > 127  # never with "int8"
        return float(past.any(-1).double().mean())
    stored = None if scale is None else scale[None]
    if stored is None:
        grids = DYNAMIC_GRIDS["ovp4"]
        codes, stored = ops.ovp_quantize(rows, codebook, format.group_size, format.pairing, *grids, None)
    else:
        codes = ops.ovp_encode(rows, stored, codebook, format.group_size, format.pairing)
    plain = expand_scale(unpack_scale(stored)[1], len(rows), rows.shape[1], format.group_size)[:, 0::2]
    return float(outlier_pairs(codes, plain).double().mean())


def set_activations(weight: OVPWeight, sample: InputSample, parameter: Tensor) -> None:
    """Give a weight the static scale of its input, if it wants one, and the figures of the sample.

    Args:
        weight: quantized, with activations.
        sample: of its input.
        parameter: the float weight that it stands for.
    """
    format, codebook, scale = weight.activations, weight.activation_codebook, None
    assert format is not None
    if format.is_static:
        energy = None
        if format.pairing != "paper":
            float_weight = parameter.detach()
            energy = column_energies(float_weight.transpose(-1, -2) if weight.transposed else float_weight)
        scale, codebook = static_scale(sample, format, energy, weight.codes.device)
        weight.set_activations_(scale, codebook)
    weight.activation_figures = activation_figures(sample, format, codebook, scale)
