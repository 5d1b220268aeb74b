"""Benchmarks: what was measured, and the code that measured it. ``python -m benchmarks`` lists the commands."""
