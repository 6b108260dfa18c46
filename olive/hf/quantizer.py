"""Marks models quantized in memory for transformers, so that they save and behave like loaded ones.

This module does not import transformers: a model of another library is left as it is.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import nn

from olive.config import QuantConfig
from olive.hf.aligned import align_

# transformers' attribute, and the name under which its value is kept while the model is quantized.
_CONVERSIONS = "_weight_conversions"
_KEPT_CONVERSIONS = "_olive_kept_weight_conversions"


def transformers_models(model: nn.Module) -> dict[str, Any]:
    """Every transformers model in `model`, itself included, by name; none if transformers is not imported."""
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None:
        return {}
    base = modeling.PreTrainedModel
    return {name: module for name, module in model.named_modules() if isinstance(module, base)}


def outermost(models: dict[str, Any]) -> dict[str, Any]:
    """Those that lie in no other of them."""
    return {
        name: model
        for name, model in models.items()
        if not any(name != other and (other == "" or name.startswith(f"{other}.")) for other in models)
    }


def load_tokenizer(model: Any) -> Any:
    """The tokenizer beside the checkpoint that `model` was loaded from.

    Raises:
        ValueError: the model was not loaded from a path or hub id.
        OSError: there is no tokenizer.
    """
    from transformers import AutoTokenizer

    if not model.name_or_path:
        raise ValueError("the model was not loaded from a path or hub id")
    return AutoTokenizer.from_pretrained(model.name_or_path)


def own_config(model: Any) -> None:
    """Give `model` a config of its own: two models built from one object must not both look quantized."""
    copies: dict[int, Any] = {}
    before = model.config
    copied = copy.deepcopy(before, copies)
    kind = sys.modules["transformers"].PreTrainedConfig
    assert copies[id(before)] is copied
    for module in model.modules():
        for key, value in list(vars(module).items()):
            if isinstance(value, kind) and id(value) in copies:
                vars(module)[key] = copies[id(value)]


def keep_names(model: Any) -> None:
    """Make `save_pretrained` write the state dict's own names.

    On saving, transformers reverts the conversions it does on loading, e.g. it splits stacks of experts.
    Its patterns match the names of codes too, and would cut them.
    """
    if _KEPT_CONVERSIONS not in vars(model):
        vars(model)[_KEPT_CONVERSIONS] = vars(model).get(_CONVERSIONS)
    vars(model)[_CONVERSIONS] = []


def mark_prepared(model: nn.Module) -> None:
    """Make checkpoints of a model in quantization-aware training fit the model again.

    Some models are saved under older names, of which the tensors of quantizers would be a mixture.
    """
    for inner in transformers_models(model).values():
        keep_names(inner)


def restore_names(model: Any) -> None:
    """The inverse of `keep_names`."""
    if _KEPT_CONVERSIONS in vars(model):
        kept = vars(model).pop(_KEPT_CONVERSIONS)
        vars(model).pop(_CONVERSIONS, None)
        if kept is not None:
            vars(model)[_CONVERSIONS] = kept


def mark_quantized(model: nn.Module, config: QuantConfig) -> None:
    """Tell transformers that `model` is quantized: `save_pretrained`, Trainer and PEFT then know it.

    Sets `config.quantization_config` (on a config of the model's own), `hf_quantizer`, `is_quantized` and
    `quantization_method` on every transformers model in `model`; nothing where there is none.

    Args:
        model: any module whose layers were replaced by quantized ones.
        config: what it was quantized with.
    """
    models = transformers_models(model)
    if not models:
        return
    from olive.hf.config import OliveConfig
    from olive.hf.hf_quantizer import OliveHfQuantizer

    for top in outermost(models).values():
        own_config(top)
        top.config.quantization_config = OliveConfig.of(config)
        align_(top)
    for inner in models.values():
        inner.hf_quantizer = OliveHfQuantizer(OliveConfig.of(config), pre_quantized=True)
        inner.is_quantized = True
        inner.quantization_method = inner.hf_quantizer.quantization_config.quant_method
        inner.config._is_quantized = True
        keep_names(inner)


def unmark_quantized(model: nn.Module) -> None:
    """Undo `mark_quantized`, on models marked by it or by loading; nothing on others."""
    from olive.hf.register import QUANT_METHOD

    for inner in transformers_models(model).values():
        if getattr(inner, "quantization_method", None) == QUANT_METHOD:
            for key in ("hf_quantizer", "quantization_method", "is_quantized"):
                vars(inner).pop(key, None)
        for key in ("quantization_config", "_is_quantized"):
            found = vars(inner.config).get(key)
            if key == "_is_quantized" or getattr(found, "quant_method", None) == QUANT_METHOD:
                vars(inner.config).pop(key, None)
        restore_names(inner)
