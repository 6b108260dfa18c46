"""`LatentWeight`: a module that trains a weight in full precision and computes with it on its levels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from olive.nn.keep_float32 import keeping_float32
from olive.ops import oscillation_
from olive.qat.weight_quantizers import Grid, MinMax, WeightQuantizer, local

FREE = -(2**15)  # in `fixed`: this weight is not fixed
# Buffers of the weight's shape, sharded as it is.
_FOLLOWING = {"codes", "direction", "frequency", "average", "fixed"}
_PASSING = ("_seen", "_held")


class LatentWeight(nn.Module):
    """A latent weight, its quantizer, and what is known of how it moves.

    Buffers that exist where they are asked for, so that they are saved, moved and loaded with the model,
    all of the weight's shape with output channels first, [N, ...]:

    - `codes` int8, at the last step, `direction` int8, where they last changed to, `frequency` float32, how
      often they oscillate (`track`);
    - `average` float32, a moving average of the codes, `fixed` int16, the code at which a weight is fixed for
      good, or FREE (`average_codes`).

    Tensors below have the same shape; of a sharded weight they hold this process's rows.
    """

    weight_quantizer: WeightQuantizer
    # What `forget` drops is neither copied nor pickled with the model: it follows from the weight.
    _seen: tuple[object, Tensor] | None = None  # of which state of the weight, what was inside the boundary

    def latent(self) -> Tensor:
        """The latent weight, detached; a view of the parameter where there is one."""
        raise NotImplementedError

    def trained(self) -> Tensor:
        """The latent weight with its gradient."""
        raise NotImplementedError

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

    def tensors(self) -> tuple[Tensor, ...]:
        """What the latent weight and its grid follow from."""
        raise NotImplementedError

    def version(self) -> tuple[int, ...]:
        """Another one after each change of the weight or its grid."""
        numbers: list[int] = []
        for one in self.tensors():  # an optimizer changes a sharded tensor, `write` its local one
            numbers += (one._version, local(one)._version, local(one).data_ptr())
        return tuple(numbers)

    @property
    def shape(self) -> torch.Size:
        """Of the latent weight, known without computing it."""
        raise NotImplementedError

    @property
    def is_sharded(self) -> bool:
        """Whether each process has some of the rows."""
        return False

    @property
    def has_whole_channels(self) -> bool:
        """Whether each process has all values of the output channels it has any of."""
        return True

    def zeros(self, dtype: torch.dtype) -> Tensor:
        """Of the weight's shape, and sharded as it is."""
        return torch.zeros_like(self.latent(), dtype=dtype, memory_format=torch.contiguous_format)

    def grid(self) -> Grid:
        """The grid the weight is on."""
        return self.weight_quantizer.grid(self.latent())

    @torch.no_grad()
    def inside(self, boundary: float) -> Tensor:
        """Which values are within so many steps of their nearest threshold: bool; NaN is not."""
        state = (boundary, *self.version())
        if self._seen is None or self._seen[0] != state:
            weight = self.latent()
            near = self.weight_quantizer.margin(weight) <= boundary if weight.numel() else weight.bool()
            self._seen = (state, near)
        return self._seen[1]

    @torch.no_grad()
    def shard(self) -> None:
        """Of buffers that were made or loaded before the weight was sharded keep this process's rows."""
        if not self.is_sharded:
            return
        for name in _FOLLOWING & self._buffers.keys():
            whole = self.get_buffer(name)
            if not hasattr(whole, "to_local"):
                self.register_buffer(name, self._cut(whole))

    def _cut(self, whole: Tensor) -> Tensor:
        """A tensor of the weight's shape, sharded as the weight is."""
        raise NotImplementedError

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # An average that moves by a thousandth, and what is frozen to the last bit, need all of theirs.
        super()._apply(keeping_float32(fn, self.buffers(recurse=False)), recurse)  # type: ignore[no-untyped-call]
        return self

    def forget(self) -> None:
        """Free what was remembered from one step to the next."""
        for name in _PASSING:
            vars(self).pop(name, None)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in _PASSING}

    @torch.no_grad()
    def track(self) -> None:
        """Begin to follow the codes; nothing where they are followed."""
        if "frequency" in self._buffers:
            return
        for name, dtype in (("codes", torch.int8), ("direction", torch.int8), ("frequency", torch.float32)):
            self.register_buffer(name, self.zeros(dtype))
        self.set_buffer("codes", self._code())

    @torch.no_grad()
    def look(self, momentum: float, boundary: float) -> None:
        """Follow the codes, and find what is inside the boundary, in one pass."""
        if self.shape.numel() == 0:
            return
        weight = self.latent()
        grid = self.weight_quantizer.grid(weight)
        codes, direction, frequency = (self.buffer(name) for name in ("codes", "direction", "frequency"))
        found = oscillation_(
            weight,
            grid.step,
            grid.offset,
            grid.qmin,
            grid.qmax,
            momentum,
            boundary,
            codes,
            direction,
            frequency,
        )
        self._seen = ((boundary, *self.version()), found)

    @torch.no_grad()
    def average_codes(self) -> None:
        """Begin to average the codes, and let weights be fixed; nothing where that has begun."""
        if "fixed" in self._buffers:
            return
        self.register_buffer("average", self.zeros(torch.float32))
        self.register_buffer("fixed", self.zeros(torch.int16))
        self.set_buffer("average", self._code())
        self.buffer("fixed").fill_(FREE)

    @torch.no_grad()
    def fix(self, momentum: float, threshold: float | None) -> None:
        """Follow the average, and fix at it the weights whose frequency is above the threshold."""
        if self.shape.numel() == 0:
            return
        average, fixed = self.buffer("average"), self.buffer("fixed")
        average.lerp_(self.buffer("codes").float(), momentum)
        if threshold is not None:
            chosen = (self.buffer("frequency") > threshold) & (fixed == FREE)
            fixed.copy_(torch.where(chosen, average.round().to(fixed.dtype), fixed))

    @torch.no_grad()
    def put_back_fixed(self) -> None:
        """Put fixed weights on the levels of their codes, on the grid as it is now."""
        if self.shape.numel() == 0:
            return
        fixed = self.buffer("fixed")
        self.write(fixed != FREE, self.grid().level(fixed.flatten(1)).view(fixed.shape))

    def buffer(self, name: str) -> Tensor:
        """This process's rows of a buffer.

        Raises:
            ValueError: the weight was sharded after the buffer was made, and `shard` not called.
        """
        found, expected = local(self.get_buffer(name)), self.shape
        if found.shape != expected:
            raise ValueError(
                f"{name}: expected shape {tuple(expected)}, got {tuple(found.shape)}; attach trackers "
                f"after fully_shard"
            )
        return found

    def set_buffer(self, name: str, values: Tensor) -> None:
        """Fill a buffer."""
        self.buffer(name).copy_(values)

    def _code(self) -> Tensor:
        weight = self.latent()
        if weight.numel() == 0:
            return weight
        return self.weight_quantizer.grid(weight).code(weight).view(weight.shape)


class ParameterLatent(LatentWeight):
    """The latent weight is the parameter `weight`."""

    weight: nn.Parameter
    channel_dim = 0  # of the parameter: along it lie the output channels
    _held: tuple[Tensor, Tensor] | None = None

    def channels_first(self, tensor: Tensor) -> Tensor:
        """The view [N, ...] of a tensor in the parameter's layout."""
        return tensor

    @property
    def shape(self) -> torch.Size:
        return self.channels_first(local(self.weight.detach())).shape

    def latent(self) -> Tensor:
        return self.channels_first(local(self.weight.detach()))

    def trained(self) -> Tensor:
        return self.channels_first(local(self.weight))

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

    @torch.no_grad()
    def write(self, where: Tensor, values: Tensor) -> None:
        latent = self.latent()
        latent.copy_(torch.where(where, values.to(latent.dtype), latent))

    def tensors(self) -> tuple[Tensor, ...]:
        return self.weight, *self.weight_quantizer.parameters()

    @property
    def is_sharded(self) -> bool:
        return hasattr(self.weight, "to_local")

    @property
    def has_whole_channels(self) -> bool:
        placements = getattr(self.weight, "placements", ())
        return all(not one.is_shard() or one.dim == self.channel_dim for one in placements)

    def zeros(self, dtype: torch.dtype) -> Tensor:
        if not self.is_sharded:
            return super().zeros(dtype)
        return torch.zeros_like(self.channels_first(self.weight.detach()), dtype=dtype)

    def _cut(self, whole: Tensor) -> Tensor:
        from torch.distributed.tensor import distribute_tensor

        like: Any = self.channels_first(self.weight.detach())
        # Each process has the whole, so none needs to send anything.
        return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def latent_weights(model: nn.Module) -> dict[str, LatentWeight]:
    """The low-bit weights of a prepared model by name; the first and last layers' are not among them.

    Raises:
        ValueError: the model is not prepared, or has no such weight, or output channels are cut up between
            processes, so that none knows what steps they have.
    """
    found = {
        f"{name}.weight" if name else "weight": module
        for name, module in model.named_modules()
        if isinstance(module, LatentWeight) and not isinstance(module.weight_quantizer, MinMax)
    }
    if not found:
        raise ValueError("model: expected a prepared model, got none of its layers; call olive.qat.prepare")
    for name, latent in found.items():
        if not latent.has_whole_channels:
            raise ValueError(
                f"{name}: expected output channels that are whole in each process, got a weight sharded "
                f"across them ({type(latent).__name__}); use DistributedDataParallel, or for FSDP2 a "
                f"shard_placement_fn that shards its output channels"
            )
    return found
