"""A progress bar for work that turns out to be long."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any, Self

PATIENCE_S = 2.0  # shorter work shows no bar


class ProgressBar:
    """A rich bar on stderr, shown when the work has taken longer than two seconds; used in a `with`.

    Args:
        title: what is going on.
        total: units of work.
        show: None = only on a terminal; True = on any stderr; False = never.
    """

    def __init__(self, title: str, total: int, show: bool | None = None) -> None:
        self._title, self._total, self._done, self._note = title, total, 0, ""
        self._show = sys.stderr.isatty() if show is None else show
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        self._start = time.monotonic()
        return self

    def note(self, text: str) -> None:
        """What was done last; shown beside the title from the next step on."""
        self._note = text

    def advance(self, units: int) -> None:
        """Count units of work as done."""
        self._done += units
        if not self._show or time.monotonic() - self._start < PATIENCE_S:
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import Progress  # only now: most calls never need it

            self._bar = Progress(console=Console(stderr=True), transient=sys.stderr.isatty())
            self._task = self._bar.add_task(self._title, total=self._total)
            self._bar.start()
        title = f"{self._title}: {self._note}" if self._note else self._title
        self._bar.update(self._task, completed=self._done, description=title)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
