"""Rows made while training from documents that arrive one after another."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from .augmentation import Augmenter
from .configuration import DataConfig, SourceConfig
from .documents import encode_batch
from .media_documents import MediaDocument, read_conversations
from .media_reader import MediaReader, UnreadableMedium
from .media_rows import Piece, join_pieces, read_piece
from .media_sources import STORED_MEDIA, conversation_of_stream
from .references import fingerprint
from .sources import columns_of
from .splits import Split, digest
from .validation import BadRows, reason_against

_FEATURES = datasets.Features(
    {
        "source": datasets.Value("string"),
        "row": datasets.Value("int64"),
        "problem": datasets.Value("string"),
        "tokens": datasets.List(datasets.Value("int32")),
        "learned": datasets.List(datasets.Value("int32")),
        "length": datasets.Value("int64"),
        "modality": datasets.Value("int64"),
        "messages": datasets.Value("large_string"),
        "media": STORED_MEDIA,
    }
)
_NOTHING = {"problem": "", "tokens": [], "learned": [], "length": 0, "modality": 0, "messages": "", "media": []}


class StreamingDataset(IterableDataset):
    """Rows like those of PackedDataset and MediaDataset, made from a stream of tokenised documents.

    Texts are cut where a row is full; conversations stay whole, and what is left of a row before one that does not fit
    is filled. Without packing rows are filled up to block_size too: accelerate may join the batches of all ranks to one
    before it deals them out.

    `state_dict` after any row, loaded into a new object, goes on with the next row.

    Args:
        stream: rows with the columns of `_FEATURES`; `learned` are places, the first and behind the last of each run.
        config: for block_size, packing and max_bad_rows: more rows that cannot be used in one pass stop the run.
        reader: reads media; None: there are none, and rows have texts alone.
        augmenters: by name of the source.
        seed: of what is random about the rows.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        config: DataConfig,
        pad_id: int,
        reader: MediaReader | None = None,
        augmenters: Mapping[str, Augmenter] | None = None,
        seed: int = 0,
    ):
        self.stream, self.reader, self.pad_id, self.seed = stream, reader, pad_id, seed
        self.block_size, self.packing, self.max_bad_rows = config.block_size, config.packing, config.max_bad_rows
        self.augmenters = augmenters or {}
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay alive see it change
        self._pending: list[MediaDocument] = []
        self._num_rows = 0
        self._start: dict[str, Any] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Let what is random about the rows be that of another epoch."""
        self.epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        self._begin_pass()
        bad_rows = BadRows(self.max_bad_rows)
        yield from self._rows(bad_rows, flush=not self.packing)
        for row in self.stream:
            if row["problem"]:
                bad_rows.add(row["source"], f"row {row['row']}", row["problem"])
            if len(row["tokens"]) == 0:
                continue
            self._pending.append(_document_of(row))
            yield from self._rows(bad_rows, flush=not self.packing)
        yield from self._rows(bad_rows, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, and the documents that wait for a full row."""
        pending = [_to_state(document) for document in self._pending]
        return {"stream": self.stream.state_dict(), "pending": pending, "num_rows": self._num_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass, and only that, go on from `state`."""
        self._start = state

    def _begin_pass(self) -> None:
        start, self._start = self._start, None
        self.stream.load_state_dict(start and start["stream"])  # None: from the first row
        self._pending = [_from_state(document) for document in start["pending"]] if start else []
        self._num_rows = start["num_rows"] if start else 0

    def _rows(self, bad_rows: BadRows, flush: bool = False) -> Iterator[dict[str, Any]]:
        while documents := self._take(flush):
            self._num_rows += 1
            row = self._join(documents, bad_rows)
            if row is not None:
                yield row

    def _take(self, flush: bool) -> list[MediaDocument]:
        """The documents of the next row, from the front of those that wait; none, if it is not full.

        Args:
            flush: take what there is.
        """
        taken: list[MediaDocument] = []
        room, waiting = self.block_size, list(self._pending)
        while waiting and room:
            document = waiting.pop(0)
            if document.row["messages"] and document.length > room:
                waiting.insert(0, document)
                break
            part, rest = _cut(document, room)
            taken.append(part)
            waiting[:0] = rest
            room -= part.length
        if room and not waiting and not flush:
            return []
        self._pending = waiting
        return taken

    def _join(self, documents: Sequence[MediaDocument], bad_rows: BadRows) -> dict[str, Any] | None:
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, int(self.epoch), worker.id if worker else 0, self._num_rows])
        pieces = []
        for document in documents:
            augmenter = self.augmenters.get(document.row["source"])
            try:
                pieces.append(self._piece(document, augmenter, rng))
            except UnreadableMedium as error:
                bad_rows.add(document.row["source"], document.row["where"], str(error))
        if not pieces:
            return None
        row = join_pieces(pieces, self.block_size, self.pad_id)
        return row if self.reader else {name: row[name] for name in ("input_ids", "labels", "position_ids")}

    def _piece(self, document: MediaDocument, augmenter: Augmenter | None, rng: np.random.Generator) -> Piece:
        if document.row["messages"]:
            return read_piece(document, self.reader, augmenter, rng)
        shown = document.tokens
        if augmenter is not None and augmenter.text.is_on:
            shown = augmenter.text(document.tokens, document.is_label, rng)
        return Piece(document.tokens, document.is_label, shown)


def _document_of(row: dict[str, Any]) -> MediaDocument:
    tokens = np.array(row["tokens"], dtype=np.int32)
    is_label = np.zeros(len(tokens), dtype=bool)
    for start, stop in zip(row["learned"][::2], row["learned"][1::2], strict=True):
        is_label[start:stop] = True
    origin = {"source": row["source"], "where": f"row {row['row']}", "messages": row["messages"], "media": row["media"]}
    return MediaDocument(tokens, is_label, row["length"], row["modality"], origin)


def _cut(document: MediaDocument, room: int) -> tuple[MediaDocument, list[MediaDocument]]:
    """What fits into a row, and the rest, which begins with the last token of that; conversations fit whole."""
    if document.length <= room:
        return document, []
    parts = [
        replace(document, tokens=document.tokens[part], is_label=document.is_label[part], length=part.stop - part.start)
        for part in (slice(0, room), slice(room - 1, document.length))
    ]
    return parts[0], parts[1:]


def _to_state(document: MediaDocument) -> dict[str, Any]:
    """What JSON can hold."""
    media = [it | {"bytes": it["bytes"] and base64.b64encode(it["bytes"]).decode()} for it in document.row["media"]]
    return {
        "tokens": document.tokens.tolist(),
        "is_label": document.is_label.tolist(),
        "length": document.length,
        "modality": document.modality,
        "row": {**document.row, "media": media},
    }


def _from_state(state: dict[str, Any]) -> MediaDocument:
    media = [it | {"bytes": it["bytes"] and base64.b64decode(it["bytes"])} for it in state["row"]["media"]]
    tokens, is_label = np.array(state["tokens"], dtype=np.int32), np.array(state["is_label"], dtype=bool)
    return MediaDocument(tokens, is_label, state["length"], state["modality"], {**state["row"], "media": media})


def build_stream(
    split: Split,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    reader: MediaReader | None = None,
    augmenters: Mapping[str, Augmenter] | None = None,
) -> StreamingDataset:
    """Mix the train sources document by document, those in memory included, until each has been read whole once.

    Args:
        reader: None: no source has media.
        augmenters: by name of the source.
    """
    augmenters = augmenters or {}
    streams = []
    for source, rows in split.train:
        if source.is_media:
            encode = partial(
                _encode_conversation,
                source=source,
                reader=reader,
                augmenter=augmenters.get(source.label),
                block_size=config.block_size,
                forbidden=split.validation_digests,
            )
        else:
            columns = columns_of(source)
            if isinstance(rows, datasets.Dataset):  # checked and renamed already
                columns = {name: name for name in columns.values()}
            encode = partial(
                _encode_text, source=source, columns=columns, tokenizer=tokenizer, forbidden=split.validation_digests
            )
        rows = rows.to_iterable_dataset().decode(False) if isinstance(rows, datasets.Dataset) else rows
        streams.append(rows.map(encode, with_indices=True).select_columns(list(_FEATURES)).cast(_FEATURES))
    stream = streams[0]
    if len(streams) > 1:
        shares = np.array([source.weight for source, _ in split.train])
        stream = datasets.interleave_datasets(
            streams, probabilities=list(shares / shares.sum()), seed=seed, stopping_strategy="all_exhausted"
        )
    return StreamingDataset(stream, config, tokenizer.pad_token_id, reader, augmenters, seed)


def _encode_text(
    row: dict,
    index: int,
    source: SourceConfig,
    columns: dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    forbidden: set[bytes],
) -> dict[str, object]:
    result = _NOTHING | {"source": source.label, "row": index + 1}
    reason = reason_against(row, tuple(columns))
    if reason is not None:
        return result | {"problem": reason}
    texts = {name: row[column] for column, name in columns.items()}
    if digest(texts) in forbidden:
        return result  # without tokens it is passed over
    encoded = encode_batch({name: [text] for name, text in texts.items()}, tokenizer, source.separator, source.loss_on)
    (tokens,), (loss_start,) = encoded["tokens"], encoded["loss_start"]
    return result | {"tokens": tokens, "learned": [loss_start, len(tokens)], "length": len(tokens)}


def _encode_conversation(
    row: dict,
    index: int,
    source: SourceConfig,
    reader: MediaReader,
    augmenter: Augmenter | None,
    block_size: int,
    forbidden: set[bytes],
) -> dict[str, object]:
    result = _NOTHING | {"source": source.label, "row": index + 1}
    try:
        messages, media = conversation_of_stream(source, row)
        if forbidden and fingerprint(messages, {"media": media}) in forbidden:
            return result
    except (OSError, ValueError) as error:
        return result | {"problem": str(error)}
    stretch, silence = (augmenter.stretch, augmenter.silence) if augmenter else (1.0, 0.0)
    ((tokens, is_label, length, modality, problem),) = read_conversations(
        [(messages, {"media": media})], reader, source.loss_on, False, block_size, stretch, silence
    )
    if problem:
        return result | {"problem": problem}
    learned = np.flatnonzero(np.diff(is_label, prepend=False, append=False))  # where runs begin and end
    found = {"tokens": tokens, "learned": learned, "length": length, "modality": modality}
    return result | found | {"messages": json.dumps(messages), "media": media}
