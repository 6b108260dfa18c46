"""Imports of the package run one way, down; other libraries come in where they belong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.house.layers import LAYERS, PACKAGE, ROOT, Import, imports_of, level, module_of, part_of, upward

SOURCES = sorted(PACKAGE.rglob("*.py"))
IMPORTS = [found for file in SOURCES for found in imports_of(file)]
MODEL_LIBRARIES = {"transformers", "peft", "accelerate", "safetensors", "huggingface_hub"}
OPTIONAL = {"rich", "jinja2", "typer", *MODEL_LIBRARIES}
OUTSIDE = {"tests", "bench", "examples", "setup"}


def test_every_part_has_a_layer() -> None:
    for file in SOURCES:
        level(part_of(module_of(file)))


def test_no_import_runs_upward() -> None:
    assert [found.where for found in IMPORTS if upward(found)] == []


def test_only_the_transformers_part_knows_model_libraries() -> None:
    strangers = [
        found.where
        for found in IMPORTS
        if found.target.split(".")[0] in MODEL_LIBRARIES and found.source not in ("hf", "cli")
    ]
    assert strangers == []


def test_optional_libraries_are_imported_when_used() -> None:
    early = [
        found.where
        for found in IMPORTS
        if found.target.split(".")[0] in OPTIONAL and not found.lazy and found.source not in ("hf", "cli")
    ]
    assert early == []


def test_the_package_does_not_import_its_tests() -> None:
    assert [found.where for found in IMPORTS if found.target.split(".")[0] in OUTSIDE] == []


def test_compiled_sources_know_nothing_of_torch() -> None:
    headers = ("#include <torch", "#include <ATen", "#include <c10", '#include "torch')
    sources = [file for file in (ROOT / "csrc").rglob("*") if file.is_file()]
    assert sources
    assert [str(file) for file in sources if any(header in file.read_text() for header in headers)] == []


@pytest.mark.parametrize(
    ("source", "text", "found"),
    [
        ("formats/new.py", "import olive.config", True),
        ("formats/new.py", "from olive.formats.codebooks import Codebook", False),
        ("formats/new.py", "from .codebooks import Codebook", False),
        ("config.py", "from olive.formats import CODEBOOKS", False),
        ("ops/new.py", "from olive import nn", True),
        ("ops/new.py", "from .. import nn", True),
        ("ops/new.py", "from olive import _cpu", False),
        ("nn/new.py", "def f():\n    from olive.quantization import quantize", True),
        ("nn/new.py", "if TYPE_CHECKING:\n    import olive.walk", True),
        ("nn/new.py", "def f():\n    import olive", True),
        ("ptq/new.py", "from olive.walk import walk", True),
        ("reports/new.py", "def f():\n    import olive", False),
        ("reports/new.py", "import olive", True),
        ("reports/new.py", "from olive.hf import peft", True),
        ("quantization.py", "import torch, olive.walk", False),
        ("__init__.py", "from olive.hf.register import register_when_imported", False),
    ],
)
def test_the_rule_itself(source: str, text: str, found: bool, tmp_path: Path) -> None:
    package = tmp_path / "olive"
    for parts in LAYERS:
        for part in parts:
            (package / part).mkdir(parents=True)
    file = package / source
    file.write_text(text)
    assert any(upward(one) for one in imports_of(file, package)) is found


def test_unknown_part_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"olive.brand_new: expected a part that LAYERS names"):
        upward(Import("olive/nn/x.py", 1, "nn", "olive.brand_new.part", False))
