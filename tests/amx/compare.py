"""Runs the AMX kernels, in software where the processor has none, and compares their bits with AVX512-VNNI's.

A process of its own, because it installs a signal handler. Arguments: the library of kernels, the emulator's.
Prints one JSON object: cases, differences, how many instructions were emulated.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2]))

from olive.formats import get_codebook
from olive.ops import cpu
from tests.ops.cpu_cases import DTYPES, random_weight
from tests.ops.fixed_point import assert_same_bits

ROWS = (5, 16, 17, 33, 130, 133)  # 1 to 4 rows, also as a last tile, go another way
SHAPES = ((1, 1), (7, 70), (16, 128), (33, 203), (50, 45))
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def amx_linear(
    library: ctypes.CDLL,
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    outputs: int,
    group: int,
) -> Tensor:
    out = torch.full((x.shape[0], outputs), 7.0, dtype=x.dtype)
    library.amx_linear(
        ctypes.c_void_p(x.data_ptr()),
        TYPES[x.dtype],
        ctypes.c_int64(x.shape[0]),
        ctypes.c_int64(outputs),
        ctypes.c_int64(x.shape[1]),
        group,
        ctypes.c_void_p(codes.data_ptr()),
        ctypes.c_void_p(scale.data_ptr()),
        ctypes.c_void_p(BOOK.data_ptr()),
        ctypes.c_void_p(None if bias is None else bias.data_ptr()),
        0 if bias is None else TYPES[bias.dtype],
        ctypes.c_void_p(out.data_ptr()),
    )
    return out


BOOK = get_codebook("adaptive").tensor()


def main(kernels_path: str, emulator_path: str) -> None:
    torch.manual_seed(0)
    cpu.cpu_isas()  # where there is AMX, this asks the system for it, and nothing will be emulated
    emulator = ctypes.CDLL(emulator_path)
    emulator.amx_emulator_count.restype = ctypes.c_long
    assert emulator.amx_emulator_install() == 0
    library = ctypes.CDLL(kernels_path)
    cases, differences = 0, []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for rows in ROWS if threads == 1 else (17, 400):
            for outputs, columns in SHAPES:
                for group in (32, 64, 128, -1, 0):
                    codes, scale, book = random_weight(outputs, columns, group, "adaptive")
                    packed = cpu.ovp_pack_cpu(codes, scale, columns, group)
                    for dtype in DTYPES:
                        x = torch.randn(rows, columns)
                        x[:, columns // 2] *= 80
                        x[rows // 2, 0] = float("nan") if cases % 7 == 0 else 0.0
                        x = x.to(dtype)
                        bias = torch.randn(outputs).to(dtype) if cases % 2 else None
                        expected = cpu.ovp_linear_cpu(x, *packed, book, bias, outputs, group, "avx512_vnni")
                        found = amx_linear(library, x, *packed, bias, outputs, group)
                        cases += 1
                        try:
                            assert_same_bits(found, expected)
                        except AssertionError as error:
                            shape = f"M {rows}, N {outputs}, K {columns}, group {group}"
                            differences.append(f"{shape}, {dtype}, {threads} threads: {error}")
    result = {"cases": cases, "differences": differences, "emulated": emulator.amx_emulator_count()}
    print(json.dumps(result))
    if len(sys.argv) > 3 and sys.argv[3] == "misuse":
        sys.stdout.flush()
        library.amx_misuse()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
