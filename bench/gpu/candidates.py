"""What multiplies in the comparison: torch's bfloat16 product (cuBLAS), our backends, other 4-bit kernels.

Each builder takes a `Problem` and gives a `Candidate`, or raises where the candidate does not exist here.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from bench.gpu.data import GROUP, Problem
from olive import ops
from olive.ops import cuda
from olive.ops.gpu_dispatch import Plan, choose_linear

FOREIGN_TOLERANCE = 0.02  # of kernels that decode to bfloat16, or sum in it
# Kernels for few rows take a tenth of a second and more beyond this; nobody would call them there.
FOREIGN_MOST_PRODUCTS = 2e12


@dataclass(frozen=True)
class Candidate:
    """A way to multiply by one weight.

    Args:
        run: activations [M, K] and the number of the call, by which it picks its copy -> [M, N].
        copies: of the weight.
        weight_bytes: of one copy, scales included.
        decoded: float64 [checked rows, K], what the weight stands for.
        tolerance: the relative error allowed; None = twice that of cuBLAS.
        plan: M -> the kernel that runs, in words.
        most_products: M N K beyond which it is left out.
        values: activations [M, K] -> float64, what they stand for in the product.
        group_size: of the weight.
    """

    run: Callable[[Tensor, int], Tensor]
    copies: int
    weight_bytes: int
    decoded: Tensor
    tolerance: float | None = None
    plan: Callable[[int], str] = lambda m: ""
    most_products: float = float("inf")
    values: Callable[[Tensor], Tensor] = Tensor.double
    group_size: int = GROUP


Builder = Callable[[Problem], Candidate]


def torch_bf16(problem: Problem) -> Candidate:
    """cuBLAS. Only the checked rows are decoded ones: the rest of the weight does not touch them."""
    options: dict[str, Any] = {"device": problem.device, "generator": problem.generator}
    weight = torch.randn(problem.n, problem.k, dtype=torch.bfloat16, **options).mul_(0.02)
    weight[problem.checked] = problem.decoded.bfloat16()
    copies = [weight, *(weight.clone() for _ in range(problem.copies(weight.nbytes) - 1))]
    return Candidate(
        lambda x, turn: linear(x, copies[turn % len(copies)]),
        len(copies),
        weight.nbytes,
        problem.decoded,
        tolerance=FOREIGN_TOLERANCE,
    )


def olive(problem: Problem) -> Candidate:
    """What a quantized model calls: the operator, in the layout and with the kernel of its choice."""
    weight = problem.canonical
    if ops.has_packed_layout(problem.device):
        weight = ops.ovp_pack(*problem.canonical, problem.k, GROUP)
    return _rotating(problem, weight, ops.ovp_linear, plan=lambda m: chosen(problem, m))


def olive_triton(problem: Problem) -> Candidate:
    """The Triton kernels, whatever the choice."""
    if problem.device.type != "cuda":
        raise NotImplementedError("the Triton kernels are measured on a GPU only")
    from olive.kernels import ovp_linear_triton

    return _rotating(problem, problem.canonical, ovp_linear_triton)


def olive_plans(problem: Problem, plans: list[Plan]) -> list[Candidate]:
    """The CUDA kernels with plans of our choice, all on the same copies."""
    weight = cuda.ovp_pack_cuda(*problem.canonical, problem.k, GROUP)
    copies = _copies(problem, weight)

    def candidate(plan: Plan) -> Candidate:
        run = partial(cuda.ovp_linear_cuda, plan=plan)
        return _rotating(problem, weight, run, copies, plan=lambda m: words(plan))

    return [candidate(plan) for plan in plans]


def olive_decode(problem: Problem) -> Candidate:
    """Decode to bfloat16, then cuBLAS: what a fused kernel must not be slower than."""
    if reason := _no_cuda(problem.device):
        raise NotImplementedError(reason)
    return olive_plans(problem, [Plan("decode")])[0]


def torch_int4(problem: Problem) -> Candidate:
    """torch's int4 operator, tinygemm.

    A weight is (code - 8) x scale + zero; the even column is the high nibble.
    """
    n, k, device = problem.n, problem.k, problem.device
    if device.type != "cuda":
        raise NotImplementedError("aten::_weight_int4pack_mm is measured on a GPU only")
    options: dict[str, Any] = {"device": device, "generator": problem.generator}
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, **options)
    scale_and_zero = torch.rand(n, k // GROUP, 2, **options) * 0.01 + 0.001
    stored = scale_and_zero.transpose(0, 1).contiguous().bfloat16()
    copies = _copies(problem, (torch.ops.aten._convert_weight_to_int4pack(codes, 8), stored))
    checked = codes[problem.checked]
    values = torch.stack((checked >> 4, checked & 15), dim=-1).flatten(1).double() - 8
    per_column = stored[:, problem.checked].transpose(0, 1).double().repeat_interleave(GROUP, dim=1)

    def run(x: Tensor, turn: int) -> Tensor:
        weight, scale = copies[turn % len(copies)]
        out: Tensor = torch.ops.aten._weight_int4pack_mm(x, weight, GROUP, scale)
        return out

    return Candidate(
        run,
        len(copies),
        _bytes(copies[0]),
        values * per_column[..., 0] + per_column[..., 1],
        tolerance=FOREIGN_TOLERANCE,
        most_products=FOREIGN_MOST_PRODUCTS,
    )


def gemlite(problem: Problem) -> Candidate:
    """GemLite's Triton kernels, where the package is installed; they tune themselves at the first call."""
    core = importlib.import_module("gemlite.core")
    n, k, device = problem.n, problem.k, problem.device
    options: dict[str, Any] = {"device": device, "generator": problem.generator}
    codes = torch.randint(0, 16, (n, k), dtype=torch.uint8, **options)
    scale = (torch.rand(n, k // GROUP, **options) * 0.01 + 0.001).bfloat16()
    zero = torch.full_like(scale, 8.0)
    dtype = core.DType.BF16

    def layer() -> torch.nn.Module:
        made: torch.nn.Module = core.GemLiteLinearTriton(
            4, group_size=GROUP, in_features=k, out_features=n, input_dtype=dtype, output_dtype=dtype
        )
        made.pack(codes.clone(), scale.view(-1, 1), zero.view(-1, 1), None)  # type: ignore[operator]
        return made

    size = n * k // 2 + 2 * scale.nbytes
    layers = [layer() for _ in range(problem.copies(size))]
    per_column = scale[problem.checked].double().repeat_interleave(GROUP, dim=1)
    return Candidate(
        lambda x, turn: layers[turn % len(layers)](x),
        len(layers),
        size,
        (codes[problem.checked].double() - 8) * per_column,
        tolerance=FOREIGN_TOLERANCE,
        most_products=FOREIGN_MOST_PRODUCTS,
    )


BASELINE = "torch_bf16"
OURS: dict[str, Builder] = {"olive": olive, "olive_triton": olive_triton, "olive_decode": olive_decode}
PEERS: dict[str, Builder] = {"torch_int4": torch_int4, "gemlite": gemlite}


def words(plan: Plan) -> str:
    """A plan as the CSV names it."""
    if plan.kernel == "mma":
        return f"mma tokens {plan.tokens} split {plan.split}"
    return f"wgmma rows {plan.rows} tokens {plan.tokens}" if plan.kernel == "wgmma" else plan.kernel


def chosen(problem: Problem, m: int) -> str:
    """The backend, and the plan where it has plans."""
    if problem.device.type != "cuda":
        return f"cpu {ops.cpu_backend()}"
    backend = ops.gpu_backend(problem.device)
    if backend != "cuda":
        return backend
    gpu = cuda.gpu_of(problem.device)
    return f"cuda {words(choose_linear(m, problem.n, problem.k, torch.bfloat16, gpu))}"


def _no_cuda(device: torch.device) -> str:
    return cuda.missing(device) if device.type == "cuda" else "olive._cuda is measured on a GPU only"


def _bytes(tensors: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _copies(problem: Problem, weight: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """As many copies of codes and scale as must be rotated, the given ones first."""
    more = problem.copies(_bytes(weight)) - 1
    return [weight, *((weight[0].clone(), weight[1].clone()) for _ in range(more))]


def _rotating(
    problem: Problem,
    weight: tuple[Tensor, Tensor],
    ovp_linear: Callable[..., Tensor],
    copies: list[tuple[Tensor, Tensor]] | None = None,
    *,
    plan: Callable[[int], str] = lambda m: "",
) -> Candidate:
    """One of our backends over copies of codes and scale in its layout."""
    copies = copies or _copies(problem, weight)

    def run(x: Tensor, turn: int) -> Tensor:
        codes, scale = copies[turn % len(copies)]
        return ovp_linear(x, codes, scale, problem.codebook, None, problem.n, GROUP)

    return Candidate(run, len(copies), _bytes(weight), problem.decoded, plan=plan)
