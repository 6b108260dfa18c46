"""Hypothesis keeps its files out of the working directory, and the same examples run every time."""

import tempfile

from hypothesis import settings
from hypothesis.configuration import set_hypothesis_home_dir

set_hypothesis_home_dir(tempfile.mkdtemp(prefix="hypothesis-"))
settings.register_profile("formats", database=None, deadline=None, derandomize=True, max_examples=60)
settings.load_profile("formats")
