"""`LatentWeight`: a module that trains a weight in full precision and computes with it on its levels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from olive.qat.weight_quantizers import Grid, MinMax, WeightQuantizer


def local(tensor: Tensor) -> Tensor:
    """This process's rows of a tensor that several share (FSDP2), or the tensor."""
    to_local = getattr(tensor, "to_local", None)
    return tensor if to_local is None else to_local()


class LatentWeight(nn.Module):
    """A latent weight, its quantizer, and what keeps frozen values as they are while an optimizer steps.

    Tensors below have the weight's shape with output channels first, [N, ...]; of a sharded weight they hold
    this process's rows.
    """

    weight_quantizer: WeightQuantizer

    def latent(self) -> Tensor:
        """The latent weight, detached; a view of the parameter where there is one."""
        raise NotImplementedError

    def grid(self) -> Grid:
        """The grid the weight is on."""
        return self.weight_quantizer.grid(self.latent())

    def hold(self, frozen: Tensor) -> None:
        """Before a step of the optimizer: remember frozen values, and drop their gradients.

        Args:
            frozen: bool.
        """
        raise NotImplementedError

    def restore(self) -> None:
        """After the step: frozen values are again what they were, to the last bit."""
        raise NotImplementedError

    def write(self, where: Tensor, values: Tensor) -> None:
        """Set the latent weight to `values` where `where` says so."""
        raise NotImplementedError


class ParameterLatent(LatentWeight):
    """The latent weight is the parameter `weight`."""

    weight: nn.Parameter
    _held: tuple[Tensor, Tensor] | None = None

    def channels_first(self, tensor: Tensor) -> Tensor:
        """The view [N, ...] of a tensor in the parameter's layout."""
        return tensor

    def latent(self) -> Tensor:
        return self.channels_first(local(self.weight.detach()))

    def hold(self, frozen: Tensor) -> None:
        if self.weight.grad is not None:
            self.channels_first(local(self.weight.grad)).masked_fill_(frozen, 0)
        latent = self.latent()
        kept = latent.clone() if self._held is None else self._held[1].copy_(latent)
        self._held = (frozen, kept)

    def restore(self) -> None:
        if self._held is not None:
            frozen, kept = self._held
            self.write(frozen, kept)

    def write(self, where: Tensor, values: Tensor) -> None:
        with torch.no_grad():
            latent = self.latent()
            latent.copy_(torch.where(where, values.to(latent.dtype), latent))


def latent_weights(model: nn.Module) -> dict[str, LatentWeight]:
    """The low-bit weights of a prepared model by name; the first and last layers' are not among them.

    Raises:
        ValueError: the model is not prepared, or has no such weight.
    """
    found = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, LatentWeight) and not isinstance(module.weight_quantizer, MinMax)
    }
    if not found:
        raise ValueError("model: expected a prepared model, got none of its layers; call olive.qat.prepare")
    return found
