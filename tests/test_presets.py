"""The presets are the paper's recipes."""

from __future__ import annotations

import json
import subprocess
import sys

import olive
from olive import presets


def test_what_the_paper_does() -> None:
    for config, bits, activations in (
        (presets.paper_w4a4(), 4, "ovp4"),
        (presets.paper_w8a8(), 8, "ovp8"),
    ):
        assert (config.bits, config.activations, config.method) == (bits, activations, "paper")
        assert (config.group_size, config.activation_group_size) == (-1, 0)
        assert config.skip == ("lm_head",)
        assert config.activation_format is not None and config.activation_format.pairing == "paper"
    assert presets.paper_w4a4().codebook == presets.paper_w4a4().activation_codebook == "paper"


def test_reachable_after_import_olive_alone() -> None:
    code = "import olive; print(olive.presets.paper_w8a8().to_json())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert olive.QuantConfig.from_dict(json.loads(done.stdout)) == presets.paper_w8a8()
