"""What depth buys: loss, answers and time of one model at several numbers of core steps."""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from model import TARGET_MODALITIES, modality_names
from model.chat import TARGET_PREFIX

from .answers import Answer, AnswerGenerator, Example, TextScores, prompt_of, text_scores, to_model
from .intervals import Interval, divided, interval_of, sums_of_draws, wilson_interval
from .metrics import METRICS, as_causal, flow_weights, metrics_from_sums, token_scores, with_flow_losses

logger = logging.getLogger(__name__)

Item = Mapping[str, Any]
Collate = Callable[[list[Item]], dict[str, torch.Tensor]]


@dataclass
class ExactMatch:
    """Share of rows whose whole answer is right, in [0, 1]."""

    total: float
    """Over all rows."""
    num_examples: int
    """Number of rows."""
    by_difficulty: dict[int, float] = field(default_factory=dict)
    """Over the rows of each difficulty, where the source names one."""
    interval: Interval | None = None
    """That of 95 % of the total."""
    difficulty_intervals: dict[int, Interval] = field(default_factory=dict)


@dataclass
class ModalityScores:
    """What all sources together come to in one modality."""

    losses: dict[str, float]
    """Loss, perplexity and bits per byte of the validation sources, and flow_loss_NAME of one that is generated; empty
    if none has it."""
    exact_match: float | None
    """Of the sources with answers; None if none has it."""
    generated: TextScores | None
    intervals: dict[str, Interval] = field(default_factory=dict)
    """Those of 95 %, of the losses and of `exact_match`."""


@dataclass
class DepthRow:
    """One model at one depth."""

    num_steps: int | None
    """Core steps; None for a model without a core."""
    loss: float
    """Nats per token over all validation sources together, each token weighing the same; with the losses of latents,
    weighted as in training, where media are generated."""
    perplexity: float
    bits_per_byte: float | None
    """None where the tokenizer's bytes are unknown."""
    milliseconds_per_token: float
    """Forward pass over the validation batches, divided by the number of positions in them, padding included."""
    sources: dict[str, dict[str, float]]
    """Loss, perplexity and bits per byte of each validation source, and flow_loss_NAME of what it has generated."""
    exact_match: dict[str, ExactMatch]
    """By source with answers."""
    generated: dict[str, TextScores] = field(default_factory=dict)
    """By source with answers, if texts were written."""
    modalities: dict[str, ModalityScores] = field(default_factory=dict)
    """By modality, where there are others than text."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    """Those of 95 % of loss, perplexity and bits per byte, over all validation sources, by a bootstrap over rows."""
    source_intervals: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """Those of each validation source alone."""
    examples: ExampleScores | None = None
    """Scores of single examples."""


@dataclass
class ExampleScores:
    """Scores of single examples at one depth, in their order, by source."""

    texts: dict[str, TextSums]
    answers: dict[str, list[Answer]]


def answers_right(logits: torch.Tensor, labels: torch.LongTensor) -> torch.BoolTensor:
    """Whether the most likely token is the right one at every labelled position of a row, shape (batch,).

    This is the exact match of greedy decoding, without decoding. If every position is right when fed the right answer,
    then greedy decoding, by induction, produces just this answer; and at the first position that is wrong it has been
    fed the same tokens, so it produces the same wrong one. (The answer's labels include the end token.)

    Args:
        logits: (batch, sequence, vocabulary).
        labels: (batch, sequence), not shifted; -100 outside the answer.
    """
    targets = labels[:, 1:]
    right = logits[:, :-1].argmax(dim=-1) == targets
    return (right | (targets == -100)).all(dim=1)


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of at most `size` items, in order."""
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield chunk


def row_of(example: Example) -> Item:
    """An example as a row to be collated, with labels on nothing but its answer."""
    start = len(prompt_of(example))
    row = {"input_ids": example["input_ids"], "labels": [-100] * start + list(example["labels"][start:])}
    return row | ({"media": example["media"]} if "media" in example else {})


def wait_for(device: torch.device) -> None:
    """Let queued work finish, so that the clock sees it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class TextSums:
    """What is known of the rows of a source at one depth."""

    tokens: torch.Tensor
    """Sums of `token_scores` over the tokens of each modality, float64 (rows, modalities, 2 or 3)."""
    latents: torch.Tensor
    """The sum of the losses of latents, and their number, by `TARGET_MODALITIES`, float64 (rows, modalities, 2)."""
    seconds: float = 0.0
    """Seconds in forward passes."""
    positions: int = 0
    """Positions that were passed."""


@dataclass
class DepthEvaluator:
    """Runs one model at one depth after the other over the same rows.

    Args:
        model: a causal language model; called as model(..., num_steps=r), without that argument where r is None.
        collate: list of items -> dict of tensors, with `input_ids` and `labels`, and `modality_ids` where there are
            others than text.
        byte_lengths: `token_byte_lengths` of the tokenizer, or None for no bits per byte.
        batch_size: rows in a forward pass.
        writer: writes answers; None for none.
    """

    model: PreTrainedModel
    collate: Collate
    byte_lengths: torch.LongTensor | None
    batch_size: int
    writer: AnswerGenerator | None

    def batch_of(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        """Items on the device, with the codes of images, where these are tokens."""
        with_codes = getattr(self.model, "with_codes", dict)  # models of text alone have none
        return with_codes(to_model(self.collate(items), self.model))

    def forward(self, batch: dict[str, torch.Tensor], num_steps: int | None, with_losses: bool = False) -> Any:
        """Output of the model, with the losses of latents or without."""
        left_out = ("modality_ids",) if with_losses else ("labels", "modality_ids")
        inputs = {name: tensor for name, tensor in batch.items() if name not in left_out}
        if num_steps is not None:
            inputs["num_steps"] = num_steps
        return self.model(**inputs, use_cache=False)

    def aligned(self, logits: torch.Tensor, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.LongTensor]:
        """Logits and labels as those of a causal model."""
        labels = batch["labels"]
        return as_causal(logits, labels) if self.model.config.is_encoder_decoder else (logits, labels)

    def score_texts(self, items: Sequence[Item], num_steps: int | None) -> TextSums:
        """Sums over all rows."""
        sums, tokens, latents = TextSums(torch.empty(0), torch.empty(0)), [], []
        for chunk in chunks(items, self.batch_size):
            batch = self.batch_of(chunk)
            has_targets = any(batch.get(f"{name}_targets") is not None for name in TARGET_MODALITIES)
            wait_for(self.model.device)
            start = time.perf_counter()
            output = self.forward(batch, num_steps, with_losses=has_targets)
            wait_for(self.model.device)
            sums.seconds += time.perf_counter() - start
            sums.positions += batch["input_ids"].numel()
            logits, labels = self.aligned(output.logits, batch)
            scores = token_scores(logits, labels, self.byte_lengths).cpu()  # (batch, sequence - 1, 2 or 3)
            modality_ids = batch.get("modality_ids", torch.zeros_like(labels))[:, 1:].cpu()
            index = modality_ids + len(modality_names()) * torch.arange(len(scores))[:, None]
            by_row = scores.new_zeros(len(scores) * len(modality_names()), scores.shape[-1])
            by_row.index_add_(0, index.flatten(), scores.flatten(0, 1))
            tokens.append(by_row.unflatten(0, (len(scores), -1)))
            latents.append(torch.zeros(len(scores), len(TARGET_MODALITIES), 2, dtype=torch.float64))
            for name, (losses, rows) in ((output.target_losses or {}) if has_targets else {}).items():
                pairs = torch.stack([losses.double(), torch.ones_like(losses).double()], dim=-1).cpu()
                latents[-1][:, TARGET_MODALITIES.index(name)].index_add_(0, rows.cpu(), pairs)
        sums.tokens, sums.latents = torch.cat(tokens), torch.cat(latents)
        return sums

    def metrics(self, tokens: torch.Tensor, latents: torch.Tensor) -> dict[str, float]:
        """Those of the trainer, from the sums of rows: (rows, 2 or 3), and (rows, target modalities, 2)."""
        sums = dict(zip(TARGET_MODALITIES, latents.sum(dim=0).tolist(), strict=True))
        return with_flow_losses(metrics_from_sums(*tokens.sum(dim=0).tolist()), sums, self.weights_of(latents))

    def weights_of(self, latents: torch.Tensor) -> dict[str, float]:
        """The weight of the losses of latents, by modality, where there are any."""
        return flow_weights(self.model.config) if latents[..., 1].any() else {}

    def intervals(self, tokens: torch.Tensor, latents: torch.Tensor) -> dict[str, Interval]:
        """The intervals of the `metrics` of the same rows, by a bootstrap over these."""
        weights, kept = self.weights_of(latents), (tokens[:, 1] > 0) | (latents[..., 1] > 0).any(dim=1)
        width = tokens.shape[1]
        draws = sums_of_draws(torch.cat([tokens, latents.flatten(1)], dim=1)[kept].numpy())
        nll, of_latents = draws[:, 0], draws[:, width:].reshape(len(draws), -1, 2)
        loss = divided(nll, draws[:, 1])
        found = {"perplexity": np.exp(loss)}
        if width == 3:
            found["bits_per_byte"] = divided(nll, draws[:, 2]) / math.log(2)
        for name, pair in zip(TARGET_MODALITIES, of_latents.swapaxes(0, 1), strict=True):
            if name in weights and pair[:, 1].any():
                found[f"flow_loss_{name}"] = divided(*pair.T)
                loss = loss + weights[name] * np.nan_to_num(found[f"flow_loss_{name}"])
        return {
            name: interval_of(values) for name, values in {"loss": loss, **found}.items() if np.isfinite(values).any()
        }

    def answer(self, examples: Iterable[Example], num_steps: int | None) -> list[Answer]:
        """The answers to examples with `input_ids`, `labels` (on the answer), `answer` and `difficulty`."""
        answers = []
        for chunk in chunks(examples, self.batch_size):  # read once: there may be media to decode
            batch = self.batch_of([row_of(example) for example in chunk])
            logits, labels = self.aligned(self.forward(batch, num_steps).logits, batch)
            right = answers_right(logits, labels).tolist()
            if self.writer is None:
                written = [None] * len(chunk)
            elif chunk[0].get("is_tagged"):
                written = self.writer.tags(logits, labels)
            else:
                written = self.writer.write(self.model, chunk, num_steps)
            for row, is_right, text in zip(chunk, right, written, strict=True):
                known = row.get("modality", "text"), row.get("difficulty"), is_right, row.get("answer", "")
                answers.append(Answer(*known, text, row.get("attributes")))
        return answers

    def row(
        self, num_steps: int | None, texts: Mapping[str, Sequence[Item]], examples: Mapping[str, Sequence[Example]]
    ) -> DepthRow:
        """All measures at one depth."""
        sums = {name: self.score_texts(items, num_steps) for name, items in texts.items()}
        seconds, positions = (sum(getattr(part, name) for part in sums.values()) for name in ("seconds", "positions"))
        whole = TextSums(*(torch.cat([getattr(it, name) for it in sums.values()]) for name in ("tokens", "latents")))
        total, *of_sources = (
            (self.metrics(part.tokens.sum(dim=1), part.latents), self.intervals(part.tokens.sum(dim=1), part.latents))
            for part in (whole, *sums.values())
        )
        answers = {name: self.answer(rows, num_steps) for name, rows in examples.items()}
        return DepthRow(
            num_steps=num_steps,
            **{name: total[0].get(name) for name in METRICS},
            milliseconds_per_token=1000 * seconds / positions,
            sources={name: metrics for name, (metrics, _) in zip(sums, of_sources, strict=True)},
            exact_match={name: exact_match(found) for name, found in answers.items()},
            generated={name: text_scores(found) for name, found in answers.items() if self.writer is not None},
            modalities=self.score_modalities(whole, [answer for found in answers.values() for answer in found]),
            intervals=total[1],
            source_intervals={name: intervals for name, (_, intervals) in zip(sums, of_sources, strict=True)},
            examples=ExampleScores(sums, answers),
        )

    def score_modalities(self, sums: TextSums, answers: Sequence[Answer]) -> dict[str, ModalityScores]:
        """Scores by modality, from sums and answers of all sources; none where all is text."""
        found = {}
        for number, name in enumerate(modality_names()):
            tokens, latents = sums.tokens[:, number], torch.zeros_like(sums.latents)
            if name.startswith(TARGET_PREFIX):
                own_latents = TARGET_MODALITIES.index(name.removeprefix(TARGET_PREFIX))
                latents[:, own_latents] = sums.latents[:, own_latents]
            own, has_tokens = [answer for answer in answers if answer.modality == name], bool(tokens[:, 1].any())
            if not own and not has_tokens:
                continue
            match = exact_match(own) if own else None
            found[name] = ModalityScores(
                losses=self.metrics(tokens, latents) if has_tokens else {},
                exact_match=match.total if match else None,
                generated=text_scores(own) if own and self.writer is not None else None,
                intervals=(self.intervals(tokens, latents) if has_tokens else {})
                | ({"exact_match": match.interval} if match else {}),
            )
        return {} if set(found) <= {"text"} else found


def exact_match(answers: Sequence[Answer]) -> ExactMatch:
    """Share of right answers."""
    by_difficulty = defaultdict(list)
    for answer in answers:
        if answer.difficulty is not None:
            by_difficulty[answer.difficulty].append(answer.is_right)
    levels = sorted(by_difficulty.items())
    right = sum(answer.is_right for answer in answers)
    return ExactMatch(
        total=right / len(answers),
        num_examples=len(answers),
        by_difficulty={level: sum(rows) / len(rows) for level, rows in levels},
        interval=wilson_interval(right, len(answers)),
        difficulty_intervals={level: wilson_interval(sum(rows), len(rows)) for level, rows in levels},
    )


def check_rows(texts: Mapping[str, Sequence[Item]], examples: Mapping[str, Sequence[Example]]) -> None:
    """Raise ValueError for a set without rows, and for an example without an answer."""
    if not texts:
        raise ValueError("0 validation sources: name at least one under data.validation, or set a validation fraction.")
    for name, items in [*texts.items(), *examples.items()]:
        if len(items) == 0:
            raise ValueError(f"Validation source {name!r} has 0 rows: give it more data or a larger share.")
    for name, rows in examples.items():
        for index, row in enumerate(rows):
            if all(label == -100 for label in row["labels"]):
                raise ValueError(f"Row {index} of {name!r} has no labelled answer token: check its answer column.")


def possible_depths(model: PreTrainedModel, asked: Iterable[int], name: object) -> list[int | None]:
    """The depths at which a model can be evaluated, of those asked for: the only one, None without a core, where its
    depth cannot vary, with a warning that calls it by `name`.
    """
    config = model.config.get_text_config()
    if config.num_core_layers == 0:
        logger.warning("%s has no core (num_core_layers is 0), so its depth cannot vary: evaluated once", name)
        return [None]
    if config.recurrence.untied_core:
        steps = config.recurrence.mean_steps
        logger.warning("%s has untied cores, so its depth cannot vary: evaluated at %d alone", name, steps)
        return [steps]
    return sorted(set(asked))


def check_lengths(examples: Mapping[str, Sequence[Example]], limit: int) -> None:
    """Raise ValueError for an example of more tokens, with the name of its source."""
    for name, rows in examples.items():
        longest = max((len(row["input_ids"]) for row in rows), default=0)
        if longest > limit:
            raise ValueError(
                f"source {name!r} has an example of {longest} tokens, more than {limit}: leave it out, or raise "
                "--max-prompt-tokens."
            )


def depth_table(
    model: PreTrainedModel,
    depths: Sequence[int | None],
    texts: Mapping[str, Sequence[Item]],
    examples: Mapping[str, Sequence[Example]],
    collate: Collate,
    byte_lengths: torch.LongTensor | None = None,
    batch_size: int = 8,
    writer: AnswerGenerator | None = None,
) -> list[DepthRow]:
    """Evaluate a model at each depth; it is left in the mode (train or eval) it came in.

    Args:
        model: called as model(input_ids, ..., num_steps=r).
        depths: numbers of core steps; [None] for a model whose depth cannot vary.
        texts: validation rows by source.
        examples: rows with one answer each by source (`input_ids`, `labels`; optional `difficulty`, and to write texts
            `answer`, `prompt_ids`, `media`, `modality`, `attributes`); may be empty.
        collate: list of rows -> dict of tensors.
        byte_lengths: `token_byte_lengths` of the tokenizer; None leaves bits per byte out.
        batch_size: rows in a forward pass.
        writer: writes answers, which are compared with the references; None for none.

    Raises:
        ValueError: no source, a source without rows, or an example without an answer.
    """
    check_rows(texts, examples)
    evaluator = DepthEvaluator(model, collate, byte_lengths, batch_size, writer)
    with evaluating(model):
        # The first passes pay for kernel selection and memory; they are not part of any depth's time.
        first = next(iter(texts.values()))
        evaluator.score_texts([first[index] for index in range(min(batch_size, len(first)))], depths[0])
        return [
            evaluator.row(num_steps, texts, examples)
            for num_steps in tqdm(depths, desc="depths", unit="depth", disable=None)
        ]


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """A context in which a model is in evaluation mode and has no gradients, and after which it is as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)
