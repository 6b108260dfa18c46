"""CUDA backend of `ovp_compensate`; see `olive.ops.cuda`."""

from __future__ import annotations

import torch
from torch import Tensor

from olive.ops import cuda
from olive.ops.compensate import check_compensate, ovp_compensate_reference


def ovp_compensate_cuda(
    values: Tensor, scale: Tensor, factor: Tensor, codebook: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`ovp_compensate` on the GPU; more columns than shared memory holds go to the reference."""
    rows, columns = check_compensate(values, scale, factor, codebook)
    device = values.device
    if columns > cuda.kernels().most_compensated_columns(cuda.gpu_of(device).shared_per_block):
        return ovp_compensate_reference(values, scale, factor, codebook)
    values, scale, codebook = values.contiguous(), scale.contiguous(), codebook.contiguous()
    factor = cuda.aligned(factor)
    codes = torch.empty((rows, columns // 2), dtype=torch.uint8, device=device)
    errors = torch.empty_like(values)
    loss = torch.empty(rows, dtype=torch.float32, device=device)
    with cuda.on_device(device):
        cuda.kernels().compensate(
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
            cuda.stream_of(device),
        )
    return codes, errors, loss
