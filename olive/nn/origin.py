"""`Origin`: what is kept of the float module that a quantized one replaced, so that it can be built again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

_MODULE_STATE = frozenset(vars(nn.Module()))  # names that nn.Module keeps for itself
_HOOKS = (
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
    "_forward_hooks",
    "_forward_hooks_always_called",
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)


@dataclass
class Origin:
    """Class and plain attributes of a replaced module, without its weights.

    Args:
        cls: the module's class.
        attributes: what it kept besides parameters, buffers, submodules and hooks.
        trainable: names of quantized parameters that required gradients.
    """

    cls: type[nn.Module]
    attributes: dict[str, Any] = field(default_factory=dict)
    trainable: frozenset[str] = frozenset()

    @classmethod
    def of(cls, module: nn.Module, weights: tuple[str, ...]) -> Origin:
        """Record `module`, whose parameters called `weights` are replaced."""
        attributes = {key: value for key, value in vars(module).items() if key not in _MODULE_STATE}
        trainable = frozenset(key for key in weights if getattr(module, key).requires_grad)
        return cls(type(module), attributes, trainable)

    def rebuild(self, weights: dict[str, Tensor]) -> nn.Module:
        """A module of the recorded class with these parameters, made without running its `__init__`."""
        module = self.cls.__new__(self.cls)
        nn.Module.__init__(module)
        vars(module).update(self.attributes)
        for key, tensor in weights.items():
            module.register_parameter(key, nn.Parameter(tensor, requires_grad=key in self.trainable))
        return module


def take_over(new: nn.Module, old: nn.Module) -> None:
    """Give `new` the training flag and the hooks of `old`.

    The dictionaries themselves are shared: a handle that removes a hook finds it through its dictionary.
    """
    new.training = old.training
    for key in _HOOKS:
        if key in vars(old):
            vars(new)[key] = vars(old)[key]


def frozen(tensor: Tensor) -> nn.Parameter:
    """A parameter without gradient; not a buffer, because tensor parallelism shards parameters only."""
    return nn.Parameter(tensor, requires_grad=False)


def empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None) -> nn.Parameter:
    """A frozen parameter without values."""
    return frozen(torch.empty(shape, dtype=dtype, device=device))
