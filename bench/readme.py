"""Writes the result tables of the README from the CSV files of the benches: no figure is typed in by hand.

    python -m bench.readme            # write
    python -m bench.readme --check    # exit status 1 if the README is not what the CSV files say

A table stands between `<!-- results:NAME -->` and `<!-- /results -->`. Where a figure was measured more than
once, the last one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from bench.common import RESULTS, ROOT
from bench.gpu.readme import GPU_SECTIONS, gpu_tables
from bench.qat_tables import digits_table, language_table, step_table, uniform_table
from bench.quality_table import readme_table
from bench.tables import Row, markdown, read_rows

GROUP_SIZE = "128"
PEERS = (  # backend, title
    ("torch_float32", "torch float32"),
    ("torch_int4", "torch int4"),
    ("torchao_w4a8", "torchao W4A8"),
    ("ggml_q4_0", "ggml Q4_0"),
    ("ggml_q4_k", "ggml Q4_K"),
)
OURS_QUANTIZED = (
    ("olive_w4a8", "W4A8"),
    ("olive_w4a8_groups", "W4A8, groups"),
    ("olive_w4a4", "W4A4"),
)
ISAS = ("portable", "avx2", "avx512", "avx512_vnni", "amx")  # slowest first


def measured(rows: Iterable[Row], command: str) -> str:
    """Where the figures come from, and how to get them again."""
    places = dict.fromkeys(
        f"{row['machine']}, {row['threads']} thread{'s' * (row['threads'] != '1')}, torch {row['torch']}, "
        f"commit {row['commit']}, {row['date']}"
        for row in rows
    )
    return f"Reproduce with `{command}`. Measured on {'; '.join(places)}."


def quality_table(rows: list[Row]) -> str:
    """What formats cost a language model and an encoder, with and without data."""
    table, used = readme_table(rows)
    if not used:
        return "No figures yet: `make quality` writes them."
    return f"{table}\n\n{measured(used, 'make quality')}"


Cells = dict[tuple[int, int, int, str], Row]  # by M, N, K and backend


def linear_cells(rows: list[Row], backend: str) -> Cells:
    """Rows of the newest runs on the best instruction set that `backend` was measured on.

    Speed-ups are within a run, and a table of one processor is one that a reader can use.
    """
    rows = [row for row in rows if row["group_size"] == GROUP_SIZE and row["dtype"] == "bfloat16"]

    def run(row: Row) -> tuple[str, ...]:
        return row["machine"], row["threads"], row["commit"], row["date"]

    isas = {
        run(row): row["backend"].partition(" ")[2] for row in rows if row["backend"].split()[0] == backend
    }
    best = max(isas.values(), key=ISAS.index, default="")
    return {
        (int(row["m"]), int(row["n"]), int(row["k"]), row["backend"].split()[0]): row
        for row in rows
        if isas.get(run(row)) == best
    }


def kernels_used(used: list[Row]) -> str:
    """Where the figures come from and which of our kernels ran."""
    isas = dict.fromkeys(row["backend"].partition(" ")[2] for row in used)
    where = measured(used, "python -m bench.bench_ovp_linear")
    return f"{where} OliVe ran on its {' and '.join(isas)} kernels."


def quantized_table(rows: list[Row]) -> str:
    """W4A8 and W4A4: one line per shape and M, speed-ups over torch's bfloat16 linear."""
    cells = linear_cells(rows, "olive_w4a8")
    shown = [("olive", "W4A16"), *OURS_QUANTIZED, *PEERS[1:]]
    shown = [(key, title) for key, title in shown if any(cell[3] == key for cell in cells)]
    lines = []
    used = []
    for m, n, k in sorted({key[:3] for key in cells if key[3] == "olive_w4a8"}):
        ours = cells[m, n, k, "olive_w4a8"]
        used.append(ours)
        memory = cells.get((m, n, k, "memory_read"))
        share = "" if memory is None else f"{float(memory['median_ms']) / float(ours['median_ms']):.0%}"
        line = [f"{n} x {k}", str(m), f"{float(ours['median_ms']):.3f}", share]
        speedups = {key: float(cells[m, n, k, key]["speedup"]) for key, _ in shown if (m, n, k, key) in cells}
        best = max([1.0, *speedups.values()])  # 1.0 is torch's bfloat16
        for key, _ in shown:
            text = f"{speedups[key]:.2f}" if key in speedups else ""
            line.append(f"**{text}**" if speedups.get(key) == best else text)
        lines.append(line)
    if not lines:
        return "No figures yet: `python -m bench.bench_ovp_linear` writes them."
    header = ["N x K", "M", "W4A8, ms", "of memory speed", *(title for _, title in shown)]
    return f"{markdown(header, lines)}\n\n{kernels_used(used)}"


def linear_table(rows: list[Row]) -> str:
    """One line per shape and M: our time and bandwidth, and speed-ups over torch's bfloat16 linear."""
    cells = linear_cells(rows, "olive")
    peers = [(key, title) for key, title in PEERS if any(cell[3] == key for cell in cells)]
    lines = []
    used = []
    for m, n, k in sorted({key[:3] for key in cells if key[3] == "olive"}):
        ours = cells[m, n, k, "olive"]
        used.append(ours)
        line = [f"{n} x {k}", str(m), f"{float(ours['median_ms']):.3f}", f"{float(ours['weight_gb_s']):.1f}"]
        speedups = [cells[m, n, k, key]["speedup"] if (m, n, k, key) in cells else "" for key, _ in peers]
        best = max([1.0, *(float(speedup) for speedup in speedups if speedup)])  # 1.0 is torch's bfloat16
        text = f"{float(ours['speedup']):.2f}"
        line.append(f"**{text}**" if float(ours["speedup"]) > best else text)
        line += [f"{float(speedup):.2f}" if speedup else "" for speedup in speedups]
        lines.append(line)
    header = ["N x K", "M", "OliVe, ms", "GB/s of codes", "OliVe", *(title for _, title in peers)]
    return f"{markdown(header, lines)}\n\n{kernels_used(used)}"


def generate_table(rows: list[Row]) -> str:
    """Tokens per second of whole models, the newest run of each."""
    newest = {(row["parameters"], row["backend"]): row for row in rows}
    used = list(newest.values())
    lines = [
        [
            f"{int(row['parameters']) / 1e9:.1f} B parameters, {row['backend']}",
            f"{float(row['tokens_s']):.1f}",
            f"{float(row['speedup']):.2f}",
        ]
        for row in used
    ]
    where = measured(used, "python -m bench.bench_generate")
    return f"{markdown(['model', 'tokens per second', 'speed-up'], lines)}\n\n{where}"


def qat_section(table: Callable[[Sequence[Row]], str], command: str) -> Callable[[list[Row]], str]:
    """A table of quantization-aware training, and where it comes from."""
    return lambda rows: f"{table(rows)}\n\n{measured(rows, command)}"


SECTIONS: dict[str, tuple[str, Callable[[list[Row]], str]]] = {
    "quality": ("quality.csv", quality_table),
    "ovp_linear": ("ovp_linear.csv", linear_table),
    "ovp_linear_quantized": ("ovp_linear.csv", quantized_table),
    "generate": ("generate.csv", generate_table),
    "qat_digits": ("qat_digits.csv", qat_section(digits_table, "python -m bench.bench_qat_digits")),
    "qat_language": ("qat_language.csv", qat_section(language_table, "python -m bench.bench_qat_language")),
    "uniform_linear": (
        "uniform_linear.csv",
        qat_section(uniform_table, "python -m bench.bench_uniform_linear"),
    ),
    "qat_step": ("qat_step.csv", qat_section(step_table, "python -m bench.bench_qat_step")),
}


def fill(text: str, name: str, content: str) -> str:
    """Put `content` between the markers of `name`.

    Raises:
        ValueError: the text does not hold the two markers once, in their order.
    """
    start, end = f"<!-- results:{name} -->", "<!-- /results -->"
    head, found, rest = text.partition(start)
    _, closed, tail = rest.partition(end)
    if not found or not closed or start in tail or "<!-- results:" in rest[: rest.find(end)]:
        raise ValueError(f"README: expected {start} followed by {end} once, got another text")
    return f"{head}{start}\n{content}\n{end}{tail}"


def render(text: str, results: Path) -> str:
    """The README with the tables that the CSV files in `results` give."""
    for name, (file, table) in SECTIONS.items():
        rows = read_rows(results / file)
        text = fill(text, name, table(rows) if rows else f"No figures yet: bench/results/{file} is missing.")
    for name, (ops, table) in GPU_SECTIONS.items():
        text = fill(text, name, gpu_tables(results, ops, table))
    return text


def write_page(page: Path, after: str, source: Path, command: str, *, check: bool) -> None:
    """Write a page where it changed; with `check` write nothing, and exit with status 1 instead."""
    if after == page.read_text(encoding="utf-8"):
        return
    if check:
        typer.echo(f"{page}: expected the figures of {source}, got others; run `{command}`", err=True)
        raise typer.Exit(1)
    page.write_text(after, encoding="utf-8")


def main(
    check: Annotated[bool, typer.Option(help="Write nothing; exit status 1 if it is outdated.")] = False,
    readme: Annotated[Path, typer.Option(help="File to fill.")] = ROOT / "README.md",
    results: Annotated[Path, typer.Option(help="Folder of the CSV files.")] = RESULTS,
) -> None:
    """Fill the tables of the README."""
    after = render(readme.read_text(encoding="utf-8"), results)
    write_page(readme, after, results, "python -m bench.readme", check=check)


if __name__ == "__main__":
    typer.run(main)
