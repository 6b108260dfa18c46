"""The demo: runs through on the bundled model, prints no warning, and refuses what it cannot show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import olive
from tests import models

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / "examples" / "demo.py"


def demo(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "120",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    command = [sys.executable, str(DEMO), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, check=False)


@pytest.mark.slow
def test_demo_of_the_bundled_model(tmp_path: Path) -> None:
    done = demo("--windows", "4", "--new-tokens", "8", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "warning" not in done.stdout.lower()
    for line in ("quantized layers on disk", "whole model on disk", "bits per weight", "tokens per second"):
        assert done.stdout.count(line) == 1
    (figures,) = [line.split() for line in done.stdout.splitlines() if line.split()[:1] == ["perplexity"]]
    before, after, ratio = map(float, figures[1:])
    # The four windows alone; 4-bit codes of the whole text lose 2 %.
    assert 1.0 <= before < 40.0
    assert 0.95 < after / before < 1.1
    assert abs(after / before - ratio) <= 0.001
    (bits,) = [line.split()[3:] for line in done.stdout.splitlines() if "bits per weight" in line]
    assert bits == ["16.000", "4.127", "0.258"]
    assert "bit for bit" in done.stdout
    assert "def read_lines" in done.stdout
    assert done.stdout.rstrip().endswith("`make demo MODEL=<path or hub id>`.")
    folder = tmp_path / "demo-output"
    assert (folder / "report.html").read_text().startswith("<!DOCTYPE html>")
    assert (folder / "tokenizer.json").exists()
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("kind", ["encoder", "quantized", "missing"])
def test_other_models_are_refused(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model"
    if kind == "encoder":
        models.build("bert").save_pretrained(path)
    elif kind == "quantized":
        olive.quantize(models.build("llama")).save_pretrained(path)
    done = demo(path, "--output", tmp_path / "out", cwd=tmp_path)
    assert done.returncode == 2
    message = " ".join(done.stderr.replace("│", " ").split())
    expected = {
        "encoder": "expected a causal language model (a class in AutoModelForCausalLM), got BertForMaskedLM",
        "quantized": "model: expected a full-precision checkpoint, got one that is quantized",
        "missing": "model: expected a path or a hub id, got",
    }
    assert expected[kind] in message
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
