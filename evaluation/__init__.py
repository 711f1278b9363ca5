"""Measures: exact losses over whole sets, what is written against what should be, and tables of what depth buys."""

from .answers import Writer, WrittenScores
from .depth import DepthRow, ExactMatch, ModalityScores, depth_table
from .metrics import METRICS, compute_metrics, metrics_from_sums, token_byte_lengths, token_nll, trainer_metrics
from .report import markdown_table, save_depth_table

__all__ = [
    "METRICS",
    "DepthRow",
    "ExactMatch",
    "ModalityScores",
    "Writer",
    "WrittenScores",
    "compute_metrics",
    "depth_table",
    "markdown_table",
    "metrics_from_sums",
    "save_depth_table",
    "token_byte_lengths",
    "token_nll",
    "trainer_metrics",
]
