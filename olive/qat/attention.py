"""`QATAttention`: self-attention with quantized operands, queries and keys merged (QKR) or separate."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from functools import cache
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from olive.nn.origin import Origin, take_over
from olive.qat.activation_quantizer import ActivationQuantizer
from olive.qat.attention_classes import ATTENTIONS, Attention, attention_of
from olive.qat.config import QATConfig
from olive.qat.layers import QATLinear
from olive.qat.merged import MergedWeight
from olive.qat.packed_merged import PackedMergedWeight
from olive.qat.weight_quantizers import StatsQ

IMPLEMENTATIONS = (None, "eager", "sdpa")
_USE_CACHE = "call the model with use_cache=False, or set model.config.use_cache = False"


class QATAttention(nn.Module):
    """In the place of a self-attention module: its parameters, state-dict keys and signature stay.

    Without QKR queries, keys, values and probabilities are quantized, queries and keys after their rotation:

        q = LSQ(W_q x + b_q),  k = LSQ(W_k x + b_k),  v = LSQ(W_v x + b_v)
        p = LSQ(softmax(s q k^T + mask)),  result = W_o (p v) + b_o,        s the module's `scaling`

    With QKR x is quantized once, and keys are taken through one quantized matrix per head (`MergedWeight`):

        x^ = LSQ(x),  K^h = LSQ(M^h x^ + offset^h),  logits^h[m, n] = s (x^_m . K^h_n + u^h . x^_n)

    Biases are not lost. (W_q x_m + b_q) . (W_k x_n + b_k) has four terms; the two with b_k are the same for
    all keys n, and softmax does not see them. What is left of b_q is u^h . x^_n with u^h = (W_k)^T b_q,
    added in full precision. So b_k has no effect here, and takes no gradient.

    Scales. Values have one for each channel, probabilities one, and queries and keys one, in QKR keys one
    for each head. Under "per_token" queries, keys and probabilities have one for each position, in QKR keys
    one for each position and head; the number of positions is then fixed. Offsets after the quantizer of
    keys, and in QKR of K, would be the same for all keys; they are left out.

    Logits and softmax are float32. Probabilities are quantized before dropout, as that only scales what it
    keeps, so the product still is one of levels. The second result is the probabilities as they multiply
    the values, with implementation "sdpa" too, where the replaced module returns None.

    Source: arXiv:2302.02210. Deviations: its code deletes the biases of queries and keys; and see
    `MergedWeight`.
    """

    origin: Origin
    traits: Attention
    config: Any
    scaling: float
    merged_weight: MergedWeight | PackedMergedWeight | None
    input_quantizer: ActivationQuantizer | None
    query_quantizer: ActivationQuantizer | None
    key_quantizer: ActivationQuantizer | None
    value_quantizer: ActivationQuantizer | None
    probability_quantizer: ActivationQuantizer | None
    key_offset: nn.Parameter | None
    per_token: bool
    heads: int
    key_heads: int
    _name: str
    _trained_key_bias: bool

    @staticmethod
    def of(
        module: nn.Module, config: QATConfig, name: str, make_linear: Callable[[nn.Linear], QATLinear]
    ) -> QATAttention:
        """A quantized attention in the place of `module`.

        Args:
            module: of a class in `ATTENTIONS`. It stays as it is, but shares its parameters; under QKR the
                bias of its keys no longer requires a gradient, until `to_float`.
            config: `quantize_attention` or `qkr` is set.
            name: of the module, for messages.
            make_linear: from a projection to its quantized layer. Under QKR the input quantizer that it
                gives the values' projection becomes the attention's; it is not called for queries and keys.

        Raises:
            ValueError: a class that is not known, cross attention, an attention implementation other than
                eager or sdpa, rotary positions with QKR, or a config that asks for neither.
            TypeError: projections that are not plain `nn.Linear`.
        """
        traits = _check(module, config, name)
        new = _blank(type(module))
        new.origin = Origin.of(module, ())
        vars(new).update(new.origin.attributes)
        new.traits, new._name, new._trained_key_bias = traits, name, False
        new.per_token = config.activation_granularity == "per_token"
        replaced = traits.projections[2:] if config.qkr else traits.projections
        for key, child in module._modules.items():
            new.register_module(key, make_linear(cast(nn.Linear, child)) if key in replaced else child)
        head_size = int(getattr(module, traits.head_size))
        new.heads = _out_features(module, traits.query) // head_size
        new.key_heads = _out_features(module, traits.key) // head_size
        new._add_merged_weight(config, head_size)
        new._add_quantizers(config)
        take_over(new, module)
        return new

    def to_float(self) -> nn.Module:
        """The replaced module, with the projections' latent weights; parameters are shared.

        What frozen entries of the merged weight hold is not in it.
        """
        new = self.origin.rebuild({})
        for name, child in self._modules.items():
            if isinstance(child, QATLinear):
                new.register_module(name, child.to_float())
            elif not isinstance(child, (ActivationQuantizer, MergedWeight)):
                new.register_module(name, child)
        if self._trained_key_bias:
            new.get_submodule(self.traits.key).bias.requires_grad_(True)
        take_over(new, self)
        return new

    def twin(self) -> Self:
        """Another of its class with the same attributes, hooks, parameters and children."""
        new = type(self).__new__(type(self))
        nn.Module.__init__(new)
        own = {key: copy(value) if isinstance(value, dict) else value for key, value in vars(self).items()}
        vars(new).update(own)
        take_over(new, self)
        return new

    def merged(self) -> Tensor:
        """QKR's matrices on their levels, float32 [H, C, C]; rows are channels on the query side.

        Raises:
            ValueError: queries and keys are not merged here.
        """
        weight = self._merged_weight()
        assert isinstance(weight, MergedWeight)
        merged: Tensor = weight()
        return merged.view(self.heads, weight.columns, weight.columns)

    def key_bias(self) -> Tensor | None:
        """QKR's u, float32 [H, C]; None without a bias of the queries.

        Raises:
            ValueError: queries and keys are not merged here.
        """
        return self._merged_weight().key_bias()

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Attend.

        Args:
            hidden_states: float [B, T, C].
            attention_mask: bool (true = attend) or float (added to logits), broadcast to [B, H, T, keys];
                None = all, or where `is_causal` those up to the query.
            past_key_values: transformers' cache of keys and values, which get here as quantized.
            position_embeddings: cosines and sines [B, T, d], for rotary attention.
            kwargs: `is_causal`, in the place of the module's; the others have no effect, as in eager
            attention.

        Returns:
            [B, T, C'], and the probabilities [B, H, T, keys].

        Raises:
            ValueError: a cache under QKR or "per_token"; another attention implementation; a rotary attention
                without positions.
            TypeError: a mask that is neither bool nor float.
        """
        _check_implementation(self.config, self._name)
        self._check_cache(past_key_values)
        if self.merged_weight is None:
            logits, values = self._separate(hidden_states, position_embeddings, past_key_values)
        else:
            logits, values = self._merged(hidden_states)
        causal = kwargs.get("is_causal")
        causal = getattr(self, "is_causal", False) if causal is None else causal
        probabilities = self._probabilities(logits, attention_mask, bool(causal)).to(values.dtype)
        if self.probability_quantizer is not None:
            probabilities = self.probability_quantizer(probabilities)
        probabilities = functional.dropout(probabilities, self.traits.dropout_of(self), self.training)
        repeated = values.repeat_interleave(self.heads // self.key_heads, 1)
        output = (probabilities @ repeated).transpose(1, 2).flatten(2)
        return (output if self.traits.output is None else self._project("output", output)), probabilities

    def _separate(
        self, hidden: Tensor, positions: tuple[Tensor, Tensor] | None, cache: Any
    ) -> tuple[Tensor, Tensor]:
        """Scaled logits [B, H, T, keys] and values [B, G, keys, d], from quantized queries and keys."""
        queries, keys = self._project("query", hidden), self._project("key", hidden)
        if self.traits.is_rotary(self):
            if positions is None:
                raise ValueError(f"{self._name}: expected position_embeddings, got None")
            queries = _rotate(queries, self.heads, *positions)
            keys = _rotate(keys, self.key_heads, *positions)
        queries = _heads_first(_quantize(self.query_quantizer, queries), self.heads)
        keys = _heads_first(_quantize(self.key_quantizer, keys), self.key_heads)
        values = self._values(hidden)
        if cache is not None:
            cache = getattr(cache, "self_attention_cache", cache)  # of an encoder-decoder's pair
            keys, values = cache.update(keys, values, self.layer_idx)
        repeated = keys.repeat_interleave(self.heads // self.key_heads, 1)
        return (queries @ repeated.transpose(-1, -2)).float() * self.scaling, values

    def _merged(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Scaled logits [B, H, T, T] and values [B, G, T, d], from QKR's matrices."""
        weight = self._merged_weight()
        if isinstance(weight, MergedWeight):
            names = self.traits.projections[:2]
            if not weight.is_of(*(self._modules[name] for name in names)):
                raise ValueError(
                    f"{self._name}: expected the projections that were there when the model was prepared "
                    f"with qkr, got others in {' or '.join(names)}; adapters on them would have no effect"
                )
        input = _quantize(self.input_quantizer, hidden)
        batch, length, columns = input.shape
        keys = weight.keys(hidden, input)
        if self.key_offset is not None:
            keys = keys + self.key_offset.to(keys.dtype)
        # Places that share a scale are one dimension: heads, or pairs of position and head.
        places = (length * self.heads,) if self.per_token else (length, self.heads)
        keys = keys.view(batch, *places, columns)
        keys = _quantize(self.key_quantizer, keys).view(batch, length * self.heads, columns)
        logits = (input @ keys.transpose(1, 2)).float().view(batch, length, length, self.heads)
        bias = weight.key_bias()
        if bias is not None:
            logits = logits + functional.linear(input, bias.to(input.dtype)).float()[:, None]
        values = self._values(input if isinstance(weight, MergedWeight) else hidden)
        return logits.permute(0, 3, 1, 2) * self.scaling, values

    def _values(self, input: Tensor) -> Tensor:
        return _heads_first(_quantize(self.value_quantizer, self._project("value", input)), self.key_heads)

    def _project(self, which: str, input: Tensor) -> Tensor:
        output: Tensor = self._modules[getattr(self.traits, which)](input)  # type: ignore[misc]
        return output

    @staticmethod
    def _probabilities(logits: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """Softmax under a mask; a query that a bool mask leaves no key attends to none, as in sdpa."""
        queries, keys = logits.shape[-2:]
        if mask is None and causal and queries > 1:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=logits.device).tril()
        if mask is None:
            return logits.softmax(-1)
        if mask.dtype is torch.bool:
            # Not -inf, of which a whole row would have NaN for its gradient.
            least = torch.finfo(logits.dtype).min
            return logits.masked_fill(~mask, least).softmax(-1).masked_fill(~mask, 0)
        if not mask.is_floating_point():
            raise TypeError(f"attention_mask: expected bool or float, got {mask.dtype}")
        return (logits + mask).softmax(-1)

    def _check_cache(self, cache: Any) -> None:
        if cache is not None and self.merged_weight is not None:
            raise ValueError(
                f"{self._name}: expected no cache with qkr, got past_key_values; it would have to hold the "
                f"layer's input instead of keys, which is not built: {_USE_CACHE}"
            )
        if cache is not None and self.per_token:
            raise ValueError(
                f"{self._name}: expected no cache with activation_granularity 'per_token', got "
                f"past_key_values; scales belong to the positions of one length: {_USE_CACHE}"
            )

    def _merged_weight(self) -> MergedWeight | PackedMergedWeight:
        if self.merged_weight is None:
            raise ValueError(f"{self._name}: expected queries and keys merged by qkr=True, got separate ones")
        return self.merged_weight

    def _add_merged_weight(self, config: QATConfig, head_size: int) -> None:
        self.merged_weight = self.input_quantizer = None
        if not config.qkr:
            return
        query, key = (cast(nn.Linear, self._modules[name]) for name in self.traits.projections[:2])
        quantizer = StatsQ(config.weight_bits, config.group_size)
        self.merged_weight = MergedWeight(query, key, self.heads, head_size, quantizer)
        values = cast(QATLinear, self._modules[self.traits.value])
        self.input_quantizer, values.input_quantizer = values.input_quantizer, None
        if key.bias is not None:
            # A parameter that requires a gradient and never gets one stops DistributedDataParallel.
            self._trained_key_bias = key.bias.requires_grad
            key.bias.requires_grad_(False)

    def _add_quantizers(self, config: QATConfig) -> None:
        for which in ("query", "key", "value", "probability"):
            setattr(self, f"{which}_quantizer", None)
        self.register_parameter("key_offset", None)
        bits = config.activation_bits
        if bits is None or not config.quantize_attention:
            return
        positions = 0 if self.per_token else 1
        query, key, value = (_out_features(self, name) for name in self.traits.projections[:3])
        device = _weight(self, self.traits.value).device

        def make(shape: int, dim: int, channels: int = 0, signed: bool = True) -> ActivationQuantizer:
            offsets = channels if config.activation_offsets else 0
            return ActivationQuantizer(
                bits, shape=shape, dim=dim, channels=offsets, signed=signed, device=device
            )

        if self.merged_weight is None:
            self.query_quantizer = make(positions, -2, query)
            self.key_quantizer = make(positions, -2, key)
            self.key_quantizer.offset_after = None
        else:
            self.key_quantizer = make(0 if self.per_token else self.heads, -2)
            if config.activation_offsets:
                size = self.heads * self.merged_weight.columns
                self.key_offset = nn.Parameter(torch.zeros(size, device=device))
        self.value_quantizer = make(value, -1, value)
        self.probability_quantizer = make(positions, -2, signed=False)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        merged = self.merged_weight
        annealed = f"{prefix}merged_weight.frozen" in state_dict
        loaded = f"{prefix}{self.traits.query}.weight" in state_dict
        if isinstance(merged, MergedWeight) and loaded and not annealed:
            merged.thaw()  # the checkpoint is from before annealing
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _blank, (self.origin.cls,), vars(self)  # no module holds the class under its name

    def extra_repr(self) -> str:
        return f"heads={self.heads}, key_heads={self.key_heads}, qkr={self.merged_weight is not None}"


class _PositionsFirst(QATAttention):
    """Signature of decoders with rotary positions."""

    def forward(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        return QATAttention.forward(
            self, hidden_states, attention_mask, past_key_values, position_embeddings, **kwargs
        )


@cache
def _subclass(cls: type[nn.Module]) -> type[QATAttention]:
    """A quantized attention that is a `cls` too: transformers records probabilities of instances of it."""
    known = ATTENTIONS[f"{cls.__module__}.{cls.__qualname__}"]
    base = _PositionsFirst if known.positions_first else QATAttention
    return type(f"QAT{cls.__name__}", (base, cls), {"__module__": __name__, "__doc__": QATAttention.__doc__})


def _blank(cls: type[nn.Module]) -> QATAttention:
    subclass: type[QATAttention] = _subclass(cls)  # type: ignore[arg-type]  # a class is hashable
    new = subclass.__new__(subclass)
    nn.Module.__init__(new)
    return new


def _check(module: nn.Module, config: QATConfig, name: str) -> Attention:
    cls = type(module).__name__
    traits = attention_of(module)
    if "CrossAttention" in cls:
        raise ValueError(f"{name}: expected self-attention, got cross attention ({cls}); add it to skip")
    if traits is None:
        known = ", ".join(one.rpartition(".")[2] for one in ATTENTIONS)
        raise ValueError(f"{name}: expected one of {known}, got {cls}; add it to skip")
    if not (config.qkr or config.quantize_attention):
        raise ValueError(f"{name}: expected a config with quantize_attention or qkr, got neither")
    if "forward" in vars(module):
        raise ValueError(
            f"{name}: expected the forward of {cls}, got another on the instance; remove its hooks"
        )
    for key in traits.projections:
        if type(module._modules[key]) is not nn.Linear:
            got = type(module._modules[key]).__name__
            raise TypeError(f"{name}.{key}: expected nn.Linear, got {got}")
    _check_implementation(module.config, name)
    if config.qkr and traits.is_rotary(module):
        raise ValueError(
            f"{name}: expected attention without rotary positions for qkr, got {cls} with them; q^T R(n-m) k "
            f"depends on the distance of two positions, so no single matrix per head stands for queries and "
            f"keys; use qkr=False, or put this attention into skip"
        )
    return traits


def _check_implementation(config: Any, name: str) -> None:
    got = getattr(config, "_attn_implementation", None)
    if got not in IMPLEMENTATIONS:
        raise ValueError(
            f"{name}: expected attention implementation 'eager' or 'sdpa', got {got!r}, whose masks differ; "
            f"call model.set_attn_implementation('sdpa')"
        )


def _weight(module: nn.Module, name: str) -> Tensor:
    return cast(nn.Linear, module._modules[name]).weight


def _out_features(module: nn.Module, name: str) -> int:
    return int(_weight(module, name).shape[0])


def _quantize(quantizer: ActivationQuantizer | None, input: Tensor) -> Tensor:
    output: Tensor = input if quantizer is None else quantizer(input)
    return output


def _split(input: Tensor, heads: int) -> Tensor:
    """[B, T, H d] -> [B, T, H, d]."""
    batch, length, channels = input.shape
    return input.view(batch, length, heads, channels // heads)


def _heads_first(input: Tensor, heads: int) -> Tensor:
    """[B, T, H d] -> [B, H, T, d]."""
    return _split(input, heads).transpose(1, 2)


def _rotate(input: Tensor, heads: int, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves of each head of [B, T, H d] by the angles of its position, [B, T, d]."""
    split = _split(input, heads)
    first, second = split.chunk(2, -1)
    turned = torch.cat((-second, first), -1)
    return (split * cos[:, :, None] + turned * sin[:, :, None]).flatten(-2)
