"""What a model writes in answer to prompts, and how far that is from what it should have written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

Example = Mapping[str, Any]


@dataclass
class Answer:
    """One example as a model answers it."""

    modality: str
    difficulty: int | None
    is_right: bool
    """Whether each token of the answer is the likeliest; see `answers_right`."""
    reference: str
    written: str | None
    """By greedy decoding; None if nothing was written."""
    attributes: Callable[[str], dict[str, str]] | None
    """Names what an answer says; None where nothing does."""


@dataclass
class WrittenScores:
    """Texts written by greedy decoding against the references, blanks at both ends left out. Shares in [0, 1], but for
    the error rates, which have no upper end.
    """

    num_examples: int
    exact_match: float
    """Texts that equal their reference."""
    word_error_rate: float
    """Words to replace, delete or insert, divided by the words of the references."""
    character_error_rate: float
    bleu: float
    """Of the whole corpus, with n-grams of at most 4 words, or as many as the longest reference has."""
    chrf: float
    """Mean F-score of character n-grams, n = 1 to 6."""
    attributes: dict[str, float]
    """Share of answers that say the same as their reference, by attribute; empty where the source names none."""


def prompt_of(example: Example) -> list[int]:
    """Token ids of an example up to its answer."""
    if "prompt_ids" in example:
        return example["prompt_ids"]
    start = next(index for index, label in enumerate(example["labels"]) if label != -100)
    return example["input_ids"][:start]


class Writer:
    """Answers prompts by greedy decoding, in batches that are padded on the left.

    Args:
        processor: a tokenizer; or, where prompts have media, a processor with `tokenizer` and `collate_media`.
        max_new_tokens: most tokens of an answer; None for twice as many as its reference has.
    """

    def __init__(self, processor: PreTrainedTokenizerBase | ProcessorMixin, max_new_tokens: int | None = None):
        self.processor = processor if isinstance(processor, ProcessorMixin) else None
        self.tokenizer = processor if self.processor is None else processor.tokenizer
        self.max_new_tokens = max_new_tokens

    def write(self, model: PreTrainedModel, examples: Sequence[Example], num_steps: int | None) -> list[str]:
        """The answers of one batch, special tokens and blanks at both ends left out.

        Args:
            examples: with `prompt_ids`, or labels that begin with the answer; `media` by kind.
            num_steps: core steps per token; None for a model without a core.
        """
        most = [self.most_tokens(example) for example in examples]
        inputs = self.prompts(examples)
        output = model.generate(
            **to_model(inputs, model),
            **({} if num_steps is None else {"num_steps": num_steps}),
            do_sample=False,
            max_new_tokens=max(most),
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        kept = [tokens[:length] for tokens, length in zip(new, most, strict=True)]
        texts = self.tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    def prompts(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """What `generate` goes on from: prompts, padded on the left, and their media."""
        prompts = [torch.tensor(prompt_of(example)) for example in examples]
        return {
            "input_ids": left_padded(prompts, self.tokenizer.pad_token_id),
            "attention_mask": left_padded([torch.ones_like(prompt) for prompt in prompts], 0),
            **self.join_media(examples),
        }

    def most_tokens(self, example: Example) -> int:
        """Tokens after which an answer is cut off: of the row alone, whatever else is in its batch."""
        return self.max_new_tokens or 2 * (len(example["input_ids"]) - len(prompt_of(example)))

    def join_media(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """The media of all examples as arguments of the model."""
        if self.processor is None:
            return {}
        found = [example.get("media", {}) for example in examples]
        kinds = dict.fromkeys(kind for media in found for kind in media)
        return self.processor.collate_media(
            {kind: [medium for media in found for medium in media.get(kind, [])] for kind in kinds}
        )


def left_padded(rows: Sequence[torch.Tensor], filler: int) -> torch.Tensor:
    """(rows, longest row)."""
    return pad_sequence(rows, batch_first=True, padding_value=filler, padding_side="left")


def to_model(batch: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors on the device of a model, those of media in its precision."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }


def written_scores(answers: Sequence[Answer]) -> WrittenScores:
    """Scores of the texts of all answers together."""
    # Here, so that training, which has nothing written, does not wait for its import.
    from torchmetrics.functional.text import bleu_score, char_error_rate, chrf_score, word_error_rate

    written, references = [answer.written for answer in answers], [answer.reference.strip() for answer in answers]
    longest = max(len(reference.split()) for reference in references)
    listed = [[reference] for reference in references]
    right = [text == reference for text, reference in zip(written, references, strict=True)]
    return WrittenScores(
        num_examples=len(answers),
        exact_match=sum(right) / len(right),
        word_error_rate=word_error_rate(written, references).item(),
        character_error_rate=char_error_rate(written, references).item(),
        bleu=bleu_score(written, listed, n_gram=min(4, longest)).item(),
        chrf=chrf_score(written, listed, n_word_order=0).item(),
        attributes=attribute_accuracy(answers),
    )


def attribute_accuracy(answers: Sequence[Answer]) -> dict[str, float]:
    """Of each attribute that references have: the share of them whose answer has the same."""
    right: dict[str, list[bool]] = {}
    for answer in answers:
        if answer.attributes is not None:
            said = answer.attributes(answer.written)
            for name, value in answer.attributes(answer.reference).items():
                right.setdefault(name, []).append(said.get(name) == value)
    return {name: sum(found) / len(found) for name, found in right.items()}
