"""The HTML page: well formed, complete, self-contained, escaped, and written whole or not at all."""

from __future__ import annotations

import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import olive
from olive.reports import Report
from olive.walk import Skipped
from tests import models
from tests.reports.fabricated import layer, report

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Checks nesting; keeps tags, attributes, and the text of table cells."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "td" in self.open:
            self.cells[-1] += data.strip()

    def bars(self) -> list[float]:
        return [float(a["width"] or "") for tag, a in self.tags if tag == "rect" and a["class"] == "bar"]


def page_of(report: Report, folder: Path) -> Page:
    return Page(report.html(folder / "page.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["mixtral", "gpt2"])
def test_page_of_a_model(name: str, tmp_path: Path) -> None:
    figures = olive.report(olive.quantize(models.build(name)))
    page = page_of(figures, tmp_path)
    for one in figures.layers:
        assert one.name in page.cells
        assert " x ".join(map(str, one.shape)) in page.cells
    for left in figures.skipped:
        assert left.name in page.cells
        assert left.reason in page.cells
    assert len(page.bars()) == 2 * len(figures.layers)


def test_bars_are_in_proportion(tmp_path: Path) -> None:
    figures = report(
        layer("a", sqnr_db=10.0, outlier_share=0.04),
        layer("b", sqnr_db=20.0, outlier_share=0.01),
        layer("c", sqnr_db=None, outlier_share=0.0),
        layer("d", sqnr_db=math.inf, outlier_share=0.02),
        layer("e", sqnr_db=-3.0, outlier_share=0.02),
    )
    assert page_of(figures, tmp_path).bars() == [60, 120, 120, 30, 0, 120, 60, 0, 60]


def test_no_outliers_and_no_ratios(tmp_path: Path) -> None:
    page = page_of(report(layer("a", sqnr_db=None, outlier_share=0.0)), tmp_path)
    assert page.bars() == [0]


def test_names_are_escaped(tmp_path: Path) -> None:
    name = '<script>alert("x")</script>&amp;'
    page = page_of(report(layer(name), skipped=(Skipped(name, 1, "<b>why"),)), tmp_path)
    assert [tag for tag, _ in page.tags].count("script") == 0
    assert page.cells.count(name) == 2
    assert "<b>why" in page.cells


def test_page_is_self_contained(tmp_path: Path) -> None:
    path = report(layer("a")).html(tmp_path / "page.html")
    text = path.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|@import|url\(|src=|href=|<script|<link", text)
    assert "prefers-color-scheme: dark" in text


def test_existing_page_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")
    assert report(layer("a")).html(str(path)) == path
    assert path.read_text().startswith("<!DOCTYPE html>")
    assert list(tmp_path.iterdir()) == [path]


def test_failed_write_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "page.html"
    path.write_text("old")

    def full(self: Path, text: str, **options: object) -> int:
        with self.open("w") as file:
            file.write(text[:100])
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        report(layer("a")).html(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        report(layer("a")).html(tmp_path / "missing" / "page.html")
    assert list(tmp_path.iterdir()) == []


def test_missing_jinja2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(RuntimeError, match=r"jinja2: expected .*`pip install olive-quant\[report\]`"):
        report(layer("a")).html(tmp_path / "page.html")
    assert list(tmp_path.iterdir()) == []
