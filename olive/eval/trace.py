"""Who reads the output of each norm: every operator of one run is looked at.

Hooks would show only what modules get; residual additions, multiplications by routing scores and the like
are operators between modules. A dispatch mode sees those as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from olive.eval.norms import Call
from olive.eval.readers import Reader
from olive.ptq.batches import tensors_in

_aten = torch.ops.aten
_COPIES = {_aten.clone, _aten._to_copy}  # the same channels at another place
_SHAPE_ONLY = {_aten.zeros_like, _aten.ones_like, _aten.empty_like, _aten.new_zeros, _aten.new_empty}
_PRODUCTS = {_aten.mm, _aten.addmm, _aten.bmm, _aten.matmul, _aten.linear}


@dataclass
class Reads:
    """What became of one norm's output.

    Args:
        call: arguments of the norm's first call, None if it was not called.
        readers: modules that multiplied it by their weight; keys, in order of appearance.
        obstacle: the first thing that keeps its channels from being scaled, in words.
    """

    call: Call | None = None
    readers: dict[nn.Module, None] = field(default_factory=dict)
    obstacle: str | None = None

    def object_to(self, obstacle: str) -> None:
        """Note an obstacle, unless there is one already."""
        self.obstacle = self.obstacle or obstacle


def trace(
    model: nn.Module,
    run: Callable[[], object],
    norms: Mapping[nn.Module, str],
    readers: Mapping[nn.Module, Reader],
) -> tuple[dict[nn.Module, Reads], list[Tensor]]:
    """Run a model once and follow the outputs of its norms.

    Args:
        model: in eval mode, gradients off.
        run: calls it.
        norms: modules whose outputs are followed, with their names.
        readers: modules that may read them.

    Returns:
        What became of each norm's output, and the tensors that `run` returned.
    """
    tracer = _Tracer(norms, readers)
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_pre_hook(tracer.entering(name), with_kwargs=True).remove)
            hooks.callback(module.register_forward_hook(tracer.leaving, with_kwargs=True).remove)
        with tracer:
            output = list(tensors_in(run()))
    tracer.finish(output)
    return tracer.reads, output


class _Tracer(TorchDispatchMode):
    """Follows tensors by their memory, so that views are the tensor they look at."""

    def __init__(self, norms: Mapping[nn.Module, str], readers: Mapping[nn.Module, Reader]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.reads = {norm: Reads() for norm in norms}
        self._readers = readers
        self._stack: list[tuple[str, nn.Module]] = []
        self._norms: dict[int, nn.Module] = {}  # by memory: whose output it holds
        self._matrices = {_memory(reader.weight): module for module, reader in readers.items()}
        self._inputs: dict[nn.Module, set[nn.Module | None]] = {}  # whose outputs each reader got
        self._kept: list[Tensor] = []  # memory that is followed must not be given to another tensor

    def entering(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
        """A forward pre-hook for the module of this name."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._stack.append((name, module))
            if module in self._readers:
                floats = (one for one in tensors_in((args, kwargs)) if one.is_floating_point())
                origin = next((self._norms.get(_memory(one)) for one in floats), None)
                self._inputs.setdefault(module, set()).add(origin)

        return hook

    def leaving(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """A forward hook for every module."""
        self._stack.pop()
        reads = self.reads.get(module)
        if reads is None:
            return
        if reads.call is None:
            reads.call = args, kwargs
        width = len(module._parameters["weight"])  # type: ignore[arg-type]  # a norm has one
        if isinstance(output, Tensor) and output.is_floating_point() and output.shape[-1:] == (width,):
            self._follow(output, module, self._norms)
        else:
            reads.object_to("its output is not one tensor with a channel for each of its weights")

    def _follow(self, tensor: Tensor, module: nn.Module, where: dict[int, nn.Module]) -> None:
        where[_memory(tensor)] = module
        self._kept.append(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = list(tensors_in((args, kwargs or {})))
        result = func(*args, **(kwargs or {}))
        places = [_memory(tensor) for tensor in given]
        is_view = not func._schema.is_mutable and any(_memory(one) in places for one in tensors_in(result))
        if is_view or func.overloadpacket in _SHAPE_ONLY:
            return result
        for place in places:
            if func.overloadpacket in _COPIES:
                for where in (self._norms, self._matrices):
                    if place in where:
                        self._follow(result, where[place], where)
            elif place in self._norms:
                self._note(self._norms[place], func, places)
        return result

    def _note(self, norm: nn.Module, func: Any, places: list[int]) -> None:
        name, module = self._stack[-1] if self._stack else ("", None)
        reader = None if module is None else self._readers.get(module)
        reads = self.reads[norm]
        if module is None or reader is None:
            reads.object_to(f"read by {func.overloadpacket} in {name or 'the model'}")
        elif reader.tied_to is not None:
            reads.object_to(f"read by {name}, whose weight is tied to {reader.tied_to}")
        elif reader.known or (
            func.overloadpacket in _PRODUCTS and any(self._matrices.get(place) is module for place in places)
        ):
            reads.readers[module] = None
        else:
            reads.object_to(f"read by {func.overloadpacket} in {name}")

    def finish(self, output: list[Tensor]) -> None:
        """Note what can be said only at the end."""
        for tensor in output:
            if (norm := self._norms.get(_memory(tensor))) is not None:
                self.reads[norm].object_to("its output is an output of the model")
        for norm, reads in self.reads.items():
            width = len(norm._parameters["weight"])  # type: ignore[arg-type]
            for module in reads.readers:
                reader = self._readers[module]
                if self._inputs[module] != {norm}:
                    reads.object_to(f"read by {reader.name}, which reads other tensors as well")
                elif reader.weight.shape[reader.dim] != width:
                    reads.object_to(f"read by {reader.name} in another shape")


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
