"""Attention classes of transformers that can be quantized, and what is particular to each.

Classes are known by module path and name, so nothing of transformers is imported. Their forwards are the
same in transformers 5.17 to 5.23.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

# Names under which attention modules of many libraries keep the projections of queries, or of all three.
_PROJECTIONS = frozenset(
    ("q_proj", "query", "q", "q_lin", "qkv", "qkv_proj", "Wqkv", "c_attn", "query_key_value", "in_proj", "wq")
)


@dataclass(frozen=True)
class Attention:
    """Where a self-attention class keeps what.

    Args:
        query, key, value: names of the projections, `nn.Linear`.
        output: name of the projection after the heads; None = it lies outside.
        head_size: attribute with the channels of a head.
        dropout: attribute with the probability of dropping an attention probability; may be dotted.
        rotary: whether queries and keys are rotated by their position, or the attribute that says so.
        positions_first: whether `position_embeddings` is the second argument of the forward.
    """

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    output: str | None = "o_proj"
    head_size: str = "head_dim"
    dropout: str = "attention_dropout"
    rotary: bool | str = False
    positions_first: bool = False

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the linear layers."""
        names = (self.query, self.key, self.value)
        return names if self.output is None else (*names, self.output)

    def is_rotary(self, module: nn.Module) -> bool:
        """Whether this module rotates queries and keys."""
        return bool(getattr(module, self.rotary)) if isinstance(self.rotary, str) else self.rotary

    def dropout_of(self, module: nn.Module) -> float:
        """Probability of dropping an attention probability in training."""
        found: Any = module
        for part in self.dropout.split("."):
            found = getattr(found, part)
        return float(found)


_VIT = Attention()
_BERT = Attention("query", "key", "value", None, "attention_head_size", "dropout.p")
_LLAMA = Attention(rotary=True, positions_first=True)

# By full name of the class.
ATTENTIONS: dict[str, Attention] = {
    f"transformers.models.{family}.modeling_{family}.{name}": attention
    for family, name, attention in (
        ("vit", "ViTAttention", _VIT),
        ("deit", "DeiTAttention", _VIT),
        ("bert", "BertSelfAttention", _BERT),
        ("roberta", "RobertaSelfAttention", _BERT),
        ("llama", "LlamaAttention", _LLAMA),
        ("mistral", "MistralAttention", _LLAMA),
        ("qwen2", "Qwen2Attention", _LLAMA),
        ("smollm3", "SmolLM3Attention", Attention(rotary="use_rope", positions_first=True)),
    )
}


def attention_of(module: nn.Module) -> Attention | None:
    """What is known of the module's class; None of other classes, subclasses of known ones included."""
    cls = type(module)
    return ATTENTIONS.get(f"{cls.__module__}.{cls.__qualname__}")


def projections_of(module: nn.Module) -> tuple[str, ...]:
    """Names of the linear layers of an attention of a known class."""
    attention = attention_of(module)
    assert attention is not None
    return attention.projections


def is_rotary(module: nn.Module) -> bool:
    """Whether a known attention module rotates queries and keys, so that QKR cannot serve it.

    Raises:
        ValueError: a class that is not known.
    """
    attention = attention_of(module)
    if attention is None:
        raise ValueError(f"module: expected one of {sorted(ATTENTIONS)}, got {type(module).__name__}")
    return attention.is_rotary(module)


def find_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Self-attention modules of a known class by full name, not yet quantized."""
    return {name: module for name, module in model.named_modules() if attention_of(module) is not None}


def unknown_attentions(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by full name that look like attention, but are of no known class.

    Such a module's class has a name that ends in "Attention", and it holds projections of its own. Cross
    attention is among them. A quantized attention is not.
    """
    found = {}
    for name, module in model.named_modules():
        if not type(module).__name__.endswith("Attention") or attention_of(module) is not None:
            continue
        if hasattr(module, "to_float"):  # quantized already
            continue
        held = {*module._modules, *module._parameters}
        if held & _PROJECTIONS or "in_proj_weight" in held:
            found[name] = module
    return found
