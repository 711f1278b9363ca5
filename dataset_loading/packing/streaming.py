"""Rows made while training from documents that arrive one after another."""

import base64
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info
from transformers import PreTrainedTokenizerFast

from ..augmentation import Augmenter, CFGDropout
from ..bad_rows import BadRows, reason_against
from ..configuration import DataConfig, SourceConfig
from ..sources.conversations import STORED_MEDIA, conversation_of_stream
from ..sources.loading import columns_of, reason_against_text
from ..sources.references import fingerprint
from ..splits import document_digest
from .documents import MediaDocument, encode_batch, read_conversations
from .media import join_pieces, read_pieces
from .media_reader import MediaReader, UnreadableItem

_FEATURES = datasets.Features(
    {
        "source": datasets.Value("string"),
        "row": datasets.Value("int64"),
        "problem": datasets.Value("string"),
        "tokens": datasets.List(datasets.Value("int32")),
        "loss_start": datasets.Value("int64"),
        "messages": datasets.Value("large_string"),
        "media": STORED_MEDIA,
    }
)
_NOTHING = {"problem": "", "tokens": [], "loss_start": 0, "messages": "", "media": []}
_ARRIVE_AT_ONCE = 8  # rows that are read one after another, which is faster than each between other work


class StreamingDataset(IterableDataset):
    """Rows like those of PackedDataset and MediaDataset, made from a stream of texts and conversations.

    Texts are cut where a row is full; conversations stay whole, and what is left of a row before one that does not fit
    is filled. Without packing rows are filled up to block_size too: accelerate may join the batches of all ranks to one
    before it deals them out.

    `state_dict` after any row, loaded into a new object, goes on with the next row.

    Args:
        stream: Rows with the columns of `_FEATURES`: a problem, the tokens of a text, of which those from `loss_start`
            on are learned, a conversation, or nothing, which is passed over.
        config: Gives block_size, packing and max_invalid_rows; more bad rows in one pass stop the run.
        loss_on: What is learned, by name of the source.
        reader: Reads media; None: there are none, and rows have texts alone.
        augmenters: Augmenters by name of the source.
        seed: Seed of what is random about the rows.
        cfg_dropout: Hides prompts of generated targets.
    """

    def __init__(
        self,
        stream: datasets.IterableDataset,
        config: DataConfig,
        pad_id: int,
        loss_on: Mapping[str, str],
        reader: MediaReader | None = None,
        augmenters: Mapping[str, Augmenter] | None = None,
        seed: int = 0,
        cfg_dropout: CFGDropout | None = None,
    ):
        self.stream, self.reader, self.pad_id, self.seed = stream, reader, pad_id, seed
        self.block_size, self.packing = config.block_size, config.packing
        self.max_invalid_rows = config.max_invalid_rows
        self.loss_on, self.augmenters, self.cfg_dropout = loss_on, augmenters or {}, cfg_dropout
        self.epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # workers that stay alive see it change
        self._pending: list[MediaDocument] = []
        self._num_rows = 0
        self._start: dict[str, Any] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Let the random changes be those of another epoch."""
        self.epoch.fill_(epoch)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        is_whole, is_empty, bad_rows = self._start is None, True, BadRows(self.max_invalid_rows)
        for row in self._pass(bad_rows):
            is_empty = False
            yield row
        bad_rows.report()
        worker = get_worker_info()
        if is_whole and is_empty and (worker is None or worker.num_workers == 1):  # one of several may have no share
            found = sum(bad_rows.counts.values())
            raise ValueError(f"the train sources give no row to learn from ({found} bad ones); check what they name")

    def _pass(self, bad_rows: BadRows) -> Iterator[dict[str, Any]]:
        start, self._start = self._start, None
        self.stream.load_state_dict(start and start["stream"])  # None: from the first row
        self._pending = [_from_state(document) for document in start["pending"]] if start else []
        self._num_rows = start["num_rows"] if start else 0
        stream = iter(self.stream)
        yield from self._rows(bad_rows, flush=not self.packing)
        while arrived := list(islice(stream, _ARRIVE_AT_ONCE)):
            for source, rows in groupby(arrived, itemgetter("source")):
                self._accept(source, list(rows), bad_rows)
            yield from self._rows(bad_rows, flush=not self.packing)
        yield from self._rows(bad_rows, flush=True)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands, and the documents that wait for a full row."""
        pending = [_to_state(document) for document in self._pending]
        return {"stream": self.stream.state_dict(), "pending": pending, "num_rows": self._num_rows}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass, and only that, go on from `state`."""
        self._start = state

    def _accept(self, source: str, rows: Sequence[dict[str, Any]], bad_rows: BadRows) -> None:
        """Let the documents of rows wait until they fit into a row. Only the headers of media are read yet."""
        conversations = [(json.loads(row["messages"]), row) for row in rows if row["messages"]]
        options = {"loss_on": self.loss_on[source], "decode": False, "block_size": self.block_size}
        if augmenter := self.augmenters.get(source):
            options |= {"stretch": augmenter.stretch, "silence": augmenter.silence}
        read = read_conversations(conversations, self.reader, **options)
        for row in rows:
            origin = {name: row[name] for name in ("source", "row", "messages", "media")}
            problem, document = row["problem"], None
            if row["messages"]:
                *parts, problem = next(read)
                document = MediaDocument(*parts, origin)
            elif len(row["tokens"]):
                tokens = np.asarray(row["tokens"], dtype=np.int32)
                is_label = np.arange(len(tokens)) >= row["loss_start"]
                document = MediaDocument(tokens, is_label, len(tokens), 0, origin)
            if problem:
                bad_rows.add(source, f"row {row['row']}", problem)
            elif document is not None:
                self._pending.append(document)

    def _rows(self, bad_rows: BadRows, flush: bool = False) -> Iterator[dict[str, Any]]:
        while documents := self._take(flush):
            self._num_rows += 1
            row = self._join(documents, bad_rows)
            if row is not None:
                yield row

    def _take(self, flush: bool) -> list[MediaDocument]:
        """The documents of the next row, from the front of those that wait; none, if it is not full, unless `flush`."""
        taken: list[MediaDocument] = []
        capacity, waiting = self.block_size, list(self._pending)
        while waiting and capacity and (self.packing or not taken):
            document = waiting.pop(0)
            if document.row["messages"] and document.length > capacity:
                waiting.insert(0, document)
                break
            part, rest = _cut(document, capacity)
            taken.append(part)
            waiting[:0] = rest
            capacity -= part.length
        if capacity and not waiting and not flush:
            return []
        self._pending = waiting
        return taken

    def _join(self, documents: Sequence[MediaDocument], bad_rows: BadRows) -> dict[str, Any] | None:
        augmenters = [self.augmenters.get(document.row["source"]) for document in documents]
        pieces = []
        worker = get_worker_info()
        rng = np.random.default_rng([self.seed, int(self.epoch), worker.id if worker else 0, self._num_rows])
        found = read_pieces(documents, self.reader, augmenters, rng, self.cfg_dropout)
        for document, piece in zip(documents, found, strict=True):
            if isinstance(piece, UnreadableItem):
                bad_rows.add(document.row["source"], f"row {document.row['row']}", str(piece))
            else:
                pieces.append(piece)
        if not pieces:
            return None
        row = join_pieces(pieces, self.block_size, self.pad_id)
        return row if self.reader else {name: row[name] for name in ("input_ids", "labels", "position_ids")}


def _cut(document: MediaDocument, capacity: int) -> tuple[MediaDocument, list[MediaDocument]]:
    """What fits into a row, and the rest, which begins with the last token of that; conversations fit whole."""
    if document.length <= capacity:
        return document, []
    parts = [
        replace(document, tokens=document.tokens[part], is_label=document.is_label[part], length=part.stop - part.start)
        for part in (slice(0, capacity), slice(capacity - 1, document.length))
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


def stream_of(
    source: SourceConfig,
    rows: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerFast,
    forbidden: set[bytes],
) -> datasets.IterableDataset:
    """The rows of a train source, in memory or not, with the columns that a StreamingDataset reads; documents whose
    digests are forbidden are passed over.
    """
    options: dict[str, Any] = {"source": source, "forbidden": forbidden}
    if not source.is_media:
        columns = columns_of(source)
        if isinstance(rows, datasets.Dataset):  # checked and renamed already
            columns = {name: name for name in columns.values()}
        options |= {"columns": columns, "tokenizer": tokenizer}
    encode = partial(_encode_conversation if source.is_media else _encode_text, **options)
    rows = rows.to_iterable_dataset().decode(False) if isinstance(rows, datasets.Dataset) else rows
    # A map with features is taken at its word, while a cast converts each value to those of Arrow and back.
    return rows.map(encode, with_indices=True, features=_FEATURES).select_columns(list(_FEATURES))


def _encode_text(
    row: dict,
    index: int,
    source: SourceConfig,
    columns: dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    forbidden: set[bytes],
) -> dict[str, object]:
    result = _NOTHING | {"source": source.label, "row": index + 1}
    is_raw = tuple(columns) == tuple(columns_of(source))
    reason = reason_against_text(source, row) if is_raw else reason_against(row, tuple(columns))
    if reason is not None:
        return result | {"problem": reason}
    texts = {name: row[column] for column, name in columns.items()}
    if document_digest(texts) in forbidden:
        return result
    encoded = encode_batch({name: [text] for name, text in texts.items()}, tokenizer, source.separator, source.loss_on)
    return result | {name: values[0] for name, values in encoded.items()}


def _encode_conversation(row: dict, index: int, source: SourceConfig, forbidden: set[bytes]) -> dict[str, object]:
    result = _NOTHING | {"source": source.label, "row": index + 1}
    try:
        messages, media = conversation_of_stream(source, row, index)
        if forbidden and fingerprint(messages, {"media": media}) in forbidden:
            return result
    except (OSError, ValueError) as error:
        return result | {"problem": str(error)}
    return result | {"messages": json.dumps(messages), "media": media}
