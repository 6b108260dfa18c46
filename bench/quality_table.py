"""Tables of `bench/results/quality.csv`: nothing is measured here.

Rows with something in the column `calibration` are those of `bench.bench_calibrated`, the others those of
`bench.bench_quality`. Where a figure was measured more than once, the last one counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from bench.tables import Row, markdown

Column = tuple[str, str, str, int]  # metric, data, title, digits
DEFAULT = "OVP adaptive"
OWN, OURS = "own definition", ("olive", "own definition")
FLOAT = "float32"
BUNDLED, OUTLIERS, MINILM = "tiny_llama", "tiny_llama, outliers x 50", "MiniLM-L6"
T6, T4 = "Student-t(6), real inputs", "Student-t(4), real inputs"

README_COLUMNS: tuple[Column, ...] = (
    ("perplexity increase", BUNDLED, "perplexity increase", 3),
    ("KL divergence", BUNDLED, "KL divergence, nats", 4),
    ("embedding distance", MINILM, "embedding distance, MiniLM", 4),
)
OUTPUT_COLUMNS: tuple[Column, ...] = (
    ("perplexity increase", BUNDLED, "perplexity increase", 3),
    ("KL divergence", BUNDLED, "KL divergence", 4),
    ("perplexity increase", OUTLIERS, "perplexity increase, outliers", 3),
    ("KL divergence", OUTLIERS, "KL divergence, outliers", 4),
    ("embedding distance", MINILM, "embedding distance, MiniLM", 4),
    ("output error", T6, "output error, Student-t(6)", 4),
    ("output error", T4, "output error, Student-t(4)", 4),
)
WEIGHT_COLUMNS: tuple[Column, ...] = (
    ("weight error", BUNDLED, "bundled model", 4),
    ("weight error", OUTLIERS, "with outliers", 4),
    ("weight error", MINILM, "MiniLM", 4),
    ("weight error", T6, "Student-t(6)", 4),
    ("weight error", T4, "Student-t(4)", 4),
)
DATA_FREE_COLUMNS: tuple[Column, ...] = (
    ("weight error", "MiniLM-L6", "weight error, MiniLM", 4),
    ("embedding distance", "MiniLM-L6", "embedding distance, MiniLM", 4),
    ("weight error", "tiny_llama", "weight error, bundled model", 4),
    ("perplexity", "tiny_llama", "perplexity, bundled model", 3),
)
# The README has NF4 as it is used most, with double quantization in blocks of 64, and leaves out the others;
# "auto", which is the best of the other codebooks, and rotated models.
README_LEAVES_OUT = (
    ("NF4, absmax", "64"),
    ("NF4, absmax", "128"),
    ("NF4, double quantization", "128"),
    ("OVP auto", "128"),
    ("OVP adaptive, rotated", "128"),
    ("OVP learned, rotated", "128"),
)
SECTIONS = (  # values of the column `calibration`, their title
    (("none",), "no data"),
    (("importance, own text",), "importance, own text"),
    (("GPTQ, own text",), "GPTQ, own text"),
    (("importance",), "importance"),
    (("GPTQ", "GPTQ, activation order", "GPTQ, searched grids"), "GPTQ"),
)


@dataclass
class Line:
    """One method: a format, what data do to it, and who implements it."""

    format: str
    calibration: str
    group_size: str
    implementation: str
    cells: dict[tuple[str, str], Row] = field(default_factory=dict)  # by metric and data

    @property
    def bits(self) -> str:
        """Of the first subject measured."""
        return f"{float(next(iter(self.cells.values()))['bits_per_weight']):.3f}"

    @property
    def title(self) -> str:
        """Format, group size unless it is 128, and a package."""
        size = {"128": "", "-1": ", per channel"}.get(self.group_size, f", group {self.group_size}")
        who = "" if self.implementation in OURS else f" ({self.implementation})"
        return f"`{self.format}`{size}" if self.format.startswith("OVP") else f"{self.format}{size}{who}"

    def value(self, column: Column) -> float | None:
        """A figure."""
        row = self.cells.get(column[:2])
        return None if row is None else float(row["value"])


def calibrated(rows: Iterable[Row]) -> list[Row]:
    """Rows of `bench.bench_calibrated`."""
    return [row for row in rows if row.get("calibration")]


def lines_of(rows: Iterable[Row]) -> list[Line]:
    """Methods in the order in which they were measured, float32 left out.

    Our own definition of a format is left out where a package gives the very same figures.
    """
    found: dict[tuple[str, ...], Line] = {}
    for row in calibrated(rows):
        if row["format"] != FLOAT:
            key = (row["format"], row["calibration"], row["group_size"], row["implementation"])
            found.setdefault(key, Line(*key)).cells[row["metric"], row["data"]] = row
    packages = [line for line in found.values() if line.implementation not in OURS]
    return [
        line
        for line in found.values()
        if line.implementation != OWN or not any(_same(line, package) for package in packages)
    ]


def _same(own: Line, package: Line) -> bool:
    keys = [(line.format, line.calibration, line.group_size) for line in (own, package)]
    return keys[0] == keys[1] and all(
        key in package.cells and package.cells[key]["value"] == row["value"] for key, row in own.cells.items()
    )


def _sections(lines: list[Line], columns: tuple[Column, ...]) -> list[list[Line]]:
    """By what data do; in each the methods with the least second figure first, those without it last."""

    def rank(line: Line) -> tuple[bool, float]:
        value = line.value(columns[1])
        return value is None, 0.0 if value is None else value

    shown = [line for line in lines if any(line.value(column) is not None for column in columns)]
    return [sorted((one for one in shown if one.calibration in names), key=rank) for names, _ in SECTIONS]


def method_table(
    rows: list[Row], columns: tuple[Column, ...], leave_out: Callable[[Line], bool] = lambda _: False
) -> tuple[str, list[Row]]:
    """One line per method; of what uses the same data the least figure of each column is in bold.

    Returns:
        The table and the rows that it shows.
    """
    table, used = [], []
    for section in _sections([line for line in lines_of(rows) if not leave_out(line)], columns):
        values = {column: [line.value(column) for line in section] for column in columns}
        for line in section:
            cells = [line.title, "" if line.calibration == "none" else line.calibration, line.bits]
            for column in columns:
                value = line.value(column)
                text = "" if value is None else _text(value, column)
                least = min((other for other in values[column] if other is not None), default=None)
                cells.append(f"**{text}**" if value is not None and value == least else text)
                used += [line.cells[column[:2]]] if value is not None else []
            table.append(cells)
    return markdown(["format", "data", "bits", *(column[2] for column in columns)], table), used


def readme_table(rows: list[Row]) -> tuple[str, list[Row]]:
    """The short table."""
    return method_table(
        rows, README_COLUMNS, lambda line: (line.format, line.group_size) in README_LEAVES_OUT
    )


def losses_table(rows: list[Row]) -> str:
    """Where other formats are better than OVP: than its best row, and than its default codebook."""
    table = []
    for (names, used), section in zip(SECTIONS, _sections(lines_of(rows), OUTPUT_COLUMNS), strict=True):
        for column in OUTPUT_COLUMNS:
            found = [(value, line) for line in section if (value := line.value(column)) is not None]
            ours = [one for one in found if one[1].format.startswith("OVP")]
            others = sorted((one for one in found if one not in ours), key=lambda one: one[0])
            default = [one for one in ours if (one[1].format, one[1].calibration) == (DEFAULT, names[0])]
            if not default or not others:
                continue
            cells = [column[2], used]
            for bound, line in (min(ours, key=lambda one: one[0]), default[0]):
                better = "; ".join(
                    f"{_title(one)} at {one.bits} bits, {_text(value, column)}"
                    for value, one in others
                    if value < bound
                )
                cells += [f"{_title(line)}, {_text(bound, column)}", better or "none"]
            table.append("| " + " | ".join(cells) + " |")
    header = ["measure", "data", "best of OVP", "better than it", "the default", "better than it"]
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *table])


def _title(line: Line) -> str:
    how = line.calibration.partition("GPTQ, ")[2]
    return f"{line.title}, {how}" if how else line.title


def _text(value: float, column: Column) -> str:
    return f"{value:.{column[3]}f}"


def data_free_table(rows: list[Row], group_size: str = "128") -> tuple[str, list[Row]]:
    """Formats without data at one group size: one line each, the least figure of a column in bold."""
    rows = [row for row in rows if row["group_size"] == group_size and not row.get("calibration")]
    cells = {(row["format"], row["metric"], row["data"]): row for row in rows}
    formats = list(dict.fromkeys(row["format"] for row in rows))
    formats.sort(key=lambda name: name != FLOAT)
    columns = [column for column in DATA_FREE_COLUMNS if any(key[1:] == column[:2] for key in cells)]
    least = {
        column: min(
            (float(row["value"]) for key, row in cells.items() if key[1:] == column[:2] and key[0] != FLOAT),
            default=None,
        )
        for column in columns
    }
    lines, used = [], []
    for name in formats:
        found = {column: cells.get((name, *column[:2])) for column in columns}
        if not any(found.values()):
            continue
        line = [f"`{name}`" if name.startswith("OVP") else name]
        line.append(next(f"{float(row['bits_per_weight']):.3f}" for row in found.values() if row))
        for column, row in found.items():
            if row is None:
                line.append("")
                continue
            used.append(row)
            text = f"{float(row['value']):.{column[3]}f}"
            line.append(f"**{text}**" if name != FLOAT and float(row["value"]) == least[column] else text)
        lines.append(line)
    return markdown(["format", "bits", *(column[2] for column in columns)], lines), used
