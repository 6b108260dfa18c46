"""Rotate the residual stream of a Llama-like model by a Hadamard matrix, folded into its weights.

Between its layers such a model only adds, and an RMS norm without weights commutes with every orthogonal
matrix Q. So the norms' weights are multiplied into the layers that read them, what writes to the stream is
multiplied by Q, and what reads from it by the inverse of Q: the same function, but an outlier channel is
spread over all channels, and so are the columns of the weights that would have met it. Nothing is left to be
done while the model runs.

What a down projection reads, act(gate) * up, is no part of the stream. Its layer can rotate it at each call
(`olive.ops.online_hadamard`), but that mixes channels of all sizes: one that is always large, and met by
small weights, would put its size on errors of large weights. So channels are balanced before: a row of the
up projection is divided, and the column of the down projection multiplied, by what makes their norms alike.
That is the same function again, and the scales of groups in a row of the up projection take it up.

Source: QuaRot, arXiv:2404.00456 (and SliceGPT, arXiv:2401.15024, for the invariance); balancing: Nagel et
al., arXiv:1906.04721, there for scales of whole weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from olive.ops.hadamard import base_order, hadamard

# What `config.model_type` of transformers has to be: RMS norms before attention and before the MLP, nothing
# else between the layers.
ROTATABLE = ("llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe")
Undo = Callable[[], None]


def rotate(model: nn.Module, *, seed: int = 0, balance: bool = False) -> Undo:
    """Rotate a float model in place.

    Q is a Hadamard matrix with the signs of its rows drawn at random. A head that shares its weight with the
    embedding gets one of its own, because the last norm is folded into it.

    Args:
        model: of transformers, of a type in `ROTATABLE`, in float32, bfloat16 or float16. Products are in
            float32, and results are rounded to the model's dtype.
        seed: of the signs.
        balance: also balance what the down projections read, for layers that rotate it.

    Returns:
        What puts the original parameters back, which it holds until then.

    Raises:
        ValueError: a model of another type, or a hidden size without a known Hadamard matrix. The model is
            as it was, as after any other error.
    """
    decoder, config = _decoder_of(model)
    head = getattr(model, "lm_head", None)
    if model is decoder or not isinstance(head, nn.Linear):
        raise ValueError(
            f"model: expected one with an output head (lm_head), into which the last norm is folded, got "
            f"{type(model).__name__}; use rotate=False"
        )
    size = int(config.hidden_size)
    if base_order(size) is None:
        raise ValueError(
            f"model: expected a hidden size with a known Hadamard matrix, got {size}; rotate=False"
        )
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator).float() * 2 - 1
    change = _Change(signs, balance)
    try:
        change.run(model, decoder, config)
    except BaseException:
        change.undo()
        raise
    return change.undo


def _decoder_of(model: nn.Module) -> tuple[nn.Module, Any]:
    """The module with the embedding, the layers and the last norm, and its config."""
    for module in (model, getattr(model, "model", None)):
        config = getattr(module, "config", None)
        layers, kind = getattr(module, "layers", None), getattr(config, "model_type", None)
        if isinstance(module, nn.Module) and isinstance(layers, nn.ModuleList) and kind in ROTATABLE:
            return module, config
    found = getattr(getattr(model, "config", None), "model_type", None) or type(model).__name__
    raise ValueError(
        f"model: expected one that rotate=True knows ({', '.join(ROTATABLE)}), got {found}; use rotate=False"
    )


class _Change:
    """Changes to parameters, and the originals."""

    def __init__(self, signs: Tensor, balance: bool) -> None:
        self._signs, self._balances = signs, balance
        self._undo: list[Undo] = []
        self._changed: set[nn.Parameter] = set()

    def undo(self) -> None:
        """Put the originals back; once is enough."""
        while self._undo:
            self._undo.pop()()

    def run(self, model: Any, decoder: Any, config: Any) -> None:
        self._untie(model, decoder, config)
        embedding: Any = decoder.embed_tokens
        self._set(embedding, "weight", self._right(embedding.weight))
        for layer in decoder.layers:
            attention, mlp = layer.self_attn, layer.mlp
            self._read(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
            self._write(attention.o_proj)
            experts = getattr(mlp, "experts", None)
            if experts is None:
                self._read(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
                self._write(mlp.down_proj)
                if self._balances:
                    self._balance(mlp.up_proj, mlp.down_proj)
            else:  # mlp.gate is the router
                self._read(layer.post_attention_layernorm, mlp.gate, (experts, "gate_up_proj"))
                self._set(experts, "down_proj", self._left(experts.down_proj))
                if self._balances:
                    self._balance_experts(experts)
        self._read(decoder.norm, model.lm_head)

    def _read(self, norm: Any, *readers: Any) -> None:
        """Fold a norm's weight and the inverse rotation into what reads it: layers, or modules with a key."""
        gain = norm.weight.detach().float()
        for reader in readers:
            module, key = reader if isinstance(reader, tuple) else (reader, "weight")
            self._set(module, key, self._right(getattr(module, key).detach().float() * gain))
        self._set(norm, "weight", torch.ones_like(norm.weight))

    def _write(self, writer: Any) -> None:
        """Rotate what is added to the stream."""
        self._set(writer, "weight", self._left(writer.weight))
        if writer.bias is not None:
            self._set(writer, "bias", self._right(writer.bias[None])[0])

    def _balance(self, up: Any, down: Any) -> None:
        scales = _balancing(up.weight, down.weight)
        self._set(up, "weight", up.weight.detach().float() / scales[:, None])
        if up.bias is not None:
            self._set(up, "bias", up.bias.detach().float() / scales)
        self._set(down, "weight", down.weight.detach().float() * scales)

    def _balance_experts(self, experts: Any) -> None:
        gate, up = experts.gate_up_proj.detach().float().chunk(2, dim=-2)
        scales = _balancing(up, experts.down_proj)
        self._set(experts, "gate_up_proj", torch.cat((gate, up / scales[..., None]), dim=-2))
        self._set(experts, "down_proj", experts.down_proj.detach().float() * scales[..., None, :])

    def _right(self, weight: Tensor) -> Tensor:
        """W Q, over the last dimension: Q = signs x Hadamard."""
        return hadamard(weight.detach().float() * self._signs.to(weight.device))

    def _left(self, weight: Tensor) -> Tensor:
        """Q^T W, over the dimension before the last."""
        return self._right(weight.transpose(-1, -2)).transpose(-1, -2)

    def _set(self, module: nn.Module, key: str, value: Tensor) -> None:
        """Exchange a parameter's values; the parameter stays the same object."""
        parameter = module._parameters[key]
        assert parameter is not None
        original = parameter.data
        if parameter not in self._changed:  # what is between two changes is not kept
            self._changed.add(parameter)
            self._undo.append(lambda: setattr(parameter, "data", original))
        parameter.data = value.to(original.dtype).contiguous()

    def _untie(self, model: Any, decoder: Any, config: Any) -> None:
        """Give the head a weight of its own."""
        head: Any = model.lm_head
        shared: Any = decoder.embed_tokens.weight
        if head.weight is not shared:
            return
        keys = vars(model).get("all_tied_weights_keys")

        def tie() -> None:
            head.weight = shared
            for one in _configs(model, config):
                one.tie_word_embeddings = True
            if keys is not None:
                model.all_tied_weights_keys = keys

        self._undo.append(tie)
        head.weight = nn.Parameter(shared.detach().clone(), requires_grad=shared.requires_grad)
        for one in _configs(model, config):
            one.tie_word_embeddings = False
        if keys is not None:
            model.all_tied_weights_keys = {}


def _balancing(up: Tensor, down: Tensor) -> Tensor:
    """sqrt(norm of a row / norm of the column that meets it), relative to the geometric mean of all.

    Args:
        up: float [..., I, K].
        down: float [..., N, I].

    Returns:
        float32 [..., I]; 1 where a row or a column is zero.
    """
    rows, columns = up.detach().float().norm(dim=-1), down.detach().float().norm(dim=-2)
    known = (rows > 0) & (columns > 0)
    roots = torch.where(known, rows / columns, 1.0).log() / 2
    mean = roots.sum(-1, keepdim=True) / known.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(known, roots - mean, 0.0).exp()


def _configs(model: nn.Module, config: Any) -> Iterator[Any]:
    yield config
    if getattr(model, "config", config) is not config:
        yield model.config
