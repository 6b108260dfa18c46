"""Every kernel compiles for the GPUs it is for, without one: registers, shared memory, rounding."""

from __future__ import annotations

import re
from itertools import product

import pytest
import torch

from tests.kernels.ahead_of_time import (
    CAPABILITIES,
    ONE_TYPE_EACH,
    SHARED_MEMORY,
    STORED,
    assert_never_fused,
    compile_kernel,
)
from tests.kernels.conftest import INTERPRETING

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="Triton compiles nothing while it interprets"),
    pytest.mark.usefixtures("no_cache"),
]

TYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
# A product's rows, group size and activations: block shapes, with the groups that need most registers.
PRODUCTS = ((2, 128, "fp16"), (64, 128, "bf16"), (4096, 128, "bf16"))
FLOAT32_PRODUCT = (4096, 128, "fp32")


@pytest.mark.parametrize(
    ("capability", "case"), [*product(CAPABILITIES, PRODUCTS), (80, FLOAT32_PRODUCT)], ids=str
)
def test_linear_fits_registers_and_shared_memory(capability: int, case: tuple[int, int, str]) -> None:
    from olive.kernels.ovp_linear import ovp_linear_kernel, plan_linear

    rows, group_size, kind = case
    plan = plan_linear(rows, 16384, 4096, group_size, TYPES[kind])
    compiled = compile_kernel(
        ovp_linear_kernel,
        {**STORED, "x_ptr": f"*{kind}", "bias_ptr": f"*{kind}", "out_ptr": f"*{kind}"},
        {
            "GROUP_SIZE": max(group_size, 0),
            "BLOCK_M": plan.block_m,
            "BLOCK_N": plan.block_n,
            "BLOCK_K": plan.block_k,
        },
        capability,
        num_warps=plan.warps,
        num_stages=plan.stages,
        enable_fp_fusion=True,
    )
    usage = compiled.resources()
    assert usage["LOCAL"] == 0
    assert usage["STACK"] <= 8  # Triton 3.6 parks two registers of the largest block on sm_120; otherwise 0
    assert compiled.shared <= SHARED_MEMORY
    if kind != "fp32":
        assert re.search(r"\b(?:mma|wgmma|tcgen05)\.", compiled.ptx)


@pytest.mark.parametrize(("capability", "kind"), ONE_TYPE_EACH)
def test_linear_of_one_row_fits_registers(capability: int, kind: str) -> None:
    from olive.kernels import ovp_linear

    float_pointers = {name: f"*{kind}" for name in ("x_ptr", "bias_ptr", "out_ptr")}
    compiled = compile_kernel(
        ovp_linear.ovp_linear_vector_kernel,
        {**STORED, **float_pointers},
        {"GROUP_SIZE": 128, "BLOCK_N": ovp_linear.VECTOR_BLOCK_N, "BLOCK_K": ovp_linear.VECTOR_BLOCK_K},
        capability,
        num_warps=ovp_linear.VECTOR_WARPS,
        enable_fp_fusion=True,
    )
    usage = compiled.resources()
    assert usage["STACK"] == usage["LOCAL"] == 0
    partial = compile_kernel(
        ovp_linear.ovp_linear_sum_kernel,
        {**float_pointers, "partial_ptr": "*fp32"},
        {"BLOCK": ovp_linear.SUM_BLOCK},
        capability,
        enable_fp_fusion=True,
    )
    assert partial.cubin


@pytest.mark.parametrize(("capability", "kind"), ONE_TYPE_EACH)
def test_decode_and_encode_round_as_the_format_does(capability: int, kind: str) -> None:
    from olive.kernels.ovp_decode import ovp_decode_kernel
    from olive.kernels.ovp_encode import ovp_encode_kernel

    blocks = {"GROUP_SIZE": 128, "BLOCK_ROWS": 4, "BLOCK_PAIRS": 128}
    decode = compile_kernel(
        ovp_decode_kernel, {**STORED, "out_ptr": f"*{kind}"}, blocks, capability, enable_fp_fusion=False
    )
    encode = compile_kernel(
        ovp_encode_kernel,
        {**STORED, "weight_ptr": f"*{kind}", "flag_ptr": "*i32"},
        {**blocks, "importance_ptr": None, "OPTIMAL": True},
        capability,
        enable_fp_fusion=False,
    )
    for compiled in (decode, encode):
        assert_never_fused(compiled)
        assert compiled.resources()["LOCAL"] == 0


@pytest.mark.parametrize(("capability", "kind"), ONE_TYPE_EACH)
def test_search_rounds_as_the_format_does(capability: int, kind: str) -> None:
    from olive.kernels.ovp_quantize import BLOCK_GROUPS, ovp_quantize_kernel

    pointers = {
        "weight_ptr": f"*{kind}",
        "multiples_ptr": "*fp32",
        "scale_ptr": "*i16",
        "codebook_ptr": "*i8",
    }
    constants = {"GROUP_SIZE": 128, "OPTIMAL": True, "BLOCK": BLOCK_GROUPS, "importance_ptr": None}
    compiled = compile_kernel(ovp_quantize_kernel, pointers, constants, capability, enable_fp_fusion=False)
    assert_never_fused(compiled)
    assert compiled.resources()["LOCAL"] == 0


def test_search_per_tensor_rounds_as_the_format_does() -> None:
    from olive.kernels import per_tensor

    weight = {"weight_ptr": "*bf16", "codebook_ptr": "*i8"}
    wide = {"energy_ptr": "*fp64", "errors_ptr": "*fp64", "values_ptr": "*fp64", "sums_ptr": "*fp64"}
    narrow = {"multiples_ptr": "*fp32", "largest_ptr": "*fp32", "scales_ptr": "*fp32"}
    pointers = {**weight, **wide, **narrow, "importance_ptr": "*fp32", "scale_ptr": "*i16", "count": "i64"}
    rows, columns = per_tensor.BLOCK_ROWS, per_tensor.BLOCK_COLUMNS
    for kernel, constants in (
        (per_tensor.row_stats_kernel, {"BLOCK": rows}),
        (per_tensor.rows_sum_kernel, {"BLOCK": columns, "IN_FLIGHT": per_tensor.ROWS_IN_FLIGHT}),
        (per_tensor.candidate_scales_kernel, {"BLOCK": columns}),
        (per_tensor.row_errors_kernel, {"BLOCK": rows, "OPTIMAL": False}),
        (per_tensor.best_scale_kernel, {}),
    ):
        assert_never_fused(compile_kernel(kernel, pointers, constants, 80, enable_fp_fusion=False))
