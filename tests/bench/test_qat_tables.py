"""Tables of quantization-aware training from a few rows, and smoke runs of its benches."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

typer = pytest.importorskip("typer")
pytest.importorskip("sklearn")

from bench import bench_qat_digits, bench_qat_language  # noqa: E402
from bench.qat_tables import digits_table, language_table, step_table, uniform_table  # noqa: E402


def _digits(method: str, bits: str, seed: str, accuracy: str, oscillating: str, step: str) -> dict[str, str]:
    keys = ("method", "bits", "seed", "accuracy", "oscillating", "ms_per_step")
    return dict(zip(keys, (method, bits, seed, accuracy, oscillating, step), strict=True))


def test_digits_table_has_means_and_spreads() -> None:
    rows = [
        _digits("full precision", "32", "0", "0.98", "", "10"),
        _digits("full precision", "32", "1", "0.96", "", "20"),
        _digits("LSQ", "2", "0", "0.90", "0.02", "15"),
        _digits("LSQ", "2", "1", "0.92", "0.04", "30"),
        _digits("LSQ", "4", "0", "0.95", "0.01", "15"),
    ]
    lines = digits_table(rows).splitlines()
    assert lines[0].count("|") == 7
    assert "| full precision | 97.0 ± 1.4 |  | 97.0 ± 1.4 |  | 1.00 |" in lines
    assert "| LSQ | 91.0 ± 1.4 | 3.00 ± 1.41 | 95.0 | 1.00 | 1.50 |" in lines


def test_language_table_leaves_out_what_was_not_trained() -> None:
    keys = ("run", "untrained", "trained", "converted", "oscillating", "steps")
    rows = [
        dict(zip(keys, ("full precision", "9.1", "", "9.1", "", "0"), strict=True)),
        dict(zip(keys, ("W2", "90.0", "9.9", "9.9", "0.0123", "400"), strict=True)),
    ]
    lines = language_table(rows).splitlines()
    assert lines[2:] == ["| full precision | 9.1 |  |  |  |  |", "| W2 | 90.0 | 9.9 | 9.9 | 1.23 | 400 |"]


def test_step_table_takes_the_last_run() -> None:
    row = {"machine": "m", "variant": "v", "median_ms": "1.0", "over_full_precision": "1.1"}
    assert step_table([row, {**row, "median_ms": "2.0"}]).splitlines()[2] == "| v | m | 2.0 | 1.1 |"


def test_uniform_table_has_a_line_for_each_size() -> None:
    keys = ("m", "n", "k", "backend", "speedup")
    rows = [
        dict(zip(keys, ("1", "64", "32", "w4a8 avx2", "4.0"), strict=True)),
        dict(zip(keys, ("1", "64", "32", "w4a8 avx2", "4.567"), strict=True)),
        dict(zip(keys, ("16", "64", "32", "torch_half", "1.0"), strict=True)),
    ]
    lines = uniform_table(rows).splitlines()
    assert lines[2:] == ["| 1, 64 x 32 |  |  |  |  | 4.57 |  |  |", "| 16, 64 x 32 |  |  |  |  |  |  |  |"]


def _run(module: object, *arguments: str) -> str:
    app = typer.Typer()
    app.command()(module.main)  # type: ignore[attr-defined]
    result = CliRunner().invoke(app, ["--tiny", *arguments], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    return result.output


def test_digits_bench_runs(tmp_path: Path) -> None:
    chosen = ("LSQ + dampening", "LSQ + freezing", "StatsQ + QKR + CGA")
    methods = [part for name in chosen for part in ("--method", name)]
    output = _run(bench_qat_digits, *methods, "--output", str(tmp_path / "out.csv"))
    assert all(name in output for name in chosen)
    assert not list(tmp_path.iterdir()), "a smoke run leaves no figures"


def test_language_bench_runs(tmp_path: Path) -> None:
    output = _run(bench_qat_language, "--run", "W4A8", "--output", str(tmp_path / "out.csv"))
    assert "W4A8" in output
    assert not list(tmp_path.iterdir()), "a smoke run leaves no figures"
