"""Benches of speed and quality; run as `python -m bench.bench_<name>` from the repository root."""
