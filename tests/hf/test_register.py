"""Registration with transformers, whichever of the two is imported first; each in a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REGISTERED = """
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
assert AUTO_QUANTIZATION_CONFIG_MAPPING["olive"].__name__ == "OliveConfig"
assert AUTO_QUANTIZER_MAPPING["olive"].__name__ == "OliveHfQuantizer"
"""


def run(code: str) -> None:
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "imports",
    [
        "import olive, transformers",
        "import transformers, olive",
        "import transformers.quantizers.auto, olive",
        "import olive\nfrom transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM\nimport olive",
        "import olive\nfrom transformers.quantizers import HfQuantizer",
        "import olive\nfrom olive.hf.register import register_when_imported\nregister_when_imported()",
    ],
)
def test_the_quantizer_is_registered_after(imports: str) -> None:
    run(imports + REGISTERED)


def test_importing_olive_imports_neither_torch_nor_transformers() -> None:
    run("import olive, sys; assert not {'torch', 'transformers', 'peft', 'triton'} & set(sys.modules)")


def test_transformers_stays_lazy() -> None:
    run("import olive, transformers, sys; assert 'transformers.quantizers.auto' not in sys.modules")


def test_registering_again_after_import_does_nothing() -> None:
    run(
        "import olive, transformers.quantizers.auto as auto\n"
        "from olive.hf import register\n"
        "before = auto.AUTO_QUANTIZER_MAPPING['olive']\n"
        "register.register_when_imported(); register._register(auto)\n"
        "assert auto.AUTO_QUANTIZER_MAPPING['olive'] is before"
    )
