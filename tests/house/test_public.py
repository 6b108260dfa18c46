"""What `import olive` brings in, and that its public names and version are what they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib

import pytest

import olive
from tests.house.layers import ROOT

HEAVY = ("torch", "transformers", "triton", "peft", "accelerate", "safetensors", "numpy", "rich", "jinja2")


def run(code: str) -> dict[str, object]:
    """Result of a program in a process of its own, which prints one JSON object."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    values: dict[str, object] = json.loads(done.stdout)
    return values


def test_import_is_light() -> None:
    code = f"import json, sys, olive; print(json.dumps({{n: n in sys.modules for n in {HEAVY!r}}}))"
    assert run(code) == dict.fromkeys(HEAVY, False)


def test_public_names_load_neither_transformers_nor_triton_and_start_no_cuda() -> None:
    code = (
        "import json, sys, olive\n"
        "for name in olive.__all__: getattr(olive, name)\n"
        "import torch\n"
        "found = {n: n in sys.modules for n in ('transformers', 'triton', 'rich', 'jinja2')}\n"
        "print(json.dumps({'cuda': torch.cuda.is_initialized(), **found}))"
    )
    assert run(code) == dict.fromkeys(("cuda", "transformers", "triton", "rich", "jinja2"), False)


def test_quantizing_a_plain_model_imports_no_transformers() -> None:
    code = (
        "import json, sys, torch, olive\n"
        "torch.set_num_threads(1)\n"
        "olive.report(olive.quantize(torch.nn.Sequential(torch.nn.Linear(64, 8))))\n"
        "print(json.dumps({n: n in sys.modules for n in ('transformers', 'triton')}))"
    )
    assert run(code) == {"transformers": False, "triton": False}


def test_public_names_resolve() -> None:
    assert set(olive.__all__) <= set(dir(olive))
    for name in olive.__all__:
        value = getattr(olive, name)
        assert value is not None
        assert not isinstance(value, type(sys)), f"olive.{name} is hidden by a module of its name"


def test_unknown_name_is_rejected() -> None:
    with pytest.raises(AttributeError, match="module 'olive' has no attribute 'quantise'"):
        olive.quantise  # noqa: B018


def test_version_has_one_source() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "version" in project["project"]["dynamic"]
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "olive.__version__"}
    assert re.fullmatch(r"\d+\.\d+\.\d+", olive.__version__)
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", changelog, re.MULTILINE)
    assert versions[0] == olive.__version__
