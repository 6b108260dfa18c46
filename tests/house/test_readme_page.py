"""The README: its Python blocks run in order, as in one session, and its links to files hold."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)\)")


def test_python_blocks_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names: dict[str, object] = {"__name__": "__main__"}
    blocks = list(BLOCK.finditer(README))
    assert len(blocks) >= 4
    for match in blocks:
        line = README.count("\n", 0, match.start()) + 1
        exec(compile("\n" * line + match[1], "README.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "92.2% of the parameters are quantized" in printed
    assert "def main():" in printed


def test_links_lead_somewhere() -> None:
    targets = LINK.findall(README)
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_commands_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in set(re.findall(r"make (\w+)", README)) - {"it"}:
        assert re.search(rf"^{command}:", makefile, re.MULTILINE), command
    for module in set(re.findall(r"python -m (bench\.\w+)", README)):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module
