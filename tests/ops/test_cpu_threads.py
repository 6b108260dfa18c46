"""Threads and the choice of an instruction set: one OpenMP runtime, the same bits, OLIVE_CPU_ISA."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from olive.ops import cpu
from tests.ops.cpu_cases import DTYPES, EACH_ISA, ISAS, NEEDS_KERNELS, heavy_tailed, random_weight
from tests.ops.fixed_point import assert_same_bits

pytestmark = NEEDS_KERNELS
ROOT = Path(__file__).parents[2]
ALL = ("portable", "avx2", "avx512", "avx512_vnni", "amx")
GRIDS = ([0.5, 0.75, 1.0], [0.6, 0.9])


@pytest.fixture(autouse=True)
def _restore_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def _everything(isa: str) -> list[Tensor]:
    """One result of every kernel, large enough to be shared among threads."""
    weight, table = heavy_tailed(300, 520), random_weight(1, 1, 32, "adaptive")[2]
    results: list[Tensor] = []
    for group_size in (0, 64):
        codes, scale = cpu.ovp_quantize_cpu(weight, table, group_size, "optimal", *GRIDS, None, isa)
        packed = cpu.ovp_pack_cpu(codes, scale, 520, group_size)
        results += [codes, scale, *packed, *cpu.ovp_unpack_cpu(*packed, 300, 520, group_size)]
        results.append(cpu.ovp_encode_cpu(weight, scale, table, group_size, "paper", isa))
        results.append(cpu.ovp_decode_cpu(codes, scale, table, 520, group_size, torch.bfloat16, isa))
        for dtype in DTYPES:
            for rows in (1, 7, 300):
                x = heavy_tailed(rows, 520, seed=1).to(dtype)
                results.append(cpu.ovp_linear_cpu(x, *packed, table, None, 300, group_size, isa))
        # Fewer row blocks than threads: threads share the rows of the activations instead.
        small = random_weight(16, 520, group_size, "adaptive")
        x = heavy_tailed(300, 520, seed=1)
        results.append(cpu.ovp_linear_cpu(x, *small, None, 16, group_size, isa))
    return results


def _same(found: list[Tensor], expected: list[Tensor]) -> None:
    for actual, wanted in zip(found, expected, strict=True):
        if actual.is_floating_point():
            assert_same_bits(actual, wanted)
        else:
            assert torch.equal(actual, wanted)


@EACH_ISA
def test_the_number_of_threads_changes_no_bit(isa: str) -> None:
    torch.set_num_threads(1)
    expected = _everything(isa)
    for threads in (2, 3):
        torch.set_num_threads(threads)
        _same(_everything(isa), expected)


@EACH_ISA
def test_calls_from_several_python_threads_are_right(isa: str) -> None:
    torch.set_num_threads(2)
    expected = _everything(isa)
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(_everything, isa) for _ in range(4)]:
            _same(future.result(), expected)


def _run(code: str, *arguments: str, **environment: str) -> str:
    """What a process of its own prints."""
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={**os.environ, **environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert process.returncode == 0, process.stderr
    return process.stdout.strip()


THREADS = """
import os, threading, torch
torch.set_num_threads(1)
from olive.ops import cpu
from tests.ops.cpu_cases import random_weight
weight = random_weight(256, 512, 64, "adaptive")
x = torch.randn(8, 512)
count = lambda: len(os.listdir("/proc/self/task"))
linear = lambda: cpu.ovp_linear_cpu(x, *weight, None, 256, 64)
idle = count()
linear()
alone = count() - idle
found = []
thread = threading.Thread(target=lambda: (linear(), found.append(count() - idle - 1)))
thread.start()
thread.join()
torch.set_num_threads(2)
linear()
shared = count() - idle
torch.randn(4_000_000).exp_()  # torch's own parallel loop finds the pool that is there
after = count() - idle
with open("/proc/self/maps") as maps:
    libraries = {line.split()[-1] for line in maps if "/" in line}
runtimes = [path for path in libraries if any(name in path for name in ("libgomp", "libomp", "libiomp"))]
print(alone, found[0], shared, after, len(runtimes))
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's /proc")
def test_threads_are_torchs_own() -> None:
    """One thread where torch is told one, in a thread of Python's too; then one more; a single runtime."""
    assert _run(THREADS, OMP_NUM_THREADS="4") == "0 0 1 1 1"


# The choice is made once, at the first call: forks of a process that has imported everything and called
# nothing make it anew, without an import each.
CHOICE = """
import os, sys, torch
from olive.ops import cpu
from tests.ops.cpu_cases import random_weight
for name in sys.argv[1:]:
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        continue
    os.environ["OLIVE_CPU_ISA"] = name
    try:
        backend = cpu.cpu_backend()
        codes, scale, table = random_weight(5, 70, 32, "adaptive")
        out = torch.ops.olive.ovp_linear(torch.ones(6, 70), codes, scale, table, None, 5, 32)
        print(backend, out.sum().item(), flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
    os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_environment_chooses_the_instruction_set() -> None:
    missing = [name for name in ALL if name not in ISAS]
    names = [*ISAS, *missing, "sse9"]
    lines = _run(CHOICE, *names, OMP_NUM_THREADS="1").splitlines()
    codes, scale, table = random_weight(5, 70, 32, "adaptive")
    for name, line in zip(names, lines, strict=True):
        if name in ISAS:
            total = cpu.ovp_linear_cpu(torch.ones(6, 70), codes, scale, table, None, 5, 32, name).sum().item()
            assert line == f"{name} {total}"
        elif name in missing:
            start = "RuntimeError isa: expected one that this processor and system support, got"
            assert line.startswith(f"{start} {name};")
        else:
            assert line == f"ValueError isa: expected {', '.join(ALL[:-1])} or {ALL[-1]}, got sse9"


def test_without_a_choice_the_best_instruction_set_runs() -> None:
    if "OLIVE_CPU_ISA" in os.environ:
        pytest.skip("OLIVE_CPU_ISA is set")
    assert cpu.cpu_backend() == ISAS[-1]
