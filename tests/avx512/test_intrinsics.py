"""The emulator's intrinsics, one by one, against Intel's manual in numpy, and a processor that has them."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from olive.ops import cpu
from tests.avx512.module import NEEDS_EMULATOR, intrinsics, native_intrinsics
from tests.ops.fixed_point import fused_multiply_add

pytestmark = NEEDS_EMULATOR
Array = NDArray[np.generic]
CASES = 200
TILE_KINDS = {"ssd": (np.int8, np.int8), "sud": (np.int8, np.uint8), "usd": (np.uint8, np.int8),
              "uud": (np.uint8, np.uint8)}  # fmt: skip


# ---- inputs -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vector:
    """One operand of all cases, [CASES, 64] bytes, seen as lanes of a type."""

    bytes: NDArray[np.uint8]

    def lanes(self, dtype: type) -> Array:
        return self.bytes.view(dtype)

    def wide(self, dtype: type) -> NDArray[np.int64]:
        """Lanes in 64 bits, where sums and products are exact."""
        return self.bytes.view(dtype).astype(np.int64)

    def first(self, size: int) -> Vector:
        return Vector(np.ascontiguousarray(self.bytes[:, :size]))


@dataclass(frozen=True)
class Operands:
    """As intrinsics.cpp has them: three vectors and a mask; x, y and z are the same as floats."""

    a: Vector
    b: Vector
    c: Vector
    k: NDArray[np.uint64]

    @property
    def zero(self) -> Vector:
        return Vector(np.zeros_like(self.a.bytes))

    @cached_property
    def bits(self) -> NDArray[np.bool_]:
        """The mask, [CASES, 64]."""
        return np.unpackbits(self.k.view(np.uint8).reshape(-1, 8), axis=1, bitorder="little").astype(bool)

    @property
    def x(self) -> NDArray[np.float32]:
        return self.a.bytes.view(np.float32)

    @property
    def y(self) -> NDArray[np.float32]:
        return self.b.bytes.view(np.float32)

    @property
    def z(self) -> NDArray[np.float32]:
        return self.c.bytes.view(np.float32)


FLOATS = np.array(
    [0.0, -0.0, 0.5, -0.5, 1.5, 2.5, -2.5, 126.5, 127.5, 128.5, 1e-40, -1e-40, 8388607.5, 2147483520.0,
     2.0**31, -(2.0**31), 2.0**32, -1.0, 65504.0, 65520.0, 1e30, np.inf, -np.inf, np.nan, 0.3125, -0.15625],
    dtype=np.float32,
)  # fmt: skip


def _operands() -> Operands:
    generator = np.random.default_rng(0)

    def vector() -> Vector:
        values = generator.integers(256, size=(CASES, 64), dtype=np.uint8)
        extreme = generator.choice(np.array([0, 1, 127, 128, 255], dtype=np.uint8), size=(50, 64))
        special = generator.choice(FLOATS, size=(50, 16))
        ordinary = (generator.normal(size=(30, 16)) * 100).astype(np.float32)
        values[:50] = extreme
        values[50:100] = special.view(np.uint8)
        values[100:130] = ordinary.view(np.uint8)
        return Vector(values)

    a, b, c = vector(), vector(), vector()
    b.bytes[::7] = a.bytes[::7]  # equal lanes for comparisons
    return Operands(a, b, c, generator.integers(2**64, size=CASES, dtype=np.uint64))


OPERANDS = _operands()


def _run(library: ctypes.CDLL) -> dict[str, NDArray[np.uint8]]:
    """Every intrinsic of a library on all cases: [CASES, 64] bytes, zeros after the result."""
    library.intrinsic_name.restype = ctypes.c_char_p
    o = OPERANDS
    packed = np.concatenate((o.a.bytes, o.b.bytes, o.c.bytes, o.k.view(np.uint8).reshape(-1, 8)), axis=1)
    packed = np.ascontiguousarray(packed)
    results = {}
    for index in range(library.intrinsic_count()):
        out = np.zeros((CASES, 64), dtype=np.uint8)
        library.intrinsic_run(
            index, CASES, packed.ctypes.data_as(ctypes.c_void_p), out.ctypes.data_as(ctypes.c_void_p)
        )
        results[library.intrinsic_name(index).decode()] = out
    return results


@pytest.fixture(scope="module")
def library(build_folder: Path) -> ctypes.CDLL:
    return intrinsics(build_folder)


@pytest.fixture(scope="module")
def results(library: ctypes.CDLL) -> dict[str, NDArray[np.uint8]]:
    return _run(library)


# ---- what each must give ----------------------------------------------------------------------------------

Oracle = Callable[[Operands], Array]  # [CASES, lanes], in the lanes' type; of masks [CASES, lanes] bool
SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}


def _clip(values: NDArray[np.int64], dtype: type) -> Array:
    return values.clip(np.iinfo(dtype).min, np.iinfo(dtype).max).astype(dtype)


def _two(dtype: type, f: Callable[[NDArray[np.int64], NDArray[np.int64]], Array]) -> Oracle:
    return lambda o: f(o.a.wide(dtype), o.b.wide(dtype)).astype(dtype)


def _merged(bits: int, result: Oracle, zero: bool) -> Oracle:
    """With the mask: else lanes of c, or zeros."""

    def oracle(o: Operands) -> Array:
        other = o.c.lanes(SIGNED[bits]) * (0 if zero else 1)
        return np.where(o.bits[:, : other.shape[1]], result(o).view(SIGNED[bits]), other)

    return oracle


def _gather(dtype: type, index: Callable[[Operands], Array], *vectors: str) -> Oracle:
    """Lanes of the vectors named, numbered through, by index."""

    def oracle(o: Operands) -> Array:
        lanes = np.concatenate([getattr(o, name).lanes(dtype) for name in vectors], axis=1)
        chosen = np.broadcast_to(index(o), (CASES, np.asarray(index(o)).shape[-1]))
        return np.take_along_axis(lanes, chosen.astype(np.int64) % lanes.shape[1], axis=1)

    return oracle


def _by_run(dtype: type, sources: list[int], *vectors: str) -> Oracle:
    """In each 16 bytes: lane i from lane sources[i] of the vectors' same 16 bytes, one after the other."""

    def oracle(o: Operands) -> Array:
        runs = [getattr(o, name).lanes(dtype).reshape(CASES, 4, -1) for name in vectors]
        return np.ascontiguousarray(np.concatenate(runs, axis=2)[:, :, sources]).reshape(CASES, -1)

    return oracle


def _pack(source: type, target: type) -> Oracle:
    def oracle(o: Operands) -> Array:
        runs = [_clip(v.wide(source), target).reshape(CASES, 4, -1) for v in (o.a, o.b)]
        return np.concatenate(runs, axis=2).reshape(CASES, -1)

    return oracle


def _convert(size: int, source: type, target: type, saturate: bool = False) -> Oracle:
    def oracle(o: Operands) -> Array:
        values = o.a.first(size).lanes(source)
        if saturate and source is np.uint32:
            return values.clip(0, np.iinfo(target).max).astype(target)
        wide = values.astype(np.int64)
        return _clip(wide, target) if saturate else wide.astype(target)

    return oracle


def _to_int(values: NDArray[np.float32], rounded: Callable[[Array], Array], dtype: type = np.int32) -> Array:
    """What does not fit, NaN included, becomes the largest unsigned or the smallest signed number."""
    whole = rounded(values.astype(np.float64))
    limits = np.iinfo(dtype)
    fits = (whole >= limits.min) & (whole <= limits.max)
    other = limits.max if limits.min == 0 else limits.min
    return np.where(fits, np.where(fits, whole, 0), other).astype(dtype)


def _sum_of_products(o: Operands, left: type, right: type, saturate: bool) -> Array:
    """Lane by lane in a loop, as the manual has it."""
    a, b, sums = o.a.lanes(left), o.b.lanes(right), o.c.lanes(np.int32)
    out = np.zeros_like(sums)
    run = a.shape[1] // 16
    for case in range(CASES):
        for lane in range(16):
            total = int(sums[case, lane])
            for j in range(run * lane, run * lane + run):
                total += int(a[case, j]) * int(b[case, j])
            if saturate:
                total = max(-(2**31), min(2**31 - 1, total))
            out[case, lane] = (total + 2**31) % 2**32 - 2**31
    return out


def _shift(bits: int, signed: bool, shift: Callable[[int, int], int]) -> Oracle:
    """Lanes of a by lanes of b, each in a loop."""

    def oracle(o: Operands) -> Array:
        dtype = (SIGNED if signed else UNSIGNED)[bits]
        values, counts = o.a.lanes(dtype), o.b.lanes(UNSIGNED[bits])
        out = [shift(int(x), min(int(n), bits)) for x, n in zip(values.flat, counts.flat, strict=True)]
        return np.array([value % 2**bits for value in out], dtype=UNSIGNED[bits]).reshape(values.shape)

    return oracle


def _fused(a: Array, b: Array, c: Array) -> Array:
    """Rounded once."""
    return fused_multiply_add(*(torch.from_numpy(v.copy()) for v in (a, b, c))).numpy()


def _round_scale(values: NDArray[np.float32], rounded: Callable[[Array], Array], bits: int) -> Array:
    return (rounded(values.astype(np.float64) * 2.0**bits) / 2.0**bits).astype(np.float32)


def _folded(values: NDArray[np.float32], f: Callable[[Array, Array], Array]) -> Array:
    """8 lanes on 8, 4 on 4, 2 on 2, 1 on 1; in gcc's header the high half comes first in two of the steps."""
    for half in (8, 4, 2, 1):
        low, high = values[:, :half], values[:, half : 2 * half]
        values = f(high, low) if half > 2 else f(low, high)
    return values


def _second_if_nan(pick: Callable[[Array, Array], Array]) -> Callable[[Array, Array], Array]:
    """max and min: the second operand unless the first is strictly more or less."""
    return lambda a, b: np.where(pick(a, b), a, b)


ORACLES: dict[str, Oracle] = {
    "maskz_loadu_epi8": lambda o: np.where(o.bits, o.a.bytes, 0),
    "mask_loadu_epi16": lambda o: np.where(o.bits[:, :32], o.a.lanes(np.int16), o.c.lanes(np.int16)),
    "maskz_loadu_epi32": lambda o: np.where(o.bits[:, :16], o.a.lanes(np.int32), 0).astype(np.int32),
    "mask_storeu_epi8": lambda o: np.where(o.bits, o.a.bytes, o.c.bytes),
    "mask_storeu_epi32": lambda o: np.where(o.bits[:, :16], o.a.lanes(np.int32), o.c.lanes(np.int32)),
    "mask_storeu_epi8_128": lambda o: np.where(o.bits & (np.arange(64) < 16), o.a.bytes, o.c.bytes),
    "set1_epi8": lambda o: np.repeat(o.a.bytes[:, :1], 64, axis=1),
    "set_epi32": lambda o: np.tile(np.arange(16, dtype=np.int32), (CASES, 1)),
    "setr_epi32": lambda o: np.tile(np.arange(15, -1, -1, dtype=np.int32), (CASES, 1)),
    "mask_set1_epi16": lambda o: np.where(o.bits[:, :32], np.int16(7), o.c.lanes(np.int16)),
    # integers
    "mullo_epi64": lambda o: o.a.lanes(np.uint64) * o.b.lanes(np.uint64),
    "mulhi_epi16": _two(np.int16, lambda a, b: a * b >> 16),
    "mulhi_epu16": _two(np.uint16, lambda a, b: a * b >> 16),
    "mulhrs_epi16": _two(np.int16, lambda a, b: (a * b + 0x4000) >> 15),
    "mul_epi32": lambda o: o.a.wide(np.int32)[:, ::2] * o.b.wide(np.int32)[:, ::2],
    "mul_epu32": lambda o: o.a.lanes(np.uint32)[:, ::2].astype(np.uint64) * o.b.lanes(np.uint32)[:, ::2],
    "madd_epi16": lambda o: (
        (o.a.wide(np.int16) * o.b.wide(np.int16)).reshape(CASES, 16, 2).sum(2).astype(np.int32)
    ),
    "maddubs_epi16": lambda o: _clip(
        (o.a.wide(np.uint8) * o.b.wide(np.int8)).reshape(CASES, 32, 2).sum(2), np.int16
    ),
    "sad_epu8": lambda o: abs(o.a.wide(np.uint8) - o.b.wide(np.uint8)).reshape(CASES, 8, 8).sum(2),
    "slli_epi16_4": lambda o: o.a.lanes(np.uint16) << 4,
    "slli_epi32_31": lambda o: o.a.lanes(np.uint32) << 31,
    "slli_epi64_33": lambda o: o.a.lanes(np.uint64) << 33,
    "srli_epi16_4": lambda o: o.a.lanes(np.uint16) >> 4,
    "srli_epi32_32": lambda o: o.a.lanes(np.uint32) * 0,
    "srli_epi64_9": lambda o: o.a.lanes(np.uint64) >> 9,
    "srai_epi16_16": lambda o: o.a.lanes(np.int16) >> 15,
    "srai_epi32_7": lambda o: o.a.lanes(np.int32) >> 7,
    "srai_epi64_40": lambda o: o.a.lanes(np.int64) >> 40,
    "mask_slli_epi16": lambda o: np.where(o.bits[:, :32], o.a.lanes(np.int16) << 3, o.c.lanes(np.int16)),
    "sllv_epi16": _shift(16, False, lambda x, n: x << n),
    "srlv_epi16": _shift(16, False, lambda x, n: x >> n),
    "srav_epi16": _shift(16, True, lambda x, n: x >> n),
    "sllv_epi32": _shift(32, False, lambda x, n: x << n),
    "srav_epi32": _shift(32, True, lambda x, n: x >> n),
    "and_si512": lambda o: o.a.bytes & o.b.bytes,
    "or_si512": lambda o: o.a.bytes | o.b.bytes,
    "xor_si512": lambda o: o.a.bytes ^ o.b.bytes,
    "andnot_si512": lambda o: ~o.a.bytes & o.b.bytes,
    "ternarylogic_epi32_select": lambda o: (o.a.bytes & o.b.bytes) | (~o.a.bytes & o.c.bytes),
    "ternarylogic_epi32_xor": lambda o: o.a.bytes ^ o.b.bytes ^ o.c.bytes,
    "reduce_add_epi32": lambda o: o.a.wide(np.int32).sum(1, keepdims=True).astype(np.int32),
    "reduce_max_epi32": lambda o: o.a.lanes(np.int32).max(1, keepdims=True),
    # masks
    "mask_cmpeq_epi8_mask": lambda o: o.bits & (o.a.bytes == o.b.bytes),
    "mask_cmp_epi16_mask": lambda o: o.bits[:, :32] & (o.a.lanes(np.int16) <= o.b.lanes(np.int16)),
    "test_epi8_mask": lambda o: (o.a.bytes & o.b.bytes) != 0,
    "testn_epi16_mask": lambda o: (o.a.lanes(np.int16) & o.b.lanes(np.int16)) == 0,
    "test_epi32_mask": lambda o: (o.a.lanes(np.int32) & o.b.lanes(np.int32)) != 0,
    "movm_epi8": lambda o: -o.bits.astype(np.int8),
    "movm_epi16": lambda o: -o.bits[:, :32].astype(np.int16),
    "movm_epi32": lambda o: -o.bits[:, :16].astype(np.int32),
    "mask_blend_epi8": lambda o: np.where(o.bits, o.b.bytes, o.a.bytes),
    "mask_blend_epi32": lambda o: np.where(o.bits[:, :16], o.b.lanes(np.int32), o.a.lanes(np.int32)),
    "mask_blend_ps": lambda o: np.where(o.bits[:, :16], o.y, o.x),
    "mask_mov_epi16": lambda o: np.where(o.bits[:, :32], o.b.lanes(np.int16), o.a.lanes(np.int16)),
    "maskz_mov_epi8": lambda o: np.where(o.bits, o.a.bytes, 0),
    "kandn": lambda o: ~o.bits[:, :16] & o.bits[:, 16:32],
    "kandn_mask64": lambda o: ~o.bits & np.pad(o.bits[:, :-1], ((0, 0), (1, 0))),
    "knot_mask32": lambda o: ~o.bits[:, :32],
    # shuffles
    "shuffle_epi8": lambda o: np.where(
        o.b.bytes & 128,
        0,
        np.take_along_axis(o.a.bytes, (np.arange(64) & ~15) | (o.b.bytes & 15), axis=1),
    ).astype(np.uint8),
    "packs_epi16": _pack(np.int16, np.int8),
    "packus_epi16": _pack(np.int16, np.uint8),
    "packs_epi32": _pack(np.int32, np.int16),
    "packus_epi32": _pack(np.int32, np.uint16),
    "alignr_epi8_5": _by_run(np.uint8, list(range(5, 21)), "b", "a"),
    "alignr_epi8_20": _by_run(np.uint8, [*range(4, 20)], "a", "zero"),
    "alignr_epi32_3": _gather(np.int32, lambda o: np.arange(3, 19), "b", "a"),
    "alignr_epi64_7": _gather(np.int64, lambda o: np.arange(7, 15), "b", "a"),
    "bslli_epi128_3": _by_run(np.uint8, list(range(13, 29)), "zero", "a"),
    "bsrli_epi128_3": _by_run(np.uint8, list(range(3, 19)), "a", "zero"),
    "shuffle_epi32": _by_run(np.int32, [1, 2, 3, 0], "a"),
    "permutex_epi64_0x1B": _gather(np.int64, lambda o: np.array([3, 2, 1, 0, 7, 6, 5, 4]), "a"),
    "shuffle_i32x4": _gather(np.int32, lambda o: np.array([*range(8, 16), *range(16, 24)]), "a", "b"),
    "permutexvar_ps": _gather(np.float32, lambda o: o.a.lanes(np.uint32), "b"),
    "mask_permutexvar_epi32": _merged(32, _gather(np.int32, lambda o: o.a.lanes(np.uint32), "b"), False),
    "mask_permutex2var_epi32": lambda o: np.where(
        o.bits[:, :16],
        _gather(np.int32, lambda o: o.b.lanes(np.uint32), "a", "c")(o),
        o.a.lanes(np.int32),
    ),
    "extracti64x4_epi64": lambda o: o.a.bytes[:, 32:],
    "extracti32x4_epi32": lambda o: o.a.bytes[:, 32:48],
    "inserti64x4": lambda o: np.concatenate((o.a.bytes[:, :32], o.b.bytes[:, :32]), axis=1),
    "inserti32x4": lambda o: np.concatenate((o.a.bytes[:, :48], o.b.bytes[:, :16]), axis=1),
    "broadcast_i32x4": lambda o: np.tile(o.a.bytes[:, :16], (1, 4)),
    "broadcast_i64x4": lambda o: np.tile(o.a.bytes[:, :32], (1, 2)),
    "broadcastb_epi8": lambda o: np.tile(o.a.bytes[:, :1], (1, 64)),
    "broadcastw_epi16": lambda o: np.tile(o.a.bytes[:, :2], (1, 32)),
    "broadcastd_epi32": lambda o: np.tile(o.a.bytes[:, :4], (1, 16)),
    "broadcastq_epi64": lambda o: np.tile(o.a.bytes[:, :8], (1, 8)),
    "zextsi128_si512": lambda o: o.a.bytes[:, :16],
    # conversions
    "mask_cvtepi32_epi8": lambda o: np.where(
        o.bits[:, :16], o.a.lanes(np.int32).astype(np.int8), o.c.first(16).lanes(np.int8)
    ),
    "mask_cvtsepi32_storeu_epi8": lambda o: np.concatenate(
        (
            np.where(o.bits[:, :16], _clip(o.a.wide(np.int32), np.int8), o.c.first(16).lanes(np.int8)),
            o.c.bytes[:, 16:].view(np.int8),
        ),
        axis=1,
    ),
    "cvtepi32_ps": lambda o: o.a.lanes(np.int32).astype(np.float32),
    "cvtepu32_ps": lambda o: o.a.lanes(np.uint32).astype(np.float32),
    "cvtps_epi32": lambda o: _to_int(o.x, np.rint),
    "cvttps_epi32": lambda o: _to_int(o.x, np.trunc),
    "cvtps_epu32": lambda o: _to_int(o.x, np.rint, np.uint32),
    "cvt_roundps_epi32_down": lambda o: _to_int(o.x, np.floor),
    "cvtph_ps": lambda o: o.a.first(32).lanes(np.float16).astype(np.float32),
    "cvtps_ph": lambda o: o.x.astype(np.float16),
    # floats
    "add_ps": lambda o: o.x + o.y,
    "sub_ps": lambda o: o.x - o.y,
    "mul_ps": lambda o: o.x * o.y,
    "div_ps": lambda o: o.x / o.y,
    "max_ps": lambda o: _second_if_nan(np.greater)(o.x, o.y),
    "min_ps": lambda o: _second_if_nan(np.less)(o.x, o.y),
    "andnot_ps": lambda o: (~o.a.bytes & o.b.bytes).view(np.float32),
    "abs_ps": lambda o: np.abs(o.x),
    "sqrt_ps": lambda o: np.sqrt(o.x),
    "fmadd_ps": lambda o: _fused(o.x, o.y, o.z),
    "fnmadd_ps": lambda o: _fused(-o.x, o.y, o.z),
    "mask_mul_ps": lambda o: np.where(o.bits[:, :16], o.x * o.y, o.z),
    "mask3_fmadd_ps": lambda o: np.where(o.bits[:, :16], _fused(o.x, o.y, o.z), o.z),
    "roundscale_ps_even": lambda o: _round_scale(o.x, np.rint, 0),
    "roundscale_ps_up_quarter": lambda o: _round_scale(o.x, np.ceil, 2),
    "roundscale_ps_zero": lambda o: _round_scale(o.x, np.trunc, 0),
    "cmp_ps_mask_lt": lambda o: o.x < o.y,
    "cmp_ps_mask_nge": lambda o: ~(o.x >= o.y),
    "cmp_ps_mask_unord": lambda o: np.isnan(o.x) | np.isnan(o.y),
    "cmp_ps_mask_eq_uq": lambda o: np.isnan(o.x) | np.isnan(o.y) | (o.x == o.y),
    "cmpneq_ps_mask": lambda o: o.x != o.y,
    "fpclass_ps_mask_special": lambda o: ~np.isfinite(o.x),
    "fpclass_ps_mask_rest": lambda o: (np.abs(o.x) < 2.0**-126) | (np.isfinite(o.x) & (o.x < 0)),
    "reduce_add_ps": lambda o: _folded(o.x, np.add),
    "reduce_max_ps": lambda o: _folded(o.x, _second_if_nan(np.greater)),
    "reduce_min_ps": lambda o: _folded(o.x, _second_if_nan(np.less)),
    # dot products
    "dpbusd_epi32": lambda o: _sum_of_products(o, np.uint8, np.int8, False),
    "dpbusds_epi32": lambda o: _sum_of_products(o, np.uint8, np.int8, True),
    "dpwssd_epi32": lambda o: _sum_of_products(o, np.int16, np.int16, False),
    "dpwssds_epi32": lambda o: _sum_of_products(o, np.int16, np.int16, True),
    "dpbusd_epi32_256": lambda o: _sum_of_products(o, np.uint8, np.int8, False)[:, :8],
}


for _bits in (8, 16, 32, 64):
    _s, _u = SIGNED[_bits], UNSIGNED[_bits]
    ORACLES[f"add_epi{_bits}"] = lambda o, u=_u: o.a.lanes(u) + o.b.lanes(u)
    ORACLES[f"sub_epi{_bits}"] = lambda o, u=_u: o.a.lanes(u) - o.b.lanes(u)
for _bits in (8, 16, 32):
    _s, _u = SIGNED[_bits], UNSIGNED[_bits]
    for _sign, _type in (("epi", _s), ("epu", _u)):
        ORACLES[f"min_{_sign}{_bits}"] = _two(_type, np.minimum)
        ORACLES[f"max_{_sign}{_bits}"] = _two(_type, np.maximum)
        ORACLES[f"adds_{_sign}{_bits}"] = lambda o, t=_type: _clip(o.a.wide(t) + o.b.wide(t), t)
        ORACLES[f"subs_{_sign}{_bits}"] = lambda o, t=_type: _clip(o.a.wide(t) - o.b.wide(t), t)
        for _name, _relation in (
            ("eq", np.equal), ("lt", np.less), ("le", np.less_equal),
            ("neq", np.not_equal), ("ge", np.greater_equal), ("gt", np.greater),
        ):  # fmt: skip
            ORACLES[f"cmp{_name}_{_sign}{_bits}_mask"] = lambda o, t=_type, f=_relation: f(
                o.a.lanes(t), o.b.lanes(t)
            )
    ORACLES[f"avg_epu{_bits}"] = _two(_u, lambda a, b: (a + b + 1) >> 1)
    ORACLES[f"abs_epi{_bits}"] = lambda o, t=_s: abs(o.a.wide(t)).astype(t)
    ORACLES[f"mullo_epi{_bits}"] = lambda o, u=_u: o.a.lanes(u) * o.b.lanes(u)
    ORACLES[f"movepi{_bits}_mask"] = lambda o, t=_s: o.a.lanes(t) < 0
for _bits in (8, 16, 32, 64):
    _half = 64 // _bits
    _pairs = [[start + i + side for i in range(_half) for side in (0, 2 * _half)] for start in (0, _half)]
    ORACLES[f"unpacklo_epi{_bits}"] = _by_run(UNSIGNED[_bits], _pairs[0], "a", "b")
    ORACLES[f"unpackhi_epi{_bits}"] = _by_run(UNSIGNED[_bits], _pairs[1], "a", "b")
    ORACLES[f"permutexvar_epi{_bits}"] = _gather(
        UNSIGNED[_bits], lambda o, u=UNSIGNED[_bits]: o.a.lanes(u), "b"
    )
    ORACLES[f"permutex2var_epi{_bits}"] = _gather(
        UNSIGNED[_bits], lambda o, u=UNSIGNED[_bits]: o.b.lanes(u), "a", "c"
    )
for _from, _to in ((8, 16), (8, 32), (16, 32), (32, 64)):
    _size = 64 * _from // _to
    ORACLES[f"cvtepi{_from}_epi{_to}"] = _convert(_size, SIGNED[_from], SIGNED[_to])
    ORACLES[f"cvtepu{_from}_epi{_to}"] = _convert(_size, UNSIGNED[_from], SIGNED[_to])
    ORACLES[f"cvtepi{_to}_epi{_from}"] = _convert(64, SIGNED[_to], SIGNED[_from])
    ORACLES[f"cvtsepi{_to}_epi{_from}"] = _convert(64, SIGNED[_to], SIGNED[_from], saturate=True)
    ORACLES[f"cvtusepi{_to}_epi{_from}"] = _convert(64, UNSIGNED[_to], UNSIGNED[_from], saturate=True)
for _name, _bits in (
    ("add_epi8", 8), ("sub_epi16", 16), ("mullo_epi32", 32), ("madd_epi16", 32), ("and_epi32", 32),
    ("shuffle_epi8", 8), ("dpbusd_epi32", 32),
):  # fmt: skip
    _plain = ORACLES["and_si512" if _name == "and_epi32" else _name]
    ORACLES[f"mask_{_name}"] = _merged(_bits, _plain, False)
    ORACLES[f"maskz_{_name}"] = _merged(_bits, _plain, True)


def _same(found: NDArray[np.uint8], expected: Array) -> NDArray[np.bool_]:
    """Per case: equal bits, zeros after them; of floats, any NaN equals any other."""
    if expected.dtype == bool:
        expected = np.packbits(expected, axis=1, bitorder="little")
    size = expected.shape[1] * expected.dtype.itemsize
    same = (found[:, size:] == 0).all(1)
    head, expected = np.ascontiguousarray(found[:, :size]), np.ascontiguousarray(expected)
    if not np.issubdtype(expected.dtype, np.floating):
        return same & (head == expected.view(np.uint8)).all(1)
    integer = np.uint16 if expected.dtype == np.float16 else np.uint32
    equal = head.view(integer) == expected.view(integer)
    return same & (equal | (np.isnan(head.view(expected.dtype)) & np.isnan(expected))).all(1)


def test_every_intrinsic_gives_what_the_manual_says(results: dict[str, NDArray[np.uint8]]) -> None:
    assert set(results) - set(ORACLES) == set()
    assert len(results) > 200
    wrong = []
    with np.errstate(all="ignore"):
        for name, found in results.items():
            bad = np.flatnonzero(~_same(found, ORACLES[name](OPERANDS)))
            wrong += [f"{name}, case {bad[0]} and {len(bad) - 1} more"] if len(bad) else []
    assert wrong == []


def test_byte_dot_products_wrap_and_saturate(results: dict[str, NDArray[np.uint8]]) -> None:
    """The cases reach both: else the two instructions would give the same."""
    assert (results["dpbusd_epi32"] != results["dpbusds_epi32"]).any()
    assert (results["dpwssd_epi32"] != results["dpwssds_epi32"]).any()
    sums = results["maddubs_epi16"].view(np.int16)
    assert {-32768, 32767} <= set(sums.flat)


def test_masked_lanes_are_not_touched(library: ctypes.CDLL) -> None:
    for count in (1, 5, 16, 63):
        library.masked_to_the_end_of_a_page(count)


# ---- tiles ------------------------------------------------------------------------------------------------


def _pointer(array: Array) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def _check_tile_products(library: ctypes.CDLL) -> None:
    generator = np.random.default_rng(0)
    for which, (left, right) in enumerate(TILE_KINDS.values()):
        for rows, depth, columns in ((16, 64, 16), (1, 4, 1), (5, 32, 16), (16, 12, 3)):
            a = generator.integers(256, size=(rows, depth), dtype=np.uint8)
            b = generator.integers(256, size=(depth // 4, columns, 4), dtype=np.uint8)
            sums = generator.integers(-(2**31), 2**31, size=(rows, columns), dtype=np.int32)
            # b [k / 4][n][k % 4] to [k][n]
            factor = b.view(right).astype(np.int64).transpose(0, 2, 1).reshape(depth, columns)
            exact = sums + a.view(left).astype(np.int64) @ factor
            library.tile_product(which, rows, depth, columns, _pointer(a), _pointer(b), _pointer(sums))
            assert np.array_equal(sums, exact.astype(np.int32))


def test_tile_products_equal_integer_products(library: ctypes.CDLL) -> None:
    _check_tile_products(library)


def test_bfloat16_tile_products_equal_exact_sums(library: ctypes.CDLL) -> None:
    """Small whole numbers, whose sums no rounding touches; one subnormal value that counts as zero."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(-8, 9, (16, 32), generator=generator).bfloat16()
    b = torch.randint(-8, 9, (32, 16), generator=generator).bfloat16()
    sums = torch.randint(-100, 100, (16, 16), generator=generator).float()
    a[:, 0], b[0] = 1e-39, 2.0**100
    exact = sums + a[:, 1:].float() @ b[1:].float()
    paired = b.view(16, 2, 16).transpose(1, 2).contiguous()
    library.tile_product(4, 16, 64, 16, *(ctypes.c_void_p(t.data_ptr()) for t in (a, paired, sums)))
    assert torch.equal(sums, exact)


MISUSES = (
    "a tile is used before ldtilecfg",
    "a tile is larger than 16 x 64 bytes",
    "a tile has rows or bytes but not both",
    "a reserved byte is not zero",
    "a tile past the eighth is configured",
    "a tile is used before ldtilecfg",
    "a tile is used that is not configured",
    "a tile appears twice",
    "sums and first factor differ in rows",
    "sums and second factor differ in columns",
    "the factors do not fit each other",
    "a tile register past the eighth",
    "an address is not a multiple of 64",
)


@pytest.mark.parametrize("which", range(len(MISUSES)))
def test_what_a_processor_refuses_is_refused(which: int, library: ctypes.CDLL) -> None:
    program = f"import ctypes; ctypes.CDLL({library._name!r}).misuse({which})"
    done = subprocess.run((sys.executable, "-c", program), capture_output=True, text=True)
    assert done.returncode == -signal.SIGABRT
    assert MISUSES[which] in done.stderr


# ---- the processor ----------------------------------------------------------------------------------------


def test_the_processor_gives_the_same(results: dict[str, NDArray[np.uint8]], build_folder: Path) -> None:
    if "avx512" not in cpu.cpu_isas():
        pytest.skip("needs AVX-512, which this processor or build lacks")
    native = native_intrinsics(build_folder)
    wrong = []
    for name, expected in _run(native).items():
        floats = name.endswith("_ps") or ("_ps_" in name and "mask" not in name)
        found = results[name]
        same = _same(found, expected.view(np.float32) if floats else expected)
        wrong += [] if same.all() else [name]
    assert wrong == []
    if "amx" in cpu.cpu_isas():  # to ask is to request the tiles from the system
        _check_tile_products(native)
