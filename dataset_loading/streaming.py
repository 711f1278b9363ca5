"""Packing of documents that arrive while training."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import IterableDataset
from transformers import PreTrainedTokenizerFast

from .configuration import DataConfig, SourceConfig
from .documents import encode_batch
from .packing import make_row
from .sources import columns_of
from .splits import Split, digest
from .validation import BadRows, reason_against

_FEATURES = datasets.Features(
    {
        "source": datasets.Value("string"),
        "row": datasets.Value("int64"),
        "problem": datasets.Value("string"),
        "tokens": datasets.List(datasets.Value("int32")),
        "loss_start": datasets.Value("int32"),
    }
)


def _no_tokens() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Empty tokens, is_start and is_label."""
    return np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool), np.zeros(0, dtype=bool)


class StreamingDataset(IterableDataset):
    """Rows like those of PackedDataset, packed from a stream of tokenised documents.

    Without packing they are filled up to block_size too: accelerate reads a stream in the first process only, and joins
    the batches of all ranks to one before it deals them out.

    `state_dict` after any row, loaded into a new object, goes on with the next row.

    Args:
        stream: rows with the columns source, row, problem, tokens and loss_start.
        block_size, pad_id, packing: as for PackedDataset.
        max_bad_rows: more rows with a problem than this in one pass stop the run.
    """

    def __init__(
        self, stream: datasets.IterableDataset, block_size: int, pad_id: int, packing: bool, max_bad_rows: int
    ):
        self.stream, self.max_bad_rows = stream, max_bad_rows
        self.block_size, self.pad_id, self.packing = block_size, pad_id, packing
        self._pending = _no_tokens()
        self._start: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        self._begin_pass()
        bad_rows = BadRows(self.max_bad_rows)
        yield from self._full_rows()
        for row in self.stream:
            if row["problem"]:
                bad_rows.add(row["source"], f"row {row['row']}", row["problem"])
            if len(row["tokens"]) == 0:
                continue
            tokens = np.array(row["tokens"], dtype=np.int32)
            places = np.arange(len(tokens))
            document = (tokens, places == 0, places >= row["loss_start"])
            self._pending = tuple(np.concatenate(pair) for pair in zip(self._pending, document, strict=True))
            yield from self._full_rows()
            if not self.packing:
                yield from self._rest()
        yield from self._rest()

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands and the tokens that wait for a full row."""
        return {"stream": self.stream.state_dict(), "pending": [part.tolist() for part in self._pending]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Let the next pass, and only that, go on from `state`."""
        self._start = state

    def _begin_pass(self) -> None:
        start, self._start = self._start, None
        self.stream.load_state_dict(start and start["stream"])  # None: from the first row
        self._pending = _no_tokens()
        if start is not None:
            pairs = zip(start["pending"], self._pending, strict=True)
            self._pending = tuple(np.array(part, dtype=like.dtype) for part, like in pairs)

    def _full_rows(self) -> Iterator[dict[str, torch.Tensor]]:
        size = self.block_size
        while len(self._pending[0]) >= size:
            parts, is_start = self._pending, self._pending[1]
            goes_on = len(is_start) > size and not is_start[size]  # then the last token here is the next row's context
            self._pending = tuple(part[size - 1 if goes_on else size :] for part in parts)
            yield make_row(*(part[:size] for part in parts), size, self.pad_id)

    def _rest(self) -> Iterator[dict[str, torch.Tensor]]:
        parts, self._pending = self._pending, _no_tokens()
        if len(parts[0]):
            yield make_row(*parts, self.block_size, self.pad_id)


def build_stream(split: Split, config: DataConfig, tokenizer: PreTrainedTokenizerFast, seed: int) -> StreamingDataset:
    """Mix the train sources document by document, those in memory included, until each has been read whole once."""
    streams = [_documents_of(source, rows, tokenizer, split.validation_digests) for source, rows in split.train]
    stream = streams[0]
    if len(streams) > 1:
        shares = np.array([source.weight for source, _ in split.train])
        stream = datasets.interleave_datasets(
            streams, probabilities=list(shares / shares.sum()), seed=seed, stopping_strategy="all_exhausted"
        )
    return StreamingDataset(stream, config.block_size, tokenizer.pad_token_id, config.packing, config.max_bad_rows)


def _documents_of(
    source: SourceConfig,
    rows: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerFast,
    forbidden: set[bytes],
) -> datasets.IterableDataset:
    columns = columns_of(source)
    if isinstance(rows, datasets.Dataset):  # checked and renamed already
        rows, columns = rows.to_iterable_dataset(), {name: name for name in columns.values()}
    encode = partial(_encode_row, source=source, columns=columns, tokenizer=tokenizer, forbidden=forbidden)
    return rows.map(encode, with_indices=True).select_columns(list(_FEATURES)).cast(_FEATURES)


def _encode_row(
    row: dict,
    index: int,
    source: SourceConfig,
    columns: dict[str, str],
    tokenizer: PreTrainedTokenizerFast,
    forbidden: set[bytes],
) -> dict[str, object]:
    result = {"source": source.label, "row": index + 1, "problem": "", "tokens": [], "loss_start": 0}
    reason = reason_against(row, tuple(columns))
    if reason is not None:
        return result | {"problem": reason}
    texts = {name: row[column] for column, name in columns.items()}
    if digest(texts) in forbidden:
        return result  # without tokens it is passed over
    encoded = encode_batch({name: [text] for name, text in texts.items()}, tokenizer, source.separator, source.loss_on)
    return result | {name: values[0] for name, values in encoded.items()}
