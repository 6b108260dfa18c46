"""`block_hadamard`: mix every block of columns by a Hadamard matrix, while a model runs.

What a layer reads from a product of two others, act(gate) * up, cannot be rotated by folding a matrix into
weights. So it is rotated at each call, in blocks: a dense product with one small matrix, which any device
does fast. Its own inverse, because Sylvester's matrices are symmetric. Schema, checks, and the definition in
plain PyTorch, which serves every device.

Source: QuaRot, arXiv:2404.00456, for a Hadamard transform before the down projection; blocks: ours.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from olive.ops.hadamard import hadamard
from olive.ops.schemas import FLOATS, library

# Columns of a block, at most. The cost is 2 x block operations a value, and the gain levels off: under int4
# activations per token the bundled model's KL divergence is 0.0765 without, and 0.0805, 0.0722 and 0.0712
# with blocks of 16, 64 and 256. Checkpoints rely on it: `block_size` says how their weights are rotated.
MAX_BLOCK = 256

library.define("block_hadamard(Tensor x, int block) -> Tensor")


def block_size(columns: int) -> int:
    """The largest power of two that divides the columns, up to MAX_BLOCK; 1 for an odd number of columns."""
    return min(columns & -columns, MAX_BLOCK)


def check_block_hadamard(x: Tensor, block: int) -> None:
    """Check the arguments of `block_hadamard`, not their values."""
    if x.dtype not in (*FLOATS, torch.float64):
        raise TypeError(f"x: expected float64, float32, bfloat16 or float16, got {x.dtype}")
    if block < 2 or block & (block - 1):
        raise ValueError(f"block: expected a power of two of at least 2, got {block}")
    if x.dim() == 0 or x.shape[-1] % block:
        raise ValueError(f"x: expected a last dimension that {block} divides, got shape {tuple(x.shape)}")


@torch.library.register_fake("olive::block_hadamard", lib=library)
def _(x, block):  # type: ignore[no-untyped-def]
    check_block_hadamard(x, block)
    return x.new_empty(x.shape)


@lru_cache(maxsize=64)
def _matrix(block: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """H / sqrt(block), [block, block]. Where sqrt(block) is no power of two, 16-bit entries are all 1.1e-4
    too small: a fortieth of bfloat16's rounding."""
    with torch.inference_mode(False), torch.device("cpu"):
        return hadamard(torch.eye(block, dtype=torch.float64)).to(device=device, dtype=dtype)


def _product_dtype(x: Tensor) -> torch.dtype:
    """What is multiplied. CPUs without 16-bit products take 30 times as long for them as for float32."""
    return torch.promote_types(x.dtype, torch.float32) if x.device.type == "cpu" else x.dtype


def block_hadamard_reference(x: Tensor, block: int) -> Tensor:
    """x H / sqrt(block) on every block of columns, H Sylvester's Hadamard matrix of that order.

    No entry of the result is larger than its block's norm. So float16 overflows only where that is above
    65504: that of 256 values of 4094, say.

    Differentiable: grad_x = grad H / sqrt(block).

    Args:
        x: float64, float32, bfloat16 or float16 [..., K].
        block: a power of two that divides K, at least 2.

    Returns:
        x's dtype and shape, contiguous. Products are in x's dtype, on CPUs in float32 at least; sums are in
        float32 (float64 for float64).

    Raises:
        TypeError: another dtype.
        ValueError: another block, or one that does not divide K.
    """
    check_block_hadamard(x, block)
    dtype = _product_dtype(x)
    rows = x.reshape(-1, block).to(dtype)
    with torch.autocast(x.device.type, enabled=False):  # reaches into operators
        return (rows @ _matrix(block, x.device, dtype)).to(x.dtype).view(x.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.block = inputs[1]


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return torch.ops.olive.block_hadamard(grad, ctx.block), None


library.impl("block_hadamard", block_hadamard_reference, "CompositeExplicitAutograd")
torch.library.register_autograd("olive::block_hadamard", _backward, setup_context=_setup_context, lib=library)
block_hadamard = torch.ops.olive.block_hadamard
