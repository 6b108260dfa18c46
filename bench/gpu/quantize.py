"""`ovp_encode` (scale given), `ovp_decode`, `quantize_activations`, the default search: against a copy.

python -m bench.gpu.quantize          # about 20 seconds on an H200
python -m bench.gpu.quantize --tiny --device cpu
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from bench.gpu.ceilings import copy_bandwidth
from bench.gpu.data import GROUP, drawn_weight
from bench.gpu.device import device_clock, prepare, synchronize
from bench.gpu.results import Results, output_file
from bench.timing import Timing, take_turns
from olive import QuantConfig, ops
from olive.formats import CODEBOOKS
from olive.ops.reference import ovp_decode_reference, ovp_encode_reference
from olive.ops.reference_quantized import quantize_activations_reference
from olive.ptq import quantize_weight
from olive.ptq.search import QuantizedWeight

# 1.8 GB in bfloat16: far more than any cache, and long enough that the host's part of a call is small.
LARGE = (73728, 12288)
LAYER = (14336, 4096)  # of an 8 B model: quantized one by one, as a model's weights are
SEARCHED_WEIGHTS = 520_000_000
ACTIVATION_ROWS = (1, 1024, 16384)  # M, of 4096 columns
_CHECKED_ROWS = 16
_CONFIG = QuantConfig(group_size=GROUP)


def random_bf16(n: int, k: int, device: torch.device) -> torch.Tensor:
    """A normal weight, made on the device."""
    return torch.randn(n, k, device=device, dtype=torch.bfloat16).mul_(0.02)


class Section:
    """What the three measurements share.

    Args:
        results: where rows go.
        device: where it runs.
        copy: bytes per second of a copy.
        tiny: a smoke run.
    """

    def __init__(self, results: Results, device: torch.device, copy: float, tiny: bool) -> None:
        self.results, self.device, self.copy, self.tiny = results, device, copy, tiny

    def _add(self, op: str, n: int, k: int, timing: Timing, note: str) -> None:
        rate = 2.5 * n * k / timing.median  # bfloat16 and half a byte: one is read, the other written
        self.results.add(
            op,
            "olive",
            timing,
            plan=ops.gpu_backend(self.device) if self.device.type == "cuda" else ops.cpu_backend(),
            n=n,
            k=k,
            dtype="bfloat16",
            codebook=_CONFIG.codebook,
            group_size=GROUP,
            gb_s=rate / 1e9,
            of_copy=rate / self.copy,
            mweights_s=n * k / timing.median / 1e6,
            note=note,
        )

    def _time(self, op: str, n: int, k: int, call: Callable[[], object], *, waits: bool) -> None:
        prepared = prepare(lambda _: call(), 1, self.device, waits=waits)
        launches = {op: lambda _: prepared.launch()}
        clock, calls = device_clock(self.device), {op: prepared.calls}
        timing = take_turns(launches, 0 if self.tiny else 1.0, clock=clock, calls=calls)[op]
        self._add(op, n, k, timing, prepared.note)

    def encode(self, n: int, k: int, weight: QuantizedWeight) -> None:
        """Scales given; the codes of the first rows must be the reference's."""
        values = random_bf16(n, k, self.device)
        _, scale, book = weight
        rows = slice(_CHECKED_ROWS)
        codes = ops.ovp_encode(values, scale, book, GROUP, "optimal")
        expected = ovp_encode_reference(values[rows], scale[rows], book, GROUP, "optimal")
        if not torch.equal(codes[rows], expected):
            raise ValueError("ovp_encode: expected the reference's codes, got others")
        del codes
        self._time(
            "ovp_encode", n, k, lambda: ops.ovp_encode(values, scale, book, GROUP, "optimal"), waits=True
        )

    def decode(self, n: int, k: int, weight: QuantizedWeight) -> None:
        """Canonical codes to bfloat16; the first rows must be the reference's."""
        part = (weight.codes[:_CHECKED_ROWS], weight.scale[:_CHECKED_ROWS], weight.codebook)
        size = (k, GROUP, torch.bfloat16)
        if not torch.equal(
            ops.ovp_decode(*weight, *size)[:_CHECKED_ROWS], ovp_decode_reference(*part, *size)
        ):
            raise ValueError("ovp_decode: expected the reference's values, got others")
        self._time("ovp_decode", n, k, lambda: ops.ovp_decode(*weight, *size), waits=False)

    def activations(self, m: int, k: int) -> None:
        """bfloat16 to int8 levels; the first rows must be the reference's."""
        book = CODEBOOKS["int4"].tensor().to(self.device)
        kinds: dict[str, tuple[Any, ...]] = {
            "int8": ("int8", -1, "optimal", None, None),
            "int8 g128": ("int8", GROUP, "optimal", None, None),
            "ovp4": ("ovp4", -1, "optimal", book, None),
            "ovp4 g128": ("ovp4", GROUP, "optimal", book, None),
        }
        for kind, format in kinds.items():
            x, arguments = random_bf16(m, k, self.device), (*format, torch.int8)
            found = ops.quantize_activations(x, *arguments)
            wanted = quantize_activations_reference(x[:_CHECKED_ROWS], *arguments)
            if not all(
                torch.equal(got[:_CHECKED_ROWS], want) for got, want in zip(found, wanted, strict=True)
            ):
                raise ValueError(f"quantize_activations {kind}: expected the reference's levels, got others")
            call = partial(ops.quantize_activations, x, *arguments)
            prepared = prepare(lambda _, call=call: call(), 1, self.device)  # type: ignore[misc]
            launches = {kind: lambda _, it=prepared: it.launch()}
            clock, calls = device_clock(self.device), {kind: prepared.calls}
            timing = take_turns(launches, 0 if self.tiny else 0.2, clock=clock, calls=calls)[kind]
            rate = 3 * m * k / timing.median  # two bytes read, one written
            figures = {"gb_s": rate / 1e9, "of_copy": rate / self.copy, "note": prepared.note}
            shape = {"plan": kind, "m": m, "k": k, "dtype": "bfloat16"}
            self.results.add("quantize_activations", "olive", timing, **shape, **figures)

    def search(self, n: int, k: int) -> None:
        """The default search on fresh weights, by the host's clock: what a user waits for."""
        weights = n * k if self.tiny else SEARCHED_WEIGHTS
        quantize_weight(random_bf16(n, k, self.device), _CONFIG)  # warm-up
        times: list[float] = []
        while len(times) * n * k < weights or len(times) < 2:
            weight = random_bf16(n, k, self.device)
            synchronize(self.device)
            start = time.perf_counter()
            quantize_weight(weight, _CONFIG)
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        seconds = 7e9 / (n * k * len(times) / sum(times))
        self._add("ovp_quantize", n, k, Timing.of(times), f"7 B weights: {seconds:.1f} s")


def main(
    tiny: Annotated[bool, typer.Option(help="Small weights, for a smoke test.")] = False,
    device: Annotated[str, typer.Option(help="cuda, or cpu for a smoke test.")] = "cuda",
    output: Annotated[Path | None, typer.Option(help="CSV to append to.")] = None,
) -> None:
    """Check and measure; exit status 1 if an operator is wrong or fails."""
    place = torch.device(device)
    results = Results(output_file(output, place, tiny), place)
    with torch.inference_mode():
        section = Section(results, place, copy_bandwidth(results, place, tiny), tiny)
        large, layer = ((64, 256), (64, 256)) if tiny else (LARGE, LAYER)
        weight = drawn_weight(*large, place)
        rows = (2,) if tiny else ACTIVATION_ROWS
        measurements: dict[str, Callable[[], None]] = {
            "ovp_decode": lambda: section.decode(*large, weight),
            "ovp_encode": lambda: section.encode(*large, weight),
            **{
                f"quantize_activations M {m}": partial(section.activations, m, 64 if tiny else 4096)
                for m in rows
            },
            "ovp_quantize": lambda: section.search(*layer),
        }
        for op, run in measurements.items():
            try:
                run()
            except (RuntimeError, ValueError) as error:
                synchronize(place)
                results.fail(op.partition(" ")[0], "olive", error)
    raise typer.Exit(int(results.failed))


if __name__ == "__main__":
    typer.run(main)
