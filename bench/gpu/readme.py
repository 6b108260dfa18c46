"""The README's tables of figures that were measured on a GPU; `bench.readme` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from bench.tables import Row, markdown, read_rows

GPU_ROWS = (1, 4, 16, 64, 256, 1024, 4096)  # M, of those that are measured
GPU_BACKENDS = (  # backend, title
    ("olive", "OliVe"),
    ("torch_int4", "torch int4"),
    ("gemlite", "GemLite"),
)


def gpu_measured(rows: Iterable[Row]) -> str:
    """Where the figures of a GPU come from, and how to get them again."""
    places = dict.fromkeys(
        f"{row['machine']}, driver {row['driver']}, torch {row['torch']}, "
        f"commit {row['commit']}, {row['date']}"
        for row in rows
    )
    return f"Reproduce with `make gpu`. Measured on {'; '.join(places)}."


def _newest(rows: Iterable[Row], *columns: str) -> dict[tuple[str, ...], Row]:
    """The last row with a time for each value of the columns."""
    return {tuple(row[name] for name in columns): row for row in rows if row["median_ms"]}


def gpu_linear_table(rows: list[Row]) -> str:
    """One line per shape and backend: bandwidth at one row, and speed-ups over cuBLAS by M."""
    newest = _newest((row for row in rows if row["op"] == "ovp_linear"), "n", "k", "backend", "m")
    lines, used = [], []
    for n, k in sorted({(int(key[0]), int(key[1])) for key in newest}):
        for backend, title in GPU_BACKENDS:
            found = [newest.get((str(n), str(k), backend, str(m))) for m in GPU_ROWS]
            if not any(found):
                continue
            used += [row for row in found if row]
            share = f"{float(found[0]['of_copy']):.0%}" if found[0] else ""
            speedups = [f"{float(row['speedup']):.2f}" if row else "" for row in found]
            lines.append([f"{n} x {k}, {title}", share, *speedups])
    header = ["N x K", "of copy bandwidth, M = 1", *(f"M = {m}" for m in GPU_ROWS)]
    return f"{markdown(header, lines)}\n\n{gpu_measured(used)}"


def gpu_generate_table(rows: list[Row]) -> str:
    """One line per model and batch, and one for a long prompt."""
    ops = {"generate": "batch {}", "prefill": "prompt of {} tokens"}
    newest = _newest((row for row in rows if row["op"] in ops), "op", "m", "backend")
    order = sorted(newest, key=lambda key: (key[0], int(key[1]), key[2] == "olive"))
    titles = {"torch_bf16": "bfloat16", "olive": "OliVe", "olive_w4a8": "OliVe, W4A8"}
    lines = []
    for op, m, backend in order:
        row = newest[op, m, backend]
        figures = [
            f"{float(row['tokens_s']):.0f}",
            f"{float(row['speedup']):.2f}",
            f"{float(row['peak_gib']):.1f}",
        ]
        lines.append([f"{ops[op].format(m)}, {titles[backend]}", *figures])
    header = ["Llama 3 8B's shape", "tokens per second", "speed-up", "peak memory, GiB"]
    return f"{markdown(header, lines)}\n\n{gpu_measured(newest[key] for key in order)}"


def gpu_quantize_table(rows: list[Row]) -> str:
    """Encoding, decoding and the search: against a copy, and how long 7 B weights take."""
    titles = {
        "ovp_encode": "encode, scales given",
        "ovp_decode": "decode",
        "ovp_quantize": "quantize, default search",
    }
    newest = _newest((row for row in rows if row["op"] in titles), "op")
    used = {op: newest[op,] for op in titles if (op,) in newest}
    lines = [
        [
            titles[op],
            f"{float(row['of_copy']):.0%}",
            f"{float(row['mweights_s']):.0f}",
            f"{7e3 / float(row['mweights_s']):.2f}",
        ]
        for op, row in used.items()
    ]
    header = ["operator", "of copy bandwidth", "million weights per second", "7 B weights, seconds"]
    return f"{markdown(header, lines)}\n\n{gpu_measured(used.values())}"


GPU_SECTIONS: dict[str, tuple[tuple[str, ...], Callable[[list[Row]], str]]] = {
    "gpu_linear": (("ovp_linear",), gpu_linear_table),
    "gpu_generate": (("generate", "prefill"), gpu_generate_table),
    "gpu_quantize": (("ovp_encode", "ovp_decode", "ovp_quantize"), gpu_quantize_table),
}


def gpu_tables(results: Path, ops: tuple[str, ...], table: Callable[[list[Row]], str]) -> str:
    """A table for every CSV of a GPU that has figures of these operators; those files name the driver."""
    files = [read_rows(path) for path in sorted(results.glob("*.csv"))]
    found = [
        rows
        for rows in files
        if rows and "driver" in rows[0] and any(row.get("op") in ops and row["median_ms"] for row in rows)
    ]
    if not found:
        return "Not measured yet: `make gpu` on a machine with a GPU writes the figures."
    return "\n\n".join(table(rows) for rows in found)
