"""Tables, page and picture of the quality comparison, from small CSV files; the page itself is up to date."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import plot_quality, quality_page
from bench.common import RESULTS, ROOT, append_csv
from bench.quality_table import (
    OUTPUT_COLUMNS,
    data_free_table,
    lines_of,
    losses_table,
    method_table,
    readme_table,
)
from bench.tables import Row, read_rows

PLACE = {
    "machine": "a chip, 2 cores", "threads": "2", "torch": "2.13.0", "commit": "abc", "date": "2026-01-02",
}  # fmt: skip
PAGE = "".join(
    f"<!-- results:quality_{name} -->\n<!-- /results -->\n"
    for name in ("float", "output", "losses", "weights", "data_free")
)


def row(
    name: str,
    value: str,
    calibration: str = "none",
    by: str = "own definition",
    group: str = "128",
    metric: str = "KL divergence",
    data: str = "tiny_llama",
    bits: str = "4.1259",
) -> Row:
    return {
        "format": name, "bits_per_weight": bits, "group_size": group, "metric": metric, "data": data,
        "value": value, "calibration": calibration, "implementation": by, **PLACE,
    }  # fmt: skip


ROWS = [
    row("float32", "9.2", metric="perplexity", bits="32"),
    row("OVP adaptive", "0.9", by="olive"),  # measured again below
    row("int4 asymmetric", "0.02"),
    row("OVP adaptive", "0.0123", by="olive"),
    row("OVP adaptive", "0.151", by="olive", metric="perplexity increase"),
    row("HQQ", "0.03", group="64", bits="4.5"),
    row("HQQ", "0.03", group="64", bits="4.5", by="hqq 1"),  # the same figure
    row("int4 asymmetric", "0.004", "GPTQ"),
    row("int4 asymmetric", "0.005", "GPTQ", by="gptqmodel 7"),  # another figure
    row("OVP adaptive", "0.003", "GPTQ, activation order", by="olive"),
    row("OVP paper preset", "0.05", by="olive", group="-1"),
    row("OVP adaptive", "0.0001", calibration=""),  # of bench_quality
    row("NF4, absmax", "0.04", bits="4.25"),
]


def test_methods_by_what_data_do_best_first() -> None:
    table, used = method_table(ROWS, OUTPUT_COLUMNS[:2])
    assert table == (
        "| format | data | bits | perplexity increase | KL divergence |\n"
        "| --- | ---: | ---: | ---: | ---: |\n"
        "| `OVP adaptive` |  | 4.126 | **0.151** | **0.0123** |\n"
        "| int4 asymmetric |  | 4.126 |  | 0.0200 |\n"
        "| HQQ, group 64 (hqq 1) |  | 4.500 |  | 0.0300 |\n"
        "| NF4, absmax |  | 4.250 |  | 0.0400 |\n"
        "| `OVP paper preset`, per channel |  | 4.126 |  | 0.0500 |\n"
        "| `OVP adaptive` | GPTQ, activation order | 4.126 |  | **0.0030** |\n"
        "| int4 asymmetric | GPTQ | 4.126 |  | 0.0040 |\n"
        "| int4 asymmetric (gptqmodel 7) | GPTQ | 4.126 |  | 0.0050 |"
    )
    assert len(used) == 9


def test_definitions_of_our_own_stay_where_a_package_differs() -> None:
    found = [(line.format, line.implementation) for line in lines_of(ROWS)]
    assert ("HQQ", "own definition") not in found
    assert ("int4 asymmetric", "own definition") in found


def test_readme_leaves_out_lines() -> None:
    table, _ = readme_table(ROWS)
    assert "NF4, absmax" not in table
    assert "int4 asymmetric (gptqmodel 7)" in table


def test_losses_of_ovp_are_named() -> None:
    rows = [
        row("OVP learned", "0.019", by="olive"),
        row("OVP adaptive", "0.02", by="olive"),
        row("NVFP4", "0.018", group="16", bits="4.5"),
        row("NF4, absmax", "0.015", bits="4.25"),
        row("int4 asymmetric", "0.0195"),
        row("OVP adaptive", "0.005", "GPTQ", by="olive"),
        row("OVP adaptive", "0.001", "GPTQ, activation order", by="olive"),
        row("int4 asymmetric", "0.004", "GPTQ"),
        row("OVP adaptive", "0.015", "importance", by="olive"),  # nothing to compare with
    ]
    assert losses_table(rows) == (
        "| measure | data | best of OVP | better than it | the default | better than it |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| KL divergence | no data | `OVP learned`, 0.0190 | NF4, absmax at 4.250 bits, 0.0150; "
        "NVFP4, group 16 at 4.500 bits, 0.0180 | `OVP adaptive`, 0.0200 | NF4, absmax at 4.250 bits, 0.0150; "
        "NVFP4, group 16 at 4.500 bits, 0.0180; int4 asymmetric at 4.126 bits, 0.0195 |\n"
        "| KL divergence | GPTQ | `OVP adaptive`, activation order, 0.0010 | none | `OVP adaptive`, 0.0050 | "
        "int4 asymmetric at 4.126 bits, 0.0040 |"
    )


def test_data_free_rows_are_those_of_one_group_size() -> None:
    rows = [
        row("OVP nf4", "0.0081", calibration="", metric="weight error", data="MiniLM-L6"),
        row("OVP nf4", "0.001", calibration="", metric="weight error", data="MiniLM-L6", group="64"),
        row("OVP nf4", "0.002", metric="weight error", data="MiniLM-L6"),
        row("float32", "9.17714", calibration="", metric="perplexity", bits="32"),
    ]
    table, used = data_free_table(rows)
    assert table == (
        "| format | bits | weight error, MiniLM | perplexity, bundled model |\n"
        "| --- | ---: | ---: | ---: |\n"
        "| float32 | 32.000 |  | 9.177 |\n"
        "| `OVP nf4` | 4.126 | **0.0081** |  |"
    )
    assert len(used) == 2


def test_page_is_filled_and_checked(tmp_path: Path) -> None:
    import typer

    app = typer.Typer()
    app.command()(quality_page.main)
    page, results = tmp_path / "page.md", tmp_path / "quality.csv"
    page.write_text(PAGE)
    append_csv(results, ROWS)
    arguments = ["--page", str(page), "--results", str(results)]
    checked = CliRunner().invoke(app, ["--check", *arguments])
    assert checked.exit_code == 1
    assert "run `python -m bench.quality_page`" in checked.output
    assert page.read_text() == PAGE
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert "| tiny_llama | 9.200 |" in page.read_text()
    assert "`OVP adaptive` | GPTQ, activation order" in page.read_text()
    assert CliRunner().invoke(app, ["--check", *arguments]).exit_code == 0


def test_the_page_has_the_figures_of_the_results() -> None:
    text = (ROOT / "docs" / "quality.md").read_text(encoding="utf-8")
    rows = read_rows(RESULTS / "quality.csv")
    assert quality_page.render(text, rows) == text, "run `python -m bench.quality_page`"
    assert (ROOT / "docs" / "images" / "quality.png").exists()


@pytest.mark.parametrize(
    ("heights", "expected"),
    [
        ([], []),
        ([0.2, 0.5], [0.2, 0.5]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.0, 0.0, 0.9], [0.0, 0.1, 0.9]),
        ([0.1, 0.98, 1.0], [0.1, 0.9, 1.0]),
    ],
)
def test_labels_are_apart_and_near_their_points(heights: list[float], expected: list[float]) -> None:
    assert plot_quality.spread(heights, 0.1) == pytest.approx(expected)


def test_picture_is_drawn(tmp_path: Path) -> None:
    append_csv(tmp_path / "quality.csv", ROWS)
    plot_quality.plot(tmp_path / "quality.csv", tmp_path / "images" / "quality.png")
    assert (tmp_path / "images" / "quality.png").read_bytes()[1:4] == b"PNG"
