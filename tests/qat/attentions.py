"""Self-attention modules of transformers with random weights and biases, and what quantizes them in tests."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from olive.qat import ActivationQuantizer, QATConfig
from olive.qat.attention import QATAttention
from olive.qat.layers import QATLinear
from olive.qat.weight_quantizers import StatsQ

CHANNELS, HEADS = 24, 4


def _encoder(family: str, config: str, cls: str) -> nn.Module:
    import importlib

    models = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    settings = getattr(models, config)(
        hidden_size=CHANNELS, num_attention_heads=HEADS, attn_implementation="eager"
    )
    module: nn.Module = getattr(models, cls)(settings)
    return module


def _decoder(family: str, config: str, cls: str, layer: int = 0, **more: object) -> nn.Module:
    import importlib

    models = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    settings = getattr(models, config)(
        hidden_size=CHANNELS,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        num_hidden_layers=4,
        attn_implementation="sdpa",
        **more,
    )
    module: nn.Module = getattr(models, cls)(settings, layer_idx=layer)
    return module


MAKERS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: _encoder("vit", "ViTConfig", "ViTAttention"),
    "deit": lambda: _encoder("deit", "DeiTConfig", "DeiTAttention"),
    "bert": lambda: _encoder("bert", "BertConfig", "BertSelfAttention"),
    "roberta": lambda: _encoder("roberta", "RobertaConfig", "RobertaSelfAttention"),
    "smollm3": lambda: _decoder("smollm3", "SmolLM3Config", "SmolLM3Attention", layer=3, attention_bias=True),
    "smollm3_rotary": lambda: _decoder("smollm3", "SmolLM3Config", "SmolLM3Attention"),
    "llama": lambda: _decoder("llama", "LlamaConfig", "LlamaAttention", attention_bias=True),
    "mistral": lambda: _decoder("mistral", "MistralConfig", "MistralAttention", head_dim=6),
    "qwen2": lambda: _decoder("qwen2", "Qwen2Config", "Qwen2Attention"),
}
WITHOUT_ROTARY = ("vit", "deit", "bert", "roberta", "smollm3")


def build(name: str) -> nn.Module:
    """A module in evaluation mode whose weights and biases all matter."""
    module = MAKERS[name]().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    return module


def positions(length: int, size: int = CHANNELS // HEADS) -> tuple[Tensor, Tensor]:
    """Cosines and sines [1, T, d] of rotary positions."""
    angles = torch.arange(length)[:, None] / 10.0 ** torch.arange(size // 2)
    doubled = torch.cat((angles, angles), -1)[None]
    return doubled.cos(), doubled.sin()


def arguments(name: str, length: int = 5) -> dict[str, object]:
    """What the module takes besides hidden states and a mask."""
    return (
        {"position_embeddings": positions(length)}
        if name in ("llama", "mistral", "qwen2") or (name.startswith("smollm3"))
        else {}
    )


def hidden(batch: int = 2, length: int = 5) -> Tensor:
    return torch.randn(batch, length, CHANNELS)


def linear(config: QATConfig) -> Callable[[nn.Linear], QATLinear]:
    """From a layer to its quantized one, as `prepare` makes it."""

    def make(layer: nn.Linear) -> QATLinear:
        quantizer = None
        if config.activation_bits is not None:
            channels = layer.in_features if config.activation_offsets else 0
            shape = 0 if config.activation_granularity == "per_token" else 1
            quantizer = ActivationQuantizer(config.activation_bits, shape=shape, dim=-2, channels=channels)
        return QATLinear.of(layer, StatsQ(config.weight_bits, config.group_size), quantizer)

    return make


def prepare(module: nn.Module, config: QATConfig, name: str = "layer.attention") -> QATAttention:
    return QATAttention.of(module, config, name, linear(config))


class Exact(StatsQ):
    """Leaves a weight as it is."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight


def exact(attention: QATAttention) -> QATAttention:
    """The same module without any rounding of weights; the caller prepared it without activation bits."""
    for module in attention.modules():
        if isinstance(getattr(module, "weight_quantizer", None), StatsQ):
            module.weight_quantizer = Exact(4)
    return attention
