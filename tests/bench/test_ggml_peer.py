"""ggml as a peer: its products are right from every copy, and what it cannot take is named."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench import ggml_peer
from bench.ggml_peer import GgmlWeight, ggml_call, ggml_version
from bench.timing import take_turns

needs_ggml = pytest.mark.skipif(not os.environ.get("OLIVE_GGML"), reason="OLIVE_GGML names no build of ggml")

# ggml rounds activations to 8 bits per block of 32 (q4_0) or 256 (q4_k), whose maxima are larger. Of 80
# Gaussian draws each on AVX2, the largest errors were 0.0064 and 0.0092. A wrong layout gives about 1.4.
LIMIT = {"q4_0": 0.008, "q4_k": 0.011}


def draw(rows: int, columns: int, seed: int) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@needs_ggml
@pytest.mark.parametrize("kind", ["q4_0", "q4_k"])
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize("shape", [(64, 256), (96, 512)])
def test_product_is_that_of_the_decoded_weight(kind: str, m: int, shape: tuple[int, int]) -> None:
    n, k = shape
    x, weight = draw(m, k, 1), draw(n, k, 2) * 0.02
    call, error, size = ggml_call(x, weight, kind, copies=3, threads=2)
    assert error <= LIMIT[kind]
    assert size >= n * k * 4.5 / 8  # both kinds store 4.5 bits per weight
    expected = x.double() @ call.weight.decoded.double().T
    for turn in range(4):
        out = call(turn)
        assert out.shape == (m, n)
        assert out.dtype == torch.float32
        for row, reference in zip(out.double(), expected, strict=True):
            assert (row - reference).norm() <= 1.5 * LIMIT[kind] * reference.norm()
    # Against the weight itself, which no code of ggml's decoded: the formats' error is about 9 percent.
    original = x.double() @ weight.double().T
    assert (call(0).double() - original).norm() <= 0.13 * original.norm()


@needs_ggml
@pytest.mark.parametrize("kind", ["q4_0", "q4_k"])
def test_rows_that_cannot_be_packed_are_multiplied_too(kind: str) -> None:
    call, error, _ = ggml_call(draw(3, 256, 1), draw(7, 256, 2), kind, copies=2, threads=1)
    assert call.weight.buffer_type == "CPU"
    assert error <= 1.5 * LIMIT[kind]


@needs_ggml
def test_copies_are_apart_and_serve_several_activations() -> None:
    weight = GgmlWeight(draw(64, 256, 1), "q4_0", copies=5)
    assert len(set(weight.tensors)) == 5
    assert weight.bytes_per_copy >= 64 * 256 * 4.5 / 8
    one, two = weight.call(draw(1, 256, 2), 2), weight.call(draw(4, 256, 3).bfloat16(), 1)
    first = one(0).clone()
    two(1)
    assert one(3).equal(first)


@needs_ggml
def test_clock_times_ggml_among_others() -> None:
    call, _, _ = ggml_call(draw(1, 256, 1), draw(64, 256, 2), "q4_k", copies=2, threads=2)
    timings = take_turns({"ggml": call, "other": lambda turn: turn}, 0, clock=ggml_peer.seconds)
    assert all(0 < timing.low <= timing.median for timing in timings.values())


@needs_ggml
def test_version_is_known() -> None:
    assert ggml_version()[0].isdigit()


@needs_ggml
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda weight: weight.call(torch.ones(1, 128), 1), r"x: expected \[M, 256\], got \[1, 128\]"),
        (lambda weight: weight.call(torch.ones(0, 256), 1), r"x: expected \[M, 256\], got \[0, 256\]"),
        (
            lambda weight: weight.call(torch.ones(1, 256, device="meta"), 1),
            "x: expected it on the CPU, got meta",
        ),
        (lambda weight: weight.call(torch.ones(1, 256), 0), "threads: expected at least 1, got 0"),
    ],
)
def test_bad_activations_are_rejected(call: Callable[[GgmlWeight], object], message: str) -> None:
    weight = GgmlWeight(torch.ones(8, 256), "q4_0", 1)
    with pytest.raises(ValueError, match=message):
        call(weight)


@needs_ggml
def test_failures_of_ggml_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = GgmlWeight(torch.ones(8, 256), "q4_0", 1)
    with monkeypatch.context() as patch:
        patch.setattr(weight.ggml, "ggml_backend_graph_compute", lambda *_: -1)
        with pytest.raises(RuntimeError, match="ggml: expected a product, got status -1"):
            weight.call(torch.ones(1, 256), 1)(0)
    with monkeypatch.context() as patch:
        patch.setattr(weight.ggml, "ggml_backend_buft_alloc_buffer", lambda *_: None)
        with pytest.raises(MemoryError, match="x: expected room for 1 rows, got no memory"):
            weight.call(torch.ones(1, 256), 1)
    with monkeypatch.context() as patch:
        patch.setattr(weight.ggml, "ggml_backend_alloc_ctx_tensors_from_buft", lambda *_: None)
        with pytest.raises(MemoryError, match="copies: expected 2 weights of 8 x 256 to fit, got no memory"):
            GgmlWeight(torch.ones(8, 256), "q4_0", 2)


@needs_ggml
def test_unusable_builds_are_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    path = Path(os.environ["OLIVE_GGML"]).resolve()
    with monkeypatch.context() as patch:
        patch.setattr(ggml_peer._Ggml, "features", lambda _: ["AVX2", "OPENMP"])
        with pytest.raises(RuntimeError, match="take one with its own threads"):
            ggml_peer._Ggml(path)
    monkeypatch.setitem(ggml_peer._PROTOTYPES, "ggml_of_the_future", (None, ()))
    with pytest.raises(RuntimeError, match=r"expected a ggml like version 0\.21, got none of ggml_of_the"):
        ggml_peer._Ggml(path)


def test_bad_weights_are_rejected() -> None:
    with pytest.raises(ValueError, match="kind: expected one of q4_0, q4_k, got q8_0"):
        GgmlWeight(torch.ones(8, 256), "q8_0", 1)
    with pytest.raises(TypeError, match=r"weight: expected float32, got torch\.float16"):
        GgmlWeight(torch.ones(8, 256).half(), "q4_0", 1)
    with pytest.raises(ValueError, match="weight: expected it on the CPU, got meta"):
        GgmlWeight(torch.ones(8, 256, device="meta"), "q4_0", 1)
    for kind, block, shape in (("q4_0", 32, (8, 48)), ("q4_k", 256, (8, 288)), ("q4_0", 32, (64,))):
        with pytest.raises(ValueError, match=rf"weight: expected \[N, K\] with K a multiple of {block}, got"):
            GgmlWeight(torch.ones(shape), kind, 1)
    with pytest.raises(ValueError, match="copies: expected at least 1, got 0"):
        GgmlWeight(torch.ones(8, 256), "q4_0", 0)


def test_missing_ggml_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OLIVE_GGML", raising=False)
    assert ggml_version() == ""
    with pytest.raises(RuntimeError, match="OLIVE_GGML: expected the folder with a build's"):
        GgmlWeight(torch.ones(8, 256), "q4_0", 1)
    monkeypatch.setenv("OLIVE_GGML", str(tmp_path))
    with pytest.raises(RuntimeError, match=r"OLIVE_GGML: expected a folder with libggml-base\.so"):
        ggml_version()
    (tmp_path / "libggml.so").write_text("not a library")
    with pytest.raises(RuntimeError, match="OLIVE_GGML: expected libraries that load, got"):
        ggml_version()
