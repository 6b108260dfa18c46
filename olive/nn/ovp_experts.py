"""`OVPExperts`: the experts of a mixture-of-experts layer, held by transformers as 3-D parameters, quantized.

Stands for the classes of transformers' experts interface (`transformers.integrations.moe`): parameters
`gate_up_proj` (or `up_proj`) and `down_proj`, [E, N, K], or [E, K, N] where `is_transposed`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn

from olive.formats import ActivationFormat
from olive.nn.origin import Origin, take_over
from olive.nn.ovp_weight import OVPWeight

EXPERT_WEIGHTS = ("gate_up_proj", "up_proj", "down_proj")


class OVPExperts(nn.Module):
    """Routed experts with quantized weights; made by `from_experts`.

    State-dict keys: `gate_up_proj.codes`, `.scale`, `.codebook` in place of `gate_up_proj`, and so on.
    A stack has one static activation scale for all its experts. Biases, norms and the plain attributes of the
    replaced module keep their names.
    """

    origin: Origin
    num_experts: int
    has_gate: bool
    has_bias: bool
    has_post_expert_norm: bool

    @classmethod
    def from_experts(
        cls,
        experts: nn.Module,
        group_size: int,
        *,
        bits: int = 4,
        activations: ActivationFormat | None = None,
    ) -> Self:
        """An empty quantized module in the place of `experts`; fill its weights with `OVPWeight.set_`.

        Parameters that are not quantized, buffers, submodules, hooks and the training flag are shared with
        `experts`, which is not changed. Arguments as in `OVPWeight`.
        """
        names = tuple(key for key in EXPERT_WEIGHTS if key in experts._parameters)
        new = cls()
        new.origin = Origin.of(experts, names)
        vars(new).update(new.origin.attributes)
        new.num_experts = int(experts.down_proj.shape[0])  # type: ignore[index]
        transposed = bool(getattr(experts, "is_transposed", True))
        for key, parameter in experts._parameters.items():
            if key not in names:
                new.register_parameter(key, parameter)
                continue
            assert parameter is not None
            count, rows, columns = (int(size) for size in parameter.shape)
            if transposed:
                rows, columns = columns, rows
            weight = OVPWeight(
                rows,
                columns,
                group_size,
                bits=bits,
                activations=activations,
                experts=count,
                transposed=transposed,
                device=parameter.device,
                dtype=parameter.dtype,
            )
            new.add_module(key, weight)
        for key, module in experts._modules.items():
            new.add_module(key, module)
        for key, buffer in experts._buffers.items():
            new.register_buffer(key, buffer, persistent=key not in experts._non_persistent_buffers_set)
        take_over(new, experts)
        return new

    def to_experts(self) -> nn.Module:
        """The float module with decoded weights, of the class that was replaced."""
        weights = self.weights()
        now = vars(self)  # attributes may have been set since, e.g. `config`
        attributes = {key: now.get(key, value) for key, value in self.origin.attributes.items()}
        new = replace(self.origin, attributes=attributes).rebuild(
            {key: weight.to_float() for key, weight in weights.items()}
        )
        for key, parameter in self._parameters.items():
            new.register_parameter(key, parameter)
        for key, module in self._modules.items():
            if key not in weights:
                new.add_module(key, module)
        for key, buffer in self._buffers.items():
            new.register_buffer(key, buffer, persistent=key not in self._non_persistent_buffers_set)
        take_over(new, self)
        return new

    def weights(self) -> dict[str, OVPWeight]:
        """The quantized weights by the name of the float parameter each stands for."""
        found = {key: self._modules.get(key) for key in EXPERT_WEIGHTS}
        return {key: module for key, module in found.items() if isinstance(module, OVPWeight)}

    def _bias(self, key: str, expert: int) -> Tensor | None:
        stack = self._parameters.get(f"{key}_bias") if self.has_bias else None
        return None if stack is None else stack[expert]

    def _activate(self, state: Tensor) -> Tensor:
        # The replaced class knows how its gate works; its method finds its attributes here.
        replaced: Any = self.origin.cls
        activation: Any = self.act_fn if not self.has_gate else partial(replaced._apply_gate, self)
        activated: Tensor = activation(state)
        return activated

    def _expert(self, state: Tensor, expert: int) -> Tensor:
        """One expert on its tokens: [T, K] to [T, K]."""
        weights = self.weights()
        key = "gate_up_proj" if self.has_gate else "up_proj"
        state = self._activate(weights[key].linear(state, self._bias(key, expert), expert))
        state = weights["down_proj"].linear(state, self._bias("down_proj", expert), expert)
        norm = self._modules["post_expert_norm"] if getattr(self, "has_post_expert_norm", False) else None
        return state if norm is None else norm(state)

    def forward(
        self,
        hidden_states: Tensor,
        top_k_index: Tensor | None = None,
        top_k_weights: Tensor | None = None,
        *,
        router_indices: Tensor | None = None,
        routing_weights: Tensor | None = None,
    ) -> Tensor:
        """Run every expert on the tokens routed to it and add up their weighted outputs.

        Args:
            hidden_states: float [T, K].
            top_k_index: int [T, top_k], the experts of each token; num_experts and above stand for none.
            top_k_weights: float [T, top_k].
            router_indices, routing_weights: what gpt-oss calls the two.

        Returns:
            hidden_states' dtype, [T, K].
        """
        index = router_indices if top_k_index is None else top_k_index
        weight = routing_weights if top_k_weights is None else top_k_weights
        if index is None or weight is None:
            raise TypeError("top_k_index, top_k_weights: expected the router's two tensors, got None")
        out = torch.zeros_like(hidden_states)
        # transformers' eager order: experts ascending, then top-k position, then token; added in out's dtype.
        for expert in torch.unique(index).tolist():
            if expert >= self.num_experts:
                continue
            position, token = torch.where(index.t() == expert)
            state = self._expert(hidden_states[token], expert) * weight[token, position, None]
            out.index_add_(0, token, state.to(out.dtype))
        return out


class OVPSortedExperts(OVPExperts):
    """Llama 4's experts: the tokens come sorted, one equal share for every expert."""

    has_gate = True
    has_bias = False

    def _expert(self, state: Tensor, expert: int) -> Tensor:
        weights = self.weights()
        gate, up = weights["gate_up_proj"].linear(state, expert=expert).chunk(2, dim=-1)
        return weights["down_proj"].linear(up * self.act_fn(gate), expert=expert)  # type: ignore[operator]

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """float [E x T, K], expert by expert, to the same shape."""
        shares = hidden_states.view(self.num_experts, -1, hidden_states.shape[-1])
        return torch.cat([self._expert(share, expert) for expert, share in enumerate(shares)])
