"""The repository names no path of the machine it was written on, and nothing but sources and small data."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.house.layers import ROOT

# Home and work folders of people and machines; /proc, /tmp and /usr are the same everywhere.
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home|root|work|workspace|Users|mnt|opt)/\w|(?<!\w)[A-Z]:\\Users\\")
LARGEST = 8_000_000  # bytes; the bundled model


def tracked_files() -> list[Path]:
    """Files that are, or could be, committed; all but what git ignores."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        capture_output=True,
        check=False,
    )
    if listed.returncode != 0:
        pytest.skip("not a git checkout: nothing says which files belong to the repository")
    names = [name for name in listed.stdout.decode().split("\0") if name]
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def test_no_machine_paths() -> None:
    found = []
    for file in tracked_files():
        try:
            text = file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # weights
        for match in MACHINE_PATH.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"{file.relative_to(ROOT)}:{line}: {text[match.start() : match.end() + 20]!r}")
    assert found == []


def test_files_are_small() -> None:
    large = [str(file.relative_to(ROOT)) for file in tracked_files() if file.stat().st_size > LARGEST]
    assert large == []
