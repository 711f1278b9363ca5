"""Prompts: as tensors, and many of them from a file."""

import argparse
import codecs
import difflib
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TextIO

from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, set_seed

from model import MODALITIES, length_before, tokenizer_of

from .output import write_result

logger = logging.getLogger("inference.generate")

MEDIA_KEYS = {"image": "image", "images": "image", **{name: name for name in MODALITIES}}
"""The keys of a line that name files, and the modality of each."""
KEYS = ("prompt", *MEDIA_KEYS)
MAX_BYTES = 2**28
"""Of what is read as prompts."""
MOST_LISTED = 5
"""Lines that an error describes one by one."""


@dataclass(frozen=True)
class Prompt:
    """One line of a file of prompts.

    Args:
        line: Its number, from 1.
        given: The line as it stands there.
        text: What is continued or, where there are media, asked about them.
        media: (modality, path) each, in the order of the line.
    """

    line: int
    given: Mapping[str, Any]
    text: str
    media: tuple[tuple[str, str], ...]


# ----------------------------------------------------------------------------------------------------------- arguments


def add_prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a prompt consists of: a text, and files that are read before it."""
    parser.add_argument(
        "--prompt", help="text to continue; default: standard input. With images or audio: what is asked about them"
    )
    for kind in MODALITIES:
        parser.add_argument(
            f"--{kind}",
            dest="media",
            metavar="PATH",
            type=lambda path, kind=kind: (kind, path),
            action="append",
            default=[],
            help="file that the model reads before the prompt, which may be missing then; may be given several times",
        )


def read_prompt(given: str | None) -> str:
    """The prompt that was given, or standard input.

    Raises:
        ValueError: it is empty, or not UTF-8.
    """
    try:
        prompt = sys.stdin.read(MAX_BYTES).removeprefix("\ufeff").removesuffix("\n") if given is None else given
        prompt.encode("utf-8")  # what an argument has that is not UTF-8 came as surrogates
    except UnicodeError as error:
        raise ValueError(
            f"the prompt is not UTF-8 ({error.reason} at {error.start}): convert it, e.g. with iconv."
        ) from error
    if not prompt.strip():
        raise ValueError("the prompt is empty: give --prompt TEXT, or a text on standard input.")
    return prompt


# ------------------------------------------------------------------------------------------------------------- tensors


def encode_prompt(tokenizer: PreTrainedTokenizerBase, *prompts: str) -> BatchFeature:
    """`input_ids` and `attention_mask`, (prompts, sequence), of documents that begin with the prompts: the begin token,
    if there is one, in front, and padding before it.

    As in training, special tokens that are written in the text are text.
    """
    rows = tokenizer(list(prompts), add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if tokenizer.bos_token_id is not None:
        rows = [[tokenizer.bos_token_id, *ids] for ids in rows]
    longest = max(map(len, rows))
    pads = [longest - len(ids) for ids in rows]
    ids = [[tokenizer.pad_token_id] * pad + ids for pad, ids in zip(pads, rows, strict=True)]
    masks = [[0] * pad + [1] * (longest - pad) for pad in pads]
    return BatchFeature({"input_ids": ids, "attention_mask": masks}, tensor_type="pt")


def encode_question(
    processor: PreTrainedTokenizerBase | ProcessorMixin, *questions: tuple[Sequence[tuple[str, str]], str]
) -> BatchFeature:
    """The inputs of the model for messages of users, each of media and a text, after which the assistant speaks.

    Args:
        questions: (media, text) each; media are (modality, path) each, in order.

    Raises:
        ValueError: the model reads no media, or not of this kind, or one of them cannot be read.
    """
    if not isinstance(processor, ProcessorMixin):
        kind, path = next(item for media, _ in questions for item in media)
        raise ValueError(f"--{kind} {path} was given, but this model reads text alone: leave it out.")
    conversations = []
    for media, text in questions:
        content = [{"type": kind, "path": path} for kind, path in media]
        conversations.append([{"role": "user", "content": content + [{"type": "text", "text": text}] * bool(text)}])
    return processor.apply_chat_template(
        conversations,
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


# -------------------------------------------------------------------------------------------------------------- lengths


def prompt_limit(model: PreTrainedModel, given: int | None) -> int:
    """The most tokens of a prompt: as many as are given, or as many as the model has positions.

    Raises:
        ValueError: more are given than the table of positions has rows.
    """
    config = model.config.get_text_config()
    positions, has_table = config.max_position_embeddings, config.position_embedding in ("learned", "sinusoidal")
    if given is not None and given > positions and has_table:
        raise ValueError(
            f"--max-prompt-tokens {given} was given, but the {config.position_embedding} table of this model has "
            f"{positions} positions; give at most as many."
        )
    return positions if given is None else given


def check_characters(tokenizer: PreTrainedTokenizerBase, text: str, limit: int) -> None:
    """Raise ValueError for a text that cannot have so few tokens, without looking for them, which takes long."""
    if len(text) > limit and len(text) > limit * max(map(len, tokenizer.get_vocab())):
        raise ValueError(
            f"the prompt has {len(text)} characters, more than {limit} tokens have; shorten it, or raise "
            "--max-prompt-tokens."
        )


def check_length(inputs: Mapping[str, Any], limit: int) -> None:
    """Raise ValueError for a prompt, with its media, of more tokens."""
    if (length := len(inputs["input_ids"][0])) > limit:
        raise ValueError(
            f"the prompt has {length} tokens, more than {limit}; shorten it, or raise --max-prompt-tokens."
        )


# ---------------------------------------------------------------------------------------------------------------- files


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file of JSON lines such as `{"prompt": "The wind"}` or `{"prompt": "What is this?", "image":
    "a.png"}`; `images` and `audio` may be lists. Paths are relative to the file; empty lines are passed over.

    Raises:
        ValueError: names the lines that are none, or says that there are no others.
        OSError: the file cannot be read.
    """
    prompts, bad = [], {}
    with path.open("rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise ValueError(f"--prompts {path} is longer than {MAX_BYTES // 2**20} MiB: divide it.")
    content = content.removeprefix(codecs.BOM_UTF8)
    refuse_other_encodings(path, content)
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            prompts.append(read_line(number, line, path.absolute().parent))
        except ValueError as error:  # also what is not UTF-8
            bad[number] = str(error)
    refuse(path, bad, len(prompts) + len(bad))
    if not prompts:
        raise ValueError(f'--prompts {path} is empty: write lines such as {{"prompt": "The wind"}} into it.')
    return prompts


def refuse_other_encodings(path: Path, raw: bytes) -> None:
    """Raise ValueError for a file that is not UTF-8 at all, whose lines would each be refused by themselves."""
    marks = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)
    if raw.startswith(marks) or raw.count(0) > len(raw) / 3:
        raise ValueError(f"--prompts {path} is UTF-16 or UTF-32; save it as UTF-8.")
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"--prompts {path} is not UTF-8 (byte 0x{raw[error.start]:02x} in line {line}), perhaps Latin-1; save "
            "it as UTF-8."
        ) from error


def read_line(number: int, line: bytes, folder: Path) -> Prompt:
    """One line; ValueError says why it is none."""
    try:
        given = json.loads(line.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("lists stand too deep in each other") from error
    if not isinstance(given, dict):
        raise ValueError(f'{str(given)[:40]!r} is no object such as {{"prompt": "The wind"}}')
    for name in given.keys() - set(KEYS):
        near = difflib.get_close_matches(name, KEYS, n=1)
        raise ValueError(f"unknown key {name!r}; {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(KEYS)}")
    media = []
    for key in (key for key in given if key != "prompt"):
        paths = given[key] if isinstance(given[key], list) else [given[key]]
        if not paths or not all(isinstance(path, str) and path for path in paths):
            raise ValueError(f"{key} is {given[key]!r}; give a path, or a list of paths")
        media += [(MEDIA_KEYS[key], str(folder / path)) for path in paths]
    text = given.get("prompt", "")
    if not isinstance(text, str) or not (text.strip() or media):
        raise ValueError(f"prompt is {text!r}; give a text")
    for _, file in media:
        if not os.path.isfile(file):
            raise ValueError(f"{file} is no file; correct the path")
    return Prompt(number, given, text, tuple(media))


def refuse(path: Path, bad: Mapping[int, str], count: int) -> None:
    """Raise ValueError if there are bad lines, with their number and the first of them."""
    if bad:
        listed = [f"line {number}: {' '.join(reason.split())}" for number, reason in list(bad.items())[:MOST_LISTED]]
        more = ["..."] * (len(bad) > MOST_LISTED)
        raise ValueError(f"--prompts {path}: {len(bad)} of {count} lines cannot be used: {'; '.join(listed + more)}")


# -------------------------------------------------------------------------------------------------------------- answers


def check_prompts(
    path: Path, processor: PreTrainedTokenizerBase | ProcessorMixin, prompts: Sequence[Prompt], limit: int
) -> None:
    """See to it that the model can read all prompts with their media, before it answers the first.

    Args:
        limit: The most tokens of each.

    Raises:
        ValueError: names the lines that it cannot.
    """
    bad = {}
    for prompt in prompts:
        try:
            check_characters(tokenizer_of(processor), prompt.text, limit)
            check_length(encode_prompts(processor, [prompt]), limit)
        except (ValueError, OSError) as error:
            bad[prompt.line] = str(error)
    refuse(path, bad, len(prompts))


def encode_prompts(processor: PreTrainedTokenizerBase | ProcessorMixin, batch: Sequence[Prompt]) -> BatchFeature:
    """The inputs of the model for prompts that all have media, or all have none."""
    if batch[0].media:
        return encode_question(processor, *((prompt.media, prompt.text) for prompt in batch))
    return encode_prompt(tokenizer_of(processor), *(prompt.text for prompt in batch))


def write_answers(
    model: PreTrainedModel,
    processor: PreTrainedTokenizerBase | ProcessorMixin,
    prompts: Sequence[Prompt],
    batch_size: int,
    seed: int,
    options: Mapping[str, Any],
    out: TextIO,
) -> None:
    """Write each prompt with the `text` after it, a JSON object a line, in the order of the prompts.

    Args:
        batch_size: The most prompts that are continued together; those with media and those without never are.
        seed: Seed of the draws of a batch; a prompt in a batch of its own is continued as without a file.
        options: Options of `generate`.
        out: Where they are written, as soon as they are known.
    """
    tokenizer, num_written = tokenizer_of(processor), 0
    for batch in batches(prompts, batch_size):
        set_seed(seed)
        inputs = encode_prompts(processor, batch)
        ids = model.generate(
            **inputs.to(model.device, model.dtype),
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
        new = ids[:, length_before(model, inputs["input_ids"]) :]
        texts = tokenizer.batch_decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for prompt, text in zip(batch, texts, strict=True):
            line = json.dumps({**prompt.given, "text": text}, ensure_ascii=False) + "\n"
            write_result(line) if out is sys.stdout else out.write(line)
        out.flush()
        num_written += len(batch)
        logger.info("%d of %d prompts are answered", num_written, len(prompts))


def batches(prompts: Sequence[Prompt], batch_size: int) -> Iterator[list[Prompt]]:
    """Prompts that follow each other and all have media, or all have none."""
    for _, group in groupby(prompts, key=lambda prompt: bool(prompt.media)):
        same = list(group)
        yield from (same[start : start + batch_size] for start in range(0, len(same), batch_size))
