"""`olive.report`: reads the figures of a quantized model off its tensors."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from olive._progress import ProgressBar
from olive.config import OVP8
from olive.formats import (
    CODEBOOKS,
    LEARNED,
    PER_TENSOR,
    Codebook,
    outlier_pairs,
    outlier_pairs8,
    unpack_scale,
)
from olive.formats.layout import expand_scale
from olive.nn import WEIGHT_TENSORS, OVPWeight
from olive.reports.records import LayerReport, Report
from olive.walk import walk

_CHUNK_CODES = 1 << 22  # looked at together: a mask is as large as the codes


def report(model: nn.Module, *, progress: bool | None = None) -> Report:
    """Say what is quantized in a model, how well, and what is not and why. Nothing is changed.

    Args:
        model: a model with quantized modules, from `olive.quantize` or from a checkpoint.
        progress: show a bar on stderr if it takes longer than two seconds; None = only on a terminal.

    Raises:
        TypeError: not a module.
        ValueError: nothing in it is quantized, or a quantized weight without values (meta device).
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    inventory = walk(model)
    if not inventory.quantized:
        raise ValueError(
            "model: expected a model with quantized layers, got none; call olive.quantize(model) first"
        )
    layers = []
    with ProgressBar("reading codes", inventory.quantizable_values, progress) as bar:
        for target in inventory.quantized:
            for full, weight in target.weights().items():
                name = target.name if target.kind in ("linear", "conv1d") else full
                layers.append(_layer(name, target.kind, weight))
                bar.advance(weight.quantized_values)
    stored = sum(layer.size_bytes for layer in layers)
    others = _other_bytes(model)
    floats = sum(
        weight.quantized_values * weight.dtype.itemsize
        for target in inventory.quantized
        for weight in target.weights().values()
    )
    return Report(
        model=type(model).__name__,
        layers=tuple(layers),
        skipped=inventory.skipped,
        quantized_share=inventory.share,
        model_bytes=stored + others,
        float_bytes=floats + others,
    )


def _layer(name: str, kind: str, weight: OVPWeight) -> LayerReport:
    if weight.codes.is_meta:
        raise ValueError(
            f"{name}: expected a weight with values, got one on the meta device; load the checkpoint first"
        )
    codes, scale, codebook = weight.canonical()
    stacked = weight.experts is not None
    pairs = plain = 0
    for one_codes, one_scale in zip(codes, scale, strict=True) if stacked else ((codes, scale),):
        if codebook is None:
            pairs += int(outlier_pairs8(one_codes).sum())
        else:
            pairs += _count_outlier_pairs(one_codes, one_scale, weight.in_features, weight.group_size)
        plain += int(unpack_scale(one_scale)[1].sum())
    matrix, figures = (weight.out_features, weight.in_features), weight.activation_figures
    return LayerReport(
        name=name,
        kind=kind,
        shape=matrix if weight.experts is None else (weight.experts, *matrix),
        codebook=OVP8 if codebook is None else _codebook_name(codebook, f"{name}.codebook"),
        group_size=weight.group_size,
        parameters=weight.quantized_values,
        size_bytes=sum(
            tensor.numel() * tensor.element_size()
            for tensor in (codes, scale, codebook)
            if tensor is not None
        ),
        outlier_share=pairs / (codes.numel() if weight.bits == 4 else codes.numel() // 2),
        plain_share=plain / scale.numel(),
        sqnr_db=weight.sqnr_db,
        bits=weight.bits,
        activations=_activations(weight, name),
        activation_sqnr_db=None if figures is None else figures.sqnr_db,
        activation_outlier_share=None if figures is None else figures.outlier_share,
        activation_clipped_share=None if figures is None else figures.clipped_share,
    )


def _activations(weight: OVPWeight, name: str) -> str | None:
    format = weight.activation_format
    if format is None:
        return None
    book = weight.activation_codebook
    words = [
        format.name,
        *([] if book is None else [_codebook_name(book.detach(), f"{name}.activation_codebook")]),
    ]
    return " ".join([*words, {-1: "token", 0: "tensor"}.get(format.group_size, str(format.group_size))])


def _count_outlier_pairs(codes: Tensor, scale: Tensor, columns: int, group_size: int) -> int:
    plain = unpack_scale(scale)[1]
    rows, pairs = codes.shape
    step = max(1, _CHUNK_CODES // pairs)
    count = 0
    for start in range(0, rows, step):
        part = codes[start : start + step]
        part_plain = plain if group_size == PER_TENSOR else plain[start : start + step]
        pair_plain = expand_scale(part_plain, len(part), columns, group_size)[:, 0::2]
        count += int(outlier_pairs(part, pair_plain).sum())
    return count


def _codebook_name(stored: Tensor, name: str) -> str:
    tables = Codebook.from_tensor(stored, name)
    return next((known for known, book in CODEBOOKS.items() if replace(tables, name=known) == book), LEARNED)


def _other_bytes(model: nn.Module) -> int:
    """Parameters and saved buffers that are not part of a quantized weight, each tensor once."""
    seen: dict[int, Tensor] = {}
    for module in model.modules():
        stored = WEIGHT_TENSORS if isinstance(module, OVPWeight) else ()
        held: dict[str, Tensor | None] = {}
        held.update({key: value for key, value in module._parameters.items() if key not in stored})
        for key, buffer in module._buffers.items():
            if key not in module._non_persistent_buffers_set:
                held[key] = buffer
        seen.update({id(value): value for value in held.values() if value is not None})
    return sum(tensor.numel() * tensor.element_size() for tensor in seen.values())
