"""Questions about media with their answers, one by one."""

from collections.abc import Sequence
from typing import Any

from .configuration import SourceConfig
from .conversations import media_of, prompt_and_answer, special_id
from .media_documents import MediaDocuments
from .media_reader import MODALITIES, MediaReader
from .packing import IGNORED
from .synthetic import get_task


class MediaExamples(Sequence):
    """Conversations of a source, of which the last message of the assistant is the answer.

    Each is {"input_ids", "labels", "prompt_ids": lists of int, the last up to and with the token that lets the
    assistant speak; "media": {kind: [tensor, ...]}, all before the answer; "modality": name of the last kind; "prompt",
    "answer", "difficulty", "attributes"}. Media are read when an example is asked for.

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
        number = range(len(self))[index]
        messages, row = self.documents.messages(number)
        media = [
            (part["type"], self.reader.tensor(part["type"], self.reader.load(part, row))) for part in media_of(messages)
        ]
        tokens, is_label = self.reader.expand(*self.documents[number], media)
        prompt, answer = prompt_and_answer(messages)
        tensors: dict[str, list] = {}
        for kind, tensor in media:
            tensors.setdefault(kind, []).append(tensor)
        ids = tokens.tolist()
        last = len(ids) - 1 - ids[::-1].index(self.assistant)
        kinds = {self.reader.modality_ids[kind]: kind for kind in tensors}
        return {
            "input_ids": ids,
            "labels": [token if learned else IGNORED for token, learned in zip(ids, is_label.tolist(), strict=True)],
            "prompt_ids": ids[: last + 1],
            "media": tensors,
            "modality": kinds[max(kinds)] if kinds else MODALITIES[0],
            "prompt": prompt,
            "answer": answer,
            "difficulty": row["difficulty"],
            "attributes": self.attributes,
        }
