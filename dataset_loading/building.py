"""From a config to the datasets of a run."""

import logging
from dataclasses import dataclass

from datasets import IterableDataset
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from .configuration import DataConfig, SourceConfig
from .documents import tokenize_rows
from .mixture import MixtureDataset
from .packing import IGNORED, PackedDataset
from .sources import load_rows
from .splits import load_split, load_validation
from .streaming import StreamingDataset, build_stream
from .validation import BadRows

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SourceReport:
    """What one source came to."""

    role: str
    name: str
    documents: int
    tokens: int
    rows: int
    bad_rows: int


@dataclass(frozen=True)
class TextDatasets:
    """The datasets of a run: items are {"input_ids", "labels", "position_ids"}."""

    train: Dataset | StreamingDataset
    """Map-style, or a StreamingDataset when a train source streams."""
    validation: dict[str, PackedDataset]
    """By name of the source, in the order of the documents."""
    report: list[SourceReport]
    """One entry for each source that is read before training."""


def build_datasets(
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int = 0,
    vocab_size: int | None = None,
    batch_size: int | None = None,
) -> TextDatasets:
    """Read, check, split, tokenise, pack and mix the sources of a run; the same on every rank.

    Args:
        seed: seed of the run: what is generated, split off and mixed.
        vocab_size: rows of the model's embedding table; the tokenizer's largest id is checked against it.
        batch_size: rows that one optimizer step takes, over all ranks; a smaller train set is an error.

    Raises:
        ValueError: a source cannot be read or has too many bad rows, the tokenizer is larger than the vocabulary, or
            there is too little to train on.
    """
    _check_vocabulary(tokenizer, vocab_size)
    bad_rows = BadRows(config.max_bad_rows)
    split = load_split(config, seed, bad_rows)
    report: list[SourceReport] = []
    validation = {
        source.label: _build_source("validation", source, rows, config, tokenizer, bad_rows, report)
        for source, rows in split.validation
    }
    if any(isinstance(rows, IterableDataset) for _, rows in split.train):
        return TextDatasets(build_stream(split, config, tokenizer, seed), validation, report)
    parts = [_build_source("train", source, rows, config, tokenizer, bad_rows, report) for source, rows in split.train]
    train = parts[0] if len(parts) == 1 else MixtureDataset(parts, [source.weight for source in config.train], seed)
    _check_size(train, parts, config, batch_size)
    return TextDatasets(train, validation, report)


def build_validation(
    config: DataConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0, vocab_size: int | None = None
) -> dict[str, PackedDataset]:
    """The `validation` of `build_datasets` without its train set, for evaluating a trained model.

    Raises:
        ValueError: as `build_datasets`.
    """
    _check_vocabulary(tokenizer, vocab_size)
    bad_rows = BadRows(config.max_bad_rows)
    return {
        source.label: _build_source("validation", source, rows, config, tokenizer, bad_rows, [])
        for source, rows in load_validation(config, seed, bad_rows)
    }


def build_examples(
    source: SourceConfig,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    limit: int | None = None,
    seed: int = 0,
) -> list[dict]:
    """Prompts and answers one by one, for checking answers: generated sources without a role are drawn from "test".

    Returns:
        {"input_ids", "labels"} as lists of int, labels only on the answer (with its separator) and the end token, and
        "prompt", "answer", "difficulty" (None where the source has none).

    Raises:
        ValueError: the source has no answers or cannot be read.
    """
    if not source.has_answers:
        raise ValueError(f"source {source.label!r} has no answers to check; set prompt_column and answer_column")
    if source.streaming:
        raise ValueError(f"source {source.label!r} is streaming; set streaming: false and use a slice as split")
    rows = load_rows(source, "test", config, seed, BadRows(config.max_bad_rows), limit)
    rows = rows if limit is None else rows.take(min(limit, len(rows)))
    documents = tokenize_rows(source, rows, tokenizer, config.preprocessing_workers, loss_on="answer")
    examples = []
    for row, (tokens, loss_start) in zip(rows, documents, strict=True):
        ids = tokens.tolist()
        labels = [IGNORED] * loss_start + ids[loss_start:]
        examples.append({"input_ids": ids, "labels": labels, **row, "difficulty": row.get("difficulty")})
    return examples


def _build_source(
    role: str,
    source: SourceConfig,
    rows,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    bad_rows: BadRows,
    report: list[SourceReport],
) -> PackedDataset:
    documents = tokenize_rows(source, rows, tokenizer, config.preprocessing_workers)
    packed = PackedDataset(documents, config.block_size, tokenizer.pad_token_id, config.packing)
    entry = SourceReport(
        role, source.label, len(rows), len(documents.tokens), len(packed), bad_rows.counts.get(source.label, 0)
    )
    logger.info("%s", entry)
    report.append(entry)
    return packed


def _check_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int | None) -> None:
    """Whether its ids occur in the data or not: they may in what the model is given later."""
    largest = max(tokenizer.get_vocab().values())
    if vocab_size is not None and largest >= vocab_size:
        raise ValueError(
            f"the tokenizer has token id {largest}, but the model's vocab_size is {vocab_size}; "
            f"use the model's own tokenizer or raise vocab_size to at least {largest + 1}"
        )


def _check_size(train: Dataset, parts: list[PackedDataset], config: DataConfig, batch_size: int | None) -> None:
    tokens = sum(len(part.tokens) for part in parts)
    if config.packing and tokens < config.block_size:
        documents = sum(int(part.is_start.sum()) for part in parts)
        raise ValueError(
            f"the train data has {documents} documents with {tokens} tokens, less than one row of data.block_size "
            f"{config.block_size}; add data or lower data.block_size"
        )
    if batch_size is not None and len(train) < batch_size:
        raise ValueError(
            f"the train data has {len(train)} rows of {config.block_size} tokens, less than one batch of {batch_size}; "
            "add data, or lower data.block_size or the batch size"
        )
