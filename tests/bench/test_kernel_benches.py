"""Every kernel bench runs, checks its results and prints a table; timings of tiny problems mean nothing."""

import csv
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

typer = pytest.importorskip("typer")

from bench import (  # noqa: E402
    bench_generate,
    bench_gptq,
    bench_ovp_decode,
    bench_ovp_encode,
    bench_ovp_linear,
    bench_qat_step,
    bench_training_ops,
    bench_uniform_linear,
    plots,
)
from bench.timing import copies_for, take_turns  # noqa: E402


@pytest.mark.parametrize(
    "module",
    [
        bench_ovp_linear,
        bench_ovp_encode,
        bench_ovp_decode,
        bench_generate,
        bench_training_ops,
        bench_qat_step,
        bench_uniform_linear,
    ],
)
def test_tiny_run_prints_a_table(module, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    app = typer.Typer()
    app.command()(module.main)
    result = CliRunner().invoke(app, ["--tiny", "--threads", "1", "--output", str(tmp_path / "out.csv")])
    assert result.exit_code == 0, result.output
    assert any(name in result.output for name in ("olive", "ovp", "bfloat16", "LSQ", "w4a8"))
    assert not list(tmp_path.iterdir()), "a smoke run leaves no figures"


def test_gptq_bench_prints_a_table():
    app = typer.Typer()
    app.command()(bench_gptq.main)
    result = CliRunner().invoke(app, ["--quick"], env={"COLUMNS": "160"})
    assert result.exit_code == 0, result.output
    assert "compensate, activation order" in result.output


def test_training_bench_stops_where_results_differ():
    weight = torch.randn(4, 32)
    (case, *_) = bench_training_ops.weight_cases(weight)
    with pytest.raises(RuntimeError, match="statsq: expected the reference's values, got others"):
        bench_training_ops.check(case._replace(reference=lambda: weight))


def test_linear_bench_writes_what_the_plot_reads(tmp_path):
    lines = bench_ovp_linear.bench_shape(
        32, 256, [1, 3], bench_ovp_linear.DTYPES["bfloat16"], 128, 10**5, 0.01
    )
    assert {line["m"] for line in lines} == {1, 3}
    path = tmp_path / "ovp_linear.csv"
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    plots.plot_linear(path, tmp_path / "ovp_linear.svg")
    assert Path(tmp_path / "ovp_linear.svg").read_text().lstrip().startswith("<?xml")


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_candidates_take_turns():
    order = []
    timings = take_turns(
        {"a": lambda turn: order.append(("a", turn)), "b": lambda turn: order.append(("b", turn))}, 0
    )
    assert order[4:8] == [("a", 2), ("b", 2), ("a", 3), ("b", 3)]
    assert timings["a"].runs == timings["b"].runs >= 5


def test_copies_are_at_least_two():
    assert copies_for(10, 100) == 10
    assert copies_for(10**9, 100) == 2
