"""Train and validation rows of a run, which never share a document."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from zlib import crc32

import numpy as np
from datasets import Dataset, Features, IterableDataset, Value

from .configuration import DataConfig, SourceConfig
from .sources import columns_of, expand_paths, load_rows, open_stream
from .validation import BadRows, reason_against

logger = logging.getLogger(__name__)


@dataclass
class Split:
    """The rows of a run by source; of a streaming train source, the raw rows past those taken for validation."""

    train: list[tuple[SourceConfig, Dataset | IterableDataset]] = field(default_factory=list)
    validation: list[tuple[SourceConfig, Dataset]] = field(default_factory=list)
    validation_digests: set[bytes] = field(default_factory=set)


def load_split(config: DataConfig, seed: int, bad_rows: BadRows, limit: int | None = None) -> Split:
    """Load every source, split validation off where none is configured, drop train documents that validation has.

    Args:
        limit: the most rows of a generated source to draw.

    Raises:
        ValueError: no train source, one file in both lists, or any error of loading a source.
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
            split.validation_digests.update(digests(rows))
    split.train = [
        (source, _without_validation(source, rows, split.validation_digests)) for source, rows in split.train
    ]
    return split


def load_validation(config: DataConfig, seed: int, bad_rows: BadRows) -> list[tuple[SourceConfig, Dataset]]:
    """The validation rows of `load_split` alone; generated train rows are not drawn for them.

    Raises:
        ValueError: as `load_split`.
    """
    if config.validation:
        return [(source, load_rows(source, "validation", config, seed, bad_rows)) for source in config.validation]
    held_out = []
    for source in config.train:
        if source.kind == "generated":
            held_out.append((source, load_rows(_held_out(source, config), "validation", config, seed, bad_rows)))
        else:
            held_out.append((source, _load_train_source(source, config, seed, bad_rows, None)[1]))
    return held_out


def iterate_training_texts(config: DataConfig, seed: int, limit: int) -> Iterator[str]:
    """The texts a vocabulary is trained on: train documents, prompts and answers apart as they are tokenised.

    Bad rows are skipped in silence, since loading the datasets reports them.
    """
    split = load_split(config, seed, BadRows(config.max_bad_rows, silent=True), limit)
    for source, rows in split.train:
        if isinstance(rows, IterableDataset):
            rows = rows_of_stream(source, rows.take(limit), BadRows(config.max_bad_rows, silent=True))
        elif source.kind == "hub":  # after the split, so that no validation document is among them
            rows = rows.take(min(limit, len(rows)))
        for batch in rows.iter(batch_size=1000):
            if "text" in batch:
                yield from batch["text"]
            else:
                yield from batch["prompt"]
                yield from (source.separator + answer for answer in batch["answer"])


def digest(row: dict[str, str]) -> bytes:
    """A fingerprint of a document's text, the same in every process."""
    text = row["text"] if "text" in row else f"{row['prompt']}\0{row['answer']}"
    return blake2b(text.encode(), digest_size=16).digest()


def digests(rows: Dataset) -> list[bytes]:
    """The fingerprint of every row."""
    return [digest(row) for row in rows]


def rows_of_stream(source: SourceConfig, stream: IterableDataset, bad_rows: BadRows) -> Dataset:
    """The usable rows of a finite stream, read into memory."""
    columns = columns_of(source)
    kept: dict[str, list[str]] = {name: [] for name in columns.values()}
    for number, row in enumerate(stream, start=1):
        reason = reason_against(row, tuple(columns))
        if reason is not None:
            bad_rows.add(source.label, f"row {number}", reason)
            continue
        for column, name in columns.items():
            kept[name].append(row[column])
    return Dataset.from_dict(kept, features=Features(dict.fromkeys(kept, Value("large_string"))))


def _load_train_source(
    source: SourceConfig, config: DataConfig, seed: int, bad_rows: BadRows, limit: int | None
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    if source.streaming:
        stream = open_stream(source)
        if config.validation:
            return stream, None
        taken = config.streaming_validation_rows
        validation, rest = rows_of_stream(source, stream.take(taken), bad_rows), stream.skip(taken)
        if len(validation) == 0 or next(iter(rest), None) is None:
            raise ValueError(
                f"streaming source {source.label!r}: its first {taken} rows are for validation, and they "
                "or the rest have nothing usable; set data.streaming_validation_rows or give data.validation"
            )
        return rest, validation
    rows = load_rows(source, "train", config, seed, bad_rows, limit if source.kind == "generated" else None)
    if config.validation:
        return rows, None
    if source.kind == "generated":
        return rows, load_rows(_held_out(source, config), "validation", config, seed, bad_rows, limit)
    return split_rows(source.label, rows, config.validation_fraction, seed)


def _held_out(source: SourceConfig, config: DataConfig) -> SourceConfig:
    return replace(source, role="validation", num_rows=max(1, round(source.num_rows * config.validation_fraction)))


def split_rows(label: str, rows: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split rows into train and validation by document, equal documents on the same side; a single text by its tail.

    Raises:
        ValueError: a single prompt and answer, or a text too short to have a tail.
    """
    marks = digests(rows)
    distinct = list(dict.fromkeys(marks))
    if len(distinct) == 1:
        return _split_tail(label, rows, fraction)
    held_out = max(1, min(round(len(distinct) * fraction), len(distinct) - 1))
    chosen = np.random.default_rng([seed, crc32(label.encode())]).choice(len(distinct), held_out, replace=False)
    chosen_marks = {distinct[number] for number in chosen}
    train = [number for number, mark in enumerate(marks) if mark not in chosen_marks]
    validation = [number for number, mark in enumerate(marks) if mark in chosen_marks]
    logger.info("%s: %d documents to train on, %d split off for validation", label, len(train), len(validation))
    return rows.select(train), rows.select(validation)


def _split_tail(label: str, rows: Dataset, fraction: float) -> tuple[Dataset, Dataset]:
    text = rows[0].get("text", "")
    cut = int(len(text) * (1 - fraction))
    line_end = text.rfind("\n", 0, cut)
    cut = line_end + 1 if line_end > cut // 2 else cut  # at the end of a line, unless lines are very long
    if not text[:cut].strip() or not text[cut:].strip():
        raise ValueError(f"source {label!r} has 1 document, too little to split validation off; give data.validation")
    logger.info("%s: 1 document, its last %d of %d characters are validation", label, len(text) - cut, len(text))
    return tuple(Dataset.from_dict({"text": [part]}, features=rows.features) for part in (text[:cut], text[cut:]))


def _without_validation(
    source: SourceConfig, rows: Dataset | IterableDataset, forbidden: set[bytes]
) -> Dataset | IterableDataset:
    if source.kind == "generated" or isinstance(rows, IterableDataset) or not forbidden:
        return rows
    kept = [number for number, mark in enumerate(digests(rows)) if mark not in forbidden]
    if len(kept) == len(rows):
        return rows
    if not kept:
        raise ValueError(
            f"all {len(rows)} documents of train source {source.label!r} are validation documents too; separate them"
        )
    logger.warning("%s: dropped %d train documents that validation has too", source.label, len(rows) - len(kept))
    return rows.select(kept)


def _refuse_shared_files(config: DataConfig) -> None:
    held_out = {
        path.resolve() for source in config.validation if source.kind == "files" for path in expand_paths(source)
    }
    for source in config.train:
        for path in expand_paths(source) if source.kind == "files" else ():
            if path.resolve() in held_out:
                raise ValueError(
                    f"{str(path)!r} is in data.train ({source.label}) and in data.validation; leave it in one of them"
                )
