"""Prompts with their answers, one by one, for checking answers."""

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from .building import Builder
from .configuration import DataConfig, SourceConfig
from .packing.documents import MediaDocument, MediaDocuments, tokenize_rows
from .packing.media import Piece, join_pieces, read_pieces
from .packing.media_reader import MediaReader, UnreadableItem
from .packing.texts import IGNORED
from .sources.loading import load_rows
from .sources.messages import last_answer, media_of, prompt_and_answer
from .splits import load_held_out
from .tasks.registry import MEDIA_TASKS


class MediaExamples(Sequence):
    """Examples of a source: conversations whose answer is the last message of the assistant.

    Each is {"input_ids", "labels", "prompt_ids": lists of int, the last up to and with the token that lets the
    assistant speak; "media": {modality: [tensor, ...]}, all before the answer; "modality": that of the last item of the
    answer, else the last modality that is read, or "text"; "prompt", "answer", "difficulty", "attributes"; "waveforms":
    a function that gives all audio that is read, float32 (samples,) each, at the processor's rate}. If the answer has
    media, "targets" are those, {modality: [tensor, ...]}, "reference" is the last of them, an image or (samples, rate),
    as good as the model could generate it, and "check" is a function of such an image or audio that says what of the
    prompt it fulfils. Otherwise they are {} and None. Media are read when an example is asked for.

    Args:
        documents: Documents whose labels are on answers only.
        check: Takes a prompt and what was generated for it.
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
            UnreadableItem: An item can be read no more.
        """
        if isinstance(index, slice):
            return [self[number] for number in range(len(self))[index]]
        document = self.documents[range(len(self))[index]]
        (piece,) = read_pieces([document], self.reader, [None], None)
        if isinstance(piece, UnreadableItem):
            raise piece
        row = join_pieces([piece], None, self.reader.tokenizer.pad_token_id)
        ids = row["input_ids"].tolist()
        given = json.loads(document.row["messages"])
        messages = self.reader.with_modalities(given)
        prompt, answer = prompt_and_answer(messages)
        shown = [it for it in media_of([messages[last_answer(messages)]]) if it["type"] in self.reader.written]
        targets, media, written = {}, row["media"], Counter(it["type"] for it in shown)
        for name, number in written.items():
            media[name], targets[name] = media[name][:-number], media[name][-number:]
        media = {name: items for name, items in media.items() if items}
        read = (name for name in media if name not in self.reader.written)
        reference = None
        if shown:
            item = self.reader.load(shown[-1], document.row)
            reference = self.reader.modalities[shown[-1]["type"]].reference(item)
        return {
            "input_ids": ids,
            "labels": row["labels"].tolist(),
            "prompt_ids": ids[: self._prompt_length(given, piece)],
            "media": media,
            "targets": targets,
            "reference": reference,
            "check": partial(self.check, prompt) if self.check and shown else None,
            "modality": shown[-1]["type"] if shown else max(read, key=self.reader.modality_ids.get, default="text"),
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
        return encoded.answer_start + sum(self.reader.modalities[kind].num_tokens(tensor) + 1 for kind, tensor in shown)

    def _waveforms(self, document: MediaDocument) -> list[np.ndarray]:
        references = media_of(self.reader.with_modalities(json.loads(document.row["messages"])))
        return [self.reader.load(it, document.row) for it in references if it["type"] == "audio"]


def build_examples(
    source: SourceConfig,
    config: DataConfig,
    processor: PreTrainedTokenizerFast | ProcessorMixin,
    limit: int | None = None,
    seed: int = 0,
    checks: Mapping[str, Callable[[str, Any], dict[str, bool]]] | None = None,
) -> Sequence[dict]:
    """Prompts and answers one by one, for checking answers: generated sources without a role are drawn from "test", and
    of a train source whose validation part is split off, only that is taken.

    Args:
        checks: Functions by name of the generated task, which take a prompt and what was generated for it.

    Returns:
        {"input_ids", "labels"} as lists of int, labels only on the answer (with its separator) and the end token, or
        the tags of a source of these, whose "is_tagged" is true;
        "prompt_ids", those before the answer; "prompt", "answer", "difficulty" (None where the source has none), and
        "attributes", a function that says what an answer names (None but for some generated tasks). Of a source with
        media also what `MediaExamples` has; those are read when an example is asked for.

    Raises:
        ValueError: The source has no answers or cannot be read.
    """
    if not source.has_answers:
        raise ValueError(f"source {source.label!r} has no answers to check; set prompt_column and answer_column")
    if source.streaming:
        raise ValueError(f"source {source.label!r} is streaming; set streaming: false and use a slice as split")
    builder = Builder(config, processor, seed)
    if source in config.train and not config.validation and source.kind != "generated":
        rows = load_held_out(source, config, seed, builder.bad_rows)
    else:
        rows = load_rows(source, "test", config, seed, builder.bad_rows, limit)
    rows = rows if limit is None else rows.take(min(limit, len(rows)))
    if source.is_media:
        documents = builder.read(replace(source, loss_on="answer"), rows)
        builder.bad_rows.report()
        return MediaExamples(source, documents, builder.reader, (checks or {}).get(source.task))
    builder.bad_rows.report()
    documents = tokenize_rows(source, rows, builder.tokenizer, config.preprocessing_workers, loss_on="answer")
    examples = []
    for row, (tokens, learned, loss_start) in zip(rows, documents, strict=True):
        ids = tokens.tolist()
        labels = [IGNORED] * loss_start + learned[loss_start:].tolist()
        example = {"input_ids": ids, "labels": labels, "prompt_ids": ids[:loss_start], **row}
        known = {"difficulty": row.get("difficulty"), "attributes": None, "is_tagged": source.loss_on == "tags"}
        examples.append(example | known)
    return examples
