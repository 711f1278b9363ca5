"""Measures: exact losses over whole sets, and tables of what depth buys."""

from .depth import DepthRow, ExactMatch, depth_table, markdown_table, save_depth_table
from .metrics import METRICS, compute_metrics, metrics_from_sums, token_byte_lengths, token_nll, trainer_metrics

__all__ = [
    "METRICS",
    "DepthRow",
    "ExactMatch",
    "compute_metrics",
    "depth_table",
    "markdown_table",
    "metrics_from_sums",
    "save_depth_table",
    "token_byte_lengths",
    "token_nll",
    "trainer_metrics",
]
