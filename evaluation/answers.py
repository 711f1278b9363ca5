"""What a model writes in answer to prompts, and how far that is from what it should have written."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from model import length_before, tokenizer_of

Example = Mapping[str, Any]


@dataclass
class Answer:
    """One example as a model answers it."""

    modality: str
    difficulty: int | None
    is_right: bool
    """Whether each token of the answer is the likeliest; see `answers_right`."""
    reference: str
    generated: str | None
    """By greedy decoding; None if nothing was written."""
    attributes: Callable[[str], dict[str, str]] | None
    """Names what an answer says; None where nothing does."""


@dataclass
class TextScores:
    """Texts written by greedy decoding against the references, blanks at both ends left out. Shares in [0, 1], but for
    the error rates, which have no upper end.
    """

    num_examples: int
    exact_match: float
    """Texts that equal their reference."""
    word_error_rate: float
    """Words to replace, delete or insert, divided by the words of the references; by 1 where these have none."""
    character_error_rate: float
    bleu: float
    """Of the whole corpus, with n-grams of at most 4 words, or as many as the longest reference has. Where no reference
    has a word, 1 if nothing was written, else 0."""
    chrf: float
    """F-score of mean precision and recall of character n-grams, n = 1 to 6, or as many as the texts have, over the
    corpus, as in sacrebleu."""
    attributes: dict[str, float]
    """Share of answers that say the same as their reference, by attribute; empty where the source names none."""


def prompt_of(example: Example) -> list[int]:
    """Token ids of an example up to its answer."""
    if "prompt_ids" in example:
        return example["prompt_ids"]
    start = next(index for index, label in enumerate(example["labels"]) if label != -100)
    return example["input_ids"][:start]


class AnswerGenerator:
    """Answers prompts by greedy decoding, in batches that are padded on the left.

    Args:
        processor: a tokenizer; or, where prompts have media, a processor with `tokenizer` and `collate_media`.
        max_new_tokens: most tokens of an answer; None for twice as many as its reference has.
    """

    def __init__(self, processor: PreTrainedTokenizerBase | ProcessorMixin, max_new_tokens: int | None = None):
        self.processor = processor if isinstance(processor, ProcessorMixin) else None
        self.tokenizer = tokenizer_of(processor)
        self.max_new_tokens = max_new_tokens

    def write(self, model: PreTrainedModel, examples: Sequence[Example], num_steps: int | None) -> list[str]:
        """The answers of one batch, special tokens and blanks at both ends left out.

        Args:
            examples: Rows with `prompt_ids`, or labels that begin with the answer, and `media` by modality.
            num_steps: core steps per token; None for a model without a core.
        """
        most = [self.most_tokens(example) for example in examples]
        inputs = self.prompts(examples)
        depth = {} if num_steps is None else {"num_steps": num_steps}
        output = model.generate(
            **to_model(inputs, model),
            **depth,
            do_sample=False,
            max_new_tokens=max(most),
            eos_token_id=self.tokenizer.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        new = output[:, length_before(model, inputs["input_ids"]) :].tolist()
        kept = [tokens[:length] for tokens, length in zip(new, most, strict=True)]
        texts = self.tokenizer.batch_decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [text.strip() for text in texts]

    def prompts(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        """What `generate` goes on from: prompts, padded on the left, and their media."""
        prompts = [torch.tensor(prompt_of(example)) for example in examples]
        media: dict[str, list[Any]] = {}
        for modality, items in (pair for example in examples for pair in example.get("media", {}).items()):
            media.setdefault(modality, []).extend(items)
        return {
            "input_ids": left_padded(prompts, self.tokenizer.pad_token_id),
            "attention_mask": left_padded([torch.ones_like(prompt) for prompt in prompts], 0),
            **(self.processor.collate_media(media) if self.processor else {}),
        }

    def most_tokens(self, example: Example) -> int:
        """Tokens after which an answer is cut off: of the row alone, whatever else is in its batch."""
        return self.max_new_tokens or 2 * (len(example["input_ids"]) - len(prompt_of(example)))


def left_padded(rows: Sequence[torch.Tensor], filler: int) -> torch.Tensor:
    """(rows, longest row)."""
    return pad_sequence(rows, batch_first=True, padding_value=filler, padding_side="left")


def to_model(batch: Mapping[str, torch.Tensor], model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Tensors on the device of a model, those of media in its precision."""
    return {
        name: value.to(model.device, model.dtype if value.is_floating_point() else None)
        for name, value in batch.items()
    }


def text_scores(answers: Sequence[Answer]) -> TextScores:
    """Scores of the texts of all answers together.

    Raises:
        ValueError: there are none.
    """
    # Here, so that training, which has nothing written, does not wait for its import.
    from torchmetrics.functional.text import bleu_score, char_error_rate, word_error_rate

    if not answers:
        raise ValueError("0 answers have no scores; give examples with answers")
    written, references = [answer.generated for answer in answers], [answer.reference.strip() for answer in answers]
    if any(references):
        longest = max(len(reference.split()) for reference in references)
        listed = [[reference] for reference in references]
        of_words = {
            "word_error_rate": word_error_rate(written, references).item(),
            "character_error_rate": char_error_rate(written, references).item(),
            "bleu": bleu_score(written, listed, n_gram=min(4, longest)).item(),
        }
    else:  # whatever was written was inserted
        of_words = {
            "word_error_rate": float(sum(len(text.split()) for text in written)),
            "character_error_rate": float(sum(map(len, written))),
            "bleu": float(not any(written)),
        }
    right = [text == reference for text, reference in zip(written, references, strict=True)]
    return TextScores(
        num_examples=len(answers),
        exact_match=sum(right) / len(right),
        **of_words,
        chrf=chrf(written, references),
        attributes=attribute_accuracy(answers),
    )


def chrf(written: Sequence[str], references: Sequence[str], longest: int = 6, beta: int = 2) -> float:
    """F-score of character n-grams without blanks, n = 1 to `longest`, over the corpus: Popović 2015, as sacrebleu
    counts it. Lengths of n-grams that either side has none of are left out, so that what is right has 1, however short
    it is; torchmetrics counts them as 0.
    """
    shares = []
    for n in range(1, longest + 1):
        right = found = wanted = 0
        for text, reference in zip(written, references, strict=True):
            ours, theirs = character_ngrams(text, n), character_ngrams(reference, n)
            right, wanted = right + (ours & theirs).total(), wanted + theirs.total()
            found += ours.total() if theirs else 0  # as sacrebleu: nothing was asked for that could be found
        if found and wanted:
            shares.append((right / found, right / wanted))
    if not shares:
        return float(not any(written) and not any(references))
    precision, recall = (sum(part) / len(shares) for part in zip(*shares, strict=True))
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall) if precision and recall else 0.0


def character_ngrams(text: str, n: int) -> Counter[str]:
    """How often each n-gram of characters occurs, blanks left out."""
    text = "".join(text.split())
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))


def attribute_accuracy(answers: Sequence[Answer]) -> dict[str, float]:
    """The share of right answers by attribute that references have."""
    named = [answer for answer in answers if answer.attributes is not None]
    pairs = [(answer.attributes(answer.generated), answer.attributes(answer.reference)) for answer in named]
    return shares([{name: said.get(name) == value for name, value in right.items()} for said, right in pairs])


def shares(found: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """The share of what is right, by name, among those that have the name."""
    values: dict[str, list[bool]] = {}
    for name, is_right in (item for one in found for item in one.items()):
        values.setdefault(name, []).append(is_right)
    return {name: sum(right) / len(right) for name, right in values.items()}
