"""Train and validation rows of a run, which never share a document."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from hashlib import blake2b

import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets, interleave_datasets

from .bad_rows import BadRows
from .configuration import DataConfig, SourceConfig
from .sources.loading import load_rows, open_stream, rows_of_stream
from .sources.tables import expand_paths

logger = logging.getLogger(__name__)
SHORTEST_TAIL = 500
"""Characters of a tail that is worth evaluating on by itself."""


@dataclass
class Split:
    """The rows of a run by source; of a streaming train source all raw rows, those taken for validation included."""

    train: list[tuple[SourceConfig, Dataset | IterableDataset]] = field(default_factory=list)
    validation: list[tuple[SourceConfig, Dataset]] = field(default_factory=list)
    validation_digests: set[bytes] = field(default_factory=set)


def mix(
    parts: Sequence[Dataset | IterableDataset], sources: Sequence[SourceConfig], seed: int
) -> Dataset | IterableDataset:
    """The rows of several sources in the proportions of their weights, until each has been read whole once."""
    if len(parts) == 1:
        return parts[0]
    weights = np.array([source.weight for source in sources])
    return interleave_datasets(list(parts), list(weights / weights.sum()), seed, stopping_strategy="all_exhausted")


def load_split(config: DataConfig, seed: int, bad_rows: BadRows, limit: int | None = None) -> Split:
    """Load every source, split validation off where none is configured, drop train documents that validation has.

    Args:
        limit: Most rows of a generated source to draw.

    Raises:
        ValueError: No train source, one file in both lists, or any error of loading a source.
    """
    if not config.train:
        raise ValueError(
            "data.train is empty, but a run needs a source; e.g. data.train: [{kind: files, paths: [my/*.txt]}]"
        )
    _refuse_shared_files(config)
    split = Split()
    for source in config.validation:
        most = limit if source.kind == "generated" else None
        split.validation.append((source, load_rows(source, "validation", config, seed, bad_rows, most)))
    for source in config.train:
        train, validation = _load_train_source(source, config, seed, bad_rows, limit)
        split.train.append((source, train))
        if validation is not None:
            split.validation.append((source, validation))
    for source, rows in split.validation:
        if source.kind != "generated":  # generated roles share nothing by construction
            split.validation_digests.update(document_digests(rows))
    split.train = [
        (source, _without_validation(source, rows, split.validation_digests)) for source, rows in split.train
    ]
    return split


def load_validation(config: DataConfig, seed: int, bad_rows: BadRows) -> list[tuple[SourceConfig, Dataset]]:
    """The validation rows of `load_split` alone; generated train rows are not drawn for them."""
    if config.validation:
        return [(source, load_rows(source, "validation", config, seed, bad_rows)) for source in config.validation]
    return [(source, load_held_out(source, config, seed, bad_rows)) for source in config.train]


def load_held_out(source: SourceConfig, config: DataConfig, seed: int, bad_rows: BadRows) -> Dataset:
    """What is split off a train source where `config` has no validation sources."""
    if source.kind == "generated":
        return load_rows(_held_out(source, config), "validation", config, seed, bad_rows)
    return _load_train_source(source, config, seed, bad_rows, None)[1]


def iterate_training_texts(config: DataConfig, seed: int, limit: int) -> Iterator[str]:
    """The texts a vocabulary is trained on: train documents, prompts and answers apart as they are tokenised.

    Bad rows are skipped in silence, since loading the datasets reports them.
    """
    split = load_split(config, seed, BadRows(config.max_invalid_rows, silent=True), limit)
    for source, rows in split.train:
        if isinstance(rows, IterableDataset):
            front = rows.skip(_rows_taken(config)).take(limit)
            rows = rows_of_stream(source, front, BadRows(config.max_invalid_rows, silent=True))
            rows = _without_validation(source, rows, split.validation_digests)
        elif source.kind == "hub":  # after the split, so that no validation document is among them
            rows = rows.take(min(limit, len(rows)))
        if source.is_media:
            for messages in rows.select_columns("messages").with_format("arrow").iter(batch_size=1000):
                for conversation in map(json.loads, messages["messages"].to_pylist()):
                    yield from (
                        part["text"] for message in conversation for part in message["content"] if "text" in part
                    )
            continue
        for batch in rows.iter(batch_size=1000):
            if "text" in batch:
                yield from batch["text"]
            else:
                yield from batch["prompt"]
                yield from (source.separator + answer for answer in batch["answer"])


def document_digest(row: dict[str, str]) -> bytes:
    """A fingerprint of a document's text and media, the same in every process."""
    if "digest" in row:
        return row["digest"]
    text = row["text"] if "text" in row else f"{row['prompt']}\0{row['answer']}"
    return blake2b(text.encode(), digest_size=16).digest()


def document_digests(rows: Dataset) -> list[bytes]:
    """The fingerprint of every row."""
    return [document_digest(row) for row in _without_media(rows)]


def _without_media(rows: Dataset) -> Dataset:
    """The rows as they are told apart: other columns of conversations may hold media, which would be decoded."""
    return rows.select_columns("digest") if "digest" in rows.column_names else rows


def _load_train_source(
    source: SourceConfig, config: DataConfig, seed: int, bad_rows: BadRows, limit: int | None
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    if source.streaming:
        stream = open_stream(source)
        return stream, None if config.validation else _front_of_stream(source, stream, config, bad_rows)
    rows = load_rows(source, "train", config, seed, bad_rows, limit if source.kind == "generated" else None)
    if config.validation:
        return rows, None
    if source.kind == "generated":
        return rows, load_rows(_held_out(source, config), "validation", config, seed, bad_rows, limit)
    return split_rows(source.label, rows, config.validation_fraction, seed)


def _rows_taken(config: DataConfig) -> int:
    """Rows at the front of a stream that are validation."""
    return 0 if config.validation else config.streaming_validation_rows


def _front_of_stream(source: SourceConfig, stream: IterableDataset, config: DataConfig, bad_rows: BadRows) -> Dataset:
    """The rows taken for validation. The stream itself stays whole, and training passes over these by their digests: a
    `skip` would be divided among the workers of a data loader, each of which would skip at the front of its own files.
    """
    taken = _rows_taken(config)
    validation = rows_of_stream(source, stream.take(taken), bad_rows)
    if len(validation) == 0 or next(iter(stream.skip(taken)), None) is None:
        raise ValueError(
            f"streaming source {source.label!r}: its first {taken} rows are for validation, and they "
            "or the rest have nothing usable; set data.streaming_validation_rows or give data.validation"
        )
    return validation


def _held_out(source: SourceConfig, config: DataConfig) -> SourceConfig:
    return replace(source, role="validation", num_rows=max(1, round(source.num_rows * config.validation_fraction)))


def split_rows(label: str, rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows into train and validation, each row by itself, so that no row changes sides when others come.

    A long document, one of which `fraction` is at least SHORTEST_TAIL characters, gives its tail. Any other, and a
    prompt with its answer, is on one side as a whole.

    Raises:
        ValueError: One of the sides is empty.
    """
    train, validation, parts = [], [], []
    for number, row in enumerate(_without_media(rows)):
        text = row.get("text", "")
        cut = _tail_start(text, fraction)
        if cut is None:
            (validation if _is_drawn(row, fraction, seed) else train).append(number)
            continue
        for side, part in ((train, text[:cut]), (validation, text[cut:])):
            side.append(len(rows) + len(parts))
            parts.append(part)
    if not train or not validation:
        raise ValueError(
            f"data.validation_fraction {fraction} of source {label!r}, which has {len(rows)} short documents, leaves "
            f"{len(train)} to train on and {len(validation)} for validation; give data.validation, more documents, or "
            "another validation_fraction"
        )
    logger.info(
        "%s: %d documents to train on, %d for validation, of which %d are the tail of one",
        *(label, len(train), len(validation), len(parts) // 2),
    )
    if parts:
        rows = concatenate_datasets([rows, Dataset.from_dict({"text": parts}, features=rows.features)])
    return rows.select(train), rows.select(validation)


def _is_drawn(row: dict[str, str], fraction: float, seed: int) -> bool:
    """Whether a document is validation: true for `fraction` of all, by the digest of its text and the seed alone."""
    key = blake2b(document_digest(row), digest_size=8, key=str(seed).encode())
    return int.from_bytes(key.digest()) < fraction * 2**64


def _tail_start(text: str, fraction: float) -> int | None:
    """Where the last `fraction` of a long document begins: with a line, unless that would double it."""
    length = int(len(text) * fraction)
    if length < SHORTEST_TAIL:
        return None
    cut = len(text) - length
    line_end = text.rfind("\n", max(0, cut - length), cut)
    cut = cut if line_end < 0 else line_end + 1
    return cut if text[:cut].strip() and text[cut:].strip() else None


def _without_validation(
    source: SourceConfig, rows: Dataset | IterableDataset, forbidden: set[bytes]
) -> Dataset | IterableDataset:
    if source.kind == "generated" or isinstance(rows, IterableDataset) or not forbidden:
        return rows
    kept = [number for number, mark in enumerate(document_digests(rows)) if mark not in forbidden]
    if len(kept) == len(rows):
        return rows
    if not kept:
        raise ValueError(
            f"all {len(rows)} documents of train source {source.label!r} are validation documents too; separate them"
        )
    logger.warning("%s: dropped %d train documents that validation has too", source.label, len(rows) - len(kept))
    return rows.select(kept)


def _refuse_shared_files(config: DataConfig) -> None:
    held_out = {path.resolve() for source in config.validation if source.paths for path in expand_paths(source)}
    for source in config.train:
        for path in expand_paths(source) if source.paths else ():
            if path.resolve() in held_out:
                raise ValueError(
                    f"{str(path)!r} is in data.train ({source.label}) and in data.validation; leave it in one of them"
                )
