"""Benchmarks: they print numbers, their spread and their ratios, and fail for no time."""
