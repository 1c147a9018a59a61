"""Benchmarks: `python -m tests.benchmarks.NAME [--json]`. Ratios within one run, never tests."""
