"""Tasks of lm-evaluation-harness at several depths and with exits, over the same requests. `python -m
evaluation.lm_eval` runs it; lm-eval has to be installed (`make extra`).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import lm_eval
import torch
from lm_eval.api.metrics import bits_per_byte, mean, perplexity, weighted_mean, weighted_perplexity
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from transformers import PreTrainedModel, set_seed

from model.exit_criteria import EXIT_CRITERIA, ExitOptions
from model.terminal import one_line

from .depth import chunks, possible_depths, wait_for
from .efficiency import FIXED, Setting, answer_scores, exit_settings, say_given, setting_name
from .intervals import Interval, ratio_interval, wilson_interval
from .tables import Table, figure_cell, tables_markdown

SEED = 1234
"""Seed of the examples before a question, and of draws, as in lm-evaluation-harness."""
OF_MEANS, OF_RATIOS = (mean, perplexity), (weighted_mean, weighted_perplexity, bits_per_byte)
"""Ways of the harness from the values of examples to that of a task, of which there is an interval."""
Pair = tuple[list[int], list[int]]
"""Tokens of a context, and of what follows."""


class AtSetting:
    """A model as `HFLM` calls it, in one setting.

    Args:
        inner: The model.
        setting: Its depth, and its exits.
        steps: List to which the core steps of each new token are added.
    """

    def __init__(self, inner: PreTrainedModel, setting: Setting, steps: list[int]):
        self.inner, self.setting, self.steps = inner, setting, steps

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output of `forward`, which has no exits."""
        depth = {} if self.setting.num_steps is None else {"num_steps": self.setting.num_steps}
        return self.inner(*args, **kwargs, **depth, use_cache=False)

    def generate(self, return_dict_in_generate: bool = False, **kwargs: Any) -> Any:
        """The output of `generate`; options of depth are those of the setting."""
        output = self.inner.generate(**kwargs | self.setting.options, return_dict_in_generate=True)
        if self.setting.num_steps is not None:
            self.steps += output.exit_steps[output.exit_steps > 0].tolist()  # 0 is behind the end of a text
        return output if return_dict_in_generate else output.sequences


@register_model("recurrent")
class RecurrentLM(HFLM):
    """The model class `recurrent` of lm-evaluation-harness: `hf` at a depth and with exits, both of which may change
    between calls, and with notes of seconds and steps. With exits, a text that is scored is said by `generate`, token
    by token, as `python -m evaluation --efficiency` does it.

    Args:
        pretrained: Folder of a checkpoint, or a model.
        num_steps: Core steps, with exits at most. Default: the model's.
        exit_criterion: An entry of `EXIT_CRITERIA`, or "none".
        exit_threshold: Value of the criterion. Default: the criterion's.
        add_bos_token: Whether contexts begin with the begin token, as texts of training do.
        options: Arguments of `HFLM`, and of `from_pretrained`.

    Raises:
        ValueError: There are exits, and no depth that could vary.
    """

    setting: Setting | None = None

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        num_steps: int | None = None,
        exit_criterion: str | None = None,
        exit_threshold: float | None = None,
        add_bos_token: bool = True,
        **options: Any,
    ):
        super().__init__(pretrained, add_bos_token=add_bos_token, **options)
        exits = ExitOptions(exit_criterion or "none", exit_threshold)
        kind = EXIT_CRITERIA.get(exits.criterion)
        thresholds = None if kind is None else [exits.threshold or kind.default_threshold]
        self.take(depth_settings(self.model, num_steps and [num_steps], exits.criterion, thresholds)[-1])

    def take(self, setting: Setting) -> None:
        """Go on in a setting, and forget what was noted."""
        self.setting, self.steps, self.seconds = setting, [], 0.0

    @property
    def model(self) -> Any:
        """The model in its setting."""
        model = super().model
        return model if self.setting is None else AtSetting(model, self.setting, self.steps)

    @property
    def has_exits(self) -> bool:
        """Whether tokens may take fewer steps than others."""
        return self.setting.criterion != FIXED

    @property
    def mean_steps(self) -> float | None:
        """Core steps of a new token; None without a core."""
        return sum(self.steps) / len(self.steps) if self.steps else self.setting.num_steps

    @contextmanager
    def timed(self) -> Iterator[None]:
        """A context whose seconds are added."""
        wait_for(self.device)
        start = time.perf_counter()
        yield
        wait_for(self.device)
        self.seconds += time.perf_counter() - start

    def loglikelihood(self, requests: list, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Log-likelihood of what follows a context, and whether each of its tokens is the likeliest."""
        with self.timed():
            if not self.has_exits:
                return super().loglikelihood(requests, disable_tqdm or is_quiet())
            return self.score([self.pair(*request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, behind one begin token: `HFLM` puts one before each window, and with
        `add_bos_token` another, which it scores.
        """
        before, self.add_bos_token = self.add_bos_token, False
        try:
            with self.timed():
                if not self.has_exits:
                    return super().loglikelihood_rolling(requests, disable_tqdm or is_quiet())
                texts = [self.windows(*request.args) for request in requests]
                scores = iter(self.score([window for windows in texts for window in windows]))
                return [sum(next(scores)[0] for _ in windows) for windows in texts]
        finally:
            self.add_bos_token = before

    def generate_until(self, requests: list, disable_tqdm: bool = False) -> list[str]:
        """Texts that are generated."""
        with self.timed():
            return super().generate_until(requests, disable_tqdm or is_quiet())

    def pair(self, context: str, continuation: str) -> Pair:
        """A context and what follows as tokens, divided as `HFLM` divides them."""
        if not context:
            before, after = [self.prefix_token_id], self.tok_encode(continuation, add_special_tokens=False)
            return (before, after[1:]) if after[:1] == before else (before, after)
        text = context.rstrip()
        continuation, before = context[len(text) :] + continuation, self.tok_encode(text)
        if self.backend == "seq2seq":
            return before, self.tok_encode(continuation, add_special_tokens=False)
        return before, self.tok_encode(text + continuation)[len(before) :]

    def windows(self, text: str) -> list[Pair]:
        """A text as contexts and what follows, each token followed once, divided as `HFLM` divides it."""
        tokens = self.tok_encode(text)
        return [
            make_disjoint_window(it)
            for it in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
        ]

    def score(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Scores of pairs that are said token by token, those of the same lengths together, so that nothing is padded.

        Raises:
            ValueError: Nothing follows, or more tokens than the model has positions.
        """
        found: list[Any] = [None] * len(pairs)
        fitting = [self.fit(*pair) for pair in pairs]

        def lengths(number: int) -> tuple[int, ...]:
            return tuple(map(len, fitting[number]))

        for _, alike in groupby(sorted(range(len(pairs)), key=lengths), lengths):
            for numbers in chunks(alike, self.batch_size):
                contexts, tokens = (
                    torch.tensor([fitting[number][part] for number in numbers], device=self.device) for part in (0, 1)
                )
                prompts = {"input_ids": contexts, "attention_mask": torch.ones_like(contexts)}
                output = say_given(self.model, prompts, tokens, self.tokenizer, {})
                scores = answer_scores(torch.stack(output.logits, dim=1), tokens)
                for number, (nats, _, right) in zip(numbers, scores.tolist(), strict=True):
                    found[number] = (-nats, bool(right))
        return found

    def fit(self, context: list[int], tokens: list[int]) -> Pair:
        """The end of a context for which there is room."""
        if not 0 < len(tokens) <= self.max_length:
            raise ValueError(f"{len(tokens)} tokens are to be scored; give 1 to {self.max_length} (max_length)")
        room = self.max_length if self.backend == "seq2seq" else self.max_length + 1 - len(tokens)
        return context[-room:], tokens


def is_quiet() -> bool:
    """Whether bars of progress would go to a file, where they are noise."""
    return not sys.stderr.isatty()


def depth_settings(
    model: PreTrainedModel, depths: Iterable[int] | None, criterion: str | None, thresholds: Sequence[float] | None
) -> list[Setting]:
    """The depths, and exits at the largest of them.

    Args:
        model: The model.
        depths: Numbers of core steps. Default: the model's.
        criterion: An entry of `EXIT_CRITERIA`; None or "none" for no exits.
        thresholds: Values of the criterion. Default: some around the criterion's.

    Raises:
        ValueError: There are exits, and no depth that could vary; or a threshold is outside its range.
    """
    config = model.config.get_text_config(decoder=True)
    possible = possible_depths(model, depths or [config.num_steps or config.recurrence.mean_steps], model.name_or_path)
    settings = [Setting(depth) for depth in possible]
    if criterion in (None, "none"):
        return settings
    if not config.has_depths:
        raise ValueError(f"exit_criterion is {criterion!r}, but the depth of this model cannot vary; leave it out")
    return settings + exit_settings(possible[-1], criterion, thresholds)


# ---------------------------------------------------------------------------------------------------------------- tasks


@dataclass
class Metric:
    """A metric of a task."""

    value: float
    interval: Interval | None
    """That of 95 %; None where the metric is no function of means over examples."""


@dataclass
class TaskResult:
    """A task in one setting."""

    num_examples: int
    metrics: dict[str, Metric]
    """By name, behind which that of a filter stands, if there is one."""
    mean_steps: float | None
    """Core steps of a new token; None without a core."""
    seconds: float
    """Seconds in the model."""


@dataclass
class HarnessRow:
    """All tasks in one setting."""

    num_steps: int | None
    criterion: str
    threshold: float | None
    tasks: dict[str, TaskResult]


def load_tasks(names: Sequence[str], include_path: Path | None = None) -> dict[str, Any]:
    """Tasks of the harness by their names.

    Args:
        names: Names of tasks or of groups of tasks, or paths of YAML files.
        include_path: A folder of YAML files of tasks.

    Raises:
        ValueError: There is no such task, or it cannot be read.
    """
    folder = None if include_path is None else str(include_path)
    with wrong_input("the tasks cannot be read by lm-eval"):
        manager = TaskManager(include_path=folder, include_defaults=False)
        if not all(name in manager.all_tasks or Path(name).is_file() for name in names):
            manager = TaskManager(include_path=folder)  # looks through all that the harness has, which takes its time
        return manager.load(list(names))["tasks"]


def evaluate_tasks(
    lm: RecurrentLM,
    tasks: Mapping[str, Any],
    settings: Sequence[Setting],
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> list[HarnessRow]:
    """Results of tasks in each setting, over the same requests, which are built once.

    Args:
        lm: The model.
        tasks: Those of `load_tasks`.
        settings: Depths and exits.
        limit: Most examples of a task.
        num_fewshot: Examples before a question. Default: the task's.

    Raises:
        ValueError: The harness or the model cannot run a task.
    """
    rows = [HarnessRow(it.num_steps, it.criterion, it.threshold, {}) for it in settings]
    for name, task in tasks.items():
        with wrong_input(f"task {name!r} cannot be scored by lm-eval"):
            prepare(task, num_fewshot)
            for setting, row in zip(settings, rows, strict=True):
                row.tasks[name] = evaluate_task(lm, name, task, setting, limit)
                task.build_all_requests = forget_responses(task)
    return rows


@contextmanager
def wrong_input(what: str) -> Iterator[None]:
    """A context in which errors that the harness raises for wrong input are a ValueError of one line."""
    try:
        yield
    except (ArithmeticError, AssertionError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
        raise ValueError(f"{what}: {one_line(repr(error))[:300]}") from error


def prepare(task: Any, num_fewshot: int | None) -> None:
    """Sets the number of examples before a question, which is left as it is where the task says 0, and their seed."""
    own = task.get_config("num_fewshot")
    if own != 0:
        task.set_config("num_fewshot", (own or 0) if num_fewshot is None else num_fewshot)
    task.set_fewshot_seed(SEED)


def forget_responses(task: Any) -> Callable[..., None]:
    """A function in the place of the one that builds the requests of a task, for one that has them: it takes their
    responses out.
    """

    def forget(**options: Any) -> None:
        for request in task.instances:
            request.resps, request.filtered_resps = [], {}

    return forget


def evaluate_task(lm: RecurrentLM, name: str, task: Any, setting: Setting, limit: int | None) -> TaskResult:
    """The result of a task in a setting."""
    lm.take(setting)
    set_seed(SEED)
    found = lm_eval.evaluate(lm, {"tasks": {name: task}}, limit=limit, bootstrap_iters=0)
    samples, metrics = found["samples"][name], {}
    for key, value in found["results"][name].items():
        metric, _, filtered = key.partition(",")
        if filtered and not metric.endswith("_stderr"):
            values = [sample[metric] for sample in samples if sample["filter"] == filtered and metric in sample]
            interval = metric_interval(values, task.aggregation().get(metric, mean))
            metrics[metric if filtered == "none" else key] = Metric(float(value), interval)
    return TaskResult(found["n-samples"][name]["effective"], metrics, lm.mean_steps, lm.seconds)


def metric_interval(values: Sequence[Any], aggregate: Callable[[list], float]) -> Interval | None:
    """The interval of a metric from its values for examples: Wilson's where these are right or wrong; a bootstrap's of
    other means, and of quotients of sums, whose values are pairs; None of what else there is.
    """
    if aggregate is mean and set(values) <= {0, 1}:
        return wilson_interval(int(sum(values)), len(values))
    if aggregate in OF_MEANS:
        ends = [aggregate([end]) for end in ratio_interval(values)]
    elif aggregate in OF_RATIOS:
        ends = [aggregate([(end, 1.0)]) for end in ratio_interval(*zip(*values, strict=True))]
    else:
        return None
    return Interval(*sorted(ends))


def harness_markdown(rows: Sequence[HarnessRow]) -> str:
    """A table for each task, with a line for each setting."""
    tables = []
    for name, first in rows[0].tasks.items():
        lines = []
        for row in rows:
            it = row.tasks[name]
            metrics = [figure_cell(metric.value, metric.interval) for metric in it.metrics.values()]
            figures = [*metrics, figure_cell(it.mean_steps, digits=2), figure_cell(it.seconds, digits=2)]
            lines.append([setting_name(row), *figures])
        tables.append(
            Table(f"{name} ({first.num_examples})", ["setting", *first.metrics, "mean steps", "seconds"], lines)
        )
    return tables_markdown(tables)
