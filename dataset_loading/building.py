"""The datasets of a run, built from its configuration."""

import logging
from dataclasses import dataclass
from functools import cached_property

from datasets import Dataset as HubDataset
from datasets import IterableDataset
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from model import MODALITIES

from .augmentation import AugmentationConfig, Augmenter, CFGDropout
from .bad_rows import BadRows
from .configuration import DataConfig, SourceConfig
from .packing.documents import MediaDocuments, read_documents, tokenize_rows
from .packing.media import MediaDataset
from .packing.media_reader import MediaReader
from .packing.mixture import MixtureDataset
from .packing.streaming import StreamingDataset, stream_of
from .packing.texts import PackedDataset
from .splits import Split, load_split, load_validation, mix

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
class RunDatasets:
    """The datasets of a run: items are {"input_ids", "labels", "position_ids"}, of sources with media also
    {"modality_ids", "media"}.
    """

    train: Dataset | StreamingDataset
    """Map-style, or a StreamingDataset when a train source streams."""
    validation: dict[str, PackedDataset | MediaDataset]
    """By name of the source, in the order of the documents."""
    report: list[SourceReport]
    """One entry for each source that is read before training."""


def build_datasets(
    config: DataConfig,
    processor: PreTrainedTokenizerFast | ProcessorMixin,
    seed: int = 0,
    vocab_size: int | None = None,
    batch_size: int | None = None,
) -> RunDatasets:
    """Read, check, split, tokenise, pack and mix the sources of a run; the same on every rank.

    Args:
        processor: The model's processor, or its tokenizer if no source has media.
        seed: Seed of the run, which decides what is generated, split off and mixed.
        vocab_size: Rows of the model's embedding table, against which the tokenizer's largest id is checked.
        batch_size: Rows that one optimizer step takes, over all ranks; a smaller train set is an error.

    Raises:
        ValueError: A source cannot be read or has too many bad rows, the tokenizer is larger than the vocabulary, or
            there is too little to train on.
    """
    builder = Builder(config, processor, seed, vocab_size)
    split = load_split(config, seed, builder.bad_rows)
    validation = {source.label: builder.build("validation", source, rows) for source, rows in split.validation}
    if any(isinstance(rows, IterableDataset) for _, rows in split.train):
        builder.bad_rows.report()
        return RunDatasets(builder.stream(split), validation, builder.report)
    parts = [builder.build("train", source, rows) for source, rows in split.train]
    builder.bad_rows.report()
    train = parts[0] if len(parts) == 1 else MixtureDataset(parts, [source.weight for source in config.train], seed)
    _check_size(train, builder.report, config, batch_size)
    return RunDatasets(train, validation, builder.report)


def build_validation(
    config: DataConfig,
    processor: PreTrainedTokenizerFast | ProcessorMixin,
    seed: int = 0,
    vocab_size: int | None = None,
) -> dict[str, PackedDataset | MediaDataset]:
    """The `validation` of `build_datasets` without its train set, for evaluating a trained model.

    Raises:
        ValueError: The reasons are those of `build_datasets`.
    """
    builder = Builder(config, processor, seed, vocab_size)
    validation = {
        source.label: builder.build("validation", source, rows)
        for source, rows in load_validation(config, seed, builder.bad_rows)
    }
    builder.bad_rows.report()
    return validation


class Builder:
    """Checked rows to datasets, one source after another."""

    def __init__(
        self,
        config: DataConfig,
        processor: PreTrainedTokenizerFast | ProcessorMixin,
        seed: int,
        vocab_size: int | None = None,
    ):
        self.config, self.processor, self.seed = config, processor, seed
        self.tokenizer = processor.tokenizer if isinstance(processor, ProcessorMixin) else processor
        self.bad_rows = BadRows.of_building(config.max_invalid_rows)
        self.report: list[SourceReport] = []
        largest = max(self.tokenizer.get_vocab().values())  # in the data or not: in what the model is given later
        if vocab_size is not None and largest >= vocab_size:
            raise ValueError(
                f"the tokenizer has token id {largest}, but the model's vocab_size is {vocab_size}; "
                f"use the model's own tokenizer or raise vocab_size to at least {largest + 1}"
            )

    @cached_property
    def reader(self) -> MediaReader:
        """The reader of media, made where a source needs it, so that a run of text needs no processor."""
        config = self.config
        return MediaReader(self.processor, config.cut_long_audio)

    def read(self, source: SourceConfig, rows: HubDataset, augmenter: Augmenter | None = None) -> MediaDocuments:
        _check_modalities(source, self.reader)
        return read_documents(source, rows, self.reader, self.config, self.bad_rows, augmenter)

    def augmenter(self, role: str, source: SourceConfig) -> Augmenter | None:
        """What changes the rows of a source, if anything does; generated media vary exactly as their tasks want it."""
        config = self.config
        is_exact = source.kind == "generated" and source.has_media
        if role != "train" or is_exact or not source.augment or config.augmentation == AugmentationConfig():
            return None
        sampling_rates, max_samples = (
            (self.reader.sampling_rates, self.reader.max_samples) if source.is_media else ({}, {})
        )
        return Augmenter(config.augmentation, self.tokenizer, sampling_rates, max_samples)

    def cfg_dropout(self, role: str) -> CFGDropout | None:
        """The CFG dropout of a source, if there is any."""
        config = self.config
        if role != "train" or config.cfg_dropout == 0:
            return None
        if not self.reader.written:
            raise ValueError(f"data.cfg_dropout is {config.cfg_dropout}, but the model writes text alone; set it to 0")
        return CFGDropout(config.cfg_dropout, self.reader)

    def stream(self, split: Split) -> StreamingDataset:
        """The train set of a run of which a source streams: its sources are mixed document by document, those in memory
        included, until each has been read whole once.
        """
        sources = [source for source, _ in split.train]
        augmenters = {source.label: augmenter for source in sources if (augmenter := self.augmenter("train", source))}
        reader = self.reader if any(source.is_media for source in sources) else None
        for source in sources if reader else ():
            _check_modalities(source, reader)
        streams = [stream_of(*part, self.tokenizer, split.validation_digests) for part in split.train]
        return StreamingDataset(
            mix(streams, sources, self.seed),
            self.config,
            self.tokenizer.pad_token_id,
            {source.label: source.loss_on for source in sources},
            reader,
            augmenters,
            self.seed,
            self.cfg_dropout("train") if reader else None,
        )

    def build(self, role: str, source: SourceConfig, rows: HubDataset) -> PackedDataset | MediaDataset:
        """The dataset of one source."""
        config, augmenter = self.config, self.augmenter(role, source)
        if source.is_media:
            documents = self.read(source, rows, augmenter)
            dataset = MediaDataset(
                documents,
                self.reader,
                config.block_size,
                config.packing,
                BadRows(config.max_invalid_rows),
                source.label,
                seed=self.seed,
                shuffle=role == "train",
                augmenter=augmenter,
                cfg_dropout=self.cfg_dropout(role),
            )
            num_documents, num_tokens = len(documents), int(documents.lengths.sum())
        else:
            documents = tokenize_rows(source, rows, self.tokenizer, config.preprocessing_workers)
            noise = augmenter.text if augmenter is not None and augmenter.text.is_on else None
            dataset = PackedDataset(
                documents, config.block_size, self.tokenizer.pad_token_id, config.packing, noise, self.seed
            )
            num_documents, num_tokens = len(rows), len(documents.tokens)
        skipped = self.bad_rows.counts.get(source.label, 0)
        entry = SourceReport(role, source.label, num_documents, num_tokens, len(dataset), skipped)
        logger.info("%s", entry)
        self.report.append(entry)
        return dataset


def _check_modalities(source: SourceConfig, reader: MediaReader) -> None:
    """Rows that have what the model does not read, or ask for what it does not write, would all be bad, for one
    reason.
    """
    if source.has_media and not reader.modalities:
        raise ValueError(
            f"source {source.label!r} has media, but the model reads text only; use model_type: megatransformer, or "
            "remove the source"
        )
    if not source.has_media or source.messages_column is not None:
        return
    written = {kind.removeprefix("written_") for kind in reader.written}
    for direction in source.directions:
        missing = [kind for kind in MODALITIES if kind in direction.answered and kind not in written]
        if missing:
            raise ValueError(
                f"source {source.label!r} has direction {str(direction)!r}, but the model does not write {missing[0]}; "
                f"set {missing[0]}_writer_config, or another direction"
            )


def _check_size(train: Dataset, report: list[SourceReport], config: DataConfig, batch_size: int | None) -> None:
    parts = [entry for entry in report if entry.role == "train"]
    tokens = sum(part.tokens for part in parts)
    if config.packing and tokens < config.block_size:
        documents = sum(part.documents for part in parts)
        raise ValueError(
            f"the train data has {documents} documents with {tokens} tokens, less than one row of data.block_size "
            f"{config.block_size}; add data or lower data.block_size"
        )
    if batch_size is not None and len(train) < batch_size:
        raise ValueError(
            f"the train data has {len(train)} rows of {config.block_size} tokens, less than one batch of {batch_size}; "
            "add data, or lower data.block_size or the batch size"
        )
