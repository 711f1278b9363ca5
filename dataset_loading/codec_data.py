"""Media alone, for models that learn to reconstruct them: those of any source, without the texts around them."""

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset as HubDataset
from datasets import Features, Value
from torch.utils.data import Dataset

from model import Modality

from .augmentation import AugmentationConfig, change_audio, change_image, torch_seeded_by
from .bad_rows import BadRows
from .configuration import DataConfig, SourceConfig
from .packing.media_reader import UnreadableItem, read_item
from .packing.mixture import MixtureDataset, RowDataset
from .sources.messages import media_of
from .sources.references import ArrowRow
from .sources.tables import map_in_memory
from .splits import load_split

logger = logging.getLogger(__name__)
_FEATURES = Features({"media": Value("int64"), "problem": Value("string")})


class CodecDataset(RowDataset):
    """The media of a source with random access, each item as `media.codec_input` gives it. An item that can be read no
    more is replaced by the next one.

    Args:
        rows: Rows with the columns of `load_conversations`.
        places: int64 (items, 2), the row of each item, and its number among the row's items of that modality.
        media: The modality, which loads items as the codec takes them.
        bad_rows: Counts the items that can be read no more.
        name: Name of the source.
        seed: Seed of all random changes.
        augmentation: Changes of the items, which are also cut, for training. None: they stay whole and as they are.
    """

    def __init__(
        self,
        rows: HubDataset,
        places: np.ndarray,
        media: Modality,
        bad_rows: BadRows,
        name: str,
        seed: int = 0,
        augmentation: AugmentationConfig | None = None,
    ):
        super().__init__(seed)
        self.rows, self.places, self.media = rows.with_format("arrow"), places, media
        self.bad_rows, self.name, self.augmentation = bad_rows, name, augmentation
        self._unreadable: set[int] = set()

    def __len__(self) -> int:
        return len(self.places)

    def draw(self, index: int, occurrence: int) -> torch.Tensor:
        rng = self.generator(index, occurrence) if self.augmentation is not None else None
        for shift in range(len(self)):
            number = (index + shift) % len(self)
            if number in self._unreadable:
                continue
            row_number, place = self.places[number].tolist()
            row = ArrowRow(self.rows[row_number : row_number + 1])
            try:
                item = read_item(self.media.load, _references(row["messages"], self.media.name)[place], row)
                return self.media.codec_input(item if rng is None else self._changed(item, rng), rng)
            except UnreadableItem as error:
                self._unreadable.add(number)
                self.bad_rows.add(self.name, f"row {row_number + 1}", str(error))
        raise ValueError(f"no medium of {self.name!r} can be read any more; are its files gone?")

    def _changed(self, item: Any, rng: np.random.Generator) -> Any:
        """The item changed at random; it has no text that a change could falsify."""
        with torch_seeded_by(rng):
            if self.media.name == "image":
                return change_image(item, "", self.augmentation.image, rng)
            return change_audio(item, self.media.sampling_rate, "", self.augmentation.audio, rng)


def build_codec_datasets(
    config: DataConfig, media: Modality, seed: int = 0, batch_size: int | None = None
) -> tuple[Dataset, dict[str, CodecDataset]]:
    """The media of a run's sources, to learn from, and by source to evaluate on; the same on every rank.

    Args:
        media: Modality of the codec.
        seed: Seed of the run, which decides what is generated, split off, cut and mixed.
        batch_size: Items that one optimizer step takes, over all ranks; a smaller train set is an error.

    Raises:
        ValueError: A source streams, cannot be read, has no media of the modality or too many bad rows, or there is
            too little to train on.
    """
    for source in (*config.train, *config.validation):
        label, name = source.label, media.name
        if not source.is_media:
            raise ValueError(f"source {label!r} has no media, and this model learns from type {name!r}; remove it")
        if source.streaming:
            raise ValueError(f"source {label!r} is streaming, which this model cannot read; set streaming: false")
    bad_rows = BadRows.of_building(config.max_invalid_rows)
    split = load_split(config, seed, bad_rows)
    parts = [_build(source, rows, "train", config, media, seed, bad_rows) for source, rows in split.train]
    train = parts[0] if len(parts) == 1 else MixtureDataset(parts, [source.weight for source in config.train], seed)
    if batch_size is not None and len(train) < batch_size:
        raise ValueError(
            f"the train data has {len(train)} media of type {media.name!r}, less than one batch of {batch_size}; add "
            "data, or lower the batch size"
        )
    validation = {
        source.label: _build(source, rows, "validation", config, media, seed, bad_rows)
        for source, rows in split.validation
    }
    bad_rows.report()
    return train, validation


def _build(
    source: SourceConfig,
    rows: HubDataset,
    role: str,
    config: DataConfig,
    media: Modality,
    seed: int,
    bad_rows: BadRows,
) -> CodecDataset:
    places = _places_of(source, rows, config, media, bad_rows)
    logger.info("%s: %d media of type %r for %s", source.label, len(places), media.name, role)
    augmentation = None
    if role == "train":
        # Generated media vary exactly as their tasks want it.
        is_changed = source.augment and source.kind != "generated"
        augmentation = config.augmentation if is_changed else AugmentationConfig()
    return CodecDataset(rows, places, media, BadRows(config.max_invalid_rows), source.label, seed, augmentation)


def _places_of(
    source: SourceConfig, rows: HubDataset, config: DataConfig, media: Modality, bad_rows: BadRows
) -> np.ndarray:
    """Where the media are: int64 (media, 2), row and number within it."""
    options = {"media": media, "decode": config.check_media}
    purpose, workers = f"looking into {source.label}", config.preprocessing_workers
    found = map_in_memory(rows.with_format("arrow"), _count_batch, _FEATURES, workers, purpose, **options)[:]
    for where, problem in zip(rows["where"], found["problem"].to_pylist(), strict=True):
        if problem:
            bad_rows.add(source.label, where, problem)
    places = [(row, place) for row, count in enumerate(found["media"].to_pylist()) for place in range(count)]
    if not places:
        raise ValueError(
            f"source {source.label!r} has no usable media of type {media.name!r} in {len(rows)} rows; check its columns"
        )
    return np.array(places, dtype=np.int64)


def _count_batch(batch: pa.Table, media: Modality, decode: bool) -> dict[str, list]:
    """The usable media of each row, and the reason against it."""
    counts, problems = [], []
    for number, messages in enumerate(batch["messages"].to_pylist()):
        references, problem = _references(messages, media.name), ""
        try:
            for reference in references:
                if decode and "task" not in reference:  # what a task makes is whole
                    read_item(media.load, reference, ArrowRow(batch, number))
        except UnreadableItem as error:
            problem = str(error)
        counts.append(0 if problem else len(references))
        problems.append(problem)
    return {"media": counts, "problem": problems}


def _references(messages: str, kind: str) -> Sequence[Mapping]:
    return [part for part in media_of(json.loads(messages)) if part["type"] == kind]
