"""`OliveHfQuantizer`: what transformers calls while it loads and saves a quantized model."""

from __future__ import annotations

import secrets
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers.base import HfQuantizer

from olive.config import FORMAT_VERSION, QuantConfig
from olive.hf.config import OliveConfig
from olive.hf.loading import QuantizeOnLoad, StoredCheckpoint, check_device_map
from olive.hf.quantizer import keep_names, transformers_models
from olive.hf.saving import streaming_state_dict
from olive.hf.stored import SAVE_ID
from olive.walk import attach_config, walk


class OliveHfQuantizer(HfQuantizer):
    """Loads checkpoints of olive, quantizes others while they are loaded, and saves both.

    Args:
        quantization_config: an `olive.QuantConfig` as the user passed it, or an `OliveConfig`.
        pre_quantized: whether the checkpoint holds codes already.
    """

    requires_calibration = False
    quantization_config: OliveConfig

    def __init__(self, quantization_config: QuantConfig | OliveConfig, **kwargs: Any) -> None:
        super().__init__(OliveConfig.of(quantization_config), **kwargs)
        self._load: StoredCheckpoint | QuantizeOnLoad | None = None  # only while a model is loaded

    def is_serializable(self) -> bool:
        """Saving works."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters on top can be trained; the codes cannot."""
        return True

    @property
    def is_compileable(self) -> bool:
        """`torch.compile` works."""
        return True

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        """Whether this tensor is ours to handle: a weight to quantize, or part of a quantized one."""
        return self._load is not None and self._load.handles(param_name)

    def param_element_size(self, model: Any, param_name: str, param: Tensor) -> float:
        """Bytes per element, for the placement on devices: what is left after quantization."""
        if not self.pre_quantized and self.param_needs_quantization(model, param_name):
            return (self.quantization_config.quant.bits + 0.125) / 8
        return param.element_size()

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """Never convert stored tensors: a scale of a wrong type must be found, not rounded."""
        if self.pre_quantized and self.param_needs_quantization(None, converter.target_patterns[0]):
            return None
        converted: torch.dtype | None = super().get_new_dtype(converter, param, dtype)
        return converted

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """Stored checkpoints have the model's own names: nothing is split or merged, old names are mapped."""
        if self.pre_quantized:
            return [entry for entry in weight_conversions if not isinstance(entry, WeightConverter)]
        return weight_conversions

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse device maps under which weights do not stay where they were quantized.

        Raises:
            ValueError: quantizing while loading, with modules on disk, or on the CPU besides other devices.
        """
        if not self.pre_quantized:
            check_device_map(device_map)

    def get_quantize_ops(self) -> ConversionOps:
        """The operation transformers runs on a full-precision weight instead of setting it."""
        assert isinstance(self._load, QuantizeOnLoad)
        return _Quantize(self._load)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Any = None, **kwargs: Any
    ) -> Any:
        files = [str(file) for file in checkpoint_files or ()]
        if self.pre_quantized:
            self._load = StoredCheckpoint(model, self.quantization_config, files)
        else:
            self._load = QuantizeOnLoad(model, self.quantization_config.quant, files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        load, self._load = self._load, None
        assert load is not None
        load.finish(model)
        attach_config(model, self.quantization_config.quant)
        for inner in transformers_models(model).values():
            inner.hf_quantizer = self
            keep_names(inner)
        self.pre_quantized = True
        self._refresh(model)
        return model

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        from olive.quantization import dequantize

        dequantize(model)
        return model if dtype is None else model.to(dtype)

    def _refresh(self, model: Any, save_id: str | None = None) -> None:
        """Describe the model as it is now in its config."""
        import olive

        ratios: dict[str, float | None] = {}
        figures: dict[str, dict[str, Any]] = {}
        for target in walk(model, self.quantization_config.quant).quantized:
            for name, weight in target.weights().items():
                ratios[name] = weight.sqnr_db
                if weight.activation_figures is not None:
                    figures[name] = weight.activation_figures.to_dict()
        self.quantization_config = OliveConfig(
            self.quantization_config.quant,
            format_version=FORMAT_VERSION,
            olive_version=olive.__version__,
            sqnr_db=ratios,
            activation_figures=figures,
            save_id=save_id,
        )
        model.config.quantization_config = self.quantization_config

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """What `save_pretrained` writes; called before it writes anything, the config included.

        The config and every file get the same fresh id, by which loading tells files that an interrupted save
        left beside those of an older one.
        """
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # only the adapter is saved
        save_id = secrets.token_hex(8)
        self._refresh(model, save_id)
        for name, inner in transformers_models(model).items():
            if name and inner.config is not model.config:  # describes a part alone, if that was ever saved
                vars(inner.config).pop("quantization_config", None)
        return streaming_state_dict(model), {SAVE_ID: save_id}


class _Quantize(ConversionOps):
    """Quantizes the weights it is given; what remains for transformers to set is what is not quantized."""

    def __init__(self, load: QuantizeOnLoad) -> None:
        self._load = load

    def convert(
        self, input_dict: dict[str, Any], *args: Any, missing_keys: set[str] | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        rest = {}
        for name, value in input_dict.items():
            tensor = value[0] if isinstance(value, list) else value
            if self._load.handles(name):
                self._load.take(name, tensor)
                if missing_keys is not None:
                    missing_keys.discard(name)
            else:
                rest[name] = tensor
        return rest
