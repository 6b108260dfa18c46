"""`ovp_linear` on the CUDA kernels: every tile, shape and group size, against float64.

The kernel without scales in the fragments (mma) rounds the output only; the other (wgmma) also rounds each
weight to the activations' type, as decoding to that type does. Both sum in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from olive.formats import GROUP_SIZES
from olive.ops import cuda, reference
from olive.ops.gpu_dispatch import Plan
from tests.cuda.module import (
    AMPERE,
    EACH_TARGET,
    HOPPER,
    NEEDS_COMPILER,
    SCHEDULES,
    Target,
    cuda_on_cpu,
    poison,
)
from tests.ops.cpu_cases import BOOKS, random_weight, strided

HALVES = (torch.bfloat16, torch.float16)
MMA = tuple(Plan("mma", tokens=tokens, split=split) for tokens in (8, 16, 32, 64) for split in (1, 2, 4, 8))
WGMMA = tuple(
    Plan("wgmma", rows=rows, tokens=tokens)
    for rows, tokens in ((128, 64), (128, 128), (128, 256), (256, 128))
)
SUM_ERROR = 2.0**-22  # of the sum of magnitudes: float32 sums of a few hundred products, in blocks
# What a GPU's tensor cores cut off a sum that they carry on, per product of 16 columns, of the same.
CUT_OFF = 2.0**-24


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def _linear(
    target: Target,
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    group_size: int,
    plan: Plan | None = None,
) -> Tensor:
    """Pack and multiply on the target; CPU tensors in and out."""
    if plan is not None and plan.kernel == "wgmma" and not target.runs_wgmma():
        pytest.skip("needs a GPU with wgmma")
    codes, scale, table = (tensor.to(target.device) for tensor in weight)
    bias = None if bias is None else bias.to(target.device)
    packed = cuda.ovp_pack_cuda(codes, scale, x.shape[-1], group_size)
    size = (weight[0].shape[0], group_size, plan)
    return cuda.ovp_linear_cuda(x.to(target.device), *packed, table, bias, *size).cpu()


def _check(
    target: Target,
    plan: Plan | None,
    rows: int,
    shape: tuple[int, int],
    group_size: int,
    book: str,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,
    rounds_weight: bool = False,
) -> None:
    """Run a plan and hold every output to the error that its roundings allow."""
    codes, scale, table = random_weight(*shape, group_size, book)
    x = torch.randn(rows, shape[1], generator=torch.Generator().manual_seed(rows)).to(dtype)
    out = _linear(target, x, (codes, scale, table), bias, group_size, plan)
    weight = reference.ovp_decode_reference(codes, scale, table, shape[1], group_size, torch.float32)
    if rounds_weight:
        weight = weight.to(dtype)
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    step = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    assert out.dtype == dtype
    assert out.shape == exact.shape
    cut_off = 0.0
    if target.device == "cuda" and rounds_weight:  # sums over all columns stay in the tensor cores
        cut_off = CUT_OFF * shape[1] / 16
        if plan is not None and plan.kernel == "decode" and bias is not None:
            step = (
                step + torch.finfo(dtype).eps * (exact - bias.double()).abs()
            )  # cuBLAS rounds before it adds
    beyond = ((out.double() - exact).abs() - step / 2) / magnitude
    assert float(beyond.max()) <= SUM_ERROR + cut_off


@EACH_TARGET
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("plan", MMA, ids=lambda plan: f"{plan.tokens}x{plan.split}")
def test_mma_is_exact_but_for_the_rounding_of_sums_and_output(
    plan: Plan, group_size: int, target: Target
) -> None:
    turn = MMA.index(plan) + GROUP_SIZES.index(group_size)
    book, dtype = list(BOOKS)[turn % len(BOOKS)], HALVES[turn % 2]
    rows = (1, plan.tokens - 1, plan.tokens + 3)[turn % 3]
    shape = ((70, 200), (130, 333), (257, 1090))[turn % 3 if plan.tokens < 64 else turn % 2]
    bias = (None, torch.randn(shape[0]), torch.randn(shape[0]).to(dtype))[turn % 3]
    with target.kernels(schedule=SCHEDULES[turn % 3]) as ran:
        _check(target, plan, rows, shape, group_size, book, dtype, bias=bias)
    assert ran is None or "ovp_linear_mma" in ran


@EACH_TARGET
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("plan", WGMMA, ids=lambda plan: f"{plan.rows}x{plan.tokens}")
def test_wgmma_is_exact_but_for_the_rounding_of_weights_sums_and_output(
    plan: Plan, group_size: int, target: Target
) -> None:
    turn = WGMMA.index(plan) + GROUP_SIZES.index(group_size)
    book, dtype = list(BOOKS)[turn % len(BOOKS)], HALVES[turn % 2]
    rows = (3, plan.tokens, plan.tokens + 9)[turn % 3]
    shape = ((130, 200), (70, 333), (264, 130))[turn % 3]
    bias = (None, torch.randn(shape[0]), torch.randn(shape[0]).to(dtype))[turn % 3]
    with target.kernels(schedule=SCHEDULES[turn % 3], multiprocessors=2) as ran:
        _check(target, plan, rows, shape, group_size, book, dtype, bias=bias, rounds_weight=True)
    assert ran is None or "ovp_linear_wgmma" in ran


@EACH_TARGET
@pytest.mark.parametrize(
    ("plan", "rows"),
    [(MMA[0], 1), (MMA[4], 16), (MMA[12], 150), (WGMMA[1], 100), (WGMMA[2], 300)],
    ids=str,
)
def test_many_tiles_per_block(plan: Plan, rows: int, target: Target) -> None:
    """A large weight on a GPU; a smaller one on the emulator, for its speed."""
    shape = (20_000, 1100) if target.device == "cuda" else (700, 260)
    with target.kernels(multiprocessors=1):
        for dtype in HALVES:
            rounds = plan.kernel == "wgmma"
            _check(target, plan, rows, shape, 128, "adaptive", dtype, rounds_weight=rounds)


@EACH_TARGET
@pytest.mark.parametrize("book", BOOKS)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_codebook(book: str, dtype: torch.dtype, target: Target) -> None:
    with target.kernels():
        _check(target, MMA[0], 2, (64, 128), 64, book, dtype)
        _check(target, WGMMA[0], 2, (64, 128), 64, book, dtype, rounds_weight=True)


@EACH_TARGET
@pytest.mark.parametrize("factor", [2.0**-12, 2.0**-7, 2.0**18])
def test_scales_outside_half_precision(factor: float, target: Target) -> None:
    """wgmma holds scales in the activations' type; where those are no normal halves, in float32."""
    x = torch.randn(5, 128).half() * 2.0**-10
    with target.kernels():
        codes, scale, table = random_weight(64, 128, 32, "adaptive")
        scale = (scale.int() + (int(torch.tensor(factor).log2()) << 7)).short()
        out = _linear(target, x, (codes, scale, table), None, 32, WGMMA[0])
        weight = reference.ovp_decode_reference(codes, scale, table, 128, 32, torch.float16).double()
        exact = x.double() @ weight.T
        allowed = 2.0**-11 * exact.abs().clamp(min=2.0**-14) + SUM_ERROR * (x.double().abs() @ weight.abs().T)
        finite = weight.isfinite().all(dim=1)
        assert bool(finite.any())
        assert bool(((out.double() - exact).abs() <= allowed)[:, finite].all())
        # A weight too large for float16 is infinite, as it is when it is decoded to float16.
        assert not bool(out[:, ~finite].isfinite().any())


@NEEDS_COMPILER
@pytest.mark.parametrize("split", [1, 2, 8])
def test_gpus_without_clusters_add_up_in_a_second_kernel(split: int) -> None:
    with cuda_on_cpu(capability=AMPERE) as module:
        bias = torch.randn(130)
        plan = Plan("mma", tokens=16, split=split)
        _check(Target("cpu"), plan, 19, (130, 900), 128, "adaptive", torch.float16, bias=bias)
        kernels = ["ovp_linear_mma", "sum_partial"] if split > 1 else ["ovp_linear_mma"]
        assert module.launched()[-len(kernels) :] == kernels


@NEEDS_COMPILER
@pytest.mark.parametrize(
    "plan", [Plan("mma", tokens=8, split=4), Plan("mma", tokens=64, split=2), WGMMA[1]], ids=str
)
def test_the_same_bits_whatever_order_threads_run_in_and_however_many_blocks(plan: Plan) -> None:
    codes, scale, table = random_weight(200, 700, 128, "adaptive")
    x = torch.randn(33, 700).bfloat16()
    outputs = []
    for schedule in SCHEDULES:
        for multiprocessors in (1, 3, 8):
            with cuda_on_cpu(schedule=schedule, multiprocessors=multiprocessors):
                packed = cuda.ovp_pack_cuda(codes, scale, 700, 128)
                outputs.append(cuda.ovp_linear_cuda(x, *packed, table, None, 200, 128, plan))
    for other in outputs[1:]:
        assert torch.equal(outputs[0], other)


@EACH_TARGET
@pytest.mark.parametrize("plan", [MMA[0], MMA[9], WGMMA[0]], ids=str)
def test_the_same_bits_every_time(plan: Plan, target: Target) -> None:
    weight = random_weight(1000, 1500, 128, "adaptive")
    x = torch.randn(33, 1500).half()
    with target.kernels():
        first = _linear(target, x, weight, None, 128, plan)
        for _ in range(20 if target.device == "cuda" else 1):
            assert torch.equal(_linear(target, x, weight, None, 128, plan), first)


@EACH_TARGET
@pytest.mark.parametrize("plan", [MMA[0], WGMMA[0]], ids=str)
def test_values_that_are_not_finite_stay_in_their_row(plan: Plan, target: Target) -> None:
    x = torch.randn(4, 200).bfloat16()
    x[1, 7], x[2, 199] = torch.nan, torch.inf
    weight = random_weight(70, 200, 64, "nf4")
    with target.kernels():
        out = _linear(target, x, weight, None, 64, plan)
        clean = _linear(target, x[[0, 3]], weight, None, 64, plan)
    assert torch.equal(out[[0, 3]], clean)
    assert bool(out[1].isnan().all())
    assert not bool(out[2].isfinite().any())


@NEEDS_COMPILER
@pytest.mark.parametrize("rows", [1, 9, 70])
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_what_dispatch_chooses_on_three_kinds_of_gpus(rows: int, dtype: torch.dtype) -> None:
    codes, scale, table = random_weight(130, 200, 32, "adaptive")
    x = torch.randn(rows, 200).to(dtype)
    expected = reference.ovp_linear_reference(x, codes, scale, table, None, 130, 32).double()
    weight = reference.ovp_decode_reference(codes, scale, table, 200, 32, torch.float32).double()
    # Each weight may have been rounded, and the output was, on both sides.
    allowed = torch.finfo(dtype).eps * (expected.abs() + x.double().abs() @ weight.abs().T)
    for capability, shared in ((HOPPER, 227 * 1024), (AMPERE, 163 * 1024), (120, 99 * 1024)):
        with cuda_on_cpu(capability=capability, shared_per_block=shared) as module:
            packed = cuda.ovp_pack_cuda(codes, scale, 200, 32)
            out = cuda.ovp_linear_cuda(x, *packed, table, None, 130, 32)
            assert bool(((out.double() - expected).abs() <= allowed).all())
            assert len(module.launched()) >= 2  # packing, and a product or decoding


@EACH_TARGET
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_decoding_before_torchs_linear(dtype: torch.dtype, target: Target) -> None:
    bias = torch.randn(70).to(dtype)
    with target.kernels() as ran:
        _check(target, Plan("decode"), 3, (70, 201), 32, "adaptive", dtype, rounds_weight=True, bias=bias)
    assert ran is None or ran[-1].startswith("ovp_decode")


@NEEDS_COMPILER
def test_strided_and_misaligned_tensors() -> None:
    codes, scale, table = random_weight(70, 200, 64, "adaptive")
    x = torch.randn(5, 200).bfloat16()
    with cuda_on_cpu():
        packed = cuda.ovp_pack_cuda(codes, scale, 200, 64)
        expected = cuda.ovp_linear_cuda(x, *packed, table, None, 70, 64)
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
        moved = torch.empty(packed[0].numel() + 1, dtype=torch.uint8)[1:].view_as(packed[0]).copy_(packed[0])
        assert shifted.data_ptr() % 16 != 0 and moved.data_ptr() % 16 != 0
        for others in ((shifted, *packed), (strided(x), *packed), (x, moved, packed[1]), (x, codes, scale)):
            assert torch.equal(cuda.ovp_linear_cuda(*others, table, None, 70, 64), expected)
        assert torch.equal(
            cuda.ovp_linear_cuda(x[None, :, :].expand(2, 5, 200), *packed, table, None, 70, 64)[1], expected
        )


@NEEDS_COMPILER
@pytest.mark.parametrize("plan", [MMA[0], MMA[3], WGMMA[0]], ids=str)
def test_nothing_is_allocated_but_the_output(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    codes, scale, table = random_weight(70, 200, 64, "adaptive")
    x = torch.randn(5, 200).bfloat16()
    made: list[tuple[int, ...]] = []
    empty = torch.empty

    def watched(shape: tuple[int, ...], **options: Any) -> Tensor:
        made.append(tuple(shape))
        return empty(shape, **options)

    with cuda_on_cpu():
        packed = cuda.ovp_pack_cuda(codes, scale, 200, 64)
        monkeypatch.setattr(torch, "empty", watched)
        cuda.ovp_linear_cuda(x, *packed, table, torch.randn(70), 70, 64, plan)
    assert made == [(5, 70)]


@NEEDS_COMPILER
def test_no_rows() -> None:
    codes, scale, table = random_weight(70, 200, 64, "adaptive")
    with cuda_on_cpu() as module:
        packed = cuda.ovp_pack_cuda(codes, scale, 200, 64)
        module.launched()
        assert cuda.ovp_linear_cuda(torch.zeros(0, 200).half(), *packed, table, None, 70, 64).shape == (0, 70)
        assert module.launched() == []


@NEEDS_COMPILER
def test_bad_arguments_are_named() -> None:
    codes, scale, table = random_weight(70, 200, 64, "adaptive")
    x = torch.randn(3, 200).half()
    with cuda_on_cpu() as module:
        packed = cuda.ovp_pack_cuda(codes, scale, 200, 64)

        def run(plan: Plan, x: Tensor = x) -> Tensor:
            return cuda.ovp_linear_cuda(x, *packed, table, None, 70, 64, plan)

        with pytest.raises(ValueError, match="tokens: expected 8, 16, 32 or 64, got 24"):
            run(Plan("mma", tokens=24))
        with pytest.raises(ValueError, match="split: expected 1, 2, 4 or 8, got 3"):
            run(Plan("mma", tokens=8, split=3))
        with pytest.raises(ValueError, match="rows, tokens: expected 128, 64"):
            run(Plan("wgmma", rows=64, tokens=64))
        with pytest.raises(ValueError, match="type: expected float16 or bfloat16 activations"):
            run(Plan("mma", tokens=8), x.float())
        with pytest.raises(ValueError, match=r"codes: expected shape \(8, 4, 512\), got \(8, 3, 512\)"):
            cuda.ovp_linear_cuda(x, packed[0][:, :3], packed[1], table, None, 70, 64)
        pointers = (packed[0].data_ptr(), packed[1].data_ptr(), table.data_ptr(), 0, 0, x.data_ptr(), 0)
        size = (2, 3, 70, 200, 64)
        with pytest.raises(ValueError, match="x: expected an address aligned to 16 bytes"):
            module.linear_mma(x.data_ptr() + 2, *size, *pointers, 8, 1, 0)
        with pytest.raises(ValueError, match="x: expected an address, got 0"):
            module.linear_mma(0, *size, *pointers, 8, 1, 0)
        with pytest.raises(ValueError, match="k: expected a multiple of 8, got 201"):
            module.linear_mma(x.data_ptr(), 2, 3, 70, 201, 64, *pointers, 8, 1, 0)
        with pytest.raises(ValueError, match="shape: expected N, K up to 1073741824, got 70, 8589934592"):
            module.linear_mma(x.data_ptr(), 2, 3, 70, 2**33, 64, *pointers, 8, 1, 0)
        with pytest.raises(ValueError, match="m: expected at least 1, got 0"):
            module.linear_mma(x.data_ptr(), 2, 0, 70, 200, 64, *pointers, 8, 1, 0)
    with cuda_on_cpu(capability=AMPERE) as module:
        with pytest.raises(ValueError, match=r"compute capability 9.0 for wgmma"):
            run(WGMMA[0])
        with pytest.raises(ValueError, match="partial: expected a buffer, because blocks form no clusters"):
            module.linear_mma(x.data_ptr(), *size, *pointers, 8, 2, 0)
    with cuda_on_cpu(shared_per_block=99 * 1024), pytest.raises(ValueError, match="tokens: expected a tile"):
        run(Plan("mma", tokens=64))
