"""The kernels of training compile for the GPUs they are for: registers, rounding."""

from __future__ import annotations

import pytest

from tests.kernels.ahead_of_time import ONE_TYPE_EACH, Compiled, assert_never_fused, compile_kernel
from tests.kernels.conftest import INTERPRETING

pytestmark = [
    pytest.mark.skipif(INTERPRETING, reason="Triton compiles nothing while it interprets"),
    pytest.mark.usefixtures("no_cache"),
]


def _assert_sound(compiled: Compiled) -> None:
    """Nothing fused, nothing spilled, and the constant that rounds is added and taken away again."""
    assert_never_fused(compiled)
    usage = compiled.resources()
    assert usage["LOCAL"] == usage["STACK"] == 0


@pytest.mark.parametrize(("capability", "kind"), ONE_TYPE_EACH)
def test_statsq(capability: int, kind: str) -> None:
    from olive.kernels.statsq import LONGEST_BLOCK, VALUES, statsq_kernel

    results = {"levels_ptr": f"*{kind}", "codes_ptr": "*i8", "scale_ptr": "*fp32", "margin_ptr": "*fp32"}
    for asked, group, block in (
        (("levels_ptr",), 0, LONGEST_BLOCK),
        (("levels_ptr",), 128, 128),
        (("codes_ptr", "scale_ptr"), 0, 4096),
        (("margin_ptr",), 0, 4096),
    ):
        compiled = compile_kernel(
            statsq_kernel,
            {"weight_ptr": f"*{kind}", **{name: results[name] for name in asked}},
            {
                **{name: None for name in results if name not in asked},
                "GROUP_SIZE": group,
                "HALF": 8,
                "SPANS": max(1, VALUES // block),
                "BLOCK": block,
            },
            capability,
            num_warps=4 if block <= VALUES else 8,
            enable_fp_fusion=False,
        )
        _assert_sound(compiled)
        if asked == ("margin_ptr",):
            assert "0f4B400000" in compiled.ptx and "0fCB400000" in compiled.ptx


@pytest.mark.parametrize(("capability", "kind"), ONE_TYPE_EACH)
def test_lsq(capability: int, kind: str) -> None:
    from olive.kernels.lsq import lsq_backward_kernel, lsq_kernel, plan_lsq

    pointers = {name: f"*{kind}" for name in ("grad_ptr", "x_ptr", "out_ptr")}
    pointers |= {"scale_ptr": "*fp32", "partial_ptr": "*fp32"}
    for shape in ((1, 1, 4096 * 4096), (4096, 4096, 1), (8, 512, 4096)):
        for kernel in (lsq_kernel, lsq_backward_kernel):
            plan = plan_lsq(*shape, backward=kernel is lsq_backward_kernel)
            constants = {
                "QMIN": -8,
                "QMAX": 7,
                "IS_SIGN": False,
                "LEAST_SCALE": 1e-5,
                "PER_COLUMN": plan.per_column,
                "BLOCK_ROWS": plan.block_rows,
                "BLOCK_COLUMNS": plan.block_columns,
            }
            if kernel is lsq_backward_kernel:
                constants["LOOPS"] = plan.loops
            named = {name: kind for name, kind in pointers.items() if name in kernel.arg_names}
            compiled = compile_kernel(kernel, named, constants, capability, enable_fp_fusion=False)
            _assert_sound(compiled)
            assert "0f4B400000" in compiled.ptx and "0fCB400000" in compiled.ptx


@pytest.mark.parametrize(("capability", "kind"), ONE_TYPE_EACH)
def test_oscillation(capability: int, kind: str) -> None:
    from olive.kernels.oscillation import VALUES, oscillation_kernel

    pointers = {"weight_ptr": f"*{kind}", "step_ptr": "*fp32", "frequency_ptr": "*fp32", "near_ptr": "*u8"}
    pointers |= {"codes_ptr": "*i8", "direction_ptr": "*i8"}
    pointers |= {name: "fp32" for name in ("offset", "momentum", "keep", "boundary")}
    for width, block in ((0, VALUES), (128, 128)):
        compiled = compile_kernel(
            oscillation_kernel,
            pointers,
            {
                "WIDTH": width,
                "ONE_STEP": False,
                "QMIN": -8,
                "QMAX": 7,
                "SPANS": VALUES // block,
                "BLOCK": block,
            },
            capability,
            enable_fp_fusion=False,
        )
        _assert_sound(compiled)
