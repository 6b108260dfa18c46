"""A state dict whose packed weights are brought into the stored layout one by one, when they are written."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from olive.nn import OVPWeight

# What `save_pretrained` asks a tensor before it writes it; these are answered without unpacking.
_CHEAP = frozenset(
    {
        Tensor.untyped_storage,
        Tensor.data_ptr,
        *(getattr(Tensor, name).__get__ for name in ("device", "dtype", "is_meta")),
    }
)


class StoredOnDemand(Tensor):
    """Stands for a tensor in the stored layout while memory holds the kernels' packed layout only.

    Storage, device and dtype are those of the packed tensor, so that shared tensors are recognised and shards
    get their size; any other use, first of all `.contiguous()`, makes the stored tensor and works on that.
    """

    _stored: Callable[[], Tensor]

    @staticmethod
    def of(packed: Tensor, stored: Callable[[], Tensor]) -> StoredOnDemand:
        """A stand-in for `stored()`, which is called at each use, with the storage of `packed`."""
        stand_in: StoredOnDemand = packed.detach().as_subclass(StoredOnDemand)
        stand_in._stored = stored
        return stand_in

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            if func in _CHEAP:
                return func(*args, **(kwargs or {}))
            args, kwargs = torch.utils._pytree.tree_map_only(StoredOnDemand, _unpacked, (args, kwargs or {}))
            return func(*args, **kwargs)


def _unpacked(tensor: StoredOnDemand) -> Tensor:
    return tensor._stored()


@contextlib.contextmanager
def _on_demand(model: nn.Module) -> Iterator[None]:
    """Let `model.state_dict()` hold stand-ins instead of unpacked copies."""
    packed = [module for module in model.modules() if isinstance(module, OVPWeight) and module.is_packed]

    def stand_ins(weight: OVPWeight) -> tuple[Tensor, Tensor, Tensor | None]:
        canonical = type(weight).canonical
        codes = StoredOnDemand.of(weight.codes, lambda: canonical(weight)[0])
        scale = StoredOnDemand.of(weight.scale, lambda: canonical(weight)[1])
        return codes, scale, None if weight.codebook is None else weight.codebook.detach()

    try:
        for weight in packed:
            # The class's method is hidden by an attribute of the instance until the state dict is made.
            vars(weight)["canonical"] = lambda weight=weight: stand_ins(weight)
        yield
    finally:
        for weight in packed:
            vars(weight).pop("canonical", None)


def streaming_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict; what is packed is a stand-in that takes memory only while it is written.

    Saving then needs one shard beyond the model, instead of a second copy of all its codes.
    """
    with _on_demand(model):
        state: dict[str, Tensor] = model.state_dict()
    return state
