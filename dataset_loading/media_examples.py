"""Questions about media with their answers, one by one."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from .configuration import SourceConfig
from .conversations import last_answer, media_of, prompt_and_answer
from .media_documents import MediaDocument, MediaDocuments
from .media_reader import MediaReader
from .media_rows import Piece, join_pieces, read_piece
from .synthetic import MEDIA_TASKS


class MediaExamples(Sequence):
    """Conversations of a source, of which the last message of the assistant is the answer.

    Each is {"input_ids", "labels", "prompt_ids": lists of int, the last up to and with the token that lets the
    assistant speak; "media": {kind: [tensor, ...]}, all before the answer; "modality": kind of the last medium that the
    answer shows, else the last of the kinds that are read, or "text"; "prompt", "answer", "difficulty", "attributes";
    "waveforms": a function that gives all recordings that are read, float32 (samples,) each, at the processor's rate}.
    Of an answer that shows media, "targets" are those, {kind: [tensor, ...]}, "reference" is the last of them, a
    picture or (samples, rate), as it would be written at best, and "check" a function of such a picture or sound that
    says what of the prompt it fulfils; elsewhere, and where there is none, they are {} and None. Media are read when an
    example is asked for.

    Args:
        documents: with labels on answers only.
        check: takes a prompt and what was written for it.
    """

    def __init__(
        self,
        source: SourceConfig,
        documents: MediaDocuments,
        reader: MediaReader,
        check: Callable[[str, Any], dict[str, bool]] | None = None,
    ):
        self.documents, self.reader, self.check = documents, reader, check
        self.attributes = MEDIA_TASKS[source.task].attributes if source.task in MEDIA_TASKS else None

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
        given = json.loads(document.row["messages"])
        messages = self.reader.with_kinds(given)
        prompt, answer = prompt_and_answer(messages)
        shown = [it for it in media_of([messages[last_answer(messages)]]) if it["type"] in self.reader.written]
        media = row["media"]
        targets = {
            kind: _take_last(media, kind, number) for kind, number in Counter(it["type"] for it in shown).items()
        }
        return {
            "input_ids": ids,
            "labels": row["labels"].tolist(),
            "prompt_ids": ids[: self._prompt_length(given, piece)],
            "media": media,
            "targets": targets,
            "reference": self._reference(shown[-1], document) if shown else None,
            "check": partial(self.check, prompt) if self.check and shown else None,
            "modality": shown[-1]["type"] if shown else self._last_kind(media),
            "prompt": prompt,
            "answer": answer,
            "difficulty": document.row["difficulty"],
            "attributes": self.attributes,
            "waveforms": partial(self._waveforms, document),
        }

    def _prompt_length(self, messages: list[dict], piece: Piece) -> int:
        """How many tokens stand before the last answer."""
        encoded = self.reader.encoder.encode(messages)
        placeholders = list(self.reader.encoder.placeholders.values())
        shown = piece.media[: np.isin(encoded.ids[: encoded.answer_start], placeholders).sum()]
        return encoded.answer_start + sum(self.reader.kinds[kind].num_tokens(tensor) + 1 for kind, tensor in shown)

    def _last_kind(self, media: dict[str, list]) -> str:
        kinds = (kind for kind in media if kind not in self.reader.written)
        return max(kinds, key=self.reader.modality_ids.get, default="text")

    def _reference(self, reference: dict, document: MediaDocument) -> Any:
        return self.reader.kinds[reference["type"]].reference(self.reader.load(reference, document.row))

    def _waveforms(self, document: MediaDocument) -> list[np.ndarray]:
        references = media_of(self.reader.with_kinds(json.loads(document.row["messages"])))
        return [self.reader.load(it, document.row) for it in references if it["type"] == "audio"]


def _take_last(media: dict[str, list], kind: str, number: int) -> list:
    """Takes the last of a kind out of `media`."""
    found = media.pop(kind)
    if len(found) > number:
        media[kind] = found[:-number]
    return found[-number:]
