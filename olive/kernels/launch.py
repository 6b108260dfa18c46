"""What the launchers share."""

from __future__ import annotations

from torch import Tensor

from olive.formats.layout import PER_TENSOR


def ceil_div(count: int, block: int) -> int:
    """Blocks that cover `count`."""
    return -(-count // block)


def scale_stride(scale: Tensor, group_size: int) -> int:
    """Scales between neighbouring rows: 0 when one scale serves the whole weight."""
    return 0 if group_size == PER_TENSOR else int(scale.shape[1])


def kernel_group_size(group_size: int) -> int:
    """Columns per group as kernels take it: 0 for one scale per row, whether rows share it or not."""
    return max(group_size, 0)
