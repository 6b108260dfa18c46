"""Builds the compiled modules with CMake; the rest is in pyproject.toml. Needs no Torch."""

from scikit_build_core.setuptools.wrapper import setup

setup(cmake_source_dir=".")
