"""What stays float32 in a module of another dtype, and what becomes of everything else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from olive.nn.keep_float32 import keeping_float32


class Kept(nn.Module):
    """Two parameters and two buffers, of each one that is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.kept, self.other = (nn.Parameter(torch.randn(3)) for _ in range(2))
        for name in ("kept_buffer", "other_buffer"):
            self.register_buffer(name, torch.randn(3))
        self.register_buffer("count", torch.arange(3))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Kept:
        return super()._apply(keeping_float32(fn, [self.kept, self.kept_buffer, self.count, None]), recurse)


@pytest.mark.parametrize(
    "bring",
    [lambda one: one.to(torch.bfloat16), lambda one: one.bfloat16(), lambda one: one.type(torch.bfloat16)],
)
def test_bits_and_objects_stay(bring: Callable[[nn.Module], nn.Module]) -> None:
    module = Kept()
    (module.kept.sum() + module.other.sum()).backward()
    parameters = module.kept, module.other
    before = module.kept.detach().clone(), module.kept_buffer.clone()
    bring(module)
    assert torch.equal(module.kept, before[0]) and torch.equal(module.kept_buffer, before[1])
    assert module.kept.grad.dtype == torch.float32
    assert module.other.dtype == module.other.grad.dtype == module.other_buffer.dtype == torch.bfloat16
    assert module.kept is parameters[0] and module.other is parameters[1]


def test_device_moves_with_and_without_a_dtype() -> None:
    for module in (Kept().to("meta"), Kept().to("meta", torch.bfloat16)):
        assert all(one.is_meta for one in module.state_dict().values())
        assert module.kept.dtype == module.kept_buffer.dtype == torch.float32
        assert module.count.dtype == torch.int64
        empty = module.to_empty(device="cpu")
        assert not empty.kept.is_meta and empty.kept_buffer.dtype == torch.float32


def test_other_conversions_are_as_ever() -> None:
    module = Kept()
    before = module.kept.detach().clone()
    module._apply(lambda one: one * 2)
    assert torch.equal(module.kept, 2 * before)
    assert module.share_memory().kept.is_shared() and module.kept_buffer.is_shared()
