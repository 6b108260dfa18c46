"""Gives pages of memory-mapped checkpoints back to the system while a checkpoint is quantized.

transformers maps every shard and keeps all maps until the last tensor is loaded. Without this a process grows
by the size of the whole full-precision checkpoint, however small the result is.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterable
from typing import NamedTuple

_MADV_DONTNEED = 4
_SMAPS = "/proc/self/smaps"


class _Map(NamedTuple):
    start: int
    length: int
    path: str
    changed_kb: int  # pages of a private map that were written to


def _maps(paths: frozenset[str]) -> list[_Map]:
    """Maps of these files in this process."""
    found: list[_Map] = []
    current: tuple[int, int, str] | None = None
    try:
        with open(_SMAPS, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                words = line.split(maxsplit=5)
                if not words[0].endswith(":"):
                    start, end = (int(word, 16) for word in words[0].split("-"))
                    path = words[5].strip() if len(words) == 6 else ""
                    current = (start, end - start, path) if path in paths else None
                elif words[0] == "Anonymous:" and current is not None:
                    found.append(_Map(*current, changed_kb=int(words[1])))
    except OSError:  # no such system file: nothing is given back
        return []
    return found


class CleanPages:
    """Drops pages of checkpoint files that this load has read; reading them again brings them back unchanged.

    Only maps made after this object, and without a single changed page, are touched: dropping a changed page
    would lose the change.

    Args:
        files: checkpoint files that are about to be mapped.
        every: bytes to read between two drops.
    """

    def __init__(self, files: Iterable[str], every: int = 64 << 20) -> None:
        self._paths = (
            frozenset(os.path.realpath(file) for file in files) if sys.platform == "linux" else frozenset()
        )
        self._every, self._read = every, 0
        self._older = {found.start for found in _maps(self._paths)} if self._paths else set()

    def read(self, size: int) -> None:
        """Say that `size` more bytes were read and are not needed any more."""
        self._read += size
        if self._read >= self._every:
            self.drop()

    def drop(self) -> None:
        """Give the pages back now; nothing where the system has no /proc."""
        self._read = 0
        if not self._paths:
            return
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        for found in _maps(self._paths):
            if found.changed_kb == 0 and found.start not in self._older:
                madvise(ctypes.c_void_p(found.start), ctypes.c_size_t(found.length), _MADV_DONTNEED)
