"""`ovp_linear_quantized` on the CUDA kernels: every tile, group size, format and type.

The wgmma kernel gives the reference's bits, and so does the mma kernel where rows of both matrices have one
scale each: int32 sums over all columns, however they are shared. With groups the mma kernel adds the same
exact sums of 64 columns (32 in groups of 32) in another order, in float32.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from olive.formats import GROUP_SIZES, pack_scale
from olive.formats.layout import PER_TENSOR
from olive.ops import cuda, reference, reference_quantized
from olive.ops.cuda_quantized import ovp_linear_quantized_cuda
from olive.ops.gpu_dispatch import Plan, quantized_wgmma_tiles
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
from tests.ops.cpu_cases import BOOKS, DTYPES, heavy_tailed, random_weight, strided
from tests.ops.fixed_point import assert_same_bits

INT8_BOOKS = tuple(name for name in BOOKS if name != "flint4")
MMA = tuple(Plan("mma", tokens=tokens, split=split) for tokens in (8, 16, 32, 64) for split in (1, 2, 4, 8))
WGMMA = tuple(Plan("wgmma", rows=128, tokens=tokens) for tokens in (64, 128, 256))
SUM_ERROR = 2.0**-22  # of the sum of magnitudes: float32 sums of a few dozen runs of columns
EACH_GROUP = pytest.mark.parametrize("group_size", GROUP_SIZES)
EACH_ACTIVATION_GROUP = pytest.mark.parametrize("activation_group_size", GROUP_SIZES)


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch)


def _activation_arguments(format: str, group_size: int, pairing: str = "optimal") -> tuple[Any, ...]:
    table = BOOKS["adaptive"].tensor() if format == "ovp4" else None
    static = pack_scale(torch.tensor([0.02]), torch.tensor([False])) if group_size == PER_TENSOR else None
    return format, group_size, pairing, table, static


def _linear(
    target: Target,
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    group_size: int,
    activations: tuple[Any, ...],
    plan: Plan | None,
) -> Tensor:
    """Pack, quantize and multiply on the target; CPU tensors in and out."""
    if plan is not None and plan.kernel == "wgmma" and not target.runs_wgmma():
        pytest.skip("needs a GPU with wgmma")

    def move(value: Any) -> Any:
        return value.to(target.device) if isinstance(value, Tensor) else value

    codes, scale, table = map(move, weight)
    packed = cuda.ovp_pack_cuda(codes, scale, x.shape[-1], group_size)
    size = (weight[0].shape[0], group_size)
    arguments = (move(x), *packed, table, move(bias), *size, *map(move, activations))
    return ovp_linear_quantized_cuda(*arguments, plan=plan).cpu()


def _expected(
    x: Tensor,
    weight: tuple[Tensor, Tensor, Tensor],
    bias: Tensor | None,
    group_size: int,
    activations: tuple[Any, ...],
) -> Tensor:
    arguments = (x, *weight, bias, weight[0].shape[0], group_size, *activations)
    return reference_quantized.ovp_linear_quantized_reference(*arguments)


def is_exact(plan: Plan, group_size: int, activation_group_size: int) -> bool:
    """Whether a plan promises the reference's bits."""
    return plan.kernel == "wgmma" or (group_size <= 0 and activation_group_size <= 0)


def tiles_of(group_size: int, activation_group_size: int) -> tuple[Plan, ...]:
    """The wgmma plans that there are."""
    tiles = quantized_wgmma_tiles(group_size, activation_group_size)
    return tuple(plan for plan in WGMMA if (plan.rows, plan.tokens) in tiles)


def _check(
    target: Target,
    plan: Plan,
    rows: int,
    shape: tuple[int, int],
    group_size: int,
    activations: tuple[Any, ...],
    book: str,
    dtype: torch.dtype,
    bias: Tensor | None = None,
) -> None:
    """The reference's bits where they are promised, else every output to the error of float32 sums."""
    weight = random_weight(*shape, group_size, book)
    x = (50 * heavy_tailed(rows, shape[1], seed=rows)).to(dtype)
    out = _linear(target, x, weight, bias, group_size, activations, plan)
    if is_exact(plan, group_size, activations[1]):
        assert_same_bits(out, _expected(x, weight, bias, group_size, activations))
        return
    levels, scale_x = reference_quantized.quantize_activations_reference(x, *activations, torch.float32)
    width = shape[1] if activations[1] <= 0 else activations[1]
    quantized = levels.double() * scale_x.double().repeat_interleave(width, dim=1)[:, : shape[1]]
    decoded = reference.ovp_decode_reference(*weight, shape[1], group_size, torch.float32).double()
    exact, magnitude = quantized @ decoded.T, quantized.abs() @ decoded.abs().T
    if bias is not None:
        exact, magnitude = exact + bias.double(), magnitude + bias.double().abs()
    step = torch.finfo(dtype).eps * exact.abs().clamp(min=torch.finfo(dtype).smallest_normal)
    assert out.dtype == dtype
    assert out.shape == exact.shape
    assert bool(((out.double() - exact).abs() <= step / 2 + SUM_ERROR * magnitude).all())


@EACH_TARGET
@EACH_ACTIVATION_GROUP
@EACH_GROUP
def test_every_pair_of_groups(group_size: int, activation_group_size: int, target: Target) -> None:
    """Every wgmma tile, and mma tiles and splits by turns; odd shapes, formats, types."""
    turn = GROUP_SIZES.index(group_size) + 2 * GROUP_SIZES.index(activation_group_size)
    mma = tuple(MMA[(4 * tile + turn + tile) % 4 + 4 * tile] for tile in range(4))
    for i, plan in enumerate((*mma, *tiles_of(group_size, activation_group_size)), start=turn):
        shape = ((70, 200), (130, 333), (90, 650))[i % 3]
        activations = _activation_arguments(("int8", "ovp4")[i // 2 % 2], activation_group_size)
        bias = (None, torch.randn(shape[0]), torch.randn(shape[0]).half())[i % 3]
        rows = (1, 9, 70)[i % 3]
        with target.kernels(schedule=SCHEDULES[i % 3], multiprocessors=2) as ran:
            book, dtype = INT8_BOOKS[i % len(INT8_BOOKS)], DTYPES[i // 3 % 3]
            _check(target, plan, rows, shape, group_size, activations, book, dtype, bias)
        assert ran is None or f"ovp_linear_quantized_{plan.kernel}" in ran


@EACH_TARGET
@pytest.mark.parametrize("plan", MMA, ids=lambda plan: f"{plan.tokens}x{plan.split}")
def test_integer_sums_are_exact_however_columns_are_shared(plan: Plan, target: Target) -> None:
    turn = MMA.index(plan)
    with target.kernels(schedule=SCHEDULES[turn % 3], multiprocessors=3):
        for group_size, activation_group_size in ((-1, -1), (0, 0)):
            activations = _activation_arguments("int8", activation_group_size)
            rows, dtype = (1, plan.tokens + 3)[turn % 2], DTYPES[turn % 3]
            _check(
                target, plan, rows, (130, 1090), group_size, activations, "fitted", dtype, torch.randn(130)
            )


@EACH_TARGET
@pytest.mark.parametrize("plan", [MMA[3], MMA[12], WGMMA[0]], ids=str)
def test_the_largest_sums_fit_an_int32(plan: Plan, target: Target) -> None:
    """Every level 127 or -127: sums beyond the 24 bits of a float32 are rounded once, at the end."""
    columns = 33_000 if target.device == "cpu" else 133_000
    codes = torch.full((64, -(-columns // 2)), 0xFF, dtype=torch.uint8)  # plain level 15 twice: 127
    codes[1::2] = 0x00  # -127
    scale = pack_scale(torch.full((64, 1), 0.01), torch.full((64, 1), True))
    x = torch.full((2, columns), 3.0)
    x[1, ::3] = -3.0
    weight, activations = (codes, scale, BOOKS["adaptive"].tensor()), _activation_arguments("int8", -1)
    with target.kernels():
        out = _linear(target, x, weight, None, -1, activations, plan)
    assert_same_bits(out, _expected(x, weight, None, -1, activations))
    assert float(out[0, 0]) == pytest.approx(columns * 127 * 3 * 0.01, rel=0.01)


@EACH_TARGET
@pytest.mark.parametrize(
    ("plan", "rows"), [(MMA[0], 1), (MMA[4], 16), (MMA[12], 150), (WGMMA[1], 200), (WGMMA[2], 300)], ids=str
)
def test_many_tiles_per_block(plan: Plan, rows: int, target: Target) -> None:
    """A large weight on a GPU; a smaller one on the emulator, for its speed."""
    shape = (20_000, 1100) if target.device == "cuda" else (300, 390)
    with target.kernels(multiprocessors=1):
        for group_size, activation_group_size in ((128, -1), (64, 128), (-1, -1)):
            if plan.kernel == "mma" or plan in tiles_of(group_size, activation_group_size):
                activations = _activation_arguments("int8", activation_group_size)
                _check(target, plan, rows, shape, group_size, activations, "adaptive", torch.bfloat16)


@EACH_TARGET
@pytest.mark.parametrize("pairing", ["optimal", "paper"])
@pytest.mark.parametrize("book", INT8_BOOKS)
def test_every_codebook_and_pairing(book: str, pairing: str, target: Target) -> None:
    with target.kernels():
        for plan in (MMA[0], WGMMA[0]):
            activations = _activation_arguments("ovp4", -1, pairing)
            _check(target, plan, 2, (64, 192), 64, activations, book, torch.float16)


@EACH_TARGET
@pytest.mark.parametrize("plan", [MMA[0], MMA[9], WGMMA[0]], ids=str)
@pytest.mark.parametrize("activation_group_size", [-1, 64, 0])
def test_values_that_are_not_finite_stay_in_their_row(
    activation_group_size: int, plan: Plan, target: Target
) -> None:
    x = torch.randn(5, 200).bfloat16()
    x[1, 7], x[2, 199], x[4] = torch.nan, torch.inf, 0.0
    weight, activations = (
        random_weight(70, 200, 64, "nf4"),
        _activation_arguments("int8", activation_group_size),
    )
    with target.kernels():
        out = _linear(target, x, weight, None, 64, activations, plan)
        clean = _linear(target, x[[0, 3]], weight, None, 64, activations, plan)
    assert torch.equal(out[[0, 3]], clean)
    assert bool(out[1:3].isnan().all())
    assert bool((out[4] == 0).all())


@NEEDS_COMPILER
@pytest.mark.parametrize("split", [1, 2, 8])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_gpus_without_clusters_add_up_in_a_second_kernel(group_size: int, split: int) -> None:
    with cuda_on_cpu(capability=AMPERE) as module:
        plan, activations = Plan("mma", tokens=16, split=split), _activation_arguments("int8", -1)
        _check(
            Target("cpu"),
            plan,
            19,
            (130, 900),
            group_size,
            activations,
            "adaptive",
            torch.float32,
            torch.randn(130),
        )
        kernels = ["ovp_linear_quantized_mma", "sum_partial"][: 1 + (split > 1)]
        assert module.launched()[-len(kernels) :] == kernels


@NEEDS_COMPILER
@pytest.mark.parametrize(
    "plan", [Plan("mma", tokens=8, split=4), Plan("mma", tokens=64, split=2), WGMMA[1]], ids=str
)
def test_the_same_bits_whatever_order_threads_run_in_and_however_many_blocks(plan: Plan) -> None:
    weight, activations = random_weight(200, 700, 128, "adaptive"), _activation_arguments("int8", 128)
    x = torch.randn(33, 700).bfloat16()
    outputs = []
    for schedule in SCHEDULES:
        for multiprocessors in (1, 8):
            with cuda_on_cpu(schedule=schedule, multiprocessors=multiprocessors):
                outputs.append(_linear(Target("cpu"), x, weight, None, 128, activations, plan))
    for other in outputs[1:]:
        assert torch.equal(outputs[0], other)


@NEEDS_COMPILER
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_what_dispatch_chooses_on_three_kinds_of_gpus(rows: int) -> None:
    weight = random_weight(130, 200, -1, "adaptive")
    x, activations = torch.randn(rows, 200), _activation_arguments("ovp4", -1)
    expected = _expected(x, weight, None, -1, activations)
    for capability, shared in ((HOPPER, 227 * 1024), (AMPERE, 163 * 1024), (120, 99 * 1024)):
        with cuda_on_cpu(capability=capability, shared_per_block=shared) as module:
            out = _linear(Target("cpu"), x, weight, None, -1, activations, None)
            assert_same_bits(out, expected)
            assert "quantize_activations rows" in module.launched()


@NEEDS_COMPILER
def test_strided_and_misaligned_tensors() -> None:
    codes, scale, table = random_weight(70, 200, 64, "adaptive")
    x, activations = torch.randn(5, 200).bfloat16(), _activation_arguments("int8", -1)
    with cuda_on_cpu():

        def run(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
            return ovp_linear_quantized_cuda(x, codes, scale, table, None, 70, 64, *activations)

        packed = cuda.ovp_pack_cuda(codes, scale, 200, 64)
        expected = run(x, *packed)
        shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view_as(x).copy_(x)
        moved = torch.empty(packed[0].numel() + 1, dtype=torch.uint8)[1:].view_as(packed[0]).copy_(packed[0])
        for others in ((shifted, *packed), (strided(x), *packed), (x, moved, packed[1]), (x, codes, scale)):
            assert torch.equal(run(*others), expected)
        assert torch.equal(run(x[None, :, :].expand(2, 5, 200), *packed)[1], expected)


@NEEDS_COMPILER
@pytest.mark.parametrize("plan", [MMA[0], MMA[3], WGMMA[0]], ids=str)
def test_nothing_is_allocated_but_levels_scales_and_the_output(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes, scale, table = random_weight(70, 200, 64, "adaptive")
    x, activations = torch.randn(5, 200).bfloat16(), _activation_arguments("int8", 64)
    made: list[tuple[int, ...]] = []
    empty = torch.empty

    def watched(shape: tuple[int, ...], **options: Any) -> Tensor:
        made.append(tuple(shape))
        return empty(shape, **options)

    with cuda_on_cpu() as module:
        packed = cuda.ovp_pack_cuda(codes, scale, 200, 64)
        module.launched()
        monkeypatch.setattr(torch, "empty", watched)
        ovp_linear_quantized_cuda(x, *packed, table, torch.randn(70), 70, 64, *activations, plan=plan)
        assert len(module.launched()) == 2
    assert made == [(5, 256), (4, 256), (5, 70)]


@NEEDS_COMPILER
def test_no_rows() -> None:
    codes, scale, table = random_weight(70, 200, 64, "adaptive")
    with cuda_on_cpu() as module:
        packed = cuda.ovp_pack_cuda(codes, scale, 200, 64)
        module.launched()
        arguments = (table, None, 70, 64, *_activation_arguments("int8", -1))
        assert ovp_linear_quantized_cuda(torch.zeros(0, 200).half(), *packed, *arguments).shape == (0, 70)
        assert module.launched() == []


@NEEDS_COMPILER
def test_bad_arguments_are_named() -> None:
    weight = random_weight(70, 200, 64, "adaptive")
    x, activations = torch.randn(3, 200).half(), _activation_arguments("int8", -1)

    def run(plan: Plan, group_size: int = 64, activation_group_size: int = -1) -> Tensor:
        chosen = _activation_arguments("int8", activation_group_size)
        weight = random_weight(70, 200, group_size, "adaptive")
        return _linear(Target("cpu"), x, weight, None, group_size, chosen, plan)

    with cuda_on_cpu() as module:
        with pytest.raises(ValueError, match="tokens: expected 8, 16, 32 or 64, got 24"):
            run(Plan("mma", tokens=24))
        with pytest.raises(ValueError, match="split: expected 1, 2, 4 or 8, got 3"):
            run(Plan("mma", tokens=8, split=3))
        for plan, *groups in ((Plan("wgmma", rows=64, tokens=64), 64), (WGMMA[2], 32), (WGMMA[2], 128, 64)):
            with pytest.raises(
                ValueError, match="rows, tokens: expected 128, 64 or 128, 128, or 128, 256 without"
            ):
                run(plan, *groups)
        with pytest.raises(ValueError, match=r"codes: expected shape \(8, 4, 512\), got \(8, 3, 512\)"):
            packed = cuda.ovp_pack_cuda(*weight[:2], 200, 64)
            ovp_linear_quantized_cuda(x, packed[0][:, :3], packed[1], weight[2], None, 70, 64, *activations)
        with pytest.raises(
            ValueError, match="format: expected 'int8' or 'ovp4' for integer products, got 'ovp8'"
        ):
            ovp_linear_quantized_cuda(x, *weight, None, 70, 64, "ovp8", -1, "optimal", None, None)
        at = torch.zeros(1024, dtype=torch.uint8)[: 1024 - 16].data_ptr()
        good = [at, at, 256, -1, 3, 70, 200, 64, at, at, at, 0, 0, at, 0, 0, 8, 1, 0]

        def bad(index: int, value: int) -> None:
            module.linear_quantized_mma(*good[:index], value, *good[index + 1 :])

        with pytest.raises(ValueError, match="x: expected an address aligned to 16 bytes"):
            bad(0, at + 4)
        with pytest.raises(
            ValueError, match="scale_pitch: expected a multiple of 256 of at least M, got 255"
        ):
            bad(2, 255)
        with pytest.raises(ValueError, match="group_size: expected -1, 0, 32, 64 or 128, got 7"):
            bad(3, 7)
        with pytest.raises(ValueError, match="m: expected at least 1, got 0"):
            bad(4, 0)
    with cuda_on_cpu(capability=AMPERE), pytest.raises(ValueError, match=r"compute capability 9.0 for wgmma"):
        run(WGMMA[0])
    with cuda_on_cpu(shared_per_block=99 * 1024), pytest.raises(ValueError, match="tokens: expected a tile"):
        run(Plan("mma", tokens=64))
