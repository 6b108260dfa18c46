"""What the launchers share."""

from __future__ import annotations

import torch
from torch import Tensor

from olive.formats.layout import PER_TENSOR


def ceil_div(count: int, block: int) -> int:
    """Blocks that cover `count`."""
    return -(-count // block)


def capability_of(device: torch.device) -> int:
    """Compute capability of an NVIDIA GPU, 90 for 9.0; 0 for other devices. Torch remembers it."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def scale_stride(scale: Tensor, group_size: int) -> int:
    """Scales between neighbouring rows: 0 when one scale serves the whole weight."""
    return 0 if group_size == PER_TENSOR else int(scale.shape[1])


def kernel_group_size(group_size: int) -> int:
    """Columns per group as kernels take it: 0 for one scale per row, whether rows share it or not."""
    return max(group_size, 0)


def pairs_of(codes: Tensor) -> Tensor:
    """Codes of eight bits, uint8 [N, 2 P], as one 16-bit word per pair: int16 [N, P]."""
    # Words need even addresses, which a slice of a larger tensor may not have.
    codes = codes.contiguous()
    return (codes if codes.data_ptr() % 2 == 0 else codes.clone()).view(torch.int16)
