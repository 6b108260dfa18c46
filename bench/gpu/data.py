"""Weights to measure with: really quantized rows, drawn as often as a shape needs."""

from __future__ import annotations

import torch
from torch import Tensor

from bench.gpu.device import cold_bytes
from bench.timing import copies_for
from olive import QuantConfig
from olive.ops.reference import ovp_decode_reference
from olive.ptq import quantize_weight
from olive.ptq.search import QuantizedWeight

GROUP = 128
_ROWS = 512  # quantized ones; a kernel's speed does not depend on which rows a weight is made of
_CHECKED = 256  # rows of the weight, at either end, whose products are compared


def random_weight(n: int, k: int) -> Tensor:
    """bfloat16 [N, K], normal with one outlier in a thousand, so that groups of both kinds occur."""
    generator = torch.Generator().manual_seed(n * 31 + k)
    weight = torch.randn(n, k, generator=generator) * 0.02
    weight[torch.rand(n, k, generator=generator) < 1e-3] *= 8
    return weight.bfloat16()


def drawn_weight(n: int, k: int, device: torch.device, group_size: int = GROUP) -> QuantizedWeight:
    """A quantized weight [N, K] in the canonical layout.

    Quantized on the CPU, so that a GPU's multiplication is measured whether or not its encoder works.
    """
    codes, scale, book = quantize_weight(random_weight(min(n, _ROWS), k), QuantConfig(group_size=group_size))
    rows = torch.randint(0, codes.shape[0], (n,), generator=torch.Generator().manual_seed(n))
    rows = rows.to(device)
    return QuantizedWeight(codes.to(device)[rows], scale.to(device)[rows], book.to(device))


class Problem:
    """One weight [N, K]: its codes, and the decoded rows that results are checked by.

    Attributes:
        canonical: codes and scale in the canonical layout.
        codebook: int8 [32].
        checked: numbers of the checked rows.
        decoded: those rows, float64, decoded by the reference.
        generator: of random numbers on the device. Not the default one: a capture that fails can leave that
            unusable.
    """

    def __init__(self, n: int, k: int, device: torch.device) -> None:
        self.n, self.k, self.device = n, k, device
        self.generator = torch.Generator(device).manual_seed(n * 31 + k)
        codes, scale, self.codebook = drawn_weight(n, k, device)
        self.canonical = (codes, scale)
        self.checked = ends(n, _CHECKED, device)
        part = (codes[self.checked], scale[self.checked], self.codebook)
        self.decoded = ovp_decode_reference(*part, k, GROUP, torch.float32).double()

    def copies(self, bytes_each: int) -> int:
        """How many copies of a weight must be rotated so that each comes from memory."""
        return copies_for(bytes_each, cold_bytes(self.device))

    def activations(self, m: int) -> Tensor:
        """bfloat16 [M, K]."""
        return torch.randn(m, self.k, generator=self.generator, device=self.device).bfloat16()


def ends(size: int, most: int, device: torch.device) -> Tensor:
    """The numbers 0 .. size - 1, or the first and last `most` of them."""
    numbers = torch.arange(size, device=device)
    return numbers if size <= 2 * most else torch.cat((numbers[:most], numbers[-most:]))
