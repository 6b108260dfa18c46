"""Giving back pages of mapped files: they leave this process, and nothing that was written is lost."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import pytest

from olive.hf import pages
from olive.hf.pages import CleanPages

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are found in /proc")
SIZE = 1 << 20


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(range(256)) * (SIZE // 256))
    return path


def private_map(path: Path) -> mmap.mmap:
    with path.open("rb") as opened:
        return mmap.mmap(opened.fileno(), SIZE, access=mmap.ACCESS_COPY)


def resident_kb(path: Path) -> int:
    """Kilobytes of the file's maps that are in this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if not words[0].endswith(":"):
            inside = len(words) == 6 and words[5] == str(path)
        elif inside and words[0] == "Rss:":
            total += int(words[1])
    return total


def test_clean_pages_leave_the_process_and_come_back(file: Path) -> None:
    clean = CleanPages([str(file)], every=SIZE)
    mapped = private_map(file)
    expected = file.read_bytes()
    assert mapped[:] == expected
    assert resident_kb(file) == SIZE // 1024
    clean.read(SIZE - 1)
    assert resident_kb(file) == SIZE // 1024
    clean.read(1)
    assert resident_kb(file) == 0
    assert mapped[:] == expected


def test_a_map_with_a_change_is_not_touched(file: Path) -> None:
    clean = CleanPages([str(file)])
    mapped = private_map(file)
    mapped[5] = 77
    clean.drop()
    assert mapped[5] == 77
    assert resident_kb(file) > 0


def test_older_maps_and_other_files_are_not_touched(file: Path, tmp_path: Path) -> None:
    older = private_map(file)
    assert older[:]
    other = tmp_path / "other"
    other.write_bytes(file.read_bytes())
    mapped = private_map(other)
    clean = CleanPages([str(file)])
    assert mapped[:]
    clean.drop()
    assert resident_kb(file) == resident_kb(other) == SIZE // 1024


def test_nothing_happens_without_proc(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_SMAPS", str(file.with_name("missing")))
    clean = CleanPages([str(file)])
    mapped = private_map(file)
    assert mapped[:]
    clean.drop()
    assert resident_kb(file) == SIZE // 1024
