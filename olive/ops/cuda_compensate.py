"""CUDA backend of `ovp_compensate`; see `olive.ops.cuda`."""

from __future__ import annotations

from torch import Tensor

from olive.ops import cuda
from olive.ops.compensate import check_compensate, ovp_compensate_reference, run_compensate


def ovp_compensate_cuda(
    values: Tensor, scale: Tensor, factor: Tensor, codebook: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`ovp_compensate` on the GPU; more columns than shared memory holds go to the reference."""
    _, columns = check_compensate(values, scale, factor, codebook)
    device, kernels = values.device, cuda.kernels()
    if columns > kernels.most_compensated_columns(cuda.gpu_of(device).shared_per_block):
        return ovp_compensate_reference(values, scale, factor, codebook)
    with cuda.on_device(device):
        where = cuda.stream_of(device)
        return run_compensate(kernels.compensate, values, scale, cuda.aligned(factor), codebook, where)
