"""Every fenced `python` block in docs/ runs: the blocks of a page share their names, as in one session."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def _blocks(page: Path) -> list[tuple[int, str]]:
    """Line number and text of each block."""
    text = page.read_text(encoding="utf-8")
    return [(text.count("\n", 0, match.start()) + 1, match[1]) for match in BLOCK.finditer(text)]


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "__main__"}
    for line, block in _blocks(page):
        if block.lstrip().startswith(">>>"):
            example = doctest.DocTestParser().get_doctest(block, names, page.name, str(page), line)
            report: list[str] = []
            runner = doctest.DocTestRunner(verbose=False)
            runner.run(example, out=report.append, clear_globs=False)
            names.update(example.globs)
            assert runner.summarize(verbose=False).failed == 0, "".join(report)
        else:
            exec(compile("\n" * line + block, str(page), "exec"), names)


def test_the_format_page_has_examples() -> None:
    assert sum(block.count(">>>") for _, block in _blocks(DOCS / "format.md")) >= 10
