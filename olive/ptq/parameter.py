"""From one float parameter of a model, a weight or a stack of experts, to its stored form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from olive import ops
from olive.config import QuantConfig
from olive.formats.codebooks import Codebook
from olive.nn import OVPWeight
from olive.ptq.activations import set_activations
from olive.ptq.calibration import InputSample
from olive.ptq.choose import choose_codebook
from olive.ptq.gptq import compensate
from olive.ptq.moments import Moment, SecondMoment, relative
from olive.ptq.noise import decibels, energies
from olive.ptq.search import checked, quantize_weight, quantize_weight8

_NONE: Mapping[str, Moment] = MappingProxyType({})


@dataclass(frozen=True)
class StoredWeight:
    """A weight, or a stack, in the canonical layout, with the quality it has.

    Args:
        codes: uint8 [N, ceil(K / 2)] or [E, N, ceil(K / 2)]; for 8 bits 2 ceil(K / 2) bytes a row.
        scale: int16 [N, G] or [E, N, G].
        codebook: int8 [32]; None for 8 bits.
        sqnr_db: signal-to-quantization-noise ratio in dB, inf if the codes hold the weight exactly.
        losses: of "gptq", by part ("" or "[e]" of an expert), the squared error of the output relative to its
            energy.
        searched: parts that "gptq" left to the search, because too little data reached them.
    """

    codes: Tensor
    scale: Tensor
    codebook: Tensor | None
    sqnr_db: float
    losses: Mapping[str, float] = field(default_factory=dict)
    searched: tuple[str, ...] = ()


class _Matrix(NamedTuple):
    """One weight [N, K] in the stored form."""

    codes: Tensor
    scale: Tensor
    codebook: Tensor | None
    loss: float | None  # None = searched


def quantize_parameter(
    parameter: Tensor,
    config: QuantConfig,
    *,
    transposed: bool = False,
    name: str = "weight",
    moments: Mapping[str, Moment] = _NONE,
    advance: Callable[[int], None] | None = None,
) -> StoredWeight:
    """Quantize one float parameter of a model, on the device it is on.

    Args:
        parameter: float32, bfloat16 or float16 [N, K], or a stack [E, N, K].
        config: how.
        transposed: the parameter is laid out [..., K, N].
        name: what to call it in errors.
        moments: of the inputs, by `name`, of an expert by "name[e]": `SecondMoment` for method "gptq", any
            for "search". Parts without one are searched, all columns alike.
        advance: called with the number of values done, for a progress bar.

    Raises:
        ValueError: NaN or Inf in it, or a wrong shape.
        TypeError: not a float type.
    """
    weight = parameter.detach()
    if transposed:
        weight = weight.transpose(-1, -2)
    parts = {"": weight} if weight.dim() != 3 else {f"[{e}]": one for e, one in enumerate(weight)}
    codebook = None
    if config.bits == 4:
        parts = {part: checked(matrix, name + part) for part, matrix in parts.items()}
        known = [] if config.method == "paper" else [moments.get(name + part) for part in parts]
        codebook = choose_codebook(weight, config, _importance(known))
    found: dict[str, _Matrix] = {}
    signal = noise = 0.0
    for part, matrix in parts.items():
        one = _quantize_matrix(matrix.contiguous(), config, codebook, moments.get(name + part), name + part)
        more = energies(matrix, one.codes, one.scale, one.codebook, config.group_size)
        signal, noise = signal + more[0], noise + more[1]
        found[part] = one
        if advance is not None:
            advance(matrix.numel())
    table = next(iter(found.values())).codebook

    def whole(tensors: list[Tensor]) -> Tensor:
        return torch.stack(tensors) if weight.dim() == 3 else tensors[0]

    return StoredWeight(
        whole([one.codes for one in found.values()]),
        whole([one.scale for one in found.values()]),
        table,
        decibels(signal, noise),
        {part: one.loss for part, one in found.items() if one.loss is not None},
        tuple(part for part, one in found.items() if one.loss is None) if config.method == "gptq" else (),
    )


def quantize_into(
    weight: OVPWeight,
    parameter: Tensor,
    config: QuantConfig,
    *,
    name: str,
    samples: dict[str, InputSample],
    moments: Mapping[str, Moment],
    advance: Callable[[int], None] | None = None,
) -> StoredWeight:
    """Fill an empty weight from its float parameter, what its input needs included, and pack it.

    Args:
        weight: empty; if it rotates its input, it is filled with W H, rounded to the parameter's dtype.
        samples: of the inputs, by name; this weight's is taken out.
        parameter, config, name, moments, advance: as in `quantize_parameter`, whose errors are raised.

    Returns:
        What it was filled with.
    """
    if weight.input_rotation:
        parameter = _rotated(parameter, weight)
    stored = quantize_parameter(
        parameter, config, transposed=weight.transposed, name=name, moments=moments, advance=advance
    )
    weight.set_(stored.codes, stored.scale, stored.codebook)
    weight.sqnr_db = stored.sqnr_db
    if (sample := samples.pop(name, None)) is not None:
        set_activations(weight, sample, parameter)
    weight.pack_()
    return stored


def _rotated(parameter: Tensor, weight: OVPWeight) -> Tensor:
    """W H in the parameter's layout and dtype, computed in float32."""
    matrix = parameter.detach()
    matrix = matrix.transpose(-1, -2) if weight.transposed else matrix
    turned: Tensor = ops.block_hadamard(matrix.float(), weight.input_rotation).to(parameter.dtype)
    return turned.transpose(-1, -2) if weight.transposed else turned


def _importance(moments: list[Moment | None]) -> Tensor | None:
    """What errors in each column cost all parts together."""
    known = [one for one in moments if one is not None]
    if not known:
        return None
    total = known[0].energy()
    for one in known[1:]:
        total = total + one.energy()
    return relative(total)


def _quantize_matrix(
    weight: Tensor, config: QuantConfig, codebook: Codebook | None, moment: Moment | None, name: str
) -> _Matrix:
    """One weight [N, K]; no codebook means 8 bits."""
    if codebook is None:
        return _Matrix(*quantize_weight8(weight, config, name=name), None, None)
    if config.method == "gptq" and isinstance(moment, SecondMoment) and moment.can_compensate():
        assert moment.total is not None
        try:
            found = compensate(
                weight,
                moment.total,
                codebook,
                config.group_size,
                damping=config.damping,
                activation_order=config.activation_order,
                drift=moment.drift,
            )
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return _Matrix(found.codes, found.scale, codebook.tensor().to(weight.device), found.loss)
    importance = None if moment is None or config.method == "paper" else _importance([moment])
    return _Matrix(
        *quantize_weight(weight, config, importance=importance, codebook=codebook, name=name), None
    )
