"""Efficiency of a model: its loss and its exact answers against the operations that were executed and against time, at
fixed depths and with exits. `python -m evaluation RUN --efficiency` writes it.

Each answer is said by `generate`, token by token over the cache, as it is when the model is used; its tokens are forced
to be those of the reference. Operations are those that torch counts while it runs: a row that has exited adds none.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from model.exit_criteria import EXIT_CRITERIA, ExitOptions

from .answers import AnswerGenerator, Example, prompt_of, to_model
from .depth import chunks, evaluating, wait_for
from .intervals import Interval, divided, interval_of, sums_of_draws, wilson_interval
from .tables import Table, depth_name, figure_cell, percent, tables_markdown

MOST_EXAMPLES, MOST_TOKENS = 64, 64
"""Examples of each source, and tokens of a text without an answer, that are read at most: each is read token by token,
twice at each point.
"""
FACTORS = (0.1, 1, 10, 100)
"""Thresholds that are tried where none is named, in those of the criterion."""
LEAST_DOUBLINGS = 0.5
"""Doublings of the operations that points span at least, or they have no slope: it would be far beyond them."""
FIXED = "fixed depth"


@dataclass(frozen=True)
class Setting:
    """The request to `generate` at one point."""

    num_steps: int | None
    """Core steps, with exits at most; None for a model without a core."""
    criterion: str = FIXED
    """That of the exits, or that there are none."""
    threshold: float | None = None

    @property
    def options(self) -> dict[str, Any]:
        """The arguments of `generate`."""
        steps = {} if self.num_steps is None else {"num_steps": self.num_steps}
        if self.criterion == FIXED:
            return steps | ({"exit_criterion": "none"} if steps else {})
        return steps | {
            "exit_criterion": self.criterion,
            "exit_threshold": self.threshold,
            "exit_in_prefill": True,  # the first token of an answer is read off the prompt
        }


@dataclass
class EfficiencyPoint:
    """One model in one setting."""

    num_steps: int | None
    criterion: str
    threshold: float | None
    flops_per_token: float
    """Operations of matrix products and attention, a multiplication and an addition each counted as one, divided by the
    tokens that were read, prompts included."""
    milliseconds_per_token: float
    mean_steps: float | None
    """Core steps that a new token took; None for a model without a core."""
    loss: float
    """Nats per token of the answers."""
    exact: float | None
    """Share of answers of which each token is the likeliest; None where texts have no answers."""
    intervals: dict[str, Interval]
    """Those of 95 %, of loss and exact."""
    on_front: list[str] = field(default_factory=list)
    """Measures in which no other point is as good with as few operations."""


@dataclass
class Slope:
    """The change that a doubling of the operations brings."""

    criterion: str
    measure: str
    value: float
    """Change of the loss in nats per token, or of the share of exact answers: least squares over the points."""
    interval: Interval
    """That of 95 %, by a bootstrap over examples that is the same for all points."""


@dataclass
class EfficiencyTable:
    """All points, by growing operations."""

    num_examples: int
    num_tokens: int
    """Tokens of their answers."""
    points: list[EfficiencyPoint]
    slopes: list[Slope]


@dataclass
class Work:
    """The findings in one setting."""

    scores: np.ndarray
    """Nats, tokens, and whether all tokens are the likeliest, of each example, float64 (examples, 3)."""
    flops: int
    seconds: float
    num_read: int
    """Tokens that were passed."""
    steps: list[int]
    """Those of each new token, where there are any."""


class SayGiven(LogitsProcessor):
    """Lets `generate` say given tokens, (rows, new tokens)."""

    def __init__(self, tokens: torch.LongTensor):
        self.tokens, self.said = tokens, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores with nothing but the next of them."""
        given = self.tokens[:, self.said, None]
        self.said += 1
        return torch.full_like(scores, -torch.inf).scatter(1, given, 0.0)


@dataclass
class EfficiencyRunner:
    """One model, and the answers that it is made to say.

    Args:
        model: The model, in evaluation mode.
        writer: Makes batches of prompts.
        examples: Rows of `input_ids` and `labels`, as `depth_table` takes them.
        batch_size: Rows that are read together, at most, of prompts and answers of the same lengths, so that nothing is
            padded.
    """

    model: PreTrainedModel
    writer: AnswerGenerator
    examples: Sequence[Example]
    batch_size: int

    @staticmethod
    def lengths(example: Example) -> tuple[int, int]:
        """Tokens of prompt and answer."""
        return len(prompt_of(example)), len(answer_of(example))

    def batches(self) -> Iterator[list[Example]]:
        """All examples, in the same order each time."""
        for _, alike in groupby(sorted(self.examples, key=self.lengths), self.lengths):
            yield from chunks(alike, self.batch_size)

    def say(self, batch: Sequence[Example], setting: Setting) -> Any:
        """The output of `generate`, made to say the answers, with logits and steps, and the tokens that it said."""
        answers = torch.tensor([answer_of(example) for example in batch], device=self.model.device)
        prompts = to_model(self.writer.prompts(batch), self.model)
        return answers, say_given(self.model, prompts, answers, self.writer.tokenizer, setting.options)

    def work(self, setting: Setting) -> Work:
        """Each batch is read twice: counted, and against the clock, since counting takes time."""
        found = Work(np.empty((0, 3)), 0, 0.0, 0, [])
        scores = []
        for batch in self.batches():
            # The counter does not know the fused attention of CPUs, nor that of GPUs with fewer heads of keys: it is
            # taken apart into the same products.
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                answers, output = self.say(batch, setting)
            found.flops += counter.get_total_flops()
            scores.append(answer_scores(torch.stack(output.logits, dim=1), answers))
            if setting.num_steps is not None:
                found.steps += output.exit_steps.flatten().tolist()
            wait_for(self.model.device)
            start = time.perf_counter()
            self.say(batch, setting)
            wait_for(self.model.device)
            found.seconds += time.perf_counter() - start
            prompt, answer = self.lengths(batch[0])
            found.num_read += len(batch) * (prompt + answer - 1)  # the last token is said, and not read
        found.scores = np.concatenate(scores)
        return found


def say_given(
    model: PreTrainedModel,
    prompts: Mapping[str, torch.Tensor],
    tokens: torch.LongTensor,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any],
) -> Any:
    """The output of `generate`, with logits and steps, where a model is made to say given tokens.

    Args:
        model: The model, in evaluation mode.
        prompts: Inputs of `generate`.
        tokens: (rows, new tokens).
        tokenizer: Its tokenizer.
        options: Further arguments of `generate`.
    """
    return model.generate(
        **prompts,
        **options,
        do_sample=False,
        max_new_tokens=tokens.shape[1],
        min_new_tokens=tokens.shape[1],  # also of an answer in which an end token stands
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=LogitsProcessorList([SayGiven(tokens)]),
        return_dict_in_generate=True,
        output_logits=True,
    )


def answer_of(example: Example) -> list[int]:
    """The tokens of the answer of an example, its end among them."""
    return list(example["labels"][len(prompt_of(example)) :])


def answer_scores(logits: torch.Tensor, answers: torch.LongTensor) -> np.ndarray:
    """Nats, tokens, and whether all tokens are the likeliest, float64 (rows, 3).

    Args:
        logits: (rows, new tokens, vocabulary), from which the tokens were read.
        answers: (rows, new tokens).
    """
    nats = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), answers.flatten(), reduction="none")
    right = (logits.argmax(dim=-1) == answers).all(dim=1)
    columns = [nats.view_as(answers).sum(dim=1), torch.full_like(right, answers.shape[1], dtype=torch.long), right]
    return torch.stack([column.double() for column in columns], dim=1).cpu().numpy()


def as_examples(texts: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, list[dict[str, list[int]]]]:
    """Texts without answers as examples: the first token is the prompt, at most `MOST_TOKENS` others the answer. Rows
    with media are left out.

    Raises:
        ValueError: No row is left.
    """
    found = {}
    for name, rows in texts.items():
        chosen = [rows[number] for number in range(min(MOST_EXAMPLES, len(rows)))]
        ids = [list(row["input_ids"][: 1 + MOST_TOKENS]) for row in chosen if "media" not in row]
        found[name] = [{"input_ids": it, "labels": [-100, *it[1:]]} for it in ids if len(it) > 1]
    if not any(found.values()):
        raise ValueError(
            "--efficiency needs questions whose answers are texts, or validation texts without media: name a source of "
            "either under data.validation, or leave it out."
        )
    return found


def exit_settings(most: int, criterion: str, thresholds: Sequence[float] | None) -> list[Setting]:
    """A setting for each threshold, of at most so many steps.

    Args:
        most: Core steps.
        criterion: An entry of `EXIT_CRITERIA`.
        thresholds: Those that are tried. Default: `FACTORS` times the criterion's.

    Raises:
        ValueError: A threshold is outside the range of the criterion.
    """
    for it in thresholds or ():
        ExitOptions(criterion, it)
    kind = EXIT_CRITERIA[criterion]
    tried = thresholds or [factor * kind.default_threshold for factor in FACTORS]
    return [Setting(most, criterion, it) for it in sorted(set(tried)) if thresholds or it <= kind.largest_threshold]


def efficiency_table(
    model: PreTrainedModel,
    settings: Sequence[Setting],
    examples: Mapping[str, Sequence[Example]],
    writer: AnswerGenerator,
    batch_size: int = 8,
    has_answers: bool = True,
) -> EfficiencyTable:
    """Measure a model in each setting; it is left in the mode (train or eval) it came in.

    Args:
        model: Called through `generate`.
        settings: Fixed depths and exits.
        examples: Rows by source, of which at most `MOST_EXAMPLES` of each are read.
        writer: Makes batches of prompts.
        batch_size: Rows that are read together, at most.
        has_answers: Whether exact answers are counted; not of texts that were made examples.
    """
    chosen = [rows[number] for rows in examples.values() for number in range(min(MOST_EXAMPLES, len(rows)))]
    runner = EfficiencyRunner(model, writer, chosen, batch_size)
    with evaluating(model):
        runner.say(next(runner.batches()), settings[0])  # the first pass pays for what all others find ready
        works = [runner.work(it) for it in tqdm(settings, desc="efficiency", unit="setting", disable=None)]
    return combine_works(settings, works, has_answers)


def combine_works(settings: Sequence[Setting], works: Sequence[Work], has_answers: bool = True) -> EfficiencyTable:
    """Points, fronts and slopes of what was found in each setting, over the same examples."""
    nats, right = (np.stack([work.scores[:, column] for work in works], axis=1) for column in (0, 2))
    tokens, count = works[0].scores[:, 1:2], len(right)
    columns = np.concatenate([tokens, np.ones_like(tokens), nats, right], axis=1)
    sums = np.concatenate([columns.sum(axis=0, keepdims=True), sums_of_draws(columns)])  # of all examples first
    curves = {"loss": divided(sums[:, 2 : 2 + len(works)], sums[:, :1])}
    if has_answers:
        curves["exact"] = divided(sums[:, 2 + len(works) :], sums[:, 1:2])
    points = []
    for number, (setting, work) in enumerate(zip(settings, works, strict=True)):
        intervals = {"loss": interval_of(curves["loss"][1:, number])}
        if has_answers:
            intervals["exact"] = wilson_interval(int(right[:, number].sum()), count)
        point = EfficiencyPoint(
            *(setting.num_steps, setting.criterion, setting.threshold),
            flops_per_token=work.flops / work.num_read,
            milliseconds_per_token=1000 * work.seconds / work.num_read,
            mean_steps=sum(work.steps) / len(work.steps) if work.steps else None,
            loss=float(curves["loss"][0, number]),
            exact=float(curves["exact"][0, number]) if has_answers else None,
            intervals=intervals,
        )
        points.append(point)
    for measure in curves:
        mark_front(points, measure)
    slopes = slopes_of(points, curves)
    points.sort(key=lambda point: point.flops_per_token)
    return EfficiencyTable(count, int(tokens.sum()), points, slopes)


def mark_front(points: Sequence[EfficiencyPoint], measure: str) -> None:
    """Note at each point whether no other is as good with as few operations, and better in either."""
    sign = 1 if measure == "loss" else -1
    costs = [(point.flops_per_token, sign * getattr(point, measure)) for point in points]
    for point, (flops, value) in zip(points, costs, strict=True):
        if not any(f <= flops and v <= value and (f, v) != (flops, value) for f, v in costs):
            point.on_front.append(measure)


def slopes_of(points: Sequence[EfficiencyPoint], curves: Mapping[str, np.ndarray]) -> list[Slope]:
    """The slopes of fixed depths and of each criterion, where operations differ enough.

    Args:
        points: Those of the columns of the curves, in their order.
        curves: Values of all examples, and of draws, by measure, (1 + draws, points).
    """
    found = []
    for criterion in dict.fromkeys(point.criterion for point in points):
        places = [number for number, point in enumerate(points) if point.criterion == criterion]
        doublings = np.array([math.log2(points[number].flops_per_token) for number in places])
        offsets = doublings - doublings.mean()
        if np.ptp(doublings) < LEAST_DOUBLINGS:
            continue
        for measure, values in curves.items():
            slopes = values[:, places] @ offsets / (offsets @ offsets)
            found.append(Slope(criterion, measure, float(slopes[0]), interval_of(slopes[1:])))
    return found


# --------------------------------------------------------------------------------------------------------------- tables


def efficiency_markdown(table: EfficiencyTable) -> str:
    """The `efficiency_tables` as Markdown."""
    return tables_markdown(efficiency_tables(table))


def efficiency_tables(table: EfficiencyTable) -> list[Table]:
    """A line for each point, and one for each slope, if there are any."""
    header = ["setting", "FLOPs per token", "ms per token", "mean steps", "loss", "exact", "on the front of"]
    lines = []
    for point in table.points:
        exact = "-" if point.exact is None else percent(point.exact, point.intervals["exact"])
        figures = [f"{point.flops_per_token:.4g}", figure_cell(point.milliseconds_per_token)]
        figures += [figure_cell(point.mean_steps, digits=2), figure_cell(point.loss, point.intervals["loss"]), exact]
        lines.append([setting_name(point), *figures, ", ".join(point.on_front) or "-"])
    title = f"Executed operations, by {table.num_examples} examples with answers of {table.num_tokens} tokens"
    tables = [Table(title, header, lines)]
    if table.slopes:
        slopes = [[it.criterion, it.measure, slope_cell(it)] for it in table.slopes]
        tables.append(Table("Change with each doubling of the operations", ["of", "measure", "change"], slopes))
    return tables


def slope_cell(slope: Slope) -> str:
    """A slope with its sign and interval: of the loss in nats a token, of exact answers in points of per cent."""
    factor, digits = (1, 4) if slope.measure == "loss" else (100, 1)
    value, low, high = (f"{factor * it:+.{digits}f}" for it in (slope.value, *slope.interval))
    return f"{value} ({low} to {high})"


def setting_name(point: EfficiencyPoint) -> str:
    """A setting as it is shown."""
    if point.criterion == FIXED:
        return depth_name(point.num_steps) if point.num_steps is None else f"num_steps {point.num_steps}"
    return f"{point.criterion} {point.threshold:g}"
