"""Measures: exact losses over whole sets, what is written, drawn and played against what should be, and tables of what
depth buys.
"""

from .answers import Writer, WrittenScores
from .checks import CHECKS, check_notes, check_scene
from .depth import DepthRow, ExactMatch, ModalityScores, depth_table
from .feature_networks import FeatureNetwork
from .frechet import frechet_distance, kernel_distance
from .judges import Judge, JudgeConfig, LabelledMedia, load_judge, save_judge, train_judge
from .media_report import media_markdown, save_media_table
from .media_writing import BackReader, MediaTable, MediaWriter, media_table
from .metrics import METRICS, compute_metrics, metrics_from_sums, token_byte_lengths, token_nll, trainer_metrics
from .pitch_reader import read_notes
from .report import markdown_table, save_depth_table
from .scene_reader import read_scene

__all__ = [
    "CHECKS",
    "METRICS",
    "BackReader",
    "DepthRow",
    "ExactMatch",
    "FeatureNetwork",
    "Judge",
    "JudgeConfig",
    "LabelledMedia",
    "MediaTable",
    "MediaWriter",
    "ModalityScores",
    "Writer",
    "WrittenScores",
    "check_notes",
    "check_scene",
    "compute_metrics",
    "depth_table",
    "frechet_distance",
    "kernel_distance",
    "load_judge",
    "markdown_table",
    "media_markdown",
    "media_table",
    "metrics_from_sums",
    "read_notes",
    "read_scene",
    "save_depth_table",
    "save_judge",
    "save_media_table",
    "token_byte_lengths",
    "token_nll",
    "train_judge",
    "trainer_metrics",
]
