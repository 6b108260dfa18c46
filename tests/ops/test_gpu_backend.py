"""Which backend serves a GPU: the first that can, a second choice with its reason, or the one asked for."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from olive.ops import cuda, gpu, has_packed_layout, triton

GPU = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv(gpu.VARIABLE, raising=False)
    gpu.gpu_backend.cache_clear()
    yield
    gpu.gpu_backend.cache_clear()


@pytest.fixture
def lacks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that says what the CUDA and the Triton kernels lack."""

    def say(cuda_reason: str, triton_reason: str) -> None:
        monkeypatch.setattr(cuda, "missing", lambda device: cuda_reason)
        monkeypatch.setattr(triton, "missing", lambda device: triton_reason)

    return say


def test_cuda_kernels_come_first(lacks: Any, caplog: pytest.LogCaptureFixture) -> None:
    lacks("", "")
    assert gpu.gpu_backend(GPU) == "cuda"
    assert has_packed_layout(GPU)
    assert caplog.records == []


def test_a_second_choice_is_logged_once_with_its_reason(lacks: Any, caplog: pytest.LogCaptureFixture) -> None:
    lacks("no code for 7.5", "")
    with caplog.at_level(logging.WARNING, "olive"):
        assert gpu.gpu_backend(GPU) == gpu.gpu_backend(GPU) == "triton"
    assert [record.getMessage() for record in caplog.records] == [
        "cuda:0: using the triton kernels, because no code for 7.5"
    ]
    assert not has_packed_layout(GPU)


def test_the_reference_is_the_last_resort(lacks: Any, caplog: pytest.LogCaptureFixture) -> None:
    lacks("not built", "not installed")
    with caplog.at_level(logging.WARNING, "olive"):
        assert gpu.gpu_backend(GPU) == "reference"
    assert caplog.records[0].getMessage().endswith("because not built; not installed")


def test_a_backend_asked_for_is_taken(lacks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks("", "")
    monkeypatch.setenv(gpu.VARIABLE, "triton")
    assert gpu.gpu_backend(GPU) == "triton"


def test_a_backend_asked_for_and_missing_is_an_error(lacks: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lacks("not built", "")
    monkeypatch.setenv(gpu.VARIABLE, "cuda")
    with pytest.raises(RuntimeError, match="expected a backend that can serve cuda:0, got 'cuda': not built"):
        gpu.gpu_backend(GPU)
    monkeypatch.setenv(gpu.VARIABLE, "opencl")
    with pytest.raises(ValueError, match="expected one of cuda, triton, reference, got 'opencl'"):
        gpu.gpu_backend(GPU)


def test_intel_gpus_have_triton(lacks: Any) -> None:
    lacks("", "")
    assert gpu.gpu_backend(torch.device("xpu", 0)) == "triton"
    assert not has_packed_layout(torch.device("xpu", 0))


def test_every_backend_has_every_operator() -> None:
    names = set(gpu._REFERENCE)
    assert all(set(functions) == names for functions in gpu._BACKENDS.values())
    for name in names:
        for key in ("CUDA", "XPU"):
            assert f"{key}: registered" in torch._C._dispatch_dump(f"olive::{name}")


def test_without_a_cuda_kernel_triton_serves_or_else_the_reference(
    lacks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lacks("", "")
    for functions, name in ((gpu._TRITON, "triton"), (gpu._REFERENCE, "reference")):
        monkeypatch.setitem(functions, "ovp8_decode", lambda codes, name=name: name)
    run = gpu._BACKENDS["cuda"]["ovp8_decode"]
    assert run(torch.zeros(1)) == "triton"
    lacks("", "not installed")
    assert run(torch.zeros(1)) == "reference"


def test_other_devices_have_no_packed_layout() -> None:
    assert has_packed_layout(torch.device("cpu"))
    assert not has_packed_layout(torch.device("meta"))


def test_without_the_module_a_call_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_MODULE", None)
    assert "olive._cuda was not built" in cuda.missing(GPU)
    assert cuda.architectures() == ""
    with pytest.raises(RuntimeError, match=r"olive\._cuda: expected a compiled module, got none; build it"):
        cuda.kernels()
