"""`MergedWeight`: the one matrix per head that queries and keys come down to (QKR)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from olive.qat.latent import LatentWeight
from olive.qat.weight_quantizers import StatsQ


def _whole(tensor: Tensor) -> Tensor:
    """All rows of a tensor that several processes share (FSDP2), or the tensor."""
    full_tensor = getattr(tensor, "full_tensor", None)
    return tensor if full_tensor is None else full_tensor()


class MergedWeight(LatentWeight):
    """M^h = (W_q^h)^T W_k^g(h), stacked over the query heads h to [H C, C], quantized by StatsQ.

    Row h C + c belongs to channel c on the query side, and each row has its own scale; g(h) is the key head
    of query head h. Trained are W_q and W_k, which stay with their projections: this module has no
    parameters. The product is taken in float32 at each call, under autocast too, so that all who ask see
    the same codes.

    Freezing. An entry of M is a sum of d products, so it cannot be held still through W_q and W_k, which
    other entries share. Frozen entries are therefore remembered in the buffer `held`, and M is `held` where
    the buffer `frozen` says so, the product elsewhere:

    - an entry that `hold` or `write` has frozen stays so, to the last bit, while W_q and W_k train on;
    - no gradient reaches W_q and W_k through it;
    - `restore` has nothing to do, since no step of an optimizer reaches it.

    The buffers, of 5 bytes per entry, are None until `begin_freezing`, or until loaded. Of sharded parameters
    they and `latent()` hold all rows, not this process's.

    Args:
        query, key: the projections, `nn.Linear`: W_q [H d, C], W_k [G d, C].
        heads: of queries, H; G divides it.
        head_size: d.
        weight_quantizer: of M.

    Raises:
        ValueError: weights of other shapes.

    Source: arXiv:2302.02210. Deviation: its code lets W_q and W_k train freely while other weights are
    annealed, so that no entry of M is ever held.
    """

    weight_quantizer: StatsQ
    frozen: Tensor | None
    held: Tensor | None

    def __init__(
        self, query: nn.Linear, key: nn.Linear, heads: int, head_size: int, weight_quantizer: StatsQ
    ) -> None:
        super().__init__()
        rows, columns = query.weight.shape
        others = key.weight.shape[0]
        if rows != heads * head_size:
            raise ValueError(f"query: expected {heads} * {head_size} rows, got {rows}")
        if others % head_size or others == 0 or rows % others or key.weight.shape[1] != columns:
            raise ValueError(
                f"key: expected [{head_size} * a divisor of {heads}, {columns}], got "
                f"{tuple(key.weight.shape)}"
            )
        self.heads, self.head_size, self.columns = heads, head_size, columns
        # In a tuple they are no submodules: names in the state dict stay those of the projections.
        self._projections = (query, key)
        self.weight_quantizer = weight_quantizer
        for name in ("frozen", "held"):
            self.register_buffer(name, None)

    def is_of(self, query: nn.Module | None, key: nn.Module | None) -> bool:
        """Whether these are the projections it multiplies."""
        return query is self._projections[0] and key is self._projections[1]

    def forward(self) -> Tensor:
        """M on its levels, float32 [H C, C], with gradients to W_q and W_k."""
        quantized: Tensor = self.weight_quantizer(self._effective())
        return quantized

    def keys(self, hidden: Tensor, input: Tensor) -> Tensor:
        """Keys [B, T, H C] of quantized hidden states `input` [B, T, C]; `hidden` is not looked at."""
        return functional.linear(input, self().to(input.dtype))

    @property
    def shape(self) -> torch.Size:
        """[H C, C], in every process."""
        return torch.Size((self.heads * self.columns, self.columns))

    def latent(self) -> Tensor:
        """M, frozen entries as they are held; float32 [H C, C], a copy."""
        with torch.no_grad():
            return self._effective()

    def trained(self) -> Tensor:
        """M with gradients to W_q and W_k, float32 [H C, C]."""
        return self._effective()

    def tensors(self) -> tuple[Tensor, ...]:
        weights = tuple(one.weight for one in self._projections)
        return weights if self.held is None or self.frozen is None else (*weights, self.held, self.frozen)

    def key_bias(self) -> Tensor | None:
        """u^h = (W_k^g(h))^T b_q^h, float32 [H, C]: what the queries' bias adds to the logits of a key."""
        query, _ = self._projections
        if query.bias is None:
            return None
        with self._full_precision():
            bias = _whole(query.bias).float().view(self._groups(), -1, 1, self.head_size)
            return (bias @ self._keys()).view(self.heads, self.columns)

    def begin_freezing(self) -> None:
        """Create the buffers; no entry is frozen."""
        if self.frozen is None:
            held = torch.zeros(self.heads * self.columns, self.columns, device=self._device())
            self.frozen, self.held = torch.zeros_like(held, dtype=torch.bool), held

    def thaw(self) -> None:
        """Forget what is frozen."""
        self.frozen = self.held = None

    def hold(self, frozen: Tensor) -> None:
        """Freeze more entries at their present values; those that are frozen stay so, whatever `frozen` says.

        Args:
            frozen: bool [H C, C].
        """
        self.write(frozen & ~self._frozen(), self.latent())

    def restore(self) -> None:
        """Nothing: no step of an optimizer reaches a frozen entry."""

    def write(self, where: Tensor, values: Tensor) -> None:
        """Freeze entries at given values.

        Args:
            where: bool [H C, C].
            values: float [H C, C].
        """
        frozen = self._frozen()
        assert self.held is not None
        self.held.copy_(torch.where(where, values.to(self.held.dtype), self.held))
        frozen.logical_or_(where)

    def _frozen(self) -> Tensor:
        self.begin_freezing()
        assert self.frozen is not None
        return self.frozen

    def _effective(self) -> Tensor:
        product = self._product()
        if self.frozen is None or self.held is None:
            return product
        return torch.where(self.frozen, self.held, product)

    def _product(self) -> Tensor:
        query, _ = self._projections
        with self._full_precision():
            rows = _whole(query.weight).float().view(self._groups(), -1, self.head_size, self.columns)
            return (rows.transpose(-1, -2) @ self._keys()).reshape(-1, self.columns)

    def _keys(self) -> Tensor:
        """W_k, float32 [G, 1, d, C], to meet the H / G query heads of each of its heads."""
        _, key = self._projections
        return _whole(key.weight).float().view(-1, 1, self.head_size, self.columns)

    def _groups(self) -> int:
        _, key = self._projections
        return key.out_features // self.head_size

    def _device(self) -> torch.device:
        return self._projections[0].weight.device

    def _full_precision(self) -> torch.autocast:
        return torch.autocast(self._device().type, enabled=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if f"{prefix}frozen" in state_dict:
            self.begin_freezing()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, head_size={self.head_size}, columns={self.columns}"
