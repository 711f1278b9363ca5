"""What a model writes in answer to prompts, and how far that is from what it should have written."""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from model import length_before, tokenizer_of

from .intervals import Interval, interval_of, sums_of_draws, wilson_interval

Example = Mapping[str, Any]
BLEU_WORDS, CHRF_CHARACTERS = 4, 6
"""The longest n-grams that are counted."""
FIRST_NGRAM = 9
"""The column of `corpus_counts` from which on n-grams are counted."""


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
    rouge1: float
    """F-score of the words that a text and its reference share, the mean over texts, as ROUGE has it: in lower case,
    letters and digits alone."""
    rouge2: float
    """F-score of pairs of words, and of words where the reference has but one."""
    rouge_l: float
    """F-score of the longest common subsequence of words."""
    attributes: dict[str, float]
    """Share of answers that say the same as their reference, by attribute; empty where the source names none."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    """Those of 95 %, by the names above and of attributes; of scores of the whole corpus by a bootstrap over texts."""


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

    def tags(self, logits: torch.Tensor, labels: torch.LongTensor) -> list[str]:
        """The likeliest tokens at the labels of each row, as texts.

        Args:
            logits: (batch, sequence, vocabulary).
            labels: (batch, sequence), not shifted; -100 outside of tags.
        """
        said, is_tag = logits[:, :-1].argmax(dim=-1), labels[:, 1:] != -100
        ids = [tokens[chosen] for tokens, chosen in zip(said, is_tag, strict=True)]
        return [text.strip() for text in self.tokenizer.batch_decode(ids, clean_up_tokenization_spaces=False)]

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
    if not answers:
        raise ValueError("0 answers have no scores; give examples with answers")
    pairs = [(answer.generated, answer.reference.strip()) for answer in answers]
    right = sum(text == reference for text, reference in pairs)
    attributes = attributes_right(answers)
    intervals = {name: wilson_interval(sum(it), len(it)) for name, it in rights_by_name(attributes).items()}
    intervals["exact_match"] = wilson_interval(right, len(pairs))
    counts = corpus_counts(pairs)
    draws = corpus_scores(sums_of_draws(counts))
    intervals |= {name: interval_of(values) for name, values in draws.items()}
    return TextScores(
        num_examples=len(pairs),
        exact_match=right / len(pairs),
        **{name: float(values[0]) for name, values in corpus_scores(counts.sum(axis=0, keepdims=True)).items()},
        attributes=shares(attributes),
        intervals=intervals,
    )


def corpus_counts(pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Counts of each text and its reference, whose sums over a corpus `corpus_scores` reads, (texts, 39).

    Edits and length of the reference, in words and in characters; words of the text; 1; ROUGE-1, -2 and -L; n-grams
    that both have, those of the text and those of the reference, of words for n = 1 to 4, of characters without blanks
    for n = 1 to 6.
    """
    # Here, so that training, which has nothing written, does not wait for its import.
    from torchmetrics.functional.text import edit_distance

    known: dict[str, str] = {}
    of_words = [[spelled(text, known) for text in pair] for pair in pairs]  # a character for each word
    edits = [edit_distance(*zip(*texts, strict=True), reduction="none").tolist() for texts in (of_words, pairs)]
    rows = []
    for (text, reference), (words, right_words), *found in zip(pairs, of_words, *edits, strict=True):
        row = [found[0], len(right_words), found[1], len(reference), len(words), 1, *rouge(text, reference)]
        for n in range(1, BLEU_WORDS + 1):
            ours, theirs = ngrams(words, n), ngrams(right_words, n)
            row += [(ours & theirs).total(), ours.total(), theirs.total()]
        texts = ["".join(it.split()) for it in (text, reference)]
        for n in range(1, CHRF_CHARACTERS + 1):
            ours, theirs = (ngrams(it, n) for it in texts)
            # As sacrebleu: where nothing was asked for, nothing could be found.
            row += [(ours & theirs).total(), ours.total() if theirs else 0, theirs.total()]
        rows.append(row)
    return np.array(rows, float)


def rouge(text: str, reference: str) -> tuple[float, float, float]:
    """F-scores of a text by ROUGE-1, -2 and -L. Where the reference has no word, 1 if the two are equal, else 0."""
    from torchmetrics.functional.text import rouge_score  # here, for the reason given above

    count = len(letters_and_digits(reference).split())
    if not count:
        return (float(text == reference),) * 3
    names = "rouge1", f"rouge{min(count, 2)}", "rougeL"
    found = rouge_score(text, reference, normalizer=letters_and_digits, rouge_keys=tuple(dict.fromkeys(names)))
    return tuple(found[f"{name}_fmeasure"].item() for name in names)


def letters_and_digits(text: str) -> str:
    """A text in lower case with blanks for all else: what the scorer of Google does, for all scripts."""
    return re.sub(r"[\W_]+", " ", text.lower())


def spelled(text: str, known: dict[str, str]) -> str:
    """A text with a character for each word, those of new words added to the known ones."""
    return "".join(known.setdefault(word, chr(0x10000 + len(known))) for word in text.split())


def ngrams(text: str, n: int) -> Counter[str]:
    """How often each n-gram of characters occurs."""
    return Counter(text[start : start + n] for start in range(len(text) - n + 1))


def corpus_scores(sums: np.ndarray) -> dict[str, np.ndarray]:
    """The scores of corpora, from the sums of their `corpus_counts`, (corpora, 39).

    Error rates are edits by the lengths of the references. BLEU: Papineni et al. 2002, with n-grams of at most as many
    words as some reference has; where no reference has a word, 1 if nothing was written. chrF: Popović 2015, as
    sacrebleu counts it; lengths of n-grams that either side has none of are left out, so that what is right has 1,
    however short it is; torchmetrics counts them as 0.
    """
    word_edits, words, edits, characters, written, texts, *rouges = sums[:, :FIRST_NGRAM].T
    is_empty = (words == 0) & (written == 0)
    of_words, of_characters = np.split(sums[:, FIRST_NGRAM:], [3 * BLEU_WORDS], axis=1)
    return {
        "word_error_rate": word_edits / np.maximum(words, 1),
        "character_error_rate": edits / np.maximum(characters, 1),
        "bleu": np.where(is_empty, 1.0, bleu(*of_words.reshape(len(sums), -1, 3).transpose(2, 0, 1), written, words)),
        "chrf": np.where(is_empty, 1.0, chrf(*of_characters.reshape(len(sums), -1, 3).transpose(2, 0, 1))),
        **{name: values / texts for name, values in zip(("rouge1", "rouge2", "rouge_l"), rouges, strict=True)},
    }


def bleu(both: np.ndarray, ours: np.ndarray, theirs: np.ndarray, written: np.ndarray, words: np.ndarray) -> np.ndarray:
    """The score from n-grams of both, of the texts and of the references, (corpora, n), and from words, (corpora,).

    It is 0 where texts and references have no n-gram of some length in common.
    """
    is_asked = theirs > 0
    precision = both / np.maximum(ours, 1)
    logs = np.where(is_asked, np.log(np.maximum(precision, np.finfo(float).tiny)), 0).sum(axis=1)
    brevity = np.exp(np.minimum(0, 1 - words / np.maximum(written, 1)))
    has_all = is_asked.any(axis=1) & ((both > 0) | ~is_asked).all(axis=1)
    return np.where(has_all, brevity * np.exp(logs / np.maximum(is_asked.sum(axis=1), 1)), 0.0)


def chrf(both: np.ndarray, ours: np.ndarray, theirs: np.ndarray, beta: int = 2) -> np.ndarray:
    """The score from n-grams that both have, those of texts and of references, (corpora, n)."""
    is_counted = (ours > 0) & (theirs > 0)
    count = np.maximum(is_counted.sum(axis=1), 1)
    precision, recall = (np.where(is_counted, both / np.maximum(of, 1), 0).sum(axis=1) / count for of in (ours, theirs))
    return (1 + beta**2) * precision * recall / np.maximum(beta**2 * precision + recall, np.finfo(float).tiny)


def attributes_right(answers: Sequence[Answer]) -> list[dict[str, bool]]:
    """Whether answers say the same as their references, by attribute that these have; of those that have any."""
    named = [answer for answer in answers if answer.attributes is not None]
    pairs = [(answer.attributes(answer.generated), answer.attributes(answer.reference)) for answer in named]
    return [{name: said.get(name) == value for name, value in right.items()} for said, right in pairs]


def rights_by_name(found: Sequence[Mapping[str, bool]]) -> dict[str, list[bool]]:
    """Lists of whether each is right, by name."""
    values: dict[str, list[bool]] = {}
    for name, is_right in (item for one in found for item in one.items()):
        values.setdefault(name, []).append(is_right)
    return values


def shares(found: Sequence[Mapping[str, bool]]) -> dict[str, float]:
    """The share of what is right, by name, among those that have the name."""
    return {name: sum(right) / len(right) for name, right in rights_by_name(found).items()}
