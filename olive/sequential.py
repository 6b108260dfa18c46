"""Quantize a model layer by layer, each on the inputs that the layers before it give once they are quantized.

A model is cut into units: the members of its module lists that hold something to quantize (decoder layers,
say), and single layers outside of them. Units are taken in the order in which they run. Inside a unit,
layers that are given one and the same tensor (q, k and v) are one stage: moments of their inputs are
gathered, they are quantized and exchanged, and the next stage sees their outputs. So memory beyond the model
is that of one unit's second moments and of the unit's inputs on all calibration data.

A unit whose first input is what the unit before it returned is run on that, with the other arguments that it
was given once by the float model (masks, position embeddings). For any other unit the model runs up to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from olive.config import QuantConfig
from olive.nn import OVPExperts, OVPLinear
from olive.ptq.activations import set_activations
from olive.ptq.batches import Call, calibrating
from olive.ptq.calibration import InputCollector, InputSample
from olive.ptq.moments import Moment, SecondMoment
from olive.ptq.parameter import StoredWeight, quantize_parameter
from olive.walk import Target, exchange

Replacements = dict[nn.Module, nn.Module]
Done = Callable[[str, StoredWeight], None]


class _Stop(Exception):
    """Ends a run of the model where nothing after it is needed."""


@dataclass
class _Unit:
    """Something that is run by itself.

    Args:
        module: what runs.
        targets: what is to be quantized in it, in the order of `walk`.
        runs: how often it ran on the first batch.
        follows: whether its first input is the output of the unit before it, and no other argument is.
    """

    module: nn.Module
    targets: list[Target]
    runs: int = 0
    follows: bool = False
    calls: list[Call] = field(
        default_factory=list
    )  # of one batch each; the hidden states replaced if it follows

    @property
    def is_target(self) -> bool:
        return self.targets[0].module is self.module


def _units(model: nn.Module, targets: tuple[Target, ...]) -> list[_Unit]:
    """Members of the outermost module lists, and what is in none."""
    holder: dict[nn.Module, nn.Module] = {}
    for module in model.modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            for child in module.children():
                for inner in child.modules():
                    holder.setdefault(inner, child)
    units: dict[nn.Module, _Unit] = {}
    for target in targets:
        module = holder.get(target.module, target.module)
        units.setdefault(module, _Unit(module, [])).targets.append(target)
    return list(units.values())


def _hidden(call: Call) -> Any:
    """The argument that a layer transforms: its first one."""
    return call.args[0] if call.args else next(iter(call.kwargs.values()), None)


def _with_hidden(call: Call, hidden: Tensor | None) -> Call:
    if call.args:
        return Call((hidden, *call.args[1:]), call.kwargs)
    first = next(iter(call.kwargs))
    return Call((), {**call.kwargs, first: hidden})


def _first_tensor(output: Any) -> Tensor | None:
    output = output[0] if isinstance(output, (tuple, list)) and output else output
    return output if isinstance(output, Tensor) else None


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _tensors(one)


@contextmanager
def _hooks(handles: list[Any]) -> Iterator[None]:
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _order(model: nn.Module, units: list[_Unit], first: Call) -> list[_Unit]:
    """Units in the order in which they run on a batch, idle ones last; sets `runs` and `follows`."""
    started: list[_Unit] = []
    outputs: list[tuple[_Unit, Tensor]] = []  # kept, so that no tensor can take the identity of another

    def before(unit: _Unit, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        unit.runs += 1
        if unit.runs > 1:
            return
        call = Call(args, dict(kwargs))
        hidden = _hidden(call)
        others = list(_tensors((call.args[1:], call.kwargs)))
        if not call.args:
            others = [one for one in others if one is not hidden]
        made = {id(tensor): maker for maker, tensor in outputs}
        unit.follows = (
            bool(started)
            and made.get(id(hidden)) is started[-1]
            and not any(id(one) in made for one in others)
        )
        started.append(unit)

    def after(unit: _Unit, module: nn.Module, args: Any, output: Any) -> None:
        found = _first_tensor(output)
        if found is not None:
            outputs.append((unit, found))

    handles = []
    for unit in units:
        handles.append(
            unit.module.register_forward_pre_hook(
                lambda module, args, kwargs, unit=unit: before(unit, module, args, kwargs), with_kwargs=True
            )
        )
        handles.append(
            unit.module.register_forward_hook(
                lambda module, args, output, unit=unit: after(unit, module, args, output)
            )
        )
    with _hooks(handles):
        first(model)
    for previous, unit in zip([None, *started], started, strict=False):
        unit.follows = (
            unit.follows
            and previous is not None
            and unit.runs == previous.runs == 1
            and not previous.is_target
        )
    return started + [unit for unit in units if unit not in started]


def _record(model: nn.Module, call: Call, units: list[_Unit]) -> None:
    """Run the model up to the last of some units, and note what each is called with."""
    last = units[-1]

    def note(unit: _Unit, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = Call(args, dict(kwargs))
        unit.calls.append(_with_hidden(found, None) if unit.follows else found)
        if unit is last:
            raise _Stop

    handles = [
        unit.module.register_forward_pre_hook(
            lambda module, args, kwargs, unit=unit: note(unit, args, kwargs), with_kwargs=True
        )
        for unit in units
    ]
    with _hooks(handles):
        try:
            call(model)
        except _Stop:
            return


class SequentialQuantizer:
    """Runs the model, quantizes, and keeps what came out; the model is whole again at the end.

    Args:
        model: float; while this runs some of its modules are exchanged.
        targets: what to quantize.
        config: how; method "gptq".
        calls: calibration data.
        done: called with the name and the stored form of each weight as it is finished.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: tuple[Target, ...],
        config: QuantConfig,
        calls: list[Call],
        done: Done,
    ) -> None:
        self._model, self._targets, self._config = model, targets, config
        self._calls, self._done = calls, done
        self._replacements: Replacements = {}
        self._undo: list[Callable[[], None]] = []

    def run(self) -> Replacements:
        """Quantized modules by the float ones; only on an error, and at the end, is the model as it was."""
        try:
            with calibrating(self._model):
                self._run()
        finally:
            for put_back in reversed(self._undo):
                put_back()
        return self._replacements

    def _run(self) -> None:
        units = _order(self._model, _units(self._model, self._targets), self._calls[0])
        followers = [unit for unit in units if unit.follows]
        if followers:  # what they are given beside the hidden states does not depend on quantized layers
            for call in self._calls:
                _record(self._model, call, followers)
        outputs: list[Tensor | None] = []
        floats: list[Tensor | None] = []
        for number, unit in enumerate(units):
            wanted = number + 1 < len(units) and units[number + 1].follows
            if unit.runs == 0:
                self._quantize_unreached(unit)
            elif unit.is_target or unit.runs > 1:
                self._quantize(unit, self._calls, self._model)
            else:
                if unit.follows:
                    exact = [_with_hidden(call, one) for call, one in zip(unit.calls, floats, strict=True)]
                    unit.calls = [
                        _with_hidden(call, hidden) for call, hidden in zip(unit.calls, outputs, strict=True)
                    ]
                else:
                    for call in self._calls:
                        _record(self._model, call, [unit])
                    exact = unit.calls
                self._quantize(unit, unit.calls, unit.module, exact)
                outputs = [_first_tensor(call(unit.module)) for call in unit.calls] if wanted else []
                if wanted:
                    with self._float_again(unit):
                        floats = [_first_tensor(call(unit.module)) for call in exact]
            unit.calls = []

    @contextmanager
    def _float_again(self, unit: _Unit) -> Iterator[None]:
        """The float modules are back in a unit."""
        back: Replacements = {
            self._replacements[target.module]: target.module
            for target in unit.targets
            if target.module in self._replacements
        }
        put_back = exchange(unit.module, back)
        try:
            yield
        finally:
            put_back()

    def _quantize_unreached(self, unit: _Unit) -> None:
        for target in unit.targets:
            self._exchange(target, {}, {})

    def _quantize(
        self, unit: _Unit, calls: list[Call], runner: nn.Module, exact: list[Call] | None = None
    ) -> None:
        """Stage by stage; `exact` are the calls that the float model makes, if they are known."""
        stages, unreached = _stages(unit.targets, calls[0], runner)
        if unreached:  # by the first batch; another may reach them
            stages.append(unreached)
        for stage in stages:
            stop = stage[-1].module if unit.runs == 1 and stage is not unreached else None
            found = self._gather(stage, calls, runner, stop, (unit, exact) if exact else None)
            for target in stage:
                if target.kind in ("linear", "conv1d"):
                    self._exchange(target, found.samples(), found.moments())
                else:
                    self._exchange_experts(target, found, calls, runner, stop)

    def _gather(
        self,
        stage: list[Target],
        calls: list[Call],
        runner: nn.Module,
        stop: nn.Module | None,
        beside: tuple[_Unit, list[Call]] | None = None,
    ) -> InputCollector:
        """Moments and samples of what reaches a stage, on all data."""
        format = self._config.activation_format
        collector = collector_for(stage, sample=format is not None, moment=SecondMoment())

        def end(module: nn.Module, args: Any) -> None:
            raise _Stop

        for number, call in enumerate(calls):
            if beside is not None:
                unit, exact = beside
                with self._float_again(unit):
                    collector.floats = _inputs_of(stage, exact[number], runner, stop)
            with (
                collector.collecting(),
                # Evaluated after that: hooks run in the order of registration.
                _hooks([] if stop is None else [stop.register_forward_pre_hook(end)]),
                suppress(_Stop),
            ):
                call(runner)
            collector.floats = {}
        return collector

    def _exchange_experts(
        self,
        target: Target,
        found: InputCollector,
        calls: list[Call],
        runner: nn.Module,
        stop: nn.Module | None,
    ) -> None:
        """Two stages in one module: the second projection's inputs come from the first one, quantized."""
        first, down = target.parameters()
        new = target.replacement(self._config)
        weights = target.weights(new)
        self._store(first, target, weights, found.samples(), found.moments())
        key = first.rpartition(".")[2]
        original = target.module._parameters[key]
        assert original is not None
        decoded = weights[first].to_float()
        target.module._parameters[key] = nn.Parameter(decoded.to(original.dtype), requires_grad=False)
        try:
            again = self._gather([target], calls, runner, stop)
        finally:
            target.module._parameters[key] = original
        self._store(down, target, weights, again.samples(), again.moments())
        self._put(target, new)

    def _exchange(self, target: Target, samples: dict[str, InputSample], moments: dict[str, Moment]) -> None:
        new = target.replacement(self._config)
        weights = target.weights(new)
        for name in target.parameters():
            self._store(name, target, weights, samples, moments)
        self._put(target, new)

    def _store(
        self,
        name: str,
        target: Target,
        weights: dict[str, Any],
        samples: dict[str, InputSample],
        moments: dict[str, Moment],
    ) -> None:
        weight, parameter = weights[name], target.parameters()[name]
        try:
            stored = quantize_parameter(
                parameter, self._config, transposed=weight.transposed, name=name, moments=moments
            )
            weight.set_(stored.codes, stored.scale, stored.codebook)
            weight.sqnr_db = stored.sqnr_db
            if name in samples:
                set_activations(weight, samples[name], parameter)
            weight.pack_()
        except BaseException as error:
            error.add_note(f"while quantizing {name}; the model is as it was")
            raise
        self._done(name, stored)

    def _put(self, target: Target, new: OVPLinear | OVPExperts) -> None:
        new.train(target.module.training)
        self._undo.append(exchange(self._model, {target.module: new}))
        self._replacements[target.module] = new


def _inputs_of(
    stage: list[Target], call: Call, runner: nn.Module, stop: nn.Module | None
) -> dict[str, Tensor]:
    """What reaches layers in one run, by weight; not experts: the router may send tokens elsewhere."""
    found: dict[str, Tensor] = {}

    def note(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = _hidden(Call(args, kwargs))
        if isinstance(hidden, Tensor) and target.kind in ("linear", "conv1d"):
            found[next(iter(target.parameters()))] = hidden
        if target.module is stop:
            raise _Stop

    handles = [
        target.module.register_forward_pre_hook(
            lambda module, args, kwargs, target=target: note(target, args, kwargs), with_kwargs=True
        )
        for target in stage
    ]
    with _hooks(handles), suppress(_Stop):
        call(runner)
    return found


def _stages(targets: list[Target], call: Call, runner: nn.Module) -> tuple[list[list[Target]], list[Target]]:
    """Targets in the order in which they run, those of one input together; and those that do not run."""
    stages: list[list[Target]] = []
    inputs: list[Tensor] = []  # kept, as above
    seen: set[nn.Module] = set()

    def note(target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if target.module in seen:
            return
        seen.add(target.module)
        hidden = _hidden(Call(args, kwargs))
        if (
            stages
            and target.kind == stages[-1][0].kind
            and inputs[-1] is hidden
            and "experts" not in target.kind
        ):
            stages[-1].append(target)
            return
        stages.append([target])
        inputs.append(hidden)

    handles = [
        target.module.register_forward_pre_hook(
            lambda module, args, kwargs, target=target: note(target, args, kwargs), with_kwargs=True
        )
        for target in targets
    ]
    with _hooks(handles):
        call(runner)
    return stages, [target for target in targets if target.module not in seen]


def collector_for(targets: list[Target], *, sample: bool, moment: Moment | None) -> InputCollector:
    """An `InputCollector` of the inputs of some targets."""
    linears, experts, sorted_experts = {}, {}, set()
    for target in targets:
        names = tuple(target.parameters())
        if len(names) == 1:
            linears[names[0]] = target.module  # a layer, which has one weight
        else:
            first, down = names
            experts[first, down] = target.module
            if target.kind == "sorted_experts":
                sorted_experts.add((first, down))
    return InputCollector(linears, experts, frozenset(sorted_experts), sample=sample, moment=moment)
