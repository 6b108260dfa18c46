"""bench.readme: tables from small CSV files, markers, and that the README itself is up to date."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import readme
from bench.common import RESULTS, ROOT

PLACE = {
    "machine": "a chip, 2 cores", "threads": "2", "torch": "2.13.0", "commit": "abc", "date": "2026-01-02",
}  # fmt: skip
PAGE = """# Title
<!-- results:quality -->
old
<!-- /results -->
between
<!-- results:ovp_linear -->
<!-- /results -->
<!-- results:ovp_linear_quantized -->
<!-- /results -->
<!-- results:generate -->
<!-- /results -->
<!-- results:gpu_linear -->
<!-- /results -->
<!-- results:gpu_generate -->
<!-- /results -->
<!-- results:gpu_quantize -->
<!-- /results -->
<!-- results:qat_digits -->
<!-- /results -->
<!-- results:qat_language -->
<!-- /results -->
<!-- results:uniform_linear -->
<!-- /results -->
<!-- results:qat_step -->
<!-- /results -->
end
"""
NO_QAT = "".join(
    f"<!-- results:{name} -->\nNo figures yet: bench/results/{name}.csv is missing.\n<!-- /results -->\n"
    for name in ("qat_digits", "qat_language", "uniform_linear", "qat_step")
)
NOT_MEASURED = "Not measured yet: `make gpu` on a machine with a GPU writes the figures.\n"


def write(path: Path, rows: list[dict[str, str]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], *PLACE])
        writer.writeheader()
        writer.writerows({**row, **PLACE} for row in rows)


def quality(
    name: str,
    metric: str,
    data: str,
    value: str,
    calibration: str = "none",
    bits: str = "4.1259",
) -> dict[str, str]:
    return {
        "format": name, "bits_per_weight": bits, "group_size": "128", "metric": metric, "data": data,
        "value": value, "calibration": calibration, "implementation": "olive",
    }  # fmt: skip


def linear(backend: str, m: str, ms: str, speedup: str, **more: str) -> dict[str, str]:
    row = {
        "backend": backend, "m": m, "n": "64", "k": "256", "dtype": "bfloat16", "group_size": "128",
        "median_ms": ms, "weight_gb_s": "30.04", "speedup": speedup,
    }  # fmt: skip
    return {**row, **more}


@pytest.fixture
def results(tmp_path: Path) -> Path:
    write(
        tmp_path / "quality.csv",
        [
            quality("OVP adaptive", "KL divergence", "tiny_llama", "99"),  # measured again below
            quality("OVP adaptive", "KL divergence", "tiny_llama", "0.01", calibration=""),  # the other bench
            quality("NVFP4", "KL divergence", "tiny_llama", "0.0184", bits="4.5"),
            quality("float32", "perplexity", "tiny_llama", "9.17714", bits="32.0"),
            quality("OVP adaptive", "KL divergence", "tiny_llama", "0.0205"),
            quality("OVP adaptive", "embedding distance", "MiniLM-L6", "0.0265"),
            quality("OVP adaptive", "KL divergence", "tiny_llama", "0.0084", calibration="GPTQ"),
            quality("only weights", "weight error", "tiny_llama", "0.5"),
        ],
    )
    write(
        tmp_path / "ovp_linear.csv",
        [
            linear("olive avx512_vnni", "16", "0.5", "2.345"),
            linear("torch_int4", "16", "2.0", "0.451"),
            linear("olive avx512_vnni", "1", "0.0512", "4.256"),
            linear("olive avx512_vnni", "1", "9", "9", group_size="64"),
            linear("olive avx512_vnni", "1", "9", "9", dtype="float32"),
            linear("torch_half", "1", "0.2", "1.000"),
        ],
    )
    model = {"parameters": "1100048384"}
    write(
        tmp_path / "generate.csv",
        [
            {**model, "backend": "bfloat16", "tokens_s": "9.99", "speedup": "1.00"},  # measured again below
            {**model, "backend": "bfloat16", "tokens_s": "5.01", "speedup": "1.00"},
            {**model, "backend": "olive avx512_vnni", "tokens_s": "19.02", "speedup": "3.80"},
        ],
    )
    return tmp_path


def test_quantized_table_shows_one_run_of_the_best_instruction_set() -> None:
    slow, fast = {**PLACE, "date": "2026-02-01"}, {**PLACE, "date": "2026-01-01"}
    rows = [
        {**linear("olive_w4a8 amx", "1", "0.5", "4.0"), **fast},
        {**linear("memory_read", "1", "0.4", "5.0"), **fast},
        {**linear("olive amx", "1", "0.6", "3.0"), **fast},
        {**linear("ggml_q4_0", "1", "0.45", "4.5"), **fast},
        {**linear("olive_w4a8 avx2", "1", "9", "9"), **slow},
        {**linear("olive_w4a4 avx2", "1", "9", "9"), **slow},
    ]
    assert readme.quantized_table(rows) == (
        "| N x K | M | W4A8, ms | of memory speed | W4A16 | W4A8 | ggml Q4_0 |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| 64 x 256 | 1 | 0.500 | 80% | 3.00 | 4.00 | **4.50** |\n"
        "\n"
        "Reproduce with `python -m bench.bench_ovp_linear`. "
        "Measured on a chip, 2 cores, 2 threads, torch 2.13.0, commit abc, 2026-01-01. "
        "OliVe ran on its amx kernels."
    )


def test_tables(results: Path) -> None:
    assert readme.render(PAGE, results) == (
        "# Title\n"
        "<!-- results:quality -->\n"
        "| format | data | bits | perplexity increase | KL divergence, nats | embedding distance, MiniLM |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| NVFP4 |  | 4.500 |  | **0.0184** |  |\n"
        "| `OVP adaptive` |  | 4.126 |  | 0.0205 | **0.0265** |\n"
        "| `OVP adaptive` | GPTQ | 4.126 |  | **0.0084** |  |\n"
        "\n"
        "Reproduce with `make quality`. "
        "Measured on a chip, 2 cores, 2 threads, torch 2.13.0, commit abc, 2026-01-02.\n"
        "<!-- /results -->\n"
        "between\n"
        "<!-- results:ovp_linear -->\n"
        "| N x K | M | OliVe, ms | GB/s of codes | OliVe | torch int4 |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: |\n"
        "| 64 x 256 | 1 | 0.051 | 30.0 | **4.26** |  |\n"
        "| 64 x 256 | 16 | 0.500 | 30.0 | **2.35** | 0.45 |\n"
        "\n"
        "Reproduce with `python -m bench.bench_ovp_linear`. "
        "Measured on a chip, 2 cores, 2 threads, torch 2.13.0, commit abc, 2026-01-02. "
        "OliVe ran on its avx512_vnni kernels.\n"
        "<!-- /results -->\n"
        "<!-- results:ovp_linear_quantized -->\n"
        "No figures yet: `python -m bench.bench_ovp_linear` writes them.\n"
        "<!-- /results -->\n"
        "<!-- results:generate -->\n"
        "| model | tokens per second | speed-up |\n"
        "| --- | ---: | ---: |\n"
        "| 1.1 B parameters, bfloat16 | 5.0 | 1.00 |\n"
        "| 1.1 B parameters, olive avx512_vnni | 19.0 | 3.80 |\n"
        "\n"
        "Reproduce with `python -m bench.bench_generate`. "
        "Measured on a chip, 2 cores, 2 threads, torch 2.13.0, commit abc, 2026-01-02.\n"
        "<!-- /results -->\n"
        f"<!-- results:gpu_linear -->\n{NOT_MEASURED}<!-- /results -->\n"
        f"<!-- results:gpu_generate -->\n{NOT_MEASURED}<!-- /results -->\n"
        f"<!-- results:gpu_quantize -->\n{NOT_MEASURED}<!-- /results -->\n"
        f"{NO_QAT}end\n"
    )


def test_rendering_again_changes_nothing(results: Path) -> None:
    once = readme.render(PAGE, results)
    assert readme.render(once, results) == once


def test_missing_files_are_said(tmp_path: Path) -> None:
    assert "No figures yet: bench/results/quality.csv is missing." in readme.render(PAGE, tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "<!-- results:quality -->",
        "<!-- results:quality --><!-- results:ovp_linear --><!-- /results -->",
        "<!-- results:quality --><!-- /results --><!-- results:quality --><!-- /results -->",
    ],
)
def test_missing_markers_are_rejected(text: str) -> None:
    with pytest.raises(ValueError, match=r"README: expected <!-- results:quality --> followed by"):
        readme.fill(text, "quality", "table")


def test_command(results: Path, tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(readme.main)
    page = tmp_path / "page.md"
    page.write_text(PAGE)
    arguments = ["--readme", str(page), "--results", str(results)]
    checked = CliRunner().invoke(app, ["--check", *arguments])
    assert checked.exit_code == 1
    assert "run `python -m bench.readme`" in checked.output
    assert page.read_text() == PAGE
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert page.read_text() == readme.render(PAGE, results)
    assert CliRunner().invoke(app, ["--check", *arguments]).exit_code == 0


def test_readme_has_the_figures_of_the_results() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.render(text, RESULTS) == text, "run `python -m bench.readme`"


GPU = {"machine": "a GPU", "driver": "580.1", "torch": "2.11.0", "commit": "abc", "date": "2026-01-02"}
GPU_FIGURES = (
    "op",
    "backend",
    "m",
    "n",
    "k",
    "median_ms",
    "of_copy",
    "speedup",
    "mweights_s",
    "tokens_s",
    "peak_gib",
)


def write_gpu(path: Path, *rows: dict[str, str]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*GPU_FIGURES, *GPU], restval="")
        writer.writeheader()
        writer.writerows({"median_ms": "1", **row, **GPU} for row in rows)


def test_gpu_tables(results: Path) -> None:
    layer = {"op": "ovp_linear", "n": "64", "k": "256"}
    write_gpu(
        results / "a_gpu.csv",
        {**layer, "backend": "olive", "m": "1", "of_copy": "0.1", "speedup": "9"},  # measured again below
        {**layer, "backend": "olive", "m": "1", "of_copy": "0.812", "speedup": "3.456"},
        {**layer, "backend": "olive", "m": "64", "of_copy": "0.7", "speedup": "1.5"},
        {**layer, "backend": "olive", "m": "3", "of_copy": "0.7", "speedup": "7"},
        {**layer, "backend": "torch_int4", "m": "64", "of_copy": "0.7", "speedup": "0.25"},
        {**layer, "backend": "gemlite", "m": "", "median_ms": ""},
        {
            "op": "generate",
            "backend": "olive",
            "m": "1",
            "tokens_s": "250.4",
            "speedup": "2.6",
            "peak_gib": "5.71",
        },
        {
            "op": "generate",
            "backend": "torch_bf16",
            "m": "1",
            "tokens_s": "96",
            "speedup": "1",
            "peak_gib": "15",
        },
        {
            "op": "prefill",
            "backend": "olive",
            "m": "4096",
            "tokens_s": "4e4",
            "speedup": "1",
            "peak_gib": "6",
        },
        {"op": "ovp_encode", "backend": "olive", "of_copy": "0.61", "mweights_s": "700000"},
        {"op": "ovp_quantize", "backend": "olive", "of_copy": "0.001", "mweights_s": "350"},
    )
    place = (
        "Reproduce with `make gpu`. Measured on a GPU, driver 580.1, torch 2.11.0, commit abc, 2026-01-02.\n"
    )
    text = readme.render(PAGE, results)
    assert text[text.index("<!-- results:gpu_linear -->") :] == (
        "<!-- results:gpu_linear -->\n"
        "| N x K | of copy bandwidth, M = 1 | "
        "M = 1 | M = 4 | M = 16 | M = 64 | M = 256 | M = 1024 | M = 4096 |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| 64 x 256, OliVe | 81% | 3.46 |  |  | 1.50 |  |  |  |\n"
        "| 64 x 256, torch int4 |  |  |  |  | 0.25 |  |  |  |\n"
        "\n"
        f"{place}"
        "<!-- /results -->\n"
        "<!-- results:gpu_generate -->\n"
        "| Llama 3 8B's shape | tokens per second | speed-up | peak memory, GiB |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| batch 1, bfloat16 | 96 | 1.00 | 15.0 |\n"
        "| batch 1, OliVe | 250 | 2.60 | 5.7 |\n"
        "| prompt of 4096 tokens, OliVe | 40000 | 1.00 | 6.0 |\n"
        "\n"
        f"{place}"
        "<!-- /results -->\n"
        "<!-- results:gpu_quantize -->\n"
        "| operator | of copy bandwidth | million weights per second | 7 B weights, seconds |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| encode, scales given | 61% | 700000 | 0.01 |\n"
        "| quantize, default search | 0% | 350 | 20.00 |\n"
        "\n"
        f"{place}"
        "<!-- /results -->\n"
        f"{NO_QAT}end\n"
    )


def test_every_gpu_has_a_table(results: Path) -> None:
    row = {"op": "ovp_encode", "backend": "olive", "of_copy": "0.61", "mweights_s": "700000"}
    write_gpu(results / "a_gpu.csv", row)
    write_gpu(results / "b_gpu.csv", row)
    text = readme.render(PAGE, results)
    assert text.count("encode, scales given") == 2
    assert f"<!-- results:gpu_linear -->\n{NOT_MEASURED}" in text
