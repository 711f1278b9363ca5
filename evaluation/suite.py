"""One number for a model: the mean of many tasks, each centred by its chance level, in the way of DCLM's CORE
(`python -m evaluation.suite runs/recurrent_lm --tasks my/suite.yaml --num-steps 1 8`).
"""

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import datasets
import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from configs.loader import Given, Layout, option_values, read_yaml
from configs.runs import build
from dataset_loading import DataConfig, SourceConfig, build_collator, build_examples
from dataset_loading.packing.documents import encode_batch
from inference import arguments
from inference.devices import device_report
from inference.loading import add_loading_arguments, load_as_asked
from inference.output import whole_folder, writable_folder, write_result
from inference.prompts import prompt_limit
from model import tokenizer_of
from model.chat import TARGET_PREFIX
from model.terminal import one_line

from .depth import DepthEvaluator, check_lengths, evaluating, possible_depths
from .suite_scores import TaskScores, suite_content, suite_markdown

logger = logging.getLogger("evaluation.suite")  # __name__ is __main__ when run with -m

DEFAULT_TASKS = Path(__file__).parents[1] / "configs" / "suites" / "generated.yaml"
EXAMPLES_PER_TASK = 256
NEEDED = {"answers": "source", "choices": "path", "lm_eval": "path"}


@dataclass
class SuiteTask:
    """A task of a suite."""

    kind: Literal["answers", "choices", "lm_eval"]
    """How it is scored: `answers`, right where each token of the answer is the likeliest; `choices`, right where the
    right one has the highest likelihood per token; `lm_eval`, by lm-evaluation-harness."""
    name: str | None = None
    """Name in tables; by default that of the source, or of the file."""
    source: SourceConfig | None = None
    """answers: prompts and answers, as under `data.validation`."""
    path: str | None = field(default=None, metadata={"is_path": True})
    """choices: a .jsonl whose lines have `prompt`, `choices` (at least two texts) and `answer` (the number of the right
    one, from 0); lm_eval: a .yaml of a task."""
    separator: str = " "
    """choices: text between prompt and choice."""
    metric: str = "acc"
    """lm_eval: what its examples are scored by, such as `acc_norm` or `exact_match`."""
    chance: float | None = None
    """Score of a guess, at least 0 and below 1; by default that of a choice among so many, else 0."""

    def __post_init__(self) -> None:
        if getattr(self, NEEDED[self.kind]) is None:
            raise ValueError(f"a task of kind {self.kind} needs {NEEDED[self.kind]}; give it")
        if self.source is not None and not (self.source.has_answers and not self.source.streaming):
            raise ValueError(f"source {self.source.label!r} has no answers in memory; give prompts and answers")
        if self.chance is not None and not 0 <= self.chance < 1:
            raise ValueError(f"chance is {self.chance}; give at least 0 and less than 1")

    @property
    def label(self) -> str:
        """The name in tables and files."""
        return self.name or (Path(self.path).stem if self.source is None else self.source.label)


@dataclass
class SuiteConfig:
    """The tasks of a suite."""

    tasks: list[SuiteTask] = field(default_factory=list)
    """Tasks, each of the same weight."""

    def __post_init__(self) -> None:
        labels = [task.label for task in self.tasks]
        twice = [label for label in labels if labels.count(label) > 1]
        if twice or not labels:
            problem = f"two tasks are called {twice[0]!r}; give each a name" if twice else "there is no task; give some"
            raise ValueError(f".tasks: {problem}")


def main(argv: Sequence[str] | None = None) -> int:
    """Score a checkpoint by a suite; writes tables to standard output, and JSON, Markdown and a line for each example.

    Raises:
        SystemExit: Code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # a bar in a file is noise
    logger.info("%s", device_report())
    with parser.one_line_errors():
        tasks = read_suite(args.tasks)
        model, processor = load_as_asked(args.checkpoint, args)
        output = writable_folder(args.output or Path(args.checkpoint) / "evaluation")
        steps = args.num_steps or [model.config.num_steps or model.config.get_text_config().recurrence.mean_steps]
        depths = possible_depths(model, steps, args.checkpoint)
        evaluate_suite = SuiteEvaluator(model, processor, depths, args)
        found = {task.label: evaluate_suite(task, number) for number, task in enumerate(tasks)}
        content = suite_content({depth: {name: of[depth] for name, of in found.items()} for depth in depths})
        about = {"checkpoint": args.checkpoint, "suite": str(args.tasks), "limit": args.limit}
        write_result(suite_markdown(content))
        with whole_folder(output) as made:
            (made / "suite.json").write_text(json.dumps(about | content, indent=2) + "\n", encoding="utf-8")
            (made / "suite.md").write_text(suite_markdown(content), encoding="utf-8")
            (made / "suite_examples.jsonl").write_text("".join(example_lines_of(found)), encoding="utf-8")
            names = sorted(path.name for path in made.iterdir())
        write_result("\nwritten to " + ", ".join(str(output / name) for name in names) + "\n")
    return 0


def build_parser() -> arguments.OneLineParser:
    """The command line."""
    parser = arguments.OneLineParser(
        prog="evaluation.suite",
        description="The scores of a model in the tasks of a suite, each centred so that a guess has 0 and what is "
        "right 100, and their mean, with intervals of 95 %, at one or several depths.",
    )
    add_loading_arguments(parser)
    parser.add_argument("--tasks", type=Path, default=DEFAULT_TASKS, help="YAML file of the suite")
    parser.add_argument(
        "--num-steps", type=arguments.core_steps, nargs="+", help="times the core is applied; default: the model's"
    )
    parser.add_argument("--batch-size", type=arguments.batch_rows, default=32, help="rows in a forward pass")
    parser.add_argument("--limit", type=arguments.row_limit, default=EXAMPLES_PER_TASK, help="examples of a task")
    parser.add_argument(
        "--max-prompt-tokens",
        type=arguments.prompt_tokens,
        help="most tokens of a question with its answer; default: as many as the model has positions",
    )
    parser.add_argument("--output", type=Path, help="folder for the files; default: evaluation in the given folder")
    return parser


def read_suite(path: Path) -> list[SuiteTask]:
    """The tasks of a YAML file; paths in it are relative to it.

    Raises:
        ValueError: It cannot be read, or a key, a type or a value is wrong.
    """
    layout = Layout(("suite",), "suite", (("suite", SuiteConfig),), ())
    given = Given([], read_yaml(path), str(path))
    return build(SuiteConfig, option_values([given], layout)["suite"], "suite").tasks


def example_lines_of(found: dict[str, dict[int | None, TaskScores]]) -> Iterator[str]:
    """A line of JSON for each example at each depth."""
    for name, depths in found.items():
        for depth, task in depths.items():
            for number, score in enumerate(task.scores.tolist()):
                line = {"num_steps": depth, "task": name, "example": number, "score": score}
                yield json.dumps(line, ensure_ascii=False) + "\n"


class SuiteEvaluator:
    """Scores one task after the other, at all depths.

    Args:
        model: The language model.
        processor: Its tokenizer or processor.
        depths: Numbers of core steps; [None] where there is no core.
        args: `batch_size`, `limit` and `max_prompt_tokens` of the command line.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: PreTrainedTokenizerBase | ProcessorMixin,
        depths: Sequence[int | None],
        args: argparse.Namespace,
    ):
        self.model, self.processor, self.depths, self.limit = model, processor, depths, args.limit
        self.longest = prompt_limit(model, args.max_prompt_tokens)
        collate = build_collator(processor, model.config.is_encoder_decoder)
        self.evaluator = DepthEvaluator(model, collate, None, args.batch_size, None)

    def __call__(self, task: SuiteTask, number: int) -> dict[int | None, TaskScores]:
        """The scores of a task, the one of this number of the suite, by depth.

        Raises:
            ValueError: Its data cannot be read, or an example is too long.
        """
        prepare = {"answers": self.of_answers, "choices": self.of_choices, "lm_eval": self.of_harness}[task.kind]
        score, chance = prepare(task)
        chance = chance if task.chance is None else task.chance
        with evaluating(self.model):
            return {depth: TaskScores(np.array(score(depth), dtype=float), chance, number) for depth in self.depths}

    def of_answers(self, task: SuiteTask) -> tuple[Callable[[int | None], list], float]:
        """A function that scores the answers of a source at a depth, and the score of a guess."""
        rows = build_examples(task.source, DataConfig(), self.processor, self.limit)
        self.check(task, rows)
        if any(row.get("modality", "text").startswith(TARGET_PREFIX) for row in rows):
            raise ValueError(f"task {task.label!r} has answers that are media; leave it out, or give another direction")
        return lambda depth: [answer.is_right for answer in self.evaluator.answer(rows, depth)], 0.0

    def of_choices(self, task: SuiteTask) -> tuple[Callable[[int | None], list], float]:
        """A function that scores questions with choices at a depth, and the score of a guess."""
        questions = read_choices(Path(task.path))[: self.limit]
        prompts = [question["prompt"] for question in questions for _ in question["choices"]]
        texts = [choice for question in questions for choice in question["choices"]]
        encoded = encode_batch(
            {"prompt": prompts, "answer": texts}, tokenizer_of(self.processor), task.separator, "answer"
        )
        rows = [
            {"input_ids": ids[:-1].tolist(), "labels": [-100] * start + ids[start:-1].tolist()}  # without the end token
            for ids, start in zip(encoded["tokens"], encoded["loss_start"], strict=True)
        ]
        self.check(task, rows)
        counts = [len(question["choices"]) for question in questions]

        def score(depth: int | None) -> list[bool]:
            nats, tokens = self.evaluator.score_texts(rows, depth).tokens.sum(dim=1).T
            by_question = (nats / tokens).split(counts)
            return [int(it.argmin()) == one["answer"] for it, one in zip(by_question, questions, strict=True)]

        return score, float(np.mean([1 / count for count in counts]))

    def of_harness(self, task: SuiteTask) -> tuple[Callable[[int | None], list], float]:
        """A function that lets lm-evaluation-harness score its own task at a depth, and 0: it names no chance level."""
        try:
            from lm_eval.models.huggingface import HFLM
        except ImportError as error:
            raise ValueError(
                f"task {task.label!r} is of kind lm_eval, and lm-eval is not installed: run `make extra`, or leave the "
                "task out."
            ) from error
        wrapped = HFLM(
            pretrained=self.model,
            tokenizer=tokenizer_of(self.processor).name_or_path,  # loaded anew, since it is told to add a begin token
            backend="seq2seq" if self.model.config.is_encoder_decoder else "causal",
            batch_size=self.evaluator.batch_size,
            add_bos_token=True,
        )
        return lambda depth: harness_scores(wrapped, task, depth, self.limit), 0.0

    def check(self, task: SuiteTask, rows: Sequence[dict]) -> None:
        """Raises ValueError for examples that are too long, and for none."""
        check_lengths({task.label: rows}, self.longest)
        if not len(rows):
            raise ValueError(f"task {task.label!r} has no example; give some")


def read_choices(path: Path) -> list[dict[str, Any]]:
    """Questions with choices, one a line of a .jsonl file.

    Raises:
        ValueError: The file cannot be read, or a line is no such question.
    """
    questions = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            question = json.loads(line)
            prompt, choices, answer = (question[name] for name in ("prompt", "choices", "answer"))
            texts = [prompt, *choices]
            if not (all(isinstance(text, str) and text for text in texts) and len(choices) > 1):
                raise ValueError("prompt and at least two choices must be texts")
            if not (type(answer) is int and 0 <= answer < len(choices)):
                raise ValueError(f"answer is {answer!r}, not the number of one of {len(choices)} choices, from 0")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} line {number} is no question with choices: {error!r}; correct it.") from error
        questions.append(question)
    return questions


def harness_scores(wrapped: Any, task: SuiteTask, depth: int | None, limit: int) -> list[float]:
    """The metric of each example of a task of lm-evaluation-harness, in their order.

    Args:
        wrapped: Its `HFLM` of the model.
        task: The task, a file.
        depth: Core steps.
        limit: Most examples.

    Raises:
        ValueError: The harness cannot read or run the task, or the task is several, or has no such metric.
    """
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    try:
        with depth_by_default(wrapped.model, depth):
            found = simple_evaluate(
                model=wrapped,
                tasks=[task.path],
                task_manager=TaskManager(include_defaults=False),
                gen_kwargs=None if depth is None else {"num_steps": depth},
                bootstrap_iters=0,
                limit=limit,
            )["samples"]
        (samples,) = found.values()
        samples = sorted(samples, key=lambda sample: sample["doc_id"])
        return [float(sample[task.metric]) for sample in samples]
    except (KeyError, ValueError, TypeError, OSError) as error:
        raise ValueError(f"task {task.label!r} cannot be scored by lm-eval: {one_line(repr(error))[:300]}") from error


@contextmanager
def depth_by_default(model: PreTrainedModel, depth: int | None) -> Iterator[None]:
    """A context in which a model takes so many core steps where nobody names a number."""
    before = model.config.num_steps
    model.config.num_steps = before if depth is None else depth
    try:
        yield
    finally:
        model.config.num_steps = before


if __name__ == "__main__":
    sys.exit(main())
