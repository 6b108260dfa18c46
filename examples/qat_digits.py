"""Train a vision transformer on handwritten digits, then train it on 2-bit weights and activations.

    python examples/qat_digits.py

takes a few minutes on two CPU cores; nothing is downloaded. It shows what any training script needs:
`olive.qat.prepare`, the same loop as before, `olive.qat.anneal` for the last epochs, `olive.qat.convert`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViTConfig, ViTForImageClassification

import olive

BATCH = 64


@dataclass(frozen=True)
class Digits:
    """scikit-learn's 1797 real images of 8 x 8 pixels, a quarter of them held out; the split is fixed."""

    images: Tensor  # float [n, 1, 8, 8], 0 to 1, standardized
    labels: Tensor  # int64 [n]

    @staticmethod
    def load() -> tuple[Digits, Digits]:
        """What to train on, and what is held out."""
        digits = load_digits()
        images = (torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16 - 0.305) / 0.376
        labels = torch.tensor(digits.target)
        train, test = train_test_split(
            torch.arange(len(labels)).numpy(), test_size=0.25, stratify=digits.target, random_state=0
        )
        return Digits(images[train], labels[train]), Digits(images[test], labels[test])

    def batches(self, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """One epoch in random order, half of the images shifted by up to a pixel."""
        for places in torch.randperm(len(self.labels), generator=generator).split(BATCH):
            if len(places) < BATCH:
                return
            rows, columns = torch.randint(-1, 2, (2, len(places), 1, 1), generator=generator)
            shifted = torch.rand(len(places), 1, 1, generator=generator) < 0.5
            rows, columns = rows * shifted, columns * shifted
            grid = torch.arange(8)
            padded = functional.pad(self.images[places][:, 0], (1, 1, 1, 1), value=-0.305 / 0.376)
            index = torch.arange(len(places))[:, None, None]
            moved = padded[index, 1 + grid[None, :, None] + rows, 1 + grid[None, None, :] + columns]
            yield moved[:, None], self.labels[places]


def vision_transformer() -> ViTForImageClassification:
    """Four layers of width 64 on patches of 2 x 2 pixels."""
    config = ViTConfig(
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        image_size=8,
        patch_size=2,
        num_channels=1,
    )
    config.num_labels = 10
    return ViTForImageClassification(config)


def optimizer_for(model: nn.Module, rate: float) -> torch.optim.AdamW:
    """AdamW; vectors (biases, norms, scales) do not decay."""
    vectors = [one for one in model.parameters() if one.dim() < 2]
    matrices = [one for one in model.parameters() if one.dim() >= 2]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=rate)


def train(
    model: nn.Module,
    data: Digits,
    optimizer: torch.optim.Optimizer,
    rates: Callable[[float], float],
    epochs: int,
    seed: int,
) -> None:
    """The usual loop; nothing in it is about quantization.

    Args:
        rates: progress from 0 to 1 -> learning rate.
    """
    generator = torch.Generator().manual_seed(seed)
    total, step = epochs * (len(data.labels) // BATCH), 0
    model.train()
    for _ in range(epochs):
        for images, labels in data.batches(generator):
            for group in optimizer.param_groups:
                group["lr"] = rates(step / total)
            loss = model(pixel_values=images, labels=labels).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1


def warm_cosine(peak: float, end: float, warmup: float = 0.1) -> Callable[[float], float]:
    """A straight line up to `peak`, then half a cosine down to `end`."""

    def rate(progress: float) -> float:
        if progress < warmup:
            return peak * (progress + 0.01) / (warmup + 0.01)
        return end + (peak - end) * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup))) / 2

    return rate


@torch.no_grad()
def accuracy(model: nn.Module, data: Digits) -> float:
    """Share of images whose digit is recognized, 0 to 1."""
    model.eval()
    return float((model(pixel_values=data.images).logits.argmax(-1) == data.labels).float().mean())


def main() -> None:
    """Full precision, two bits, the last epochs with annealing, integers."""
    train_set, test_set = Digits.load()
    torch.manual_seed(0)
    model = vision_transformer()
    train(model, train_set, optimizer_for(model, 1e-3), warm_cosine(1e-3, 1e-5), epochs=80, seed=0)
    print(f"full precision    {accuracy(model, test_set):.1%}")

    teacher = copy.deepcopy(model)
    config = olive.qat.QATConfig(
        weight_bits=2,
        activation_bits=2,
        activation_granularity="per_token",
        activation_offsets=True,
        qkr=True,
    )
    olive.qat.prepare(model, config, batch={"pixel_values": train_set.images[:256]})
    print(f"2 bits, untrained {accuracy(model, test_set):.1%}")
    olive.qat.distill(model, teacher, weight=0.5)
    optimizer = optimizer_for(model, 1e-3)
    tracker = olive.qat.OscillationTracker(model, momentum=0.01, optimizer=optimizer)
    train(model, train_set, optimizer, warm_cosine(1e-3, 1e-5), epochs=30, seed=1)
    print(
        f"2 bits, trained   {accuracy(model, test_set):.1%}, {tracker.shares()['oscillating']:.2%} oscillate"
    )
    olive.qat.anneal(model, optimizer)
    train(model, train_set, optimizer, lambda _: 2e-4, epochs=10, seed=2)
    print(
        f"2 bits, annealed  {accuracy(model, test_set):.1%}, {tracker.shares()['oscillating']:.2%} oscillate"
    )
    olive.qat.convert(model)
    print(f"2 bits, integers  {accuracy(model, test_set):.1%}")


if __name__ == "__main__":
    main()
