"""Run in a process of its own by test_load_memory.py: prints how much memory loading and saving took."""

from __future__ import annotations

import ctypes
import json
import sys
import threading
import time
from collections.abc import Callable

import psutil
import torch
import transformers
from transformers.models.llama import LlamaForCausalLM  # what it imports is no part of the measurement

import olive
import olive.ptq.grids
import olive.ptq.parameter
from olive.ops import cpu_backend


def resident() -> int:
    return int(psutil.Process().memory_info().rss)


def peak_of(work: Callable[[], object]) -> tuple[object, int]:
    """Run `work`; its result and the largest resident size meanwhile, sampled every millisecond."""
    peak, done = resident(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, resident())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return work(), peak
    finally:
        done.set()
        thread.join()


def search_cheaply() -> None:
    """One scale per group, without compiled kernels a few rows at a time: how weights come and go counts."""
    search = olive.ptq.parameter.quantize_weight
    olive.ptq.grids.PAIR_GRID = (0.9,)
    if cpu_backend() != "reference":
        return

    def by_rows(weight: torch.Tensor, config: olive.QuantConfig, **kwargs: object) -> object:
        parts = [search(part, config, **kwargs) for part in weight.split(128)]
        codes, scale = torch.cat([part.codes for part in parts]), torch.cat([part.scale for part in parts])
        return parts[0]._replace(codes=codes, scale=scale)

    olive.ptq.parameter.quantize_weight = by_rows


def load(path: str, config: olive.QuantConfig | None) -> tuple[LlamaForCausalLM, dict[str, int]]:
    before = resident()
    model, peak = peak_of(
        lambda: LlamaForCausalLM.from_pretrained(path, dtype=torch.bfloat16, quantization_config=config)
    )
    size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
    return model, {"before": before, "peak": peak, "after": resident(), "model": size}


def quantize_while_loading(path: str, target: str) -> None:
    """Measure the loading, then save."""
    search_cheaply()
    model, figures = load(path, olive.QuantConfig(codebook="nf4"))
    model.save_pretrained(target, max_shard_size="40MB")
    print(json.dumps(figures))


def load_and_save(path: str, target: str) -> None:
    """Measure both."""
    model, figures = load(path, None)
    ctypes.CDLL(None).malloc_trim(0)  # else free pages of the heap hide what saving needs
    before = resident()
    _, peak = peak_of(lambda: model.save_pretrained(target, max_shard_size="20MB"))
    print(json.dumps({**figures, "save_before": before, "save_peak": peak}))


if __name__ == "__main__":
    transformers.utils.logging.disable_progress_bar()
    globals()[sys.argv[1]](*sys.argv[2:])
