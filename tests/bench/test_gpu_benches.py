"""The GPU benches on a CPU: rows, checks, bars, and that every section runs."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from typer.testing import CliRunner

from bench.common import gpu_environment
from bench.gpu import __main__ as everything
from bench.gpu import bars, generate, linear, quantize, quantized, sweep
from bench.gpu.candidates import BASELINE, Candidate, olive, torch_bf16, words
from bench.gpu.data import Problem, ends
from bench.gpu.generate import Lengths, Section
from bench.gpu.measure import check, measure
from bench.gpu.results import FIGURES, Results, file_name, line, output_file
from bench.models import TINY, random_llama
from bench.tables import read_rows
from bench.timing import Timing
from olive.ops.gpu_dispatch import Gpu, Plan

CPU = torch.device("cpu")
H200 = Gpu(
    capability=90, multiprocessors=132, clusters=True, shared_per_block=232_448, shared_per_processor=233_472
)
SMALL = Gpu(
    capability=89, multiprocessors=128, clusters=False, shared_per_block=101_376, shared_per_processor=102_400
)


def app(module: ModuleType) -> Any:
    import typer

    made = typer.Typer()
    made.command()(module.main)
    return made


def figures(**values: str) -> dict[str, str]:
    return dict.fromkeys(FIGURES, "") | {"backend": "olive"} | values


@pytest.mark.parametrize(
    ("gpu", "name"),
    [
        ("NVIDIA H200", "nvidia_h200.csv"),
        ("NVIDIA H100 80GB HBM3", "nvidia_h100_80gb_hbm3.csv"),
        ("NVIDIA GeForce RTX 4090", "nvidia_geforce_rtx_4090.csv"),
        ("NVIDIA A100-SXM4-40GB ", "nvidia_a100_sxm4_40gb.csv"),
    ],
)
def test_file_names(gpu: str, name: str) -> None:
    assert file_name(gpu) == name


def test_smoke_runs_write_only_where_they_are_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    cuda = torch.device("cuda")
    assert output_file(None, CPU, tiny=False) is None
    assert output_file(None, cuda, tiny=True) is None
    assert output_file(Path("x.csv"), cuda, tiny=True) == Path("x.csv")
    found = output_file(None, cuda, tiny=False)
    assert found is not None
    assert found.parts[-3:] == ("bench", "results", "nvidia_h200.csv")


def test_rows_are_written_at_once_with_every_column(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = Results(tmp_path / "gpu.csv", CPU)
    results.add("ovp_linear", "olive", Timing(1e-5, 0.9e-5, 1.1e-5, 7), m=16, n=64, k=256, speedup=2.34567)
    (row,) = read_rows(tmp_path / "gpu.csv")
    assert list(row) == [*FIGURES, *gpu_environment(CPU)]
    assert {name: row[name] for name in ("op", "m", "median_ms", "runs", "speedup", "gb_s")} == {
        "op": "ovp_linear", "m": "16", "median_ms": "0.01000", "runs": "7", "speedup": "2.3457", "gb_s": "",
    }  # fmt: skip
    results.fail("ovp_encode", "olive", ValueError("codes: others\nmore"))
    results.missing("ovp_linear", "gemlite", "not installed")
    assert [row["note"] for row in read_rows(tmp_path / "gpu.csv")] == [
        "", "failed: ValueError: codes: others", "not available: not installed",
    ]  # fmt: skip
    assert results.failed
    assert "M 16    64 x 256        median_ms 0.01000  speedup 2.3457" in capsys.readouterr().out


def test_missing_peers_are_no_failure() -> None:
    results = Results(None, CPU)
    results.missing("ovp_linear", "gemlite", ImportError("No module named 'gemlite'"))
    assert not results.failed
    assert "not available: ImportError: No module named 'gemlite'" in line(results.rows[0])


def test_unknown_figures_are_rejected() -> None:
    with pytest.raises(ValueError, match=r"figures: expected names among .* got \['speed'\]"):
        Results(None, CPU).add("copy", "torch", speed=1)


def test_a_gpu_names_its_driver_and_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr("bench.common.driver_version", lambda: "580.1")
    found = gpu_environment(torch.device("cuda"))
    assert (found["machine"], found["driver"], found["cuda"]) == ("NVIDIA H200", "580.1", "13.0")
    assert "threads" not in found


def test_ends_of_a_range() -> None:
    assert ends(5, 3, CPU).tolist() == [0, 1, 2, 3, 4]
    assert ends(9, 3, CPU).tolist() == [0, 1, 2, 6, 7, 8]


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(64, 256, CPU)


def test_rows_of_a_problem_are_drawn_from_quantized_ones(problem: Problem) -> None:
    codes, scale = problem.canonical
    assert (codes.shape, scale.shape) == ((64, 128), (64, 2))
    assert problem.decoded.shape == (64, 256)
    assert 0.01 < float(problem.decoded.std()) < 0.04


def candidate(problem: Problem, change: Any) -> Candidate:
    return Candidate(lambda x, turn: change(x.double() @ problem.decoded.T), 1, 1, problem.decoded)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda out: (out * 1.1).bfloat16(), "expected a relative error of at most 0.01, got 0.1"),
        (lambda out: (out * float("nan")).bfloat16(), "at most 0.01, got nan"),
        (lambda out: out.bfloat16()[:, :-1], r"expected torch.bfloat16 \(3, 64\), got .* \(3, 63\)"),
        (lambda out: out.float(), r"expected torch.bfloat16 \(3, 64\), got torch.float32"),
    ],
)  # fmt: skip
def test_wrong_results_are_refused(problem: Problem, change: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        check(problem, candidate(problem, change), problem.activations(3), 0.01)


def test_right_results_pass(problem: Problem) -> None:
    assert check(problem, candidate(problem, Tensor.bfloat16), problem.activations(70), 0.01) < 0.01


def test_a_wrong_kernel_of_ours_fails_and_the_others_are_measured(problem: Problem) -> None:
    def broken(x: Tensor, turn: int) -> Tensor:
        raise RuntimeError("launch failed")

    candidates = {
        BASELINE: torch_bf16(problem),
        "olive": olive(problem),
        "olive_decode": candidate(problem, lambda out: (2 * out).bfloat16()),
        "gemlite": Candidate(broken, 1, 1, problem.decoded),
        "torch_int4": Candidate(broken, 1, 1, problem.decoded, most_products=10),
    }
    results = Results(None, CPU)
    measure("ovp_linear", problem, 3, candidates, results, copy=1e9, seconds=0)
    notes = {row["backend"]: row["note"] for row in results.rows}
    assert notes["olive_decode"].startswith("failed: ValueError: result: expected a relative error")
    assert notes["gemlite"] == "not available: RuntimeError: launch failed"
    assert notes[BASELINE] == notes["olive"] == ""
    assert "torch_int4" not in notes, "left out: too many products"
    assert results.failed
    (baseline,) = (row for row in results.rows if row["backend"] == BASELINE)
    assert baseline["speedup"] == "1"


def test_plans_cover_the_tiles_that_fit() -> None:
    few = sweep.plans(8, H200)
    assert {plan.tokens for plan in few if plan.kernel == "mma"} == {8, 16}
    assert {plan.split for plan in few if plan.kernel == "mma"} == {1, 2, 4, 8}
    many = sweep.plans(4096, H200)
    assert {plan.tokens for plan in many if plan.kernel == "mma"} == {64}
    assert {(plan.rows, plan.tokens) for plan in many if plan.kernel == "wgmma"} == {
        (128, 64), (128, 128), (128, 256), (256, 128),
    }  # fmt: skip
    assert many[-1] == Plan("decode")
    assert {plan.kernel for plan in sweep.plans(4096, SMALL)} == {"mma", "decode"}
    assert all(len(set(map(words, found))) == len(found) for found in (few, many))


def test_plans_for_quantized_activations_are_those_of_their_kernels() -> None:
    kinds = quantized.KINDS
    many = sweep.quantized_plans_of(4096, H200, kinds["olive_w4a8"])
    assert {plan.tokens for plan in many if plan.kernel == "wgmma"} == {64, 128, 256}
    grouped = sweep.quantized_plans_of(4096, H200, kinds["olive_w4a8_g128"])
    assert {plan.tokens for plan in grouped if plan.kernel == "wgmma"} == {64, 128}
    assert {plan.kernel for plan in sweep.quantized_plans_of(4096, SMALL, kinds["olive_w4a8"])} == {"mma"}


@pytest.mark.parametrize("name", quantized.KINDS)
def test_quantized_activations_are_held_to_their_own_values(name: str, problem: Problem) -> None:
    made, x = quantized.QUANTIZED[name](problem), problem.activations(3)
    assert check(problem, made, x, 0.01) < 0.01
    assert float((made.values(x) - x.double()).norm() / x.double().norm()) > 0.001


def test_shapes_and_rows_are_those_of_the_bars() -> None:
    for shape in bars.SPEEDUPS:
        assert shape in linear.SHAPES
        assert set(bars.BAR_ROWS) | set(bars.QUANTIZED_ROWS) <= set(linear.rows_of(*shape))
    assert sum(8192 in linear.rows_of(*shape) for shape in linear.SHAPES) == 2


def test_bars_are_met_or_missed() -> None:
    rows = [
        figures(op="ovp_linear", n="4096", k="4096", m="1", speedup="9"),  # measured again below
        figures(op="ovp_linear", n="4096", k="4096", m="1", speedup="2.25"),
        figures(op="ovp_linear", n="4096", k="4096", m="16", speedup="1.9"),
        figures(op="ovp_linear", n="4096", k="4096", m="64", note="failed: result"),
        figures(op="ovp_linear", n="4096", k="4096", m="16", speedup="8", backend="olive_triton"),
        figures(op="ovp_linear", n="73728", k="12288", m="1", speedup="3", of_copy="0.8"),
        figures(op="ovp_linear", n="4096", k="4096", m="1024", speedup="1.55", backend="olive_w4a8"),
        figures(op="ovp_quantize", mweights_s="350"),
        figures(op="ovp_encode", of_copy="0.5"),
        figures(op="generate", m="8", speedup="9"),
    ]
    linear_table, quantized_table, others = bars.tables(rows)
    printed = io.StringIO()
    console = Console(width=200, file=printed)
    for table in (linear_table, quantized_table, others):
        console.print(table)
    text = printed.getvalue()
    for expected in (
        "2.25 / 2.2 met",
        "1.90 / 2 missed",
        "- / 1.5",
        "3.00 / 3.5 missed",
        "1.55 / 1.4 met",
        "80.00 / 80 met",
        "20.00 / 30 met",  # seconds: less is better
        "50.00 / 60 missed",
        "- / 2.5",
    ):
        assert expected in text
    assert "8.00" not in text


def test_failures_are_listed_below_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    bars.show([figures(op="ovp_linear", plan="cuda mma", m="64", note="failed: ValueError: got nan")])
    assert "ovp_linear olive cuda mma M 64: failed: ValueError: got nan" in capsys.readouterr().out


def test_bars_of_a_file(tmp_path: Path) -> None:
    Results(tmp_path / "gpu.csv", CPU).add("ovp_encode", "olive", of_copy=0.75)
    result = CliRunner().invoke(app(bars), [str(tmp_path / "gpu.csv")])
    assert result.exit_code == 0
    assert "75.00 / 60 met" in result.output


@pytest.mark.parametrize(
    ("module", "ops"),
    [
        (linear, {"copy", "product", "ovp_linear"}),
        (quantize, {"copy", "ovp_encode", "ovp_decode", "quantize_activations", "ovp_quantize"}),
        (generate, {"generate_eager", "generate", "prefill", "quantize_model"}),
    ],
)
def test_tiny_run_writes_rows(module: ModuleType, ops: set[str], tmp_path: Path) -> None:
    output = tmp_path / "gpu.csv"
    result = CliRunner().invoke(
        app(module), ["--tiny", "--device", "cpu", "--output", str(output)], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    rows = read_rows(output)
    assert {row["op"] for row in rows} == ops
    measured = [row for row in rows if row["median_ms"]]
    assert all(float(row["median_ms"]) > 0 for row in measured)
    assert any(row["backend"] == "olive" for row in measured)


def test_a_graph_that_generates_other_tokens_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    results = Results(None, CPU)
    section = Section(results, CPU, Lengths(4, 3, 8))
    model = random_llama(TINY)
    generated = iter([torch.tensor([[1]]), torch.tensor([[2]])])
    monkeypatch.setattr(generate.StaticDecoder, "generate", lambda *_: next(generated))
    with torch.inference_mode():
        section.generation(model, "olive", 2)
    assert results.failed
    assert results.rows[-1]["note"] == "failed: a replayed step generates other tokens"


def test_sections_run_in_processes_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[tuple[str, ...]] = []

    def fake(command: tuple[str, ...], *, cwd: Path, timeout: int) -> Any:
        commands.append(command)
        if command[2] == "hangs":
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, int(command[2] == "fails"))

    monkeypatch.setattr(subprocess, "run", fake)
    failures = everything.run({"works": 1, "fails": 2, "hangs": 3, "last": 4}, ["--tiny"])
    assert failures == {"fails": "exit status 1", "hangs": "took more than 3 s"}
    assert commands[-1] == (sys.executable, "-m", "last", "--tiny")


def test_command_shows_the_rows_of_this_run_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "gpu.csv"
    Results(output, CPU).add("ovp_encode", "olive", of_copy=0.75)

    def fake(sections: dict[str, int], arguments: list[str]) -> dict[str, str]:
        assert arguments == ["--output", str(output), "--device", "cpu", "--tiny"]
        Results(output, CPU).add("generate", "olive", m=1, speedup=2.6)
        return {"bench.gpu.quantize": "exit status 1"}

    monkeypatch.setattr(everything, "run", fake)
    result = CliRunner().invoke(app(everything), ["--tiny", "--device", "cpu", "--output", str(output)])
    assert result.exit_code == 1
    assert "2.60 / 2.5 met" in result.output
    assert "75.00" not in result.output
    assert "bench.gpu.quantize: exit status 1" in result.output


def test_smoke_run_needs_a_file() -> None:
    result = CliRunner().invoke(app(everything), ["--tiny", "--device", "cpu"])
    assert result.exit_code == 2
    assert "a smoke run needs a file" in result.output


def test_all_sections_fit_into_ten_minutes() -> None:
    build, tests = 75, 130  # seconds: expected, and the limit in the Makefile
    assert build + tests + sum(everything.SECTIONS.values()) <= 600
