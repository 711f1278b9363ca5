"""A conversation with a model: its history, what is shown with the next message, and the calls of tools."""

import copy
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import BatchFeature, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TextStreamer

from model import tokenizer_of
from model.chat import ROLE_TOKENS, encode_conversation

from .calculator import answer_call, called_expression
from .decoding import depth_option
from .output import append
from .prompts import check_characters, prompt_limit

logger = logging.getLogger(__name__)

MAX_CALLS = 8
"""Calls of tools in answer to one message."""


class Conversation:
    """Messages between a user, a model and a calculator, as `model.chat` has them.

    Args:
        processor: that of the model, or its tokenizer if it reads text alone; with a chat template.
        options: arguments of `generate`, with `max_new_tokens`.
        system: what the model is told before anything else.
        max_prompt_tokens: most tokens of a conversation; by default as many as leave an answer its positions.

    Raises:
        ValueError: there is no chat template, or no room beside an answer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        options: dict[str, Any],
        system: str | None = None,
        max_prompt_tokens: int | None = None,
    ) -> None:
        if model.config.is_encoder_decoder:
            raise ValueError(
                "this model writes a target for a source, and holds no conversation: use inference.generate."
            )
        if processor.chat_template is None:
            raise ValueError(
                "this model has no chat template, as it has never seen conversations: fine-tune it on some with "
                "finetune.py, or continue texts with inference.generate."
            )
        limit, positions = prompt_limit(model, max_prompt_tokens), prompt_limit(model, None)
        if options["max_new_tokens"] >= positions:
            raise ValueError(
                f"max_new_tokens is {options['max_new_tokens']}, but this model has {positions} positions for a "
                "conversation with its answers; give less."
            )
        self.model, self.processor, self.options = model, processor, dict(options)
        self.tokenizer = tokenizer_of(processor)
        self.room = positions - options["max_new_tokens"] if max_prompt_tokens is None else limit
        check_characters(self.tokenizer, system or "", self.room)
        self.first = [] if system is None else [{"role": "system", "content": system}]
        self.messages: list[dict[str, Any]] = []
        self.attached: list[dict[str, str]] = []

    def set_steps(self, num_steps: int) -> None:
        """Choose how often the core is applied from now on.

        Raises:
            ValueError: the model has none.
        """
        self.options |= depth_option(self.model, num_steps, name="/steps")

    def attach(self, kind: str, path: str) -> None:
        """Show a file of a kind, "image" or "audio", with the next message.

        Raises:
            ValueError: the model does not read such media, or not this one.
        """
        if not isinstance(self.processor, ProcessorMixin):
            raise ValueError(f"/{kind} {path}: this model reads text alone.")
        self.processor.load_item(kind, path)
        self.attached.append({"type": kind, "path": path})

    def forget(self) -> None:
        """Begin again, with nothing said or attached."""
        self.messages, self.attached = [], []

    def ask(self, text: str, streamer: TextStreamer | None = None) -> Iterator[dict[str, Any]]:
        """Say something, with what is attached; gives each message of the assistant and of the tool that it calls.

        Where the model cannot answer, or is interrupted, nothing has been said.

        Raises:
            ValueError: the message says nothing, cannot be read, or is longer than there is room for.
        """
        check_characters(self.tokenizer, text, self.room)
        before, attached = list(self.messages), self.attached
        parts = [*attached, *([{"type": "text", "text": text}] if text else [])]
        self.messages.append({"role": "user", "content": parts if attached else text})
        self.attached = []
        try:
            for _ in range(MAX_CALLS):
                message = {"role": "assistant", "content": self._answer(streamer)}
                self.messages.append(message)
                yield message
                expression = called_expression(message["content"])
                if expression is None:
                    return
                self.messages.append({"role": "tool", "content": answer_call(expression)})
                yield self.messages[-1]
            logger.warning("the calculator was called %d times without an answer; ask again", MAX_CALLS)
        except BaseException:
            self.messages, self.attached = before, attached
            raise

    def _answer(self, streamer: TextStreamer | None) -> str:
        inputs = self._inputs().to(self.model.device, self.model.dtype)
        known = self.tokenizer.get_vocab()  # an answer ends with the end token, or where the next message would begin
        ends = [self.tokenizer.eos_token_id, *(known[token] for token in ROLE_TOKENS.values() if token in known)]
        output = self.model.generate(
            **inputs,
            **self.options,
            streamer=streamer,
            eos_token_id=ends,
            pad_token_id=self.tokenizer.pad_token_id,
            return_dict_in_generate=True,
        )
        new = output.sequences[0, inputs["input_ids"].shape[1] :]
        text = self.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        for token in ROLE_TOKENS.values():  # spelled, where the vocabulary has no such token
            text = text.partition(token)[0]
        if not text.strip():
            raise ValueError("the model has nothing to say to that; ask in another way.")
        return text

    def _inputs(self) -> BatchFeature:
        """What `generate` goes on from. What was said longest ago is forgotten where there is no more room; ValueError
        where there is none for the last message either.
        """
        inputs = self._encode()
        while (length := inputs["input_ids"].shape[1]) > self.room:
            asked = [number for number, message in enumerate(self.messages) if message["role"] == "user"]
            if len(asked) < 2:
                raise ValueError(
                    f"the message has {length} tokens, with what stands around it, and there is room for {self.room}; "
                    "say less, lower --max-new-tokens or raise --max-prompt-tokens."
                )
            logger.warning("no more room: what was said first is forgotten")
            del self.messages[: asked[1]]
            inputs = self._encode()
        return inputs

    def _encode(self) -> BatchFeature:
        messages = [*self.first, *self.messages]
        if isinstance(self.processor, ProcessorMixin):
            return self.processor.apply_chat_template(
                messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        ids = torch.tensor([encode_conversation(self.tokenizer, messages, add_generation_prompt=True)])
        return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def save(self, path: Path) -> None:
        """Append the conversation to a file as one line, which sources of kind `chat` read. Names of media files are
        written relative to it.

        Raises:
            ValueError: nothing has been answered yet, the name does not end in .jsonl, or the file cannot be written.
        """
        if not self.messages:
            raise ValueError("nothing has been said that could be saved.")
        if path.suffix != ".jsonl":
            raise ValueError(f"/save {path}: the name must end in .jsonl.")
        messages = copy.deepcopy([*self.first, *self.messages])
        for part in (part for message in messages for part in message["content"] if "path" in part):  # in no character
            part["path"] = os.path.relpath(part["path"], path.parent)
        append(path, json.dumps({"messages": messages}, ensure_ascii=False))
