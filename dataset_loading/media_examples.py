"""Questions about media with their answers, one by one."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from .configuration import SourceConfig
from .conversations import media_of, prompt_and_answer, special_id
from .media_documents import MediaDocument, MediaDocuments
from .media_reader import MediaReader
from .media_rows import join_pieces, read_piece
from .synthetic import get_task


class MediaExamples(Sequence):
    """Conversations of a source, of which the last message of the assistant is the answer.

    Each is {"input_ids", "labels", "prompt_ids": lists of int, the last up to and with the token that lets the
    assistant speak; "media": {kind: [tensor, ...]}, all before the answer; "modality": name of the last kind; "prompt",
    "answer", "difficulty", "attributes"; "waveforms": a function that gives all recordings, float32 (samples,) each, at
    the processor's rate}. Media are read when an example is asked for.

    Args:
        documents: with labels on answers only.
    """

    def __init__(self, source: SourceConfig, documents: MediaDocuments, reader: MediaReader):
        self.documents, self.reader = documents, reader
        self.assistant = special_id(reader.tokenizer, "<|assistant|>")
        self.attributes = get_task(source.task).attributes if source.kind == "generated" else None

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int | slice) -> Any:
        """One example, or a list of them.

        Raises:
            UnreadableMedium: a medium can be read no more.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        document = self.documents[range(len(self))[index]]
        piece = read_piece(document, self.reader, None, np.random.default_rng(0))
        row = join_pieces([piece], None, self.reader.tokenizer.pad_token_id)
        ids = row["input_ids"].tolist()
        prompt, answer = prompt_and_answer(json.loads(document.row["messages"]))
        return {
            "input_ids": ids,
            "labels": row["labels"].tolist(),
            "prompt_ids": ids[: len(ids) - ids[::-1].index(self.assistant)],
            "media": row["media"],
            "modality": next((kind for kind, it in self.reader.modality_ids.items() if it == piece.modality), "text"),
            "prompt": prompt,
            "answer": answer,
            "difficulty": document.row["difficulty"],
            "attributes": self.attributes,
            "waveforms": partial(self._waveforms, document),
        }

    def _waveforms(self, document: MediaDocument) -> list[np.ndarray]:
        references = media_of(json.loads(document.row["messages"]))
        return [self.reader.load(it, document.row) for it in references if it["type"] == "audio"]
