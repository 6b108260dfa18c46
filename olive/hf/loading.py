"""The two ways a model becomes quantized inside `from_pretrained`: from stored codes, and from float weights.

transformers catches exceptions inside its loading loop and reports them without their type. So both check
what they can before the loop, remember what goes wrong in it, and raise when it is done.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from olive.config import QuantConfig
from olive.hf.aligned import align_
from olive.hf.config import WHERE, OliveConfig
from olive.hf.pages import CleanPages
from olive.hf.stored import Header, check_contents, check_float_header, check_headers, read_headers
from olive.nn import ACTIVATION_TENSORS, WEIGHT_TENSORS, OVPExperts, OVPLinear, OVPWeight
from olive.ptq.parameter import StoredWeight, quantize_parameter
from olive.walk import Target, check_skip, exchange, walk

_STORED = (*WEIGHT_TENSORS, *ACTIVATION_TENSORS)


def check_device_map(device_map: Any) -> None:
    """Refuse to quantize while loading onto a disk, or onto a CPU from where a GPU fetches weights.

    Raises:
        ValueError: such a device map.
    """
    devices = {str(device) for device in device_map.values()} if isinstance(device_map, dict) else set()
    if "disk" in devices or ("cpu" in devices and len(devices) > 1):
        raise ValueError(
            f"device_map: expected one device, or several GPUs, while quantizing, got "
            f"{', '.join(sorted(devices))}; quantize on one device, save, and load that with this device_map"
        )


class StoredCheckpoint:
    """Loading of a checkpoint that holds codes.

    Args:
        model: the skeleton, on the meta device; the modules listed in the config are exchanged in it.
        config: from the checkpoint.
        files: safetensors files; none if the user passed a state dict.

    Raises:
        ValueError: the config lists no weight of this model, a file is damaged, or a tensor is missing or has
            another shape.
        TypeError: a tensor of another type.
    """

    def __init__(self, model: Any, config: OliveConfig, files: list[str]) -> None:
        prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
        candidates = {target.name: target for target in walk(model, QuantConfig(skip=())).targets}
        by_weight = {name: target for target in candidates.values() for name in target.parameters()}
        parameters = {name for name, _ in model.named_parameters()}
        self._names: dict[str, str] = {}  # weight in the model -> weight in the checkpoint
        for stored in config.sqnr_db:
            # As transformers does: a head's checkpoint fits the bare model, and the other way round.
            names = (stored, stored.removeprefix(prefix), f"{prefix}{stored}")
            name = next((name for name in names if name in parameters), None)
            if name is None:
                continue
            if name not in by_weight:
                raise ValueError(
                    f"{stored}: expected a weight that can be quantized, because {WHERE} lists it, got one "
                    f"that cannot in a {type(model).__name__}; load with the class that was saved"
                )
            self._names[name] = stored
        if not self._names:
            raise ValueError(
                f"{WHERE}.sqnr_db: expected the names of this model's quantized weights, got "
                f"{next(iter(config.sqnr_db), 'none')!r}, which a {type(model).__name__} does not have"
            )
        self._pages = CleanPages(files)
        self._has_files = bool(files) and all(file.endswith(".safetensors") for file in files)
        self._modules: dict[str, OVPWeight] = {}  # by full name of the module in the model
        self._owners: dict[str, nn.Module] = {}  # layers and experts, likewise
        replacements: dict[nn.Module, nn.Module] = {}
        headers = read_headers(files, config.save_id) if self._has_files else None
        for target in {id(by_weight[name]): by_weight[name] for name in self._names}.values():
            new = target.replacement(config.quant)
            replacements[target.module] = new
            self._add(target, new, config)
            if headers is not None:
                self._check(target, new, headers)
        if headers is not None:
            _check_unlisted(headers, config, prefix, parameters)
        exchange(model, replacements)

    def _add(self, target: Target, new: OVPLinear | OVPExperts, config: OliveConfig) -> None:
        for parameter, weight in target.weights(new).items():
            stored = self._names.get(parameter)
            if stored is None:
                raise ValueError(
                    f"{WHERE}.sqnr_db: expected {parameter} besides the other weights of {target.name}"
                )
            weight.sqnr_db = config.sqnr_db[stored]
            weight.activation_figures = config.activation_figures.get(stored)
        self._owners[target.name] = new
        for module in new.modules():
            # transformers must not initialise these again; what is missing is an error of ours.
            module._is_hf_initialized = True  # type: ignore[assignment]
        self._modules.update(
            {_module_name(parameter, weight): weight for parameter, weight in target.weights(new).items()}
        )

    def _check(self, target: Target, new: OVPLinear | OVPExperts, headers: dict[str, Header]) -> None:
        """Check that the files hold everything that belongs to one module."""
        for parameter, weight in target.weights(new).items():
            stored = self._names[parameter]
            check_headers(_module_name(stored, weight), weight, headers)
            in_file = stored.removesuffix(parameter.removeprefix(target.name))  # the module's name there
        for name, tensor in new.named_parameters():
            if name.rpartition(".")[2] not in _STORED:
                check_float_header(f"{in_file}.{name}", tensor, headers)

    def handles(self, name: str) -> bool:
        """Whether `name` is a tensor of a quantized weight."""
        module, _, field = name.rpartition(".")
        return field in _STORED and module in self._modules

    def finish(self, model: Any) -> None:
        """Check what was loaded and bring it into the layout of the kernels, weight by weight."""
        for prefix, module in self._owners.items() if not self._has_files else ():
            for name, tensor in module.named_parameters():
                if not getattr(tensor, "_is_hf_initialized", False):  # set by transformers on what it loaded
                    raise ValueError(f"{prefix}.{name}: expected in the state dict, got no such tensor")
        for name, weight in self._modules.items():
            if weight.codes.is_meta:  # left on disk by the device map
                if weight.activations is not None:
                    raise ValueError(
                        f"device_map: expected no disk with quantized activations, got {name} on disk: its "
                        f"tensors say how its input is quantized; use CPUs and GPUs"
                    )
                continue
            check_contents(name, weight)
            weight.refresh_activations_()
            weight.pack_()
            self._pages.read(weight.codes.nbytes)
        align_(model)
        self._pages.drop()


def _check_unlisted(
    headers: dict[str, Header], config: OliveConfig, prefix: str, parameters: set[str]
) -> None:
    """Refuse codes that the config does not list: transformers would fill their float weight with noise."""
    for key in headers:
        name, _, field = key.rpartition(".")
        if field != "codes" or {name, f"{name}.weight"} & config.sqnr_db.keys():
            continue
        for own in (name, name.removeprefix(prefix), f"{prefix}{name}"):
            if {own, f"{own}.weight"} & parameters:
                raise ValueError(
                    f"{key}: expected its weight in {WHERE}.sqnr_db, got codes that are not listed"
                )


def _module_name(parameter: str, weight: OVPWeight) -> str:
    """The module that holds the codes of a float parameter: the layer itself, or a stack called like it."""
    return parameter.removesuffix(".weight") if isinstance(weight, OVPLinear) else parameter


class QuantizeOnLoad:
    """Quantization of a full-precision checkpoint, one tensor at a time.

    Args:
        model: the skeleton, on the meta device. It keeps its float modules until all is loaded.
        config: how to quantize.
        files: of the checkpoint.

    Raises:
        ValueError: nothing in the model can be quantized, a name in `skip` that it does not have, or a
            configuration that needs the loaded model: static activations, method "gptq", rotation.
    """

    def __init__(self, model: Any, config: QuantConfig, files: list[str]) -> None:
        if config.activation_format is not None and config.activation_format.is_static:
            raise ValueError(
                "quantization_config: expected dynamic activation scales in from_pretrained, got static ones "
                "(activation_group_size=0), which need data; load the model without it first, then call "
                "olive.quantize(model, config, calibration=...), or use activation_group_size=-1"
            )
        if config.method == "gptq" or config.rotate:
            wanted = "rotate=True, which changes" if config.rotate else "method 'gptq', which runs"
            raise ValueError(
                f"quantization_config: expected a configuration for single tensors in from_pretrained, got "
                f"{wanted} the whole model; load the model without it first, then call "
                f"olive.quantize(model, config)"
            )
        check_skip(model, config.skip)
        self._config = config
        self._targets = walk(model, config).targets
        if not self._targets:
            raise ValueError(
                f"quantization_config: expected at least one layer that can be quantized, got none in a "
                f"{type(model).__name__}; olive.report(model) of the model loaded without it says why"
            )
        self._transposed: dict[str, bool] = {}
        for target in self._targets:
            empty = target.weights(target.replacement(config))
            self._transposed.update({name: weight.transposed for name, weight in empty.items()})
        self._stored: dict[str, StoredWeight] = {}
        self._error: Exception | None = None
        self._pages = CleanPages(files)

    def handles(self, name: str) -> bool:
        """Whether `name` is a weight to quantize."""
        return name in self._transposed

    def take(self, name: str, parameter: Tensor) -> None:
        """Quantize one weight; after the first error nothing more is done."""
        if self._error is not None:
            return
        try:
            transposed = self._transposed[name]
            self._stored[name] = quantize_parameter(parameter, self._config, transposed=transposed, name=name)
        except Exception as error:  # raised in finish: the loading loop would hide it
            self._error = error
        self._pages.read(parameter.nbytes)

    def finish(self, model: Any) -> None:
        """Exchange the modules whose weights were in the checkpoint; new ones stay float, to be trained.

        Raises:
            ValueError: NaN or Inf in a weight, part of a module is missing in the checkpoint, or the device
                map moved weights away.
            TypeError: a weight that is not float.
        """
        if self._error is not None:
            raise self._error
        check_device_map(getattr(model, "hf_device_map", None))
        replacements: dict[nn.Module, nn.Module] = {}
        for target in self._targets:
            names = target.parameters()
            missing = [name for name in names if name not in self._stored]
            if len(missing) == len(names):
                continue
            if missing:
                raise ValueError(f"{missing[0]}: expected in the checkpoint, got no such tensor")
            new = target.replacement(self._config)
            for name, weight in target.weights(new).items():
                stored = self._stored.pop(name)
                weight.set_(stored.codes, stored.scale, stored.codebook)
                weight.sqnr_db = stored.sqnr_db
                weight.pack_()
            replacements[target.module] = new
        exchange(model, replacements)
        align_(model)
        self._pages.drop()
