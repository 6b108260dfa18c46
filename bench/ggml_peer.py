"""ggml's product with Q4_0 and Q4_K weights on a CPU, the way llama.cpp runs it: an optional peer.

`OLIVE_GGML` names what a build of ggml (https://github.com/ggml-org/ggml) leaves: the folder with
`libggml-base.so` and `libggml-cpu.so`, or one library that has or pulls in both. It has to use threads of its
own, not OpenMP's. Nothing of ggml is needed to build, install or test OliVe.

As in llama.cpp, ggml itself quantizes the weight, and the first buffer type that can multiply it holds it
(AMX, then repacked rows, then plain rows). Activations go in as float32, and ggml rounds them to 8 bits per
block: this is W4A8. Written against ggml 0.21.0 (commit d99724f2). Only functions of its headers are called,
and `dequantize_row_*`; of its structs, only `ggml_init_params` is not opaque.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bench.timing import host_seconds

KINDS = {"q4_0": (2, 32), "q4_k": (12, 256)}  # name -> number in enum ggml_type, columns per block
_FLOAT32 = 0  # in enum ggml_type
_WEIGHTS = 1  # in enum ggml_backend_buffer_usage
_SUCCESS = 0  # in enum ggml_status
_WARNING, _ERROR = 3, 4  # in enum ggml_log_level
_ALIGNMENT = 64  # bytes; at least what any CPU buffer type of ggml asks for
_GRAPH_SIZE = 4  # places for nodes in a graph; a product is one
_POOL_PARAMS_BYTES = 4096  # ggml_threadpool_params is some 530 bytes, filled in by ggml
# OpenMP's workers (torch's and ours) spin on after a product, 6 to 8 ms measured on two cores of an AMD EPYC,
# and would take a core from ggml's pool, which is not OpenMP's.
_CALM_SECONDS = 0.02


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_Log = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)  # level, text, null


def _print(level: int, text: bytes, _: None) -> None:
    """Warnings and errors only; ggml would name every copy of a weight that it packs."""
    if level in (_WARNING, _ERROR):
        sys.stderr.write(text.decode(errors="replace"))


_LOG = _Log(_print)  # kept, since ggml calls it as long as the process lives


# name -> result, arguments; every pointer of ggml's is opaque here.
_PROTOTYPES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_version": (c_char_p, ()),
    "ggml_log_set": (None, (_Log, c_void_p)),
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
    "dequantize_row_q4_0": (None, (c_void_p, c_void_p, c_int64)),
    "dequantize_row_q4_K": (None, (c_void_p, c_void_p, c_int64)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_reg": (c_void_p, ()),
    "ggml_backend_reg_dev_get": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_reg_get_proc_address": (c_void_p, (c_void_p, c_char_p)),
    "ggml_backend_dev_supports_op": (c_bool, (c_void_p, c_void_p)),
    "ggml_backend_cpu_buffer_type": (c_void_p, ()),
    "ggml_backend_buft_name": (c_char_p, (c_void_p,)),
    "ggml_backend_buft_alloc_buffer": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buft_get_alloc_size": (c_size_t, (c_void_p, c_void_p)),
    "ggml_backend_alloc_ctx_tensors_from_buft": (c_void_p, (c_void_p, c_void_p)),
    "ggml_backend_buffer_set_usage": (None, (c_void_p, c_int)),
    "ggml_backend_buffer_get_base": (c_void_p, (c_void_p,)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_alloc": (c_int, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_tensor_set": (None, (c_void_p, c_void_p, c_size_t, c_size_t)),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
    "ggml_backend_cpu_set_threadpool": (None, (c_void_p, c_void_p)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_threadpool_params_init": (None, (c_void_p, c_int)),
    "ggml_threadpool_new": (c_void_p, (c_void_p,)),
    "ggml_threadpool_pause": (None, (c_void_p,)),
    "ggml_threadpool_resume": (None, (c_void_p,)),
}


class _Ggml:
    """The functions of a loaded ggml, by their names."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, path: Path) -> None:
        # The base first: the others then find it by its name, whatever their search path.
        names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
        files = [path] if path.is_file() else [path / name for name in names if (path / name).is_file()]
        if not files:
            raise RuntimeError(
                f"OLIVE_GGML: expected a folder with libggml-base.so and libggml-cpu.so, got {path}"
            )
        try:
            libraries = [ctypes.CDLL(str(file)) for file in files]
        except OSError as error:
            raise RuntimeError(f"OLIVE_GGML: expected libraries that load, got {error}") from error
        for name, (result, arguments) in _PROTOTYPES.items():
            function = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
            if function is None:
                raise RuntimeError(
                    f"OLIVE_GGML: expected a ggml like version 0.21, got none of {name} in {path}"
                )
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.ggml_log_set(_LOG, None)
        if "OPENMP" in self.features():
            raise RuntimeError(
                "OLIVE_GGML: expected a ggml with a thread pool of its own, got one built for OpenMP; "
                "take one with its own threads"
            )

    def _listing(self, name: bytes) -> Any:
        """The registry's function of that name: an array of pointers that ends with a null, or None."""
        address = self.ggml_backend_reg_get_proc_address(self.ggml_backend_cpu_reg(), name)
        prototype = ctypes.CFUNCTYPE(ctypes.POINTER(c_void_p), c_void_p)
        return prototype(address) if address else None

    @property
    def device(self) -> int:
        """The CPU."""
        return int(self.ggml_backend_reg_dev_get(self.ggml_backend_cpu_reg(), 0))

    def features(self) -> list[str]:
        """What the build uses of the processor, and how: AVX2, REPACK, OPENMP ..."""
        function = self._listing(b"ggml_backend_get_features")
        found: list[str] = []
        if function is not None:
            pairs = function(self.ggml_backend_cpu_reg())  # name, value, name, value ...
            while pairs[2 * len(found)]:
                found.append(ctypes.string_at(pairs[2 * len(found)]).decode())
        return found

    def packing_buffer_types(self) -> list[int]:
        """Those that pack weights for the processor, in llama.cpp's order."""
        function = self._listing(b"ggml_backend_dev_get_extra_bufts")
        found: list[int] = []
        if function is not None:
            extra = function(self.device)
            while extra[len(found)]:
                found.append(extra[len(found)])
        return found

    def context(self, tensors: int, graphs: int = 0) -> int:
        """Room for so many descriptions; data is in buffers."""
        graph_bytes = self.ggml_graph_overhead_custom(_GRAPH_SIZE, False)
        size = tensors * self.ggml_tensor_overhead() + graphs * graph_bytes
        return int(self.ggml_init(_InitParams(size, None, True)))

    def can_multiply(self, buffer_type: int, kind: int, n: int, k: int) -> bool:
        """Whether the CPU multiplies such a weight from memory of this type, asked as llama.cpp does."""
        weights, product = self.context(1), self.context(2)
        tensor = self.ggml_new_tensor_2d(weights, kind, k, n)
        buffer = self.ggml_backend_alloc_ctx_tensors_from_buft(weights, buffer_type)
        x = self.ggml_new_tensor_2d(product, _FLOAT32, k, 1)
        out = self.ggml_mul_mat(product, tensor, x)
        answer = bool(buffer) and self.ggml_backend_dev_supports_op(self.device, out)
        self.free((weights, product), buffer)
        return bool(answer)

    def free(self, contexts: tuple[int, ...], buffer: int | None) -> None:
        """Contexts and a buffer."""
        for context in contexts:
            self.ggml_free(context)
        if buffer:
            self.ggml_backend_buffer_free(buffer)


@cache
def _open(path: Path) -> _Ggml:
    return _Ggml(path)


@cache
def _backend(ggml: _Ggml, threads: int) -> tuple[int, int]:
    """A CPU backend and its pool of threads, which sleep; both are kept until the process ends."""
    params = ctypes.create_string_buffer(_POOL_PARAMS_BYTES)
    ggml.ggml_threadpool_params_init(params, threads)
    pool = ggml.ggml_threadpool_new(params)
    ggml.ggml_threadpool_pause(pool)
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, threads)
    ggml.ggml_backend_cpu_set_threadpool(backend, pool)
    return backend, pool


@cache
def _caller() -> ThreadPoolExecutor:
    """The one thread that calls ggml's products.

    ggml loads its AMX tile configuration once per thread; on a thread shared with other operators, theirs
    would take its place.
    """
    return ThreadPoolExecutor(1, "ggml")


def _ggml() -> _Ggml:
    path = os.environ.get("OLIVE_GGML")
    if not path:
        raise RuntimeError("OLIVE_GGML: expected the folder with a build's libggml*.so, got nothing")
    return _open(Path(path).resolve())


def ggml_version() -> str:
    """Version of the ggml found, "" where `OLIVE_GGML` is not set.

    Raises:
        RuntimeError: no usable ggml is there.
    """
    return str(_ggml().ggml_version().decode()) if os.environ.get("OLIVE_GGML") else ""


class GgmlWeight:
    """Copies of one weight, quantized by ggml and held the way llama.cpp holds it.

    Args:
        weight: float32, [N, K], K a multiple of the kind's block (32 or 256).
        kind: "q4_0" or "q4_k".
        copies: how many, one after another in one buffer.

    Attributes:
        decoded: float32, [N, K]; what the quantized weight stands for.
        bytes_per_copy: what one copy takes in the buffer, so what a product reads.
        buffer_type: ggml's name of the buffer: "AMX", "CPU_REPACK" or "CPU".

    Raises:
        TypeError: the weight is not float32.
        ValueError: kind, shape or copies are not as above, or the weight is not on the CPU.
        RuntimeError: `OLIVE_GGML` names no usable ggml.
        MemoryError: the copies do not fit.
    """

    def __init__(self, weight: Tensor, kind: str, copies: int) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind}")
        number, block = KINDS[kind]
        if weight.dtype != torch.float32:
            raise TypeError(f"weight: expected float32, got {weight.dtype}")
        if weight.device.type != "cpu":
            raise ValueError(f"weight: expected it on the CPU, got {weight.device}")
        if weight.dim() != 2 or weight.numel() == 0 or weight.shape[1] % block:
            raise ValueError(
                f"weight: expected [N, K] with K a multiple of {block}, got {list(weight.shape)}"
            )
        if copies < 1:
            raise ValueError(f"copies: expected at least 1, got {copies}")
        n, k = weight.shape
        ggml = _ggml()
        weight = weight.contiguous()
        quantized = torch.empty(n, ggml.ggml_row_size(number, k), dtype=torch.uint8)
        ggml.ggml_quantize_chunk(number, weight.data_ptr(), quantized.data_ptr(), 0, n, k, None)
        self.decoded = torch.empty_like(weight)
        decode = ggml.dequantize_row_q4_0 if kind == "q4_0" else ggml.dequantize_row_q4_K
        decode(quantized.data_ptr(), self.decoded.data_ptr(), n * k)

        packing = (found for found in ggml.packing_buffer_types() if ggml.can_multiply(found, number, n, k))
        buffer_type = next(packing, ggml.ggml_backend_cpu_buffer_type())
        context = ggml.context(copies)
        self.tensors = [ggml.ggml_new_tensor_2d(context, number, k, n) for _ in range(copies)]
        buffer = ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buffer_type)
        weakref.finalize(self, ggml.free, (context,), buffer)
        if not buffer:
            raise MemoryError(f"copies: expected {copies} weights of {n} x {k} to fit, got no memory")
        ggml.ggml_backend_buffer_set_usage(buffer, _WEIGHTS)
        for tensor in self.tensors:
            ggml.ggml_backend_tensor_set(tensor, quantized.data_ptr(), 0, quantized.numel())
        self.bytes_per_copy = int(ggml.ggml_backend_buft_get_alloc_size(buffer_type, self.tensors[0]))
        self.buffer_type = str(ggml.ggml_backend_buft_name(buffer_type).decode())
        self.ggml = ggml

    def call(self, x: Tensor, threads: int) -> GgmlCall:
        """The product with these activations."""
        return GgmlCall(self, x, threads)


class GgmlCall:
    """ggml's x @ weight.T, one graph per copy of the weight; the turn picks the copy.

    The pool's threads sleep between calls, so as not to take a core from other candidates. A plain call wakes
    them first; `seconds` keeps that out of the time.

    Args:
        weight: copies of it.
        x: [M, K], M >= 1, taken as float32.
        threads: that compute, the calling one among them.

    Raises:
        ValueError: x has another shape or is not on the CPU, or there are no threads.
        MemoryError: activations and result do not fit.
    """

    def __init__(self, weight: GgmlWeight, x: Tensor, threads: int) -> None:
        n, k = weight.decoded.shape
        if x.dim() != 2 or x.shape[0] < 1 or x.shape[1] != k:
            raise ValueError(f"x: expected [M, {k}], got {list(x.shape)}")
        if x.device.type != "cpu":
            raise ValueError(f"x: expected it on the CPU, got {x.device}")
        if threads < 1:
            raise ValueError(f"threads: expected at least 1, got {threads}")
        m = x.shape[0]
        x = x.float().contiguous()
        self.weight = weight
        self._ggml = ggml = weight.ggml
        self._compute = ggml.ggml_backend_graph_compute
        self._backend, self._pool = _backend(ggml, threads)
        copies = len(weight.tensors)
        context = ggml.context(1 + copies, copies)
        # Activations and result of all graphs are in the same places, as a model's are in its compute buffer.
        x_bytes = -(-4 * m * k // _ALIGNMENT) * _ALIGNMENT
        buffer = ggml.ggml_backend_buft_alloc_buffer(ggml.ggml_backend_cpu_buffer_type(), x_bytes + 4 * m * n)
        weakref.finalize(self, ggml.free, (context,), buffer)
        if not buffer:
            raise MemoryError(f"x: expected room for {m} rows, got no memory")
        base = ggml.ggml_backend_buffer_get_base(buffer)
        inputs = ggml.ggml_new_tensor_2d(context, _FLOAT32, k, m)
        ggml.ggml_backend_tensor_alloc(buffer, inputs, base)
        ggml.ggml_backend_tensor_set(inputs, x.data_ptr(), 0, 4 * m * k)
        self._graphs = []
        for tensor in weight.tensors:
            out = ggml.ggml_mul_mat(context, tensor, inputs)
            ggml.ggml_backend_tensor_alloc(buffer, out, base + x_bytes)
            graph = ggml.ggml_new_graph_custom(context, _GRAPH_SIZE, False)
            ggml.ggml_build_forward_expand(graph, out)
            self._graphs.append(graph)
        memory = (c_float * (m * n)).from_address(base + x_bytes)
        self._out = torch.frombuffer(memory, dtype=torch.float32).view(m, n)

    def _run(self, turn: int) -> None:
        status = self._compute(self._backend, self._graphs[turn % len(self._graphs)])
        if status != _SUCCESS:
            raise RuntimeError(f"ggml: expected a product, got status {status}")

    def _run_and_sleep(self, turn: int) -> None:
        try:
            self._run(turn)
        finally:
            self._ggml.ggml_threadpool_pause(self._pool)

    def _timed(self, turn: int) -> float:
        self._ggml.ggml_threadpool_resume(self._pool)
        try:
            calm = time.perf_counter() + _CALM_SECONDS
            while time.perf_counter() < calm:  # not asleep, so that this core stays at its speed
                pass
            return host_seconds(self._run, turn)
        finally:
            self._ggml.ggml_threadpool_pause(self._pool)

    def __call__(self, turn: int) -> Tensor:
        """float32, [M, N]: ggml's own memory, valid while this object lives and until its next call."""
        _caller().submit(self._run_and_sleep, turn).result()
        return self._out

    def seconds(self, turn: int) -> float:
        """Time of one product, from a pool that is awake, as between two products of a model."""
        return _caller().submit(self._timed, turn).result()


def seconds(call: Callable[[int], object], turn: int) -> float:
    """A clock for `take_turns`, fair to ggml's thread pool; other candidates are timed as always."""
    return call.seconds(turn) if isinstance(call, GgmlCall) else host_seconds(call, turn)


def ggml_call(x: Tensor, weight: Tensor, kind: str, copies: int, threads: int) -> tuple[GgmlCall, float, int]:
    """ggml's product as a candidate; `GgmlWeight` makes the copies once for several activations.

    Args:
        x: [M, K], taken as float32.
        weight: float32, [N, K], K a multiple of 32 ("q4_0") or 256 ("q4_k").
        kind: "q4_0" or "q4_k".
        copies: of the weight, through which the calls cycle.
        threads: that compute.

    Returns:
        The call; its error against float64 with ggml's own decoded weight, relative to the product's norm;
        bytes of one copy of the weight.

    Raises:
        TypeError, ValueError, RuntimeError, MemoryError: see `GgmlWeight` and `GgmlCall`.
    """
    held = GgmlWeight(weight, kind, copies)
    call = held.call(x, threads)
    expected = x.float().double() @ held.decoded.double().T
    error = float((call(0).double() - expected).norm() / expected.norm())
    return call, error, held.bytes_per_copy
