"""`OliveQATHfQuantizer`: how transformers loads and saves models after quantization-aware training."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightConverter
from transformers.quantizers.base import HfQuantizer

from olive.hf.aligned import align_
from olive.hf.converted import WHERE, build, describe
from olive.hf.qat_config import OliveQATConfig
from olive.hf.qat_stored import check_listed, check_stored
from olive.hf.quantizer import keep_names, outermost, own_config, transformers_models
from olive.hf.stored import AGAIN, Header, read_headers
from olive.nn import UniformLinear
from olive.qat.activation_quantizer import ActivationQuantizer
from olive.walk import exchange

# Tensors of layers of integers, and of quantizers in attention.
_STORED = frozenset(
    {"codes", "scale", "input_scale", "input_offset", "offset", "offset_after", "bias_of_keys"}
)


class OliveQATHfQuantizer(HfQuantizer):
    """Puts empty layers of integers into the skeleton before the checkpoint's tensors are set.

    Args:
        quantization_config: from the checkpoint.
        pre_quantized: whether the checkpoint holds codes; always.
    """

    requires_calibration = True  # a float checkpoint has to be trained first
    quantization_config: OliveQATConfig

    def is_serializable(self) -> bool:
        """Saving works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Codes cannot be trained, and PEFT has no adapters for these layers."""
        return False

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` works."""
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Nothing is quantized while loading."""
        return False

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Never convert stored tensors: float32 scales stay float32 in a bfloat16 model."""
        if converter.target_patterns[0].rpartition(".")[2] in _STORED:
            return None
        converted: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return converted

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Checkpoints have the model's own names: nothing is split or merged."""
        return [entry for entry in weight_conversions if not isinstance(entry, WeightConverter)]

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> Any:
        layers, headers = self.quantization_config.layers, _headers(checkpoint_files)
        prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
        modules = dict(model.named_modules())
        replacements: dict[nn.Module, nn.Module] = {}
        for stored, description in layers.items():
            # As transformers does: a head's checkpoint fits the bare model, and the other way round.
            names = (stored, stored.removeprefix(prefix), f"{prefix}{stored}")
            name = next((name for name in names if name in modules), None)
            if name is not None:
                new = replacements[modules[name]] = build(stored, description, modules[name])
                if headers is not None:
                    check_stored(stored, new, headers)
            elif prefix and stored.startswith(prefix):  # others may belong to a head this model lacks
                raise ValueError(
                    f"{WHERE}: expected the names of this model's layers, got {stored!r}, which a "
                    f"{type(model).__name__} does not have"
                )
        if headers is not None:
            check_listed(tuple(layers), headers, WHERE)
        if not replacements:
            raise ValueError(
                f"{WHERE}: expected the names of this model's layers, got "
                f"{next(iter(layers), 'none')!r}, which a {type(model).__name__} "
                f"does not have"
            )
        exchange(model, replacements)
        _untie(model)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        for name, module in model.named_modules():
            if isinstance(module, UniformLinear):
                held = {key: tensor for key, tensor in module._buffers.items() if tensor is not None}
                if not any(tensor.is_meta for tensor in held.values()):
                    module.validate(held, name)
            elif isinstance(module, ActivationQuantizer) and not module.scale.is_meta:
                module.refresh()
                if not (module.is_initialized and bool(module.scale.isfinite().all())):
                    raise ValueError(f"{name}.scale: expected finite values, not all 0, got others; {AGAIN}")
        mark_converted(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[None, dict[str, str]]:
        """What `save_pretrained` writes beside the config, which describes the model as it is now."""
        self.quantization_config = current_config(model)
        model.config.quantization_config = self.quantization_config
        return None, {}


def _headers(checkpoint_files: Any) -> dict[str, Header] | None:
    """Of all files; None where there are none, or others than safetensors."""
    files = [str(file) for file in checkpoint_files or ()]
    is_stored = bool(files) and all(file.endswith(".safetensors") for file in files)
    return read_headers(files, None) if is_stored else None


def current_config(model: nn.Module) -> OliveQATConfig:
    """The config that describes a converted model."""
    import olive

    return OliveQATConfig(describe(model), olive_version=olive.__version__)


def mark_converted(model: nn.Module) -> None:
    """Tell transformers that `model` holds integers, so that it saves and behaves like a loaded one.

    Args:
        model: any module; transformers models in it are marked.
    """
    models = transformers_models(model)
    for top in outermost(models).values():
        own_config(top)
        top.config.quantization_config = current_config(top)
        _untie(top)
        align_(top)
    for inner in models.values():
        inner.hf_quantizer = OliveQATHfQuantizer(current_config(inner), pre_quantized=True)
        inner.is_quantized = True
        inner.quantization_method = inner.hf_quantizer.quantization_config.quant_method
        inner.config._is_quantized = True
        keep_names(inner)


def _untie(model: Any) -> None:
    """Forget ties of weights that are codes now: a table and a head then have codes of their own each.

    transformers ties all or nothing on loading. So whatever else was tied with them, as the bias of BERT's
    head, becomes a parameter of its own too.
    """
    coded = {f"{name}.weight" for name in describe(model)}
    ties = model.all_tied_weights_keys
    if not any({key, other} & coded for key, other in ties.items()):
        return
    for key in ties.keys() - coded:
        owner, _, field = key.rpartition(".")
        module = model.get_submodule(owner)
        if (held := module._parameters.get(field)) is not None:
            module.register_parameter(field, nn.Parameter(held.detach().clone(), held.requires_grad))
    model.all_tied_weights_keys = {}
    model.config.tie_word_embeddings = False
