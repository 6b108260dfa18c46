"""Which modules of a model are quantized, which are left alone, and why: one rule for everybody who asks.

`olive.quantize`, the loader of checkpoints and the report all call `walk`. It looks at names, classes, shapes
and shared parameters, never at values, so it gives the same answer for a model on the meta device, for the
model with its weights, and (modules found as `quantized` instead of `targets`) after quantization.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import Tensor, nn

from olive.config import QuantConfig
from olive.nn import (
    ACTIVATION_TENSORS,
    EXPERT_WEIGHTS,
    WEIGHT_TENSORS,
    OVPExperts,
    OVPLinear,
    OVPSortedExperts,
    OVPWeight,
)
from olive.nn.ovp_linear import OVPConv1D
from olive.ops import block_size

Kind = Literal["linear", "conv1d", "experts", "sorted_experts"]
HEAD = "lm_head"  # in `QuantConfig.skip` it stands for the output head, whatever the model calls it
VECTORS = "vectors only (norms, biases)"
EMBEDDING = "embedding: rows are looked up, not multiplied"
ROTATED_ONLINE = "down_proj"  # the last part of its name, of a layer as of a stack of experts
_CONFIG = "_olive_config"
_EXPERT_TRAITS = ("has_gate", "has_bias", "is_transposed", "num_experts", "config")


@dataclass(frozen=True)
class Target:
    """A module to quantize, or one that is quantized already.

    Args:
        name: its full name in the model (the first one, if it is registered twice).
        module: the module.
        kind: what it is.
    """

    name: str
    module: nn.Module
    kind: Kind

    def replacement(self, config: QuantConfig) -> OVPLinear | OVPExperts:
        """An empty quantized module for this one, which is not changed."""
        group_size, bits, activations = config.group_size, config.bits, config.activation_format
        new: OVPLinear | OVPExperts
        if self.kind in ("linear", "conv1d"):
            linear = OVPLinear if self.kind == "linear" else OVPConv1D
            new = linear.from_linear(self.module, group_size, bits=bits, activations=activations)
        else:
            experts = OVPSortedExperts if self.kind == "sorted_experts" else OVPExperts
            new = experts.from_experts(self.module, group_size, bits=bits, activations=activations)
        weights = self.weights(new)
        for name, block in self.input_rotations(config).items():
            weights[name].input_rotation = block
        return new

    def input_rotations(self, config: QuantConfig) -> dict[str, int]:
        """Columns of the blocks in which inputs are rotated, by the full name of the float parameter.

        Raises:
            ValueError: a `down_proj` with an odd number of columns, which no block but 1 divides.
        """
        if not config.rotate_online:
            return {}
        transposed = self.kind == "conv1d" or (
            self.kind != "linear" and bool(getattr(self.module, "is_transposed", True))
        )
        found = {}
        for name, weight in self.parameters().items():
            if name.removesuffix(".weight").rpartition(".")[2] == ROTATED_ONLINE:
                columns = int(weight.shape[-2 if transposed else -1])
                if columns % 2:
                    raise ValueError(
                        f"{name}: expected an even number of columns to rotate online, got {columns}; use "
                        f"rotate_online=False"
                    )
                found[name] = block_size(columns)
        return found

    def parameters(self) -> dict[str, Tensor]:
        """The float parameters to quantize by full name, [N, K] or [E, N, K] (in Conv1D transposed)."""
        keys = ("weight",) if self.kind in ("linear", "conv1d") else EXPERT_WEIGHTS
        found = {join(self.name, key): self.module._parameters.get(key) for key in keys}
        return {full: value for full, value in found.items() if value is not None}

    def weights(self, quantized: OVPLinear | OVPExperts | None = None) -> dict[str, OVPWeight]:
        """Quantized weights by the full name of the float parameter each stands for.

        Args:
            quantized: this target's replacement; None if the target itself is quantized already.
        """
        module = self.module if quantized is None else quantized
        assert isinstance(module, (OVPLinear, OVPExperts))
        return {join(self.name, key): weight for key, weight in module.weights().items()}


@dataclass(frozen=True)
class Skipped:
    """A module with parameters of its own that stays as it is.

    Args:
        name: its full name; "" is the model itself.
        parameters: values it holds itself; those shared with a module met earlier count there.
        reason: why it is not quantized.
    """

    name: str
    parameters: int
    reason: str


@dataclass(frozen=True)
class Inventory:
    """What `walk` found. Values of shared parameters count once.

    Args:
        targets: modules to quantize.
        quantized: modules that are quantized already.
        skipped: all others that hold parameters.
        quantizable_values: float values in the weights of targets and quantized modules.
        total_values: those, their biases, and the parameters of the skipped modules.
    """

    targets: tuple[Target, ...]
    quantized: tuple[Target, ...]
    skipped: tuple[Skipped, ...]
    quantizable_values: int
    total_values: int

    @property
    def share(self) -> float:
        """Share of all parameter values that are, or would be, quantized: 0 to 1."""
        return self.quantizable_values / self.total_values if self.total_values else 0.0


def join(prefix: str, name: str) -> str:
    """Full name of `name` inside `prefix`."""
    return f"{prefix}.{name}" if prefix else name


def attach_config(model: nn.Module, config: QuantConfig | None) -> None:
    """Remember on the model what it was quantized with; None forgets it."""
    if config is None:
        vars(model).pop(_CONFIG, None)
    else:
        vars(model)[_CONFIG] = config


def attached_config(model: nn.Module) -> QuantConfig | None:
    """What `attach_config` remembered on this model."""
    return vars(model).get(_CONFIG)


def skip_matches(name: str, skip: tuple[str, ...]) -> str | None:
    """The entry of `skip` that leaves the module called `name` alone, or None.

    An entry is a full name, the last parts of one, or a pattern with *; it holds for everything inside the
    module it names.
    """
    parts = name.split(".")
    for end in range(1, len(parts) + 1):
        path = ".".join(parts[:end])
        for entry in skip:
            if path == entry or path.endswith(f".{entry}"):
                return entry
            if "*" in entry and (fnmatchcase(path, entry) or fnmatchcase(path, f"*.{entry}")):
                return entry
    return None


def check_skip(model: nn.Module, skip: tuple[str, ...]) -> None:
    """Refuse entries that no module of the model matches: most likely a slip of the pen.

    Raises:
        ValueError: such an entry, "lm_head" apart, which is in the default.
    """
    names = [name for name, _ in model.named_modules() if name]
    for entry in skip:
        if entry != HEAD and not any(skip_matches(name, (entry,)) for name in names):
            raise ValueError(
                f"skip: expected names of modules in the model, got {entry!r}, which matches none"
            )


def exchange(model: nn.Module, replacements: dict[nn.Module, nn.Module]) -> Callable[[], None]:
    """Put new modules wherever the old ones are registered.

    Returns:
        What puts the old ones back.
    """
    places = [
        (parent, key, child)
        for parent in model.modules()
        for key, child in parent._modules.items()
        if child is not None and child in replacements
    ]

    def undo() -> None:
        for parent, key, child in places:
            parent._modules[key] = child

    try:
        for parent, key, child in places:
            parent._modules[key] = replacements[child]
    except BaseException:  # Ctrl-C
        undo()
        raise
    return undo


def _known_class(module: str, name: str) -> type | None:
    """A class of another library if that is imported; no module of the class exists otherwise."""
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None


def _classify_linear(module: nn.Module, base: type[nn.Module], kind: Kind) -> Kind | str:
    name = type(module).__name__
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"{name}: nn.MultiheadAttention uses its weight without calling it"
    if "forward" in vars(module) or type(module).forward is not base.forward:
        return f"{name}: its forward is not that of {base.__name__}"
    weight = module._parameters.get("weight")
    if weight is None:
        return f"{name}: its weight is computed (parametrized), not stored"
    if set(module._parameters) - {"weight", "bias"} or module._buffers or module._modules:
        return f"{name}: holds more than weight and bias"
    if weight.dim() != 2 or 0 in weight.shape:
        return f"{name}: weight of shape {tuple(weight.shape)}"
    return kind


def _classify_experts(module: nn.Module) -> Kind | str:
    name = type(module).__name__
    llama4 = _known_class("transformers.models.llama4.modeling_llama4", "Llama4TextExperts")
    sorted_experts = llama4 is not None and type(module) is llama4
    if not sorted_experts:
        known = all(hasattr(module, trait) for trait in _EXPERT_TRAITS) and hasattr(module, "_apply_gate")
        # The decorator of transformers' experts interface leaves the eager forward as __wrapped__.
        if not known or "forward" in vars(module) or not hasattr(type(module).forward, "__wrapped__"):
            return f"{name}: 3-D parameters, but not a class of transformers' experts interface"
        if getattr(module, "_is_expert_parallel", False):
            return f"{name}: its experts are spread over devices; quantize before distributing"
    up = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    held = {key: value for key, value in module._parameters.items() if value is not None}
    stacks = {key: value.shape for key, value in held.items() if value.dim() > 2}
    if set(stacks) != {up, "down_proj"}:
        return f"{name}: expected 3-D parameters {up} and down_proj, got {', '.join(sorted(stacks))}"
    if any(len(shape) != 3 or 0 in shape for shape in stacks.values()):
        return f"{name}: parameters that are not stacks of matrices"
    return "sorted_experts" if sorted_experts else "experts"


def _classify(module: nn.Module) -> Kind | str:
    """The kind of a module that can be quantized, or the reason why it cannot."""
    name = type(module).__name__
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return EMBEDDING
    if isinstance(module, nn.Linear):
        return _classify_linear(module, nn.Linear, "linear")
    conv1d = _known_class("transformers.pytorch_utils", "Conv1D")
    if conv1d is not None and isinstance(module, conv1d):
        return _classify_linear(module, conv1d, "conv1d")
    parameters = [value for value in module._parameters.values() if value is not None]
    if all(value.dim() < 2 for value in parameters):
        return VECTORS
    if isinstance(module, nn.modules.conv._ConvNd):
        return f"{name}: convolution kernels are not quantized"
    if isinstance(module, nn.MultiheadAttention):
        return f"{name}: computes with its in_proj weights itself"
    if any(key in module._parameters for key in EXPERT_WEIGHTS) or any(
        sum(size > 1 for size in value.shape) > 2 for value in parameters
    ):
        return _classify_experts(module)
    return f"{name}: not one of the classes that can be quantized"


KINDS: tuple[Kind, ...] = ("linear", "conv1d", "experts", "sorted_experts")


def output_heads(model: nn.Module) -> set[int]:
    """Ids of the modules that transformers models in `model` call their output embeddings."""
    heads = set()
    for module in model.modules():
        getter = getattr(type(module), "get_output_embeddings", None)
        if getter is None:
            continue
        try:
            head = getter(module)
        except (AttributeError, NotImplementedError):  # models without a head say so in either way
            continue
        if isinstance(head, nn.Module):
            heads.add(id(head))
    return heads


def _declared_ties(model: nn.Module) -> dict[str, str]:
    """Parameters that transformers ties once they are loaded: full name -> full name of the partner."""
    ties: dict[str, str] = {}
    for prefix, module in model.named_modules():
        declared = vars(module).get("all_tied_weights_keys")
        if isinstance(declared, dict):
            ties.update({join(prefix, target): join(prefix, source) for target, source in declared.items()})
    return ties


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with parameters of their own, a quantized one as a whole, each once."""
    inside: set[int] = set()
    for name, module in model.named_modules():
        if isinstance(module, OVPExperts):
            inside.update(id(weight) for weight in module.weights().values())
            yield name, module
        elif id(module) not in inside and any(value is not None for value in module._parameters.values()):
            yield name, module


def _kind_of_quantized(module: nn.Module) -> Kind:
    if isinstance(module, OVPExperts):
        return "sorted_experts" if isinstance(module, OVPSortedExperts) else "experts"
    return "conv1d" if isinstance(module, OVPConv1D) else "linear"


class _Sharing:
    """Which parameters are one: the same object, or declared to be tied (before a checkpoint is loaded)."""

    def __init__(self, model: nn.Module, modules: list[tuple[str, nn.Module]]) -> None:
        self._ties = _declared_ties(model)
        self._first: dict[int, str] = {}
        self._users: dict[str, list[str]] = {}
        self._counted: set[str] = set()
        for name, module in modules:
            for key, value in module._parameters.items():
                if value is not None:
                    full = join(name, key)
                    self._users.setdefault(self._identity(full, value), []).append(full)

    def _identity(self, full: str, value: Tensor) -> str:
        return self._first.setdefault(id(value), self._ties.get(full, full))

    def partner(self, full: str, value: Tensor) -> str | None:
        """Another parameter that is the same as this one, or None."""
        users = self._users[self._identity(full, value)]
        return next((other for other in users if other != full), None)

    def count(self, full: str, value: Tensor | None) -> int:
        """Number of values, or 0 if they were counted before."""
        if value is None or (identity := self._identity(full, value)) in self._counted:
            return 0
        self._counted.add(identity)
        return value.numel()


def walk(model: nn.Module, config: QuantConfig | None = None) -> Inventory:
    """Sort the modules of a model into those to quantize, those quantized, and those left alone.

    Args:
        model: any module, quantized or not, on any device.
        config: whose `skip` decides; None = the one the model was quantized with, or the default.
    """
    config = config or attached_config(model) or QuantConfig()
    modules = list(_modules(model))
    heads = output_heads(model) if HEAD in config.skip else set()
    sharing = _Sharing(model, modules)
    targets: list[Target] = []
    quantized: list[Target] = []
    skipped: list[Skipped] = []
    quantizable = total = 0
    for name, module in modules:
        own = {join(name, key): value for key, value in module._parameters.items()}
        if isinstance(module, (OVPLinear, OVPExperts)):
            quantized.append(Target(name, module, _kind_of_quantized(module)))
            values = sum(weight.quantized_values for weight in module.weights().values())
            stored = {join(name, key) for key in (*WEIGHT_TENSORS, *ACTIVATION_TENSORS)}
            quantizable += values
            total += values + sum(sharing.count(full, p) for full, p in own.items() if full not in stored)
            continue
        counts = {full: sharing.count(full, value) for full, value in own.items()}
        total += sum(counts.values())
        kind = _classify(module)
        if kind not in KINDS:
            skipped.append(Skipped(name, sum(counts.values()), kind))
            continue
        target = Target(name, module, kind)
        weights = target.parameters()
        partners = [sharing.partner(full, value) for full, value in weights.items()]
        reason = None
        if tied := next((partner for partner in partners if partner), None):
            reason = f"its weight is tied to {tied}"
        elif (entry := skip_matches(name, config.skip)) is not None:
            reason = f'skip holds "{entry}"'
        elif id(module) in heads:
            reason = f'output head, and skip holds "{HEAD}"'
        if reason is None:
            targets.append(target)
            quantizable += sum(counts[full] for full in weights)
        else:
            skipped.append(Skipped(name, sum(counts.values()), reason))
    return Inventory(tuple(targets), tuple(quantized), tuple(skipped), quantizable, total)
