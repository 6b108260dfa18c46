"""LSQ: values on integer multiples of a scale that is learned with the rest of the model.

    v = clamp(x / s, qmin, qmax),    x_q = s round(v)

    d x_q / d x = 1 inside of the clamp, 0 outside
    d x_q / d s = round(v) - x / s inside, qmin or qmax outside; times g = 1 / sqrt(qmax m)

with m values sharing a scale. Scales below 1e-5 count as 1e-5, and their gradient as it is. Signed values of
1 bit are +-s. Schema, checks, and the definition in plain PyTorch, which serves every device.

Source: Esser et al., "Learned Step Size Quantization", arXiv:1902.08153.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from olive.ops.schemas import check_device, check_float, check_tensor, library

LEAST_SCALE = 1e-5
MAX_BITS = 8

library.define("lsq(Tensor input, Tensor scale, int bits, bool signed, int dim) -> Tensor")
library.define(
    "lsq_backward(Tensor grad, Tensor input, Tensor scale, int bits, bool signed, int dim) "
    "-> (Tensor grad_input, Tensor grad_scale)"
)


def integer_range(bits: int, signed: bool) -> tuple[int, int]:
    """(qmin, qmax). Signed values of 1 bit are -1 and 1."""
    if not 1 <= bits <= MAX_BITS:
        raise ValueError(f"bits: expected 1 to {MAX_BITS}, got {bits}")
    if not signed:
        return 0, 2**bits - 1
    return (-1, 1) if bits == 1 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def check_lsq(input: Tensor, scale: Tensor, bits: int, dim: int) -> None:
    """Check the arguments, not their values."""
    integer_range(bits, signed=True)
    check_float("input", input)
    if not -input.dim() <= dim < input.dim():
        raise ValueError(f"dim: expected a dimension of an input {tuple(input.shape)}, got {dim}")
    size = 1 if scale.dim() == 1 and scale.shape[0] == 1 else int(input.shape[dim])
    check_tensor("scale", scale, torch.float32, (size,))
    check_device(input=input, scale=scale)


def check_lsq_backward(grad: Tensor, input: Tensor, scale: Tensor, bits: int, dim: int) -> None:
    """Check the arguments, not their values."""
    check_lsq(input, scale, bits, dim)
    check_tensor("grad", grad, input.dtype, tuple(input.shape))
    check_device(grad=grad, input=input)


@torch.library.register_fake("olive::lsq", lib=library)
def _(input, scale, bits, signed, dim):  # type: ignore[no-untyped-def]
    check_lsq(input, scale, bits, dim)
    return torch.empty_like(input, memory_format=torch.contiguous_format)


@torch.library.register_fake("olive::lsq_backward", lib=library)
def _(grad, input, scale, bits, signed, dim):  # type: ignore[no-untyped-def]
    check_lsq_backward(grad, input, scale, bits, dim)
    return torch.empty_like(input, memory_format=torch.contiguous_format), scale.new_empty(scale.shape)


class _Rounded(NamedTuple):
    scale: Tensor  # that counts, shaped to broadcast
    steps: Tensor  # x / s
    codes: Tensor  # what it is rounded to, float32
    inside: Tensor  # of the clamp


def _shared(tensor: Tensor, scale: Tensor, dim: int) -> list[int]:
    """The scale's shape beside a tensor."""
    shape = [1] * tensor.dim()
    shape[dim] = int(scale.shape[0])
    return shape


def _round(input: Tensor, scale: Tensor, bits: int, signed: bool, dim: int) -> _Rounded:
    qmin, qmax = integer_range(bits, signed)
    used = scale.clamp(min=LEAST_SCALE).view(_shared(input, scale, dim))
    steps = input.float() / used
    inside = (steps >= qmin) & (steps <= qmax)
    is_sign = signed and bits == 1
    codes = torch.where(steps >= 0, 1.0, -1.0) if is_sign else steps.clamp(qmin, qmax).round()
    return _Rounded(used, steps, codes, inside)


def lsq_reference(input: Tensor, scale: Tensor, bits: int, signed: bool, dim: int) -> Tensor:
    """The input on its levels, in its own shape and dtype, contiguous. NaN stays NaN, but for signed 1 bit.

    Args:
        input: float32, bfloat16 or float16 [...].
        scale: float32 [1], or one for each place along `dim`.
        bits: 1 to 8.
        signed: whether levels go below zero.
        dim: of the input; any where there is one scale.

    Raises:
        TypeError, ValueError: another type or shape, another device, or a number out of its range.
    """
    check_lsq(input, scale, bits, dim)
    found = _round(input, scale, bits, signed, dim)
    return (found.codes * found.scale).to(input.dtype).contiguous()


def lsq_backward_reference(
    grad: Tensor, input: Tensor, scale: Tensor, bits: int, signed: bool, dim: int
) -> tuple[Tensor, Tensor]:
    """Gradients of `lsq` with respect to the input, in its dtype, contiguous, and to the scale, float32.

    Args:
        grad: of the result, in its dtype and shape.
        input, scale, bits, signed, dim: as for `lsq_reference`.
    """
    check_lsq_backward(grad, input, scale, bits, dim)
    found = _round(input, scale, bits, signed, dim)
    grad = grad.float()
    by_scale = grad * torch.where(found.inside, found.codes - found.steps, found.codes)
    others = [one for one in range(input.dim()) if scale.shape[0] == 1 or one != dim % input.dim()]
    _, qmax = integer_range(bits, signed)
    shared = max(1, input.numel() // int(scale.shape[0]))
    total = by_scale.sum(others) if others else by_scale
    grad_input = (grad * found.inside).to(input.dtype).contiguous()
    return grad_input, total.view(scale.shape) / math.sqrt(qmax * shared)


def lsq_initial_scale(input: Tensor, bits: int, signed: bool, dim: int | None) -> Tensor:
    """A scale to begin with: 2 mean |x| / sqrt(qmax), twice that for unsigned values with a scale per place.

    Args:
        input: float [...], of a first batch.
        bits, signed: as for `lsq_reference`.
        dim: with a scale for each place along it; None = one for all.

    Returns:
        float32 [1], or [the size of that dimension].

    Source: the released code of arXiv:2302.02210.
    """
    _, qmax = integer_range(bits, signed)
    magnitude = input.detach().float().abs()
    if dim is None:
        return (2 * magnitude.mean() / math.sqrt(qmax)).reshape(1)
    others = [one for one in range(input.dim()) if one != dim % input.dim()]
    mean = magnitude.mean(others) if others else magnitude
    return (2 if signed else 4) * mean / math.sqrt(qmax)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, scale, *ctx.how = inputs
    ctx.save_for_backward(input, scale)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
    return *torch.ops.olive.lsq_backward(grad, *ctx.saved_tensors, *ctx.how), None, None, None


library.impl("lsq", lsq_reference, "CompositeExplicitAutograd")
library.impl("lsq_backward", lsq_backward_reference, "CompositeExplicitAutograd")
torch.library.register_autograd("olive::lsq", _backward, setup_context=_setup_context, lib=library)
lsq = torch.ops.olive.lsq
