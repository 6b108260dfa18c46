"""Moves float parameters to aligned memory, so that saved and loaded models compute the same bits."""

from __future__ import annotations

from torch import Tensor, nn

ALIGNMENT = 64  # bytes; what torch's own CPU allocator gives


def align_(model: nn.Module) -> None:
    """Copy parameters and buffers that lie at odd addresses; values and parameter objects stay the same.

    Tensors that transformers loads lie in the mapped file wherever its header ends. There torch's float32
    product of one row (MKL) adds in another order: a model and its saved copy would differ in the last bit.
    """
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for tensor in tensors:
        if (
            tensor.device.type != "cpu"
            or not tensor.is_floating_point()
            or tensor.data_ptr() % ALIGNMENT == 0
        ):
            continue
        if tensor.untyped_storage().nbytes() == tensor.nbytes:  # else a view into something that others share
            tensor.data = tensor.data.clone()
