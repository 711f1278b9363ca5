"""Data of a run: sources, checked rows, tokenizer, packing, mixture, batches. docs/data.md describes every format."""

from .building import RunDatasets, SourceReport, build_datasets, build_validation
from .collator import Collator, Seq2SeqCollator, build_collator
from .configuration import DataConfig, SourceConfig, TokenizerConfig
from .examples import build_examples
from .packing.media import MediaDataset
from .packing.mixture import MixtureDataset
from .packing.streaming import StreamingDataset
from .packing.texts import PackedDataset
from .tasks.base import GeneratedMediaTask, GeneratedTask
from .tasks.registry import MEDIA_TASKS, TASKS, get_task
from .tokenizer import build_tokenizer, load_tokenizer, train_tokenizer

__all__ = [
    "MEDIA_TASKS",
    "TASKS",
    "Collator",
    "DataConfig",
    "GeneratedMediaTask",
    "GeneratedTask",
    "MediaDataset",
    "MixtureDataset",
    "PackedDataset",
    "RunDatasets",
    "Seq2SeqCollator",
    "SourceConfig",
    "SourceReport",
    "StreamingDataset",
    "TokenizerConfig",
    "build_collator",
    "build_datasets",
    "build_examples",
    "build_tokenizer",
    "build_validation",
    "get_task",
    "load_tokenizer",
    "train_tokenizer",
]
