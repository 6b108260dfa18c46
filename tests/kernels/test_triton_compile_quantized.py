"""The kernels on integers and eight bits compile for the GPUs they are for: units, registers, rounding."""

from __future__ import annotations

import re
from itertools import product
from typing import Any

import pytest
import torch

from tests.kernels.ahead_of_time import (
    CAPABILITIES,
    ONE_TYPE_EACH,
    SHARED_MEMORY,
    STORED,
    Compiled,
    assert_never_fused,
    compile_kernel,
)
from tests.kernels.conftest import INTERPRETING

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="Triton compiles nothing while it interprets"),
    pytest.mark.usefixtures("no_cache"),
]

# Names of machine instructions. Triton 3.6 multiplies integers with IMMA on 10.0 as well.
INTEGER_UNITS = {80: ("IMMA.",), 90: ("IGMMA.",), 100: ("UTCIMMA", "IMMA."), 120: ("IMMA.",)}
# Rows of activations, group sizes of weight and activations: every plan, with what needs most registers.
PRODUCTS = ((4, 128, 128), (64, 128, 128), (200, 128, -1), (4096, -1, -1), (4096, 128, -1))
REST = ((200, -1, -1), (4096, 32, 32))


def _assert_no_spills(compiled: Compiled) -> None:
    usage = compiled.resources()
    assert usage["LOCAL"] == 0
    assert usage["STACK"] <= 8  # what Triton 3.6 parks in two cases, outside of loops


def _compile_product(capability: int, rows: int, group_size: int, x_group_size: int) -> Compiled:
    from olive.kernels.ovp_linear_quantized import ovp_linear_quantized_kernel, plan_linear_quantized

    plan = plan_linear_quantized(rows, 16384, 4096, group_size, x_group_size, capability)
    split = plan.tile.splits > 1
    sums = "*i32" if max(group_size, x_group_size) <= 0 else "*fp32"
    return compile_kernel(
        ovp_linear_quantized_kernel,
        {
            **STORED,
            "codes_ptr": "*i8" if plan.decoded else "*u8",
            "x_ptr": "*i8",
            "x_scale_ptr": "*fp32",
            "bias_ptr": "*bf16",
            "out_ptr": sums if split else "*bf16",
        },
        {
            "GROUP_SIZE": max(group_size, 0),
            "X_GROUP_SIZE": max(x_group_size, 0),
            "SPLIT": split,
            "BLOCK_M": plan.tile.block_m,
            "BLOCK_N": plan.tile.block_n,
            "BLOCK_K": plan.tile.block_k,
        },
        capability,
        num_warps=plan.tile.warps,
        num_stages=plan.tile.stages,
        enable_fp_fusion=False,
    )


@pytest.mark.parametrize(
    ("capability", "case"), [*product(CAPABILITIES, PRODUCTS), *product((90,), REST)], ids=str
)
def test_products_use_integer_units_and_fit(capability: int, case: tuple[int, int, int]) -> None:
    compiled = _compile_product(capability, *case)
    instructions = compiled.instructions()
    assert any(name.startswith(INTEGER_UNITS[capability]) for name in instructions)
    assert not any("HMMA" in name or "QGMMA" in name for name in instructions)
    assert_never_fused(compiled, asked_for=True)
    assert compiled.shared <= SHARED_MEMORY
    _assert_no_spills(compiled)


def test_sums_of_split_columns_round_as_the_format_does() -> None:
    from olive.kernels.ovp_linear import SUM_BLOCK
    from olive.kernels.ovp_linear_quantized import ovp_linear_quantized_sum_kernel

    pointers = {"x_scale_ptr": "*fp32", "scale_ptr": "*i16", "bias_ptr": "*bf16", "out_ptr": "*bf16"}
    for sums in ("*i32", "*fp32"):
        compiled = compile_kernel(
            ovp_linear_quantized_sum_kernel,
            {**pointers, "partial_ptr": sums},
            {"BLOCK": SUM_BLOCK},
            90,
            enable_fp_fusion=False,
        )
        assert_never_fused(compiled, asked_for=sums == "*i32")


def _compile_int8(capability: int, kind: str, constants: dict[str, Any], static: str | None) -> Compiled:
    from olive.kernels.quantize_activations import quantize_int8_kernel

    pointers = {"x_ptr": f"*{kind}", "levels_ptr": "*i8", "scale_ptr": "*fp32"}
    if static is None:
        constants = {**constants, "static_ptr": None}
    else:
        pointers["static_ptr"] = static
    return compile_kernel(
        quantize_int8_kernel, pointers, constants, capability, num_warps=8, enable_fp_fusion=False
    )


@pytest.mark.parametrize(("capability", "kind"), ONE_TYPE_EACH)
def test_int8_levels_round_as_the_format_does(capability: int, kind: str) -> None:
    from olive.kernels.quantize_activations import INT8_BLOCK, INT8_VALUES

    for constants, static in (
        ({"GROUP_SIZE": 0, "SPANS": 1, "BLOCK": INT8_BLOCK}, None),
        ({"GROUP_SIZE": 0, "SPANS": 1, "BLOCK": INT8_BLOCK}, "*i16"),
        ({"GROUP_SIZE": 128, "SPANS": INT8_VALUES // 128, "BLOCK": 128}, None),
    ):
        compiled = _compile_int8(capability, kind, constants, static)
        assert_never_fused(compiled)
        _assert_no_spills(compiled)
        # The constant that rounds to integers is added and taken away again, not folded into nothing.
        assert {"0f4B400000", "0fCB400000"} <= set(re.findall(r"0f[4C]B400000", compiled.ptx))


@pytest.mark.parametrize(
    ("capability", "kind", "format", "spans", "width"),
    [
        (80, "fp16", "ovp4", 100_000, 128),
        (90, "bf16", "ovp4", 1, 32768),
        (90, "bf16", "ovp8", 4096, 4096),
        (100, "fp16", "ovp4", 4096, 4096),
        (120, "bf16", "ovp4", 1, 4096),
    ],
)
def test_searches_of_activations_round_as_the_format_does(
    capability: int, kind: str, format: str, spans: int, width: int
) -> None:
    from olive.formats.activations import DYNAMIC_OVP8_GRID, DYNAMIC_PAIR_GRID
    from olive.kernels.quantize_activations import SIGNED_PLAIN_GRID, plan_pairs, quantize_pairs_kernel

    plan = plan_pairs(spans, width, True)
    grid = DYNAMIC_PAIR_GRID if format == "ovp4" else DYNAMIC_OVP8_GRID
    pointers = {"x_ptr": f"*{kind}", "levels_ptr": f"*{kind}", "scale_ptr": "*fp32"}
    constants: dict[str, Any] = {"static_ptr": None, "GROUP_SIZE": 128 if width == 128 else 0}
    if format == "ovp4":
        pointers["codebook_ptr"] = "*i8"
    else:
        constants["codebook_ptr"] = None
    compiled = compile_kernel(
        quantize_pairs_kernel,
        pointers,
        {
            **constants,
            "GRID": grid,
            "COUNT": len(grid),
            "PLAIN_GRID": SIGNED_PLAIN_GRID,
            "PLAIN_COUNT": len(SIGNED_PLAIN_GRID),
            "OPTIMAL": True,
            "SPANS": plan.spans,
            "CHUNKS": plan.chunks,
            "CANDIDATES": plan.candidates,
        },
        capability,
        num_warps=plan.warps,
        enable_fp_fusion=False,
    )
    assert_never_fused(compiled)
    _assert_no_spills(compiled)


@pytest.mark.parametrize(("capability", "kind"), ONE_TYPE_EACH)
def test_eight_bits_decode_and_multiply_without_spills(capability: int, kind: str) -> None:
    from olive.kernels import ovp_linear
    from olive.kernels.ovp8_decode import BLOCK_PAIRS, BLOCK_ROWS, ovp8_decode_kernel

    decode = compile_kernel(
        ovp8_decode_kernel,
        {"pairs_ptr": "*i16", "scale_ptr": "*i16", "out_ptr": f"*{kind}"},
        {"GROUP_SIZE": 128, "BLOCK_ROWS": BLOCK_ROWS, "BLOCK_PAIRS": BLOCK_PAIRS},
        capability,
        enable_fp_fusion=False,
    )
    assert_never_fused(decode)
    _assert_no_spills(decode)
    dtype = torch.float16 if kind == "fp16" else torch.bfloat16
    pointers = {name: f"*{kind}" for name in ("x_ptr", "bias_ptr", "out_ptr")}
    pointers |= {"codes_ptr": "*i16", "scale_ptr": "*i16"}
    for rows in (2, 4096):
        plan = ovp_linear.plan_linear(rows, 16384, 4096, 128, dtype)
        compiled = compile_kernel(
            ovp_linear.ovp_linear_kernel,
            pointers,
            {
                "codebook_ptr": None,
                "GROUP_SIZE": 128,
                "BLOCK_M": plan.block_m,
                "BLOCK_N": plan.block_n,
                "BLOCK_K": plan.block_k,
            },
            capability,
            num_warps=plan.warps,
            num_stages=plan.stages,
            enable_fp_fusion=True,
        )
        assert re.search(r"\b(?:mma|wgmma|tcgen05)\.", compiled.ptx)
        assert compiled.shared <= SHARED_MEMORY
        _assert_no_spills(compiled)
    vector = compile_kernel(
        ovp_linear.ovp_linear_vector_kernel,
        pointers,
        {
            "codebook_ptr": None,
            "GROUP_SIZE": 128,
            "BLOCK_N": ovp_linear.VECTOR_BLOCK_N,
            "BLOCK_K": ovp_linear.VECTOR_BLOCK_K,
        },
        capability,
        num_warps=ovp_linear.VECTOR_WARPS,
        enable_fp_fusion=True,
    )
    _assert_no_spills(vector)


def test_searches_of_eight_bits_round_as_the_format_does() -> None:
    from olive.kernels import ovp8_quantize, per_tensor

    weight = {"weight_ptr": "*bf16", "scale_ptr": "*i16", "multiples_ptr": "*fp32"}
    blocks = {"BLOCK_ROWS": ovp8_quantize.BLOCK_ROWS, "BLOCK_PAIRS": ovp8_quantize.BLOCK_PAIRS}
    for kernel, pointers, constants in (
        (
            ovp8_quantize.ovp8_quantize_kernel,
            weight,
            {"GROUP_SIZE": 128, "OPTIMAL": True, "BLOCK": ovp8_quantize.BLOCK_GROUPS},
        ),
        (
            ovp8_quantize.ovp8_encode_kernel,
            {**weight, "pairs_ptr": "*i16", "flag_ptr": "*i32"},
            {"GROUP_SIZE": 128, "OPTIMAL": True, **blocks},
        ),
        (
            per_tensor.row_errors_kernel,
            {**weight, "scales_ptr": "*fp32", "errors_ptr": "*fp64"},
            {"codebook_ptr": None, "importance_ptr": None, "BLOCK": 8, "OPTIMAL": False},
        ),
    ):
        compiled = compile_kernel(kernel, pointers, constants, 90, enable_fp_fusion=False)
        assert_never_fused(compiled)
        _assert_no_spills(compiled)
