"""Our kernels on quantized activations, W4A8 and W4A4, as candidates of the comparison.

A call quantizes its activations as a layer does, then multiplies: both kernels are in the time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.gpu.candidates import Builder, Candidate, words
from bench.gpu.data import GROUP, Problem, drawn_weight
from olive import ops
from olive.formats import CODEBOOKS
from olive.formats.activations import ActivationFormat
from olive.ops import cuda
from olive.ops.cuda_quantized import ovp_linear_quantized_cuda
from olive.ops.gpu_dispatch import Plan, choose_linear_quantized
from olive.ops.reference import ovp_decode_reference
from olive.ops.reference_quantized import quantize_activations_reference

PER_ROW = -1


@dataclass(frozen=True)
class Kind:
    """What is quantized how.

    Args:
        activations: the input's format.
        group_size: of the weight.
    """

    activations: ActivationFormat
    group_size: int = GROUP


KINDS = {
    "olive_w4a8": Kind(ActivationFormat("int8")),
    "olive_w4a8_g128": Kind(ActivationFormat("int8", GROUP)),
    "olive_w4a4": Kind(ActivationFormat("ovp4")),
    "olive_w4a8_row": Kind(ActivationFormat("int8"), PER_ROW),
}


def _arguments(kind: Kind, device: torch.device) -> tuple[Any, ...]:
    """The operators' arguments after the weight's."""
    format = kind.activations
    book = CODEBOOKS[format.codebook].tensor().to(device) if format.name == "ovp4" else None
    return format.name, format.group_size, format.pairing, book, None


def quantized_values(kind: Kind, x: Tensor) -> Tensor:
    """What activations [M, K] stand for once they are quantized: float64."""
    arguments = (*_arguments(kind, x.device), torch.float32)
    levels, scale = quantize_activations_reference(x, *arguments)
    width = kind.activations.group_size if kind.activations.group_size > 0 else x.shape[1]
    return levels.double() * scale.double().repeat_interleave(width, dim=1)[:, : x.shape[1]]


def _chosen(kind: Kind, problem: Problem, m: int) -> str:
    if problem.device.type != "cuda":
        return f"cpu {ops.cpu_backend()}"
    backend = ops.gpu_backend(problem.device)
    if backend != "cuda":
        return backend
    size = (m, problem.n, problem.k, kind.group_size, kind.activations.group_size)
    return f"cuda {words(choose_linear_quantized(*size, cuda.gpu_of(problem.device)))}"


def _candidates(
    kind: Kind, problem: Problem, linears: Sequence[tuple[Callable[..., Tensor], Callable[[int], str]]]
) -> list[Candidate]:
    """Operators, each with what it says of its plan, all on the same copies of the weight."""
    codes, scale, book = (*problem.canonical, problem.codebook)
    if kind.group_size != GROUP:
        codes, scale, book = drawn_weight(problem.n, problem.k, problem.device, kind.group_size)
    part = (codes[problem.checked], scale[problem.checked], book)
    decoded = ovp_decode_reference(*part, problem.k, kind.group_size, torch.float32).double()
    weight = (codes, scale)
    if ops.has_packed_layout(problem.device):
        weight = ops.ovp_pack(codes, scale, problem.k, kind.group_size)
    size = weight[0].nbytes + weight[1].nbytes
    copies = [weight, *((weight[0].clone(), weight[1].clone()) for _ in range(problem.copies(size) - 1))]
    after = (book, None, problem.n, kind.group_size, *_arguments(kind, problem.device))

    def run(linear: Callable[..., Tensor], x: Tensor, turn: int) -> Tensor:
        return linear(x, *copies[turn % len(copies)], *after)

    return [
        Candidate(
            partial(run, linear),
            len(copies),
            size,
            decoded,
            plan=plan,
            values=partial(quantized_values, kind),
            group_size=kind.group_size,
        )
        for linear, plan in linears
    ]


def _build(kind: Kind, problem: Problem) -> Candidate:
    return _candidates(kind, problem, [(ops.ovp_linear_quantized, partial(_chosen, kind, problem))])[0]


def quantized_plans(name: str, problem: Problem, plans: list[Plan]) -> list[Candidate]:
    """One kind with plans of our choice, all on the same copies."""

    def text(plan: Plan, m: int) -> str:
        return f"{name} {words(plan)}"

    linears = [(partial(ovp_linear_quantized_cuda, plan=plan), partial(text, plan)) for plan in plans]
    return _candidates(KINDS[name], problem, linears)


QUANTIZED: dict[str, Builder] = {name: partial(_build, kind) for name, kind in KINDS.items()}
