"""Quantize a model layer by layer, each on the inputs that the layers before it give once they are quantized.

A model is cut into units: the members of its module lists that hold something to quantize (decoder layers,
say), and single layers outside of them. Units are taken in the order in which they run. Inside a unit,
layers that are given one and the same tensor (q, k and v) are one stage: moments of their inputs are
gathered, they are quantized and exchanged, and the next stage sees their outputs. So memory beyond the model
is that of one unit's second moments, of the unit's inputs on all calibration data, and of the packed weights.

A unit whose first input is what the unit before it returned is run on that, with the other arguments that it
was given once by the float model (masks, position embeddings). For any other unit the model runs up to it.

The float unit runs beside it: on what the float unit before it returned, or, where a unit does not follow
another one, on the same inputs. So layers are told how far their inputs have drifted, since the beginning of
the chain of units that they are in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from olive.config import QuantConfig
from olive.nn import OVPExperts, OVPLinear, OVPWeight
from olive.ptq.batches import Call, calibrating, tensors_in
from olive.ptq.calibration import InputCollector, InputSample, input_of
from olive.ptq.moments import Moment, SecondMoment
from olive.ptq.parameter import StoredWeight, quantize_into
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
    # Of one batch each. Of a unit that follows, without the first input until the unit before it is done.
    calls: list[Call] = field(default_factory=list)

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


def _with_hidden(call: Call, hidden: Tensor | None) -> Call:
    if call.args:
        return Call((hidden, *call.args[1:]), call.kwargs)
    first = next(iter(call.kwargs))
    return Call((), {**call.kwargs, first: hidden})


def _first_tensor(output: Any) -> Tensor | None:
    output = output[0] if isinstance(output, (tuple, list)) and output else output
    return output if isinstance(output, Tensor) else None


@contextmanager
def _watching(hooks: Iterable[tuple[nn.Module, Callable[[Call], None]]]) -> Iterator[None]:
    """Inside, each function is told what its module is about to be called with."""

    def told(watch: Callable[[Call], None], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        watch(Call(args, dict(kwargs)))

    handles = [
        module.register_forward_pre_hook(partial(told, watch), with_kwargs=True) for module, watch in hooks
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _order(model: nn.Module, units: list[_Unit], first: Call) -> list[_Unit]:
    """Units in the order in which they run on a batch, idle ones last; sets `runs` and `follows`."""
    started: list[_Unit] = []
    outputs: list[tuple[_Unit, Tensor]] = []  # kept, so that no tensor can take the identity of another

    def before(unit: _Unit, call: Call) -> None:
        unit.runs += 1
        if unit.runs > 1:
            return
        hidden = input_of(*call)
        others = [one for one in tensors_in(tuple(call)) if one is not hidden]
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

    handles = [unit.module.register_forward_hook(partial(after, unit)) for unit in units]
    try:
        with _watching((unit.module, partial(before, unit)) for unit in units):
            first(model)
    finally:
        for handle in handles:
            handle.remove()
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

    def note(unit: _Unit, found: Call) -> None:
        unit.calls.append(_with_hidden(found, None) if unit.follows else found)
        if unit is last:
            raise _Stop

    with _watching((unit.module, partial(note, unit)) for unit in units), suppress(_Stop):
        call(model)


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
        """Stage by stage; `exact` are the calls that the float modules get, None if they do not run."""
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
        collector = collector_for(stage, self._config, sample=format is not None, moment=SecondMoment())

        def end(call: Call) -> None:
            raise _Stop

        for number, call in enumerate(calls):
            floats: dict[str, Tensor] = {}
            if beside is not None:
                unit, exact = beside
                with self._float_again(unit):
                    floats = _inputs_of(stage, exact[number], runner, stop)
            # The stop after the collector: hooks run in the order of registration.
            with (
                collector.collecting(floats),
                _watching([] if stop is None else [(stop, end)]),
                suppress(_Stop),
            ):
                call(runner)
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
        weights: dict[str, OVPWeight],
        samples: dict[str, InputSample],
        moments: dict[str, Moment],
    ) -> None:
        try:
            stored = quantize_into(
                weights[name],
                target.parameters()[name],
                self._config,
                name=name,
                samples=samples,
                moments=moments,
            )
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

    def note(target: Target, call: Call) -> None:
        hidden = input_of(*call)
        if isinstance(hidden, Tensor) and target.kind in ("linear", "conv1d"):
            found[next(iter(target.parameters()))] = hidden
        if target.module is stop:
            raise _Stop

    with _watching((target.module, partial(note, target)) for target in stage), suppress(_Stop):
        call(runner)
    return found


def _stages(targets: list[Target], call: Call, runner: nn.Module) -> tuple[list[list[Target]], list[Target]]:
    """Targets in the order in which they run, those of one input together; and those that do not run."""
    stages: list[list[Target]] = []
    inputs: list[Tensor] = []  # kept, as above
    seen: set[nn.Module] = set()

    def note(target: Target, call: Call) -> None:
        if target.module in seen:
            return
        seen.add(target.module)
        hidden = input_of(*call)
        together = bool(stages) and inputs[-1] is hidden and target.kind == stages[-1][0].kind
        if together and target.kind in ("linear", "conv1d"):
            stages[-1].append(target)
            return
        stages.append([target])
        inputs.append(hidden)

    with _watching((target.module, partial(note, target)) for target in targets):
        call(runner)
    return stages, [target for target in targets if target.module not in seen]


def collector_for(
    targets: list[Target], config: QuantConfig, *, sample: bool, moment: Moment | None
) -> InputCollector:
    """An `InputCollector` of the inputs of some targets, as their quantized layers will see them."""
    linears, experts, sorted_experts = {}, {}, set()
    rotations: dict[str, int] = {}
    for target in targets:
        rotations.update(target.input_rotations(config))
        names = tuple(target.parameters())
        if len(names) == 1:
            linears[names[0]] = target.module  # a layer, which has one weight
        else:
            first, down = names
            experts[first, down] = target.module
            if target.kind == "sorted_experts":
                sorted_experts.add((first, down))
    return InputCollector(
        linears, experts, frozenset(sorted_experts), rotations, sample=sample, moment=moment
    )
