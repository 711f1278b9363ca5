"""Rows to documents of token ids, and from where on they are learned; of conversations with one placeholder for each
item of media, and how long they become at most.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerFast

from model.text_encoding import encode_texts

from ..augmentation import Augmenter
from ..bad_rows import BadRows
from ..configuration import DataConfig, SourceConfig
from ..sources.references import ArrowRow
from ..sources.tables import map_in_memory
from .media_reader import MediaReader, UnreadableItem

_TEXT_FEATURES = Features({"tokens": List(Value("int32")), "loss_start": Value("int32")})
_TAGGED_FEATURES = Features(_TEXT_FEATURES | {"labels": List(Value("int32"))})
_FEATURES = Features(
    {
        "tokens": List(Value("int32")),
        "is_label": List(Value("bool")),
        "length": Value("int64"),
        "modality": Value("int8"),
        "problem": Value("string"),
    }
)


@dataclass(frozen=True)
class Documents:
    """Documents one after another."""

    tokens: np.ndarray
    """int32 (tokens,): begin + text + end of every document."""
    lengths: np.ndarray
    """int64 (documents,): tokens of each, begin and end included."""
    loss_start: np.ndarray
    """int32 (documents,): the first token of each that is a label; at least 1, as begin never is."""
    labels: np.ndarray
    """int32 (tokens,): the tokens, or, where documents are tagged, what the token before each is to say."""

    def __iter__(self) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        """Tokens, labels and loss_start of each document."""
        ends = np.cumsum(self.lengths)
        for start, end, loss_start in zip(ends - self.lengths, ends, self.loss_start, strict=True):
            yield self.tokens[start:end], self.labels[start:end], int(loss_start)

    @property
    def is_start(self) -> np.ndarray:
        """bool (tokens,): whether a token is the first of its document."""
        mask = np.zeros(len(self.tokens), dtype=bool)
        mask[np.cumsum(self.lengths) - self.lengths] = True
        return mask

    @property
    def is_label(self) -> np.ndarray:
        """bool (tokens,): whether a token is learned."""
        mask = np.ones(len(self.tokens), dtype=bool)
        for start, loss_start in zip(np.cumsum(self.lengths) - self.lengths, self.loss_start, strict=True):
            mask[start : start + loss_start] = False
        return mask


def tokenize_rows(
    source: SourceConfig,
    rows: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    workers: int = 1,
    loss_on: str | None = None,
) -> Documents:
    """Tokenise checked rows in batches, in `workers` processes; the result stays in memory and leaves no files. What is
    learned is `loss_on` instead of the source's own; a source of tags has no other.

    Raises:
        ValueError: A row to be tagged has not as many tokens in its answer as in its prompt.
    """
    options = {"separator": source.separator, "loss_on": loss_on or source.loss_on}
    encode, features = encode_batch, _TEXT_FEATURES
    if source.loss_on == "tags":
        encode, features, options = tag_batch, _TAGGED_FEATURES, {}
    purpose = f"tokenising {source.label}"
    encoded = map_in_memory(rows, encode, features, workers, purpose, 1000, tokenizer=tokenizer, **options)
    encoded = encoded.with_format("arrow")[:]
    tokens = encoded.column("tokens")
    return Documents(
        tokens=_flat(tokens),
        labels=_flat(encoded.column("labels" if "labels" in features else "tokens")),
        lengths=pc.list_value_length(tokens).to_numpy().astype(np.int64),
        loss_start=encoded.column("loss_start").to_numpy(),
    )


def encode_batch(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast, separator: str, loss_on: str
) -> dict[str, list]:
    """Columns text, or prompt and answer, to columns tokens (int32 arrays) and loss_start.

    Prompt and answer are tokenised apart, the separator with the answer, so that no token spans the boundary and a
    prompt alone has the tokens that it has in front of its answer.
    """
    if "text" in batch:
        parts = [encode_texts(tokenizer, batch["text"])]
        loss_start = [1] * len(batch["text"])
    else:
        prompts = encode_texts(tokenizer, batch["prompt"])
        parts = [prompts, encode_texts(tokenizer, [separator + answer for answer in batch["answer"]])]
        loss_start = [1 + len(prompt) if loss_on == "answer" else 1 for prompt in prompts]
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    tokens = [np.concatenate([begin, *ids, end], dtype=np.int32) for ids in zip(*parts, strict=True)]
    return {"tokens": tokens, "loss_start": loss_start}


def tag_batch(batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerFast) -> dict[str, list]:
    """Columns prompt and answer to columns tokens, loss_start and labels: begin, a prompt and end, and, at those behind
    the tokens of the prompt, which say them, the tokens of the answer.

    Raises:
        ValueError: A prompt and its answer have different numbers of tokens.
    """
    begin, end = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    columns = [encode_texts(tokenizer, batch[name]) for name in ("prompt", "answer")]
    for row, (prompt, answer) in enumerate(zip(*columns, strict=True)):
        if len(prompt) != len(answer):
            raise ValueError(
                f"prompt {batch['prompt'][row]!r} has {len(prompt)} tokens, and its answer {batch['answer'][row]!r} "
                f"{len(answer)}; loss_on: tags needs as many: choose 'answer', or another vocabulary"
            )
    return {
        "tokens": [np.concatenate([begin, ids, end], dtype=np.int32) for ids in columns[0]],
        "labels": [np.concatenate([begin, begin, ids], dtype=np.int32) for ids in columns[1]],
        "loss_start": [2] * len(columns[0]),
    }


@dataclass(frozen=True)
class MediaDocument:
    """One conversation; its media are where its row says."""

    tokens: np.ndarray
    """int32 (tokens,): one placeholder for each item of media."""
    is_label: np.ndarray
    """bool (tokens,): whether a token is learned."""
    length: int
    """The most tokens that it has when its media are read."""
    modality: int
    """Number of the last modality of its media, as in `MediaReader.modality_ids`; 0: text alone."""
    row: Mapping[str, Any]
    """Its messages as JSON, where it is from, and what its references refer to."""


@dataclass(frozen=True)
class MediaDocuments:
    """Conversations one after another, with what `MediaDocument` has of each: tokens (int32) and is_label (bool), each
    (tokens,); ends among them and lengths (int64) and modality (int8), each (documents,); rows in the format "arrow".
    """

    tokens: np.ndarray
    is_label: np.ndarray
    ends: np.ndarray
    lengths: np.ndarray
    modality: np.ndarray
    rows: Dataset

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, number: int) -> MediaDocument:
        part = slice(self.ends[number - 1] if number else 0, self.ends[number])
        return MediaDocument(
            tokens=self.tokens[part],
            is_label=self.is_label[part],
            length=int(self.lengths[number]),
            modality=int(self.modality[number]),
            row=ArrowRow(self.rows[int(number) : int(number) + 1]),
        )


def read_documents(
    source: SourceConfig,
    rows: Dataset,
    reader: MediaReader,
    config: DataConfig,
    bad_rows: BadRows,
    augmenter: Augmenter | None = None,
) -> MediaDocuments:
    """Tokenise conversations and find the sizes of their media, in `config.preprocessing_workers` processes.

    Args:
        augmenter: Changes that may make audio longer, for which capacity is left.

    Raises:
        ValueError: None of them can be used, or too many cannot.
    """
    longer = {"stretch": augmenter.stretch, "silence": augmenter.silence} if augmenter else {}
    found = map_in_memory(
        rows.with_format("arrow"),
        _read_batch,
        _FEATURES,
        config.preprocessing_workers,
        f"looking into {source.label}",
        reader=reader,
        loss_on=source.loss_on,
        decode=config.check_media,
        block_size=config.block_size,
        **longer,
    )
    kept, problems = [], found[:]["problem"].to_pylist()
    for number, (where, problem) in enumerate(zip(rows["where"], problems, strict=True)):
        if problem:
            bad_rows.add(source.label, where, problem)
        else:
            kept.append(number)
    if not kept:
        raise ValueError(f"source {source.label!r} has no usable rows; the first of {len(rows)}: {problems[0]}")
    table = found.select(kept)[:]
    tokens = table["tokens"]
    return MediaDocuments(
        tokens=_flat(tokens),
        is_label=_flat(table["is_label"]),
        ends=np.cumsum(pc.list_value_length(tokens).to_numpy(), dtype=np.int64),
        lengths=table["length"].to_numpy(),
        modality=table["modality"].to_numpy(),
        rows=rows.select(kept).with_format("arrow"),
    )


def _flat(lists: pa.ChunkedArray) -> np.ndarray:
    return np.concatenate([chunk.flatten().to_numpy(zero_copy_only=False) for chunk in lists.chunks])


def _read_batch(batch: pa.Table, reader: MediaReader, **options: Any) -> dict[str, list]:
    columns: dict[str, list] = {name: [] for name in _FEATURES}
    messages = map(json.loads, batch["messages"].to_pylist())
    rows = [(conversation, ArrowRow(batch, number)) for number, conversation in enumerate(messages)]
    for values in read_conversations(rows, reader, **options):
        for column, value in zip(columns.values(), values, strict=True):
            column.append(value)
    return columns


def read_conversations(
    rows: Sequence[tuple[list[dict], Mapping[str, object]]],
    reader: MediaReader,
    loss_on: str,
    decode: bool,
    block_size: int,
    stretch: float = 1.0,
    silence: float = 0.0,
) -> Iterator[tuple[np.ndarray, np.ndarray, int, int, str]]:
    """Tokens, is_label, most tokens, modality and the reason against it (or "") of each conversation.

    Args:
        rows: Messages, and what their references refer to.
        decode: Whether the media are read whole, and not their headers only.
        stretch: How many times as long audio may become.
        silence: How many seconds longer it may become then.
    """
    nothing = np.zeros(0, dtype=np.int32), np.zeros(0, dtype=bool)
    for encoded, (_, row) in zip(reader.encode([messages for messages, _ in rows]), rows, strict=True):
        if isinstance(encoded, ValueError):
            yield *nothing, 0, 0, str(encoded)
            continue
        media, problem = encoded.media, ""
        length, modality = len(encoded.ids), max((reader.modality_ids[part["type"]] for part in media), default=0)
        try:
            for part in media:
                length += reader.most_tokens(part, row, decode, stretch, silence) - 1
        except UnreadableItem as error:
            problem = str(error)
        if length > block_size and not problem:
            media_tokens = length - len(encoded.ids) + len(media)
            of_media = f", {media_tokens} of them of media" if media else ""
            smaller = "make the media smaller" if 2 * media_tokens > length else "shorten the texts"
            problem = f"{length} tokens{of_media}, more than data.block_size {block_size}; raise it, or {smaller}"
        is_label = encoded.is_answer if loss_on == "answer" else ~encoded.is_left_out
        is_label[0] = False  # nothing stands before it
        if not (is_label.any() or problem):
            problem = "all messages of the assistant are left out of the loss, so that there is nothing to learn"
        yield encoded.ids, is_label, length, modality, problem
