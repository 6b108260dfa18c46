"""Fixtures: the emulated module, alone and in place of olive._cpu."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from olive.ops import cpu
from tests.avx512.module import emulated_cpu


@pytest.fixture(scope="session")
def build_folder(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In pytest's cache, so that the next session compiles only what has changed."""
    if hasattr(pytestconfig, "cache") and pytestconfig.cache is not None:
        return pytestconfig.cache.mkdir("emulated_cpu")
    return tmp_path_factory.mktemp("emulated_cpu")


@pytest.fixture(scope="session")
def emulated_module(build_folder: Path) -> ModuleType:
    """olive._cpu with every instruction set, on any processor with AVX2."""
    return emulated_cpu(build_folder)


@pytest.fixture
def emulated(emulated_module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`olive.ops.cpu` runs the emulated module; name an instruction set, e.g. of EMULATED_ISAS, by `isa`."""
    monkeypatch.setattr(cpu, "_MODULE", emulated_module)
    return emulated_module
