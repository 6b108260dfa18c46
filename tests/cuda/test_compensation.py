"""`ovp_compensate` on the CUDA kernel: the definition's codes but for rounding, and errors that fit them."""

from __future__ import annotations

import pytest
import torch

from olive.ops.compensate import ovp_compensate_reference
from olive.ops.cuda_compensate import ovp_compensate_cuda
from tests.cuda.module import EACH_TARGET, SCHEDULES, Target, poison
from tests.ops.test_compensate import (
    assert_compensated_alike,
    assert_errors_are_those_of_the_codes,
    compensation_case,
)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


# Whole and ragged blocks of rows; one pair; a scale for all pairs of a row, and one for each.
@EACH_TARGET
@pytest.mark.parametrize("rule", ["pair", "mixed", "plain"])
@pytest.mark.parametrize("codebook", ["int4", "flint4", "nf4", "adaptive"])
@pytest.mark.parametrize(
    ("rows", "columns", "per_pair"), [(37, 128, False), (32, 30, True), (1, 2, False), (69, 64, True)]
)
def test_the_kernel_equals_the_definition(
    target: Target, rule: str, codebook: str, rows: int, columns: int, per_pair: bool
) -> None:
    case = compensation_case(rows, columns, codebook, rule, per_pair)
    with target.kernels(schedule=SCHEDULES[rows % 3]) as ran:
        found = ovp_compensate_cuda(*(one.to(target.device) for one in case))
    assert ran is None or ran == ["ovp_compensate"]
    on_cpu = tuple(one.cpu() for one in found)
    assert_compensated_alike(on_cpu, ovp_compensate_reference(*case))
    assert_errors_are_those_of_the_codes(case, on_cpu)


@EACH_TARGET
def test_any_strides(target: Target) -> None:
    values, scale, factor, table = compensation_case(40, 64, "adaptive", "mixed", True)
    part = (values[:, 32:], scale[:, 16:], factor[32:, 32:], table)
    with target.kernels():
        found = ovp_compensate_cuda(*(one.to(target.device) for one in part))
        expected = ovp_compensate_cuda(*(one.contiguous().to(target.device) for one in part))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@EACH_TARGET
def test_more_columns_than_shared_memory_holds(target: Target) -> None:
    case = compensation_case(3, 2048, "nf4", "pair", False)
    with target.kernels() as ran:
        found = ovp_compensate_cuda(*(one.to(target.device) for one in case))
    assert not ran
    assert_errors_are_those_of_the_codes(case, tuple(one.cpu() for one in found))
