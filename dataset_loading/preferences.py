"""What is learned from without being imitated: prompts with what is known about them, for rewards, and pairs of answers
of which one is better, for preferences. Rows of text or of conversations without media, split as in `splits.py`.
"""

import json
import random
import string
from collections.abc import Callable, Sequence
from dataclasses import replace

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerFast

from model.chat import CHAT_TEMPLATE, ConversationEncoder
from model.text_encoding import encode_texts

from .bad_rows import BadRows
from .configuration import DataConfig, SourceConfig
from .sources.loading import load_rows
from .sources.messages import last_answer, media_of, text_of
from .splits import load_split, mix

Datasets = tuple[Dataset, dict[str, Dataset]]
"""What is trained on, and by name of the source what is held out."""


def build_prompts(config: DataConfig, seed: int = 0) -> Datasets:
    """Rows {"prompt", "answer", "source", "difficulty"}; a prompt is a text, or the messages in front of the answer,
    each {"role", "content"}.

    Raises:
        ValueError: A source cannot be read, has no answers or has media, or texts and conversations are mixed.
    """
    if len({source.is_media for source in (*config.train, *config.validation)}) > 1:
        raise ValueError("data mixes prompts of text with conversations; give each source of text a prompt, or none")
    return _build(config, seed, _prompts)


def build_pairs(config: DataConfig, tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Datasets:
    """Rows {"prompt_ids", "chosen_ids", "rejected_ids"}, tokens as in the documents of pretraining. The rejected answer
    is that of `rejected_column`; of generated sources it is the right one with a letter or a digit replaced.

    Raises:
        ValueError: A source cannot be read, has no rejected answers, or has media.
    """
    for source in (*config.train, *config.validation):
        if source.kind != "generated" and source.rejected_column is None:
            raise ValueError(f"source {source.label!r} has no worse answers to learn from; set rejected_column")

    def pairs(source: SourceConfig, rows: Dataset, bad_rows: BadRows) -> Dataset:
        if source.is_media:
            return _pairs_of_conversations(source, rows, config, tokenizer, seed, bad_rows)
        return _pairs_of_texts(source, rows, tokenizer, seed)

    return _build(config, seed, pairs)


def spoiled(answer: str, rng: random.Random) -> str:
    """The answer with one letter or digit replaced by another; "" for one that has neither."""
    places = [place for place, sign in enumerate(answer) if sign.isalnum()]
    if not places:
        return ""
    place = rng.choice(places)
    others = (string.digits if answer[place].isdigit() else string.ascii_lowercase).replace(answer[place], "")
    return answer[:place] + rng.choice(others) + answer[place + 1 :]


def _build(config: DataConfig, seed: int, convert: Callable[[SourceConfig, Dataset, BadRows], Dataset]) -> Datasets:
    for source in (*config.train, *config.validation):
        if source.has_media:
            raise ValueError(f"source {source.label!r} has media; preferences and rewards are for text alone")
        if not source.has_answers:
            raise ValueError(f"source {source.label!r} has no answers; set prompt_column and answer_column")
    bad_rows = BadRows.of_building(config.max_invalid_rows)
    split = load_split(config, seed, bad_rows)
    streaming = [source.label for source, rows in split.train if isinstance(rows, IterableDataset)]
    if streaming:
        raise ValueError(f"source {streaming[0]!r} is streaming; set streaming: false and use a slice as split")
    train = [convert(source, rows, bad_rows) for source, rows in split.train]
    validation = {source.label: convert(source, rows, bad_rows) for source, rows in split.validation}
    bad_rows.report()
    return mix(train, config.train, seed), validation


def _prompts(source: SourceConfig, rows: Dataset, bad_rows: BadRows) -> Dataset:
    if source.is_media:
        asked = []
        for messages in _conversations(source, rows):
            given = [{"role": message["role"], "content": text_of(message)} for message in messages[:-1]]
            asked.append((given, text_of(messages[-1])))
    else:
        asked = list(zip(rows["prompt"], rows["answer"], strict=True))
    columns = {name: [pair[place] for pair in asked] for place, name in enumerate(("prompt", "answer"))}
    difficulty = list(rows["difficulty"]) if "difficulty" in rows.column_names else [None] * len(rows)
    return Dataset.from_dict({**columns, "source": [source.label] * len(rows), "difficulty": difficulty})


def _pairs_of_texts(source: SourceConfig, rows: Dataset, tokenizer: PreTrainedTokenizerFast, seed: int) -> Dataset:
    rejected = rows["rejected"] if source.rejected_column is not None else _spoiled(source, rows["answer"], seed)
    prompts = encode_texts(tokenizer, list(rows["prompt"]))
    columns = {"prompt_ids": [[tokenizer.bos_token_id, *ids.tolist()] for ids in prompts]}
    for name, texts in {"chosen_ids": rows["answer"], "rejected_ids": rejected}.items():
        encoded = encode_texts(tokenizer, [source.separator + text for text in texts])
        columns[name] = [[*ids.tolist(), tokenizer.eos_token_id] for ids in encoded]
    return Dataset.from_dict(columns)


def _pairs_of_conversations(
    source: SourceConfig,
    rows: Dataset,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    bad_rows: BadRows,
) -> Dataset:
    chosen = _conversations(source, rows)
    if source.rejected_column is None:
        texts = _spoiled(source, [text_of(messages[-1]) for messages in chosen], seed)
        worse = [{"role": "assistant", "content": [{"type": "text", "text": text}]} for text in texts]
    else:
        column = "answer_column" if source.messages_column is None else "messages_column"
        other = replace(source, rejected_column=None, **{column: source.rejected_column})
        unusable = BadRows(config.max_invalid_rows, silent=True)
        found = load_rows(other, "train", config, seed, unusable)
        reasons = {where: reason for _, where, reason in unusable.found}
        by_place = dict(zip(found["where"], _conversations(other, found), strict=True))
        kept = [number for number, where in enumerate(rows["where"]) if where in by_place]
        for where in rows["where"]:
            if where not in by_place:
                bad_rows.add(source.label, where, reasons[where])
        rows = rows.select(kept)
        worse = [by_place[where][-1] for where in rows["where"]]
        chosen = [chosen[number] for number in kept]
    columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    rejected = [[*messages[:-1], answer] for messages, answer in zip(chosen, worse, strict=True)]
    encoder = ConversationEncoder(tokenizer, chat_template=tokenizer.chat_template or CHAT_TEMPLATE)
    encoded = [encoder.encode_all(side, may_end_empty=True) for side in (chosen, rejected)]
    for where, *pair in zip(rows["where"], *encoded, strict=True):
        if problem := next((side for side in pair if isinstance(side, ValueError)), None):
            bad_rows.add(source.label, where, str(problem))
            continue
        better, other = pair
        columns["prompt_ids"].append(better.ids[: better.answer_start].tolist())
        columns["chosen_ids"].append(better.ids[better.answer_start :].tolist())
        columns["rejected_ids"].append(other.ids[other.answer_start :].tolist())
    return Dataset.from_dict(columns)


def _conversations(source: SourceConfig, rows: Dataset) -> list[list[dict]]:
    """The messages of each row up to its last answer; raises ValueError for media in them."""
    conversations = [json.loads(messages) for messages in rows["messages"]]
    if any(map(media_of, conversations)):
        raise ValueError(
            f"source {source.label!r} has media in its messages; preferences and rewards are for text alone"
        )
    return [messages[: last_answer(messages) + 1] for messages in conversations]


def _spoiled(source: SourceConfig, answers: Sequence[str], seed: int) -> list[str]:
    return [spoiled(answer, random.Random(f"{source.label} {seed} {number}")) for number, answer in enumerate(answers)]
