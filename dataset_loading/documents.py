"""Rows to documents of token ids: begin + tokens + end, and from where on they are learned."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerFast

from model.text_encoding import encode_texts

from .configuration import SourceConfig

_FEATURES = Features({"tokens": List(Value("int32")), "loss_start": Value("int32")})


@dataclass(frozen=True)
class Documents:
    """Documents one after another."""

    tokens: np.ndarray
    """int32 (tokens,): begin + text + end of every document."""
    lengths: np.ndarray
    """int64 (documents,): tokens of each, begin and end included."""
    loss_start: np.ndarray
    """int32 (documents,): the first token of each that is a label; at least 1, as begin never is."""

    def __iter__(self) -> Iterator[tuple[np.ndarray, int]]:
        """Tokens and loss_start of each document."""
        ends = np.cumsum(self.lengths)
        for start, end, loss_start in zip(ends - self.lengths, ends, self.loss_start, strict=True):
            yield self.tokens[start:end], int(loss_start)

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
    """Tokenise checked rows in batches, in `workers` processes; the result stays in memory and leaves no files.

    Args:
        loss_on: "all" or "answer", in place of the source's own.
    """
    encoded = rows.map(
        encode_batch,
        batched=True,
        fn_kwargs={"tokenizer": tokenizer, "separator": source.separator, "loss_on": loss_on or source.loss_on},
        remove_columns=rows.column_names,
        features=_FEATURES,
        num_proc=min(workers, len(rows)) if workers > 1 else None,
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=f"tokenized-{zlib.crc32(source.label.encode()):08x}",
        desc=f"tokenising {source.label}",
    ).with_format("arrow")[:]
    tokens = encoded.column("tokens")
    return Documents(
        tokens=np.concatenate([chunk.flatten().to_numpy() for chunk in tokens.chunks]),
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
