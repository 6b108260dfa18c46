"""The public names of `olive.eval`, and what importing them brings in."""

from __future__ import annotations

import subprocess
import sys

import olive
from tests.house.layers import ROOT


def test_names_resolve() -> None:
    assert set(olive.eval.__all__) <= set(dir(olive.eval))
    for name in olive.eval.__all__:
        assert callable(getattr(olive.eval, name)), f"olive.eval.{name} is hidden by a module of its name"


def test_star_import_leaves_the_builtin_eval_alone() -> None:
    assert "eval" not in olive.__all__


def test_names_are_lazy_and_import_no_transformers() -> None:
    code = (
        "import sys, olive\n"
        "assert 'torch' not in sys.modules\n"
        "for name in olive.eval.__all__: getattr(olive.eval, name)\n"
        "assert 'torch' in sys.modules\n"
        "assert not {'transformers', 'rich', 'triton'} & set(sys.modules)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
