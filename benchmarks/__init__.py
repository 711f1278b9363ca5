"""Measurements of speed, memory and accuracy; run as `python -m benchmarks.NAME`."""
