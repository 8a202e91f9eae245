"""Measurements, side by side in one run. `python -m benchmarks` runs the CPU set; RESULTS.md keeps dated tables."""
