"""CUDA backend of the operators on quantized activations; see `olive.ops.cuda`."""

from __future__ import annotations

import torch
from torch import Tensor

from olive.formats.activations import DYNAMIC_GRIDS
from olive.formats.layout import groups_per_row
from olive.ops import cuda
from olive.ops import schemas_quantized as schemas
from olive.ops.cuda import aligned
from olive.ops.gpu_dispatch import Plan, choose_linear_quantized
from olive.ops.native import ACTIVATION_FORMATS, FLOAT_TYPES, LEVEL_TYPES
from olive.ops.packed import CUDA_LAYOUT

TILE_COLUMNS = 64  # levels for products are padded to whole tiles of the weight
MOST_TOKENS = 256  # activation rows of a block: scales for products are padded to them


def _quantize(
    x: Tensor,
    format: str,
    group_size: int,
    pairing: str,
    codebook: Tensor | None,
    static_scale: Tensor | None,
    levels: Tensor,
    scale: Tensor,
    *,
    for_products: bool,
) -> None:
    """Start the kernel on activations [M, K], M >= 1; see `ActivationLevels` in csrc/cuda/api.h."""
    with cuda.on_device(x.device):
        cuda.kernels().quantize_activations(
            x.data_ptr(),
            FLOAT_TYPES[x.dtype],
            x.shape[0],
            x.shape[1],
            ACTIVATION_FORMATS[format],
            group_size,
            pairing == "paper",
            0 if codebook is None else codebook.data_ptr(),
            0 if static_scale is None else static_scale.data_ptr(),
            *DYNAMIC_GRIDS[format],
            for_products,
            levels.data_ptr(),
            LEVEL_TYPES[levels.dtype],
            scale.data_ptr(),
            scale.shape[1],
            cuda.stream_of(x.device),
        )


def quantize_activations_cuda(
    input: Tensor,
    format: str,
    group_size: int,
    pairing: str,
    codebook: Tensor | None,
    static_scale: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """`quantize_activations` on the GPU, to the last bit.

    Nothing is read back: that int8 holds the levels of `codebook` is for the caller to know; `olive.nn`
    checks codebooks when layers are made.
    """
    columns = schemas.check_activations(input, format, group_size, pairing, codebook, static_scale)
    schemas.check_levels(format, None, dtype)
    groups = groups_per_row(columns, group_size)
    levels = torch.empty(input.shape, dtype=dtype, device=input.device)
    scale = torch.empty((*input.shape[:-1], groups), dtype=torch.float32, device=input.device)
    if input.numel() > 0:
        _quantize(
            aligned(input).view(-1, columns),
            format,
            group_size,
            pairing,
            None if codebook is None else codebook.contiguous(),
            static_scale,
            levels.view(-1, columns),
            scale.view(-1, groups),
            for_products=False,
        )
    return levels, scale


def ovp_linear_quantized_cuda(
    input: Tensor,
    codes: Tensor,
    scale: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    out_features: int,
    group_size: int,
    format: str,
    activation_group_size: int,
    pairing: str,
    activation_codebook: Tensor | None,
    static_scale: Tensor | None,
    plan: Plan | None = None,
) -> Tensor:
    """`ovp_linear_quantized` on the GPU; canonical codes are packed for the call.

    Two kernels: activations become int8 in a buffer, in the order that the products read them; then the
    product. The wgmma kernel gives the reference's bits, and so does the mma kernel where both scales are one
    per row or tensor (integer sums over all columns); else the mma kernel adds the same runs of columns in
    another order, in float32.

    Nothing is read back, so that launches need not wait: that the levels of both codebooks are int8, up to
    127, is for the caller to know. `olive.nn` checks codebooks when layers are made.

    Args:
        plan: overrules `choose_linear_quantized`.
    """
    columns = schemas.check_linear_quantized(
        input,
        codes,
        scale,
        codebook,
        bias,
        out_features,
        group_size,
        format,
        activation_group_size,
        pairing,
        activation_codebook,
        static_scale,
        CUDA_LAYOUT,
    )
    if codes.dim() == 2:
        codes, scale = cuda.ovp_pack_cuda(codes, scale, columns, group_size)
    codes, scale, codebook = aligned(codes), aligned(scale), codebook.contiguous()
    bias = None if bias is None else bias.contiguous()
    rows = input.numel() // columns
    if rows == 0:
        return input.new_empty((*input.shape[:-1], out_features))
    gpu = cuda.gpu_of(input.device)
    if plan is None:
        plan = choose_linear_quantized(rows, out_features, columns, group_size, activation_group_size, gpu)
    pitch = -(-columns // TILE_COLUMNS) * TILE_COLUMNS
    token_pitch = -(-rows // MOST_TOKENS) * MOST_TOKENS
    groups = groups_per_row(columns, activation_group_size)
    levels = torch.empty((rows, pitch), dtype=torch.int8, device=input.device)
    scale_x = torch.empty((groups, token_pitch), dtype=torch.float32, device=input.device)
    _quantize(
        aligned(input).view(rows, columns),
        format,
        activation_group_size,
        pairing,
        None if activation_codebook is None else activation_codebook.contiguous(),
        static_scale,
        levels,
        scale_x,
        for_products=True,
    )
    out = torch.empty((*input.shape[:-1], out_features), dtype=input.dtype, device=input.device)
    arguments = (
        levels.data_ptr(),
        scale_x.data_ptr(),
        token_pitch,
        activation_group_size,
        rows,
        out_features,
        columns,
        group_size,
        codes.data_ptr(),
        scale.data_ptr(),
        codebook.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else FLOAT_TYPES[bias.dtype],
        out.data_ptr(),
        FLOAT_TYPES[input.dtype],
    )
    with cuda.on_device(input.device):
        stream = cuda.stream_of(input.device)
        if plan.kernel == "wgmma":
            cuda.kernels().linear_quantized_wgmma(*arguments, plan.rows, plan.tokens, stream)
            return out
        partial = None
        if plan.split > 1 and not gpu.clusters:
            shape = (plan.split, rows, out_features)
            partial = torch.empty(shape, dtype=torch.float32, device=input.device)
        address = 0 if partial is None else partial.data_ptr()
        cuda.kernels().linear_quantized_mma(*arguments, address, plan.tokens, plan.split, stream)
    return out
