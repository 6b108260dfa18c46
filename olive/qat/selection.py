"""Which layers of a model are trained on levels, in which role, and which are left alone and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from olive.config import QuantConfig
from olive.frameworks import framework_models
from olive.qat.config import QATConfig
from olive.walk import Skipped, output_heads, skip_matches, walk

Role = Literal["body", "ends"]
_NOT_CONVERTIBLE = "experts: quantization-aware training of stacked experts is not supported"
_GROUPED = "grouped or dilated convolution, or a padding that is not a number of zeros"
_READ = "torch's Transformer layer reads this weight without calling the layer"
_ADAPTER = "adapter"
_ENDS = "first or last layer, and first_last_bits is None"


@dataclass(frozen=True)
class Layer:
    """A layer to quantize.

    Args:
        name: its full name.
        module: nn.Linear, transformers' Conv1D, nn.Conv2d or nn.Embedding.
        role: "ends" for the layer that reads the model's input and for its heads.
    """

    name: str
    module: nn.Module
    role: Role


@dataclass(frozen=True)
class Selection:
    """What `select` found.

    Args:
        layers: to quantize.
        skipped: everything else with parameters, with the reason.
        share: of all parameter values those in the weights of `layers`, 0 to 1.
    """

    layers: tuple[Layer, ...]
    skipped: tuple[Skipped, ...]
    share: float


def is_plain(module: nn.Module, base: type[nn.Module]) -> bool:
    """Whether a module is of a class, and computes as that does."""
    return (
        isinstance(module, base)
        and type(module).forward is base.forward
        and "forward" not in vars(module)
        and module._parameters.get("weight") is not None
    )


def _convertible(module: nn.Module) -> bool:
    assert isinstance(module, nn.Conv2d)
    padded = module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return module.groups == 1 and set(module.dilation) == {1} and padded


def _is_table(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _multiplying(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, one in module.named_modules():
        if any(is_plain(one, base) for base in (nn.Linear, nn.Conv2d, nn.Embedding)):
            yield name, one


def _ends(model: nn.Module) -> set[nn.Module]:
    """Layers that read a model's input, and its heads.

    Of a transformers model the modules in its input embeddings, its output embeddings, and, where it has
    none, the linear layers outside of its base model; of any other the first and the last layer.
    """
    found: set[nn.Module] = set()
    models = [wrapped for _, wrapped in framework_models(model)]
    for wrapped in models:
        getter: Callable[[], nn.Module | None] = wrapped.get_input_embeddings  # type: ignore[assignment]
        try:
            first = getter()
        except NotImplementedError:
            first = None
        if first is not None:
            inner = [one for _, one in _multiplying(first)]
            tables = {id(one.weight) for one in inner if isinstance(one, nn.Embedding)}
            found.update(inner)
            found.update(
                one for _, one in _multiplying(wrapped) if _is_table(one) and id(one.weight) in tables
            )
        heads = output_heads(wrapped)
        base = getattr(wrapped, str(getattr(wrapped, "base_model_prefix", "")), None)
        if not heads and isinstance(base, nn.Module):
            inside = set(base.modules())
            heads = {id(one) for _, one in _multiplying(wrapped) if one not in inside}
        found.update(one for _, one in _multiplying(wrapped) if id(one) in heads)
    if not models:
        layers = [one for _, one in _multiplying(model)]
        found.update(layers[:1] + layers[-1:])
    return found


def select(model: nn.Module, config: QATConfig) -> Selection:
    """Sort the modules of a float model: what `prepare` would quantize, and what it would leave alone and
    why.

    Args:
        model: any module.
        config: `skip` and `first_last_bits` decide.
    """
    inventory = walk(model, QuantConfig(skip=config.skip))
    ends = _ends(model)
    linear = {
        target.module: target.name for target in inventory.targets if target.kind in ("linear", "conv1d")
    }
    layers: list[Layer] = []
    skipped: list[Skipped] = []
    reasons = {one.name: one for one in inventory.skipped}
    read = {
        part
        for module in model.modules()
        if isinstance(module, (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer))
        for part in (module.linear1, module.linear2)
    }
    for name, module in model.named_modules():
        reason: str | None
        if module in read:
            reason = _READ
        elif _is_adapter(name) and module in linear:
            reason = _ADAPTER
        elif module in ends:
            reason = _reason_at_an_end(name, module, config)
        elif module in linear:
            reason = None
        elif is_plain(module, nn.Conv2d):
            reason = _reason(name, config) or (None if _convertible(module) else _GROUPED)
        elif name in reasons:
            reason = reasons[name].reason
        elif any(target.module is module for target in inventory.targets):
            reason = _NOT_CONVERTIBLE
        else:
            continue
        if reason is None:
            layers.append(Layer(name, module, "ends" if module in ends else "body"))
        else:
            own = sum(one.numel() for one in module._parameters.values() if one is not None)
            skipped.append(Skipped(name, own, reason))
    weights = {id(layer.module.weight): layer.module.weight for layer in layers}
    values = sum(weight.numel() for weight in weights.values())  # type: ignore[operator, misc]
    total = sum(parameter.numel() for parameter in model.parameters())
    return Selection(tuple(layers), tuple(skipped), values / total if total else 0.0)


def _is_adapter(name: str) -> bool:
    """Whether PEFT put this layer beside another one."""
    return any(part.startswith("lora_") for part in name.split("."))


def _reason(name: str, config: QATConfig) -> str | None:
    entry = skip_matches(name, config.skip)
    return None if entry is None else f'skip holds "{entry}"'


def _reason_at_an_end(name: str, module: nn.Module, config: QATConfig) -> str | None:
    if config.first_last_bits is None:
        return _ENDS
    if isinstance(module, nn.Conv2d) and not _convertible(module):
        return _GROUPED
    return _reason(name, config)
