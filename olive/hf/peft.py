"""LoRA adapters on quantized layers: the piece that PEFT needs to know them."""

from __future__ import annotations

from typing import Any

from peft import LoraConfig
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn

from olive.nn import OVPLinear, OVPWeight


class OVPLoraLinear(LoraLinear):
    """A LoRA layer whose base is quantized. It trains and runs like any other; merging needs a float base."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        return module.in_features, module.out_features  # type: ignore[return-value]

    def merge(self, *args: Any, **kwargs: Any) -> None:
        """Merge into the base layer, once it is float again.

        Raises:
            NotImplementedError: the base is quantized; a sum written there would be lost.
        """
        if isinstance(self.get_base_layer(), OVPWeight):
            raise NotImplementedError(
                "merge: expected float layers below the adapter, got quantized ones; call "
                "olive.dequantize(model) first, and olive.quantize(model) after merging"
            )
        super().merge(*args, **kwargs)


def with_quantized_layers(config: LoraConfig) -> LoraConfig:
    """Let a LoRA configuration apply to quantized layers as well as to float ones.

    Use: `get_peft_model(model, with_quantized_layers(LoraConfig(...)))`, and for a saved adapter
    `PeftModel.from_pretrained(model, path, config=with_quantized_layers(LoraConfig.from_pretrained(path)))`.

    Args:
        config: changed in place, because PEFT keeps what it registers on the configuration.

    Returns:
        The configuration.
    """
    config._register_custom_module({OVPLinear: OVPLoraLinear})
    return config
