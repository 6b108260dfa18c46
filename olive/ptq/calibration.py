"""Calibration: what reaches the layers of a float model while it runs on a user's data.

Of each layer's input a bounded number of rows is kept, drawn evenly from all batches, and the largest
magnitude of all rows. Layers that are given one and the same tensor share what is kept. So memory on the host
is at most `SAMPLE_ROWS` x (the sum of the distinct inputs' widths) values in the model's dtype, whatever the
amount of data: 0.4 GB for a Llama 3 8B in bfloat16. Methods that weigh errors also have moments of all rows
gathered (`olive.ptq.moments`), for each expert of a stack on its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from olive import ops
from olive.ptq.moments import Moment, SecondMoment

# On the bundled model static scales differ from those of 4096 rows by 2 % on average and 10 % at most, about
# two steps of the grids; those of 64 rows by up to 30 %.
SAMPLE_ROWS = 256


@dataclass(frozen=True)
class InputSample:
    """Rows of one layer's input, an unbiased draw from all that were seen.

    Args:
        rows: [at most SAMPLE_ROWS, K], in the model's dtype, on the CPU; None before the first row.
        keys: float64, one random number per row; the rows with the largest keys stay.
        seen: how many rows there were.
        largest: max |x| over all of them.
    """

    rows: Tensor | None = None
    keys: Tensor | None = None
    seen: int = 0
    largest: float = 0.0

    def updated(self, rows: Tensor, largest: float) -> InputSample:
        """With more rows [T, K] added; `largest` is their largest magnitude.

        The random numbers depend on nothing but the number of rows seen, so runs on equal data draw alike.
        """
        generator = torch.Generator().manual_seed(self.seen)
        keys = torch.rand(len(rows), dtype=torch.float64, generator=generator)
        held = 0 if self.keys is None else len(self.keys)
        together = keys if self.keys is None else torch.cat((self.keys, keys))
        chosen = together.topk(min(SAMPLE_ROWS, len(together))).indices.sort().values
        old, new = chosen[chosen < held], chosen[chosen >= held] - held
        kept = rows.detach()[new.to(rows.device)].cpu()
        if self.rows is not None:
            kept = torch.cat((self.rows[old], kept))
        return InputSample(kept, together[chosen], self.seen + len(rows), max(self.largest, largest))


def input_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module transforms: its first argument; None if it was given none."""
    return args[0] if args else next(iter(kwargs.values()), None)


class _Gathered(NamedTuple):
    """What is known of one input."""

    sample: InputSample | None
    moment: Moment | None

    def updated(self, rows: Tensor, largest: float, floats: Tensor | None) -> _Gathered:
        sample = None if self.sample is None else self.sample.updated(rows, largest)
        if self.moment is None:
            return _Gathered(sample, None)
        if isinstance(self.moment, SecondMoment) and floats is not None:
            return _Gathered(sample, self.moment.updated_beside(rows, floats))
        return _Gathered(sample, self.moment.updated(rows))


class InputCollector:
    """Samples the inputs of layers while the model runs.

    Args:
        linears: layers whose input is one tensor [..., K], by the name of their weight.
        experts: modules of stacked experts, by the names of the weights: (first stack, down_proj).
        sorted_experts: those of `experts` whose tokens come sorted, as Llama 4's do.
        rotations: columns of the blocks in which a layer rotates its input first, by the name of its weight;
            what is gathered is of the rotated input.
        sample: whether to sample rows.
        moment: the empty moment to gather of each layer and expert; None = no moments.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Module],
        experts: Mapping[tuple[str, str], nn.Module] = MappingProxyType({}),
        sorted_experts: frozenset[tuple[str, str]] = frozenset(),
        rotations: Mapping[str, int] = MappingProxyType({}),
        *,
        sample: bool = True,
        moment: Moment | None = None,
    ) -> None:
        self._linears, self._experts, self._sorted = linears, experts, sorted_experts
        self._rotations = rotations
        self._nothing = _Gathered(InputSample() if sample else None, moment)
        self._samples: dict[str, InputSample | None] = {}
        self._moments: dict[str, Moment | None] = {}
        self._floats: Mapping[str, Tensor] = {}
        # The last input and what it made of what was known: layers that are given it next share the result.
        self._last: tuple[Tensor, _Gathered, _Gathered] | None = None

    def samples(self) -> dict[str, InputSample]:
        """Samples by weight; weights that saw no row are missing."""
        return {name: one for name, one in self._samples.items() if one is not None and one.seen}

    def moments(self) -> dict[str, Moment]:
        """Moments by weight, of an expert of a stack by "weight[e]"; those that saw no row are missing."""
        return {name: one for name, one in self._moments.items() if one is not None and one.seen}

    @contextmanager
    def collecting(self, floats: Mapping[str, Tensor] = MappingProxyType({})) -> Iterator[None]:
        """Hooks are on inside, and off afterwards whatever happens.

        Args:
            floats: what the float model has in the place of the layers' inputs in the one batch that is to
                run, by weight: [..., K].
        """
        handles = []
        self._floats = floats
        try:
            for name, module in self._linears.items():
                hook = partial(self._on_linear, name)
                handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for names, module in self._experts.items():
                expert_hook = partial(self._on_experts, names)
                handles.append(module.register_forward_pre_hook(expert_hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last, self._floats = None, {}

    def end_batch(self) -> None:
        """Let go of the last input."""
        self._last = None

    def _on_linear(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = input_of(args, kwargs)
        if isinstance(found, Tensor):
            self._add(name, found)

    def _add(self, name: str, found: Tensor, part: str = "") -> None:
        """Count an input of a weight, in moments of one part of it."""
        if not found.is_floating_point() or found.numel() == 0:
            return
        found = self._rotated(name, found)
        before = _Gathered(
            self._samples.get(name, self._nothing.sample),
            self._moments.get(name + part, self._nothing.moment),
        )
        last = self._last
        if (
            last is None
            or last[0] is not found
            or any(a is not b for a, b in zip(last[1], before, strict=True))
        ):
            self._last = last = (found, before, self._after(name, found, before))
        self._samples[name], self._moments[name + part] = last[2]

    def _rotated(self, name: str, found: Tensor) -> Tensor:
        block = self._rotations.get(name)
        return found if block is None else ops.block_hadamard(found.detach(), block)

    def _after(self, name: str, found: Tensor, before: _Gathered) -> _Gathered:
        least, most = found.detach().aminmax()
        largest = max(-float(least), float(most))
        if not math.isfinite(largest):
            raise ValueError(
                f"{name.removesuffix('.weight')}: expected finite values to reach this layer in calibration, "
                f"got NaN or Inf; check the data, or load the model in bfloat16 or float32 if it overflows "
                f"in float16"
            )
        floats = self._floats.get(name)
        if floats is not None:
            same = floats.shape == found.shape
            floats = self._rotated(name, floats).reshape(-1, floats.shape[-1]) if same else None
        return before.updated(found.reshape(-1, found.shape[-1]), largest, floats)

    def _on_experts(
        self, names: tuple[str, str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        first, down = names
        states = input_of(args, kwargs)
        if not isinstance(states, Tensor):
            return
        if names in self._sorted:
            count: Any = module.num_experts
            shares = states.view(count, -1, states.shape[-1])
            # Llama 4 multiplies tokens by 0 for the experts that they do not go to; such rows say nothing.
            routed = {e: share[share.any(-1)] for e, share in enumerate(shares)}
        else:
            index = args[1] if len(args) > 1 else kwargs.get("top_k_index", kwargs.get("router_indices"))
            if not isinstance(index, Tensor):
                return
            routed = {
                e: states[(index == e).any(-1)] for e in index.unique().tolist() if e < module.num_experts
            }
        for expert, state in routed.items():
            if len(state):
                self._add(first, state, f"[{expert}]")
                hidden = _down_input(module, first.rpartition(".")[2], state, expert, names in self._sorted)
                self._add(down, hidden, f"[{expert}]")


def _down_input(experts: nn.Module, key: str, state: Tensor, expert: int, is_sorted: bool) -> Tensor:
    """What reaches an expert's down projection, [T, K], by the formula of the float module.

    transformers multiplies whole stacks in one call, where no hook can see it.
    """
    weight: Any = getattr(experts, key)[expert]
    if not getattr(experts, "is_transposed", True):
        weight = weight.T
    state = state @ weight
    module: Any = experts
    if is_sorted:
        gate, up = state.chunk(2, dim=-1)
        hidden: Tensor = up * module.act_fn(gate)
        return hidden
    bias = experts._parameters.get(f"{key}_bias") if module.has_bias else None
    if bias is not None:
        state = state + bias[expert]
    activated: Tensor = module._apply_gate(state) if module.has_gate else module.act_fn(state)
    return activated
