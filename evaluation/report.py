"""One page of all that is known of a run: `python -m evaluation.report runs/recurrent_lm`. It reads what training and
evaluation have left in the folder, and runs no model.
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import io
import json
import logging
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

from configs.runs import find_run_config
from configs.strict_yaml import parse_yaml
from inference import arguments
from inference.checkpoints import is_codec
from inference.output import whole_file, write_result
from model.versions import describe_versions

from .controls import ControlTable, score_and_gap_tables, sentences_of
from .depth import DepthRow
from .dynamics_report import verdict_sentence
from .efficiency import FIXED, EfficiencyTable, efficiency_tables
from .event_logs import Logs, is_sample, read_logs
from .iteration import Verdict
from .media_generation import MediaRow, MediaTable
from .plots import new_figure
from .report_parts import (
    Card,
    Cards,
    MediaBudget,
    MissingError,
    Part,
    Picture,
    Report,
    Section,
    Skipped,
    Words,
    report_html,
    report_markdown,
)
from .tables import Table, depth_name, depth_tables, media_tables

logger = logging.getLogger("evaluation.report")  # __name__ is __main__ when run with -m

Value = TypeVar("Value")

TRAIN = "python pretrain.py --config FILE"
TRAIN_WITH_LOGS = f"{TRAIN} --training.report_to tensorboard"
MOST_CARDS, MOST_ANSWERS = 24, 6
"""Samples of training, and answers of each source, that are shown."""
MOST_CURVES = 8
SHOWN_POINTS = 10
"""Points of a curve that stand in its table."""
LOSSES = ("train/loss", "eval/loss")
SPEEDS = ("train/tokens_per_second", "train/core_steps_per_second")
SOURCE_KEYS = ("kind", "task", "path", "paths", "num_rows", "weight", "difficulty", "direction")


def main(argv: Sequence[str] | None = None) -> int:
    """Write the report as HTML and Markdown, and their paths to standard output.

    Raises:
        SystemExit: Code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    with parser.one_line_errors():
        output = args.output or args.run / "report.html"
        check_paths(args.run, output)
        report = build_report(args.run)
        beside = output.with_suffix(".md")
        with whole_file(output) as page, whole_file(beside) as text:
            page.write_text(report_html(report), encoding="utf-8")
            text.write_text(report_markdown(report, output.absolute().parent), encoding="utf-8")
        for it in report.skipped:
            write_result(f"skipped {it.what}: {it.reason}" + f" ({it.command})" * bool(it.command) + "\n")
        write_result(f"written to {output}, {beside}\n")
    return 0


def build_parser() -> arguments.OneLineParser:
    """The command line."""
    parser = arguments.OneLineParser(
        prog="evaluation.report",
        description="All that is known of a run on one page, HTML that needs nothing else and Markdown: configuration, "
        "model, data, losses, evaluation, samples, speed and versions, from the files that training and evaluation "
        "have left. Nothing is evaluated: what is not there is listed with the command that makes it.",
    )
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--output", type=Path, help="HTML file; default: report.html in the folder of the run")
    return parser


def check_paths(run: Path, output: Path) -> None:
    """Raise ValueError for a folder that is no run's, and for an output that cannot be one."""
    if not run.is_dir():
        raise ValueError(f"{run} {'is a file' if run.exists() else 'does not exist'}: give the folder of a run.")
    if not any((run / name).exists() for name in ("config.yaml", "config.json", "evaluation", "runs")):
        raise ValueError(f"{run} holds nothing of a run (no config.yaml, weights or evaluation): give a run's folder.")
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output} is no name for a page: end it in .html.")
    if not output.absolute().parent.is_dir():
        raise ValueError(f"--output {output}: the folder {output.parent} does not exist; make it.")


def build_report(run: Path) -> Report:
    """The report of the folder of a run; a section that cannot be made is among what is skipped."""
    results = Results(run)
    sections = []
    for title, build in SECTIONS.items():
        parts = results.attempt(title, lambda build=build: list(build(results)))
        sections += [Section(title, parts)] if parts else []
    made = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return Report(run.absolute().name, f"{run}, {made}", sections, results.skipped)


class Results:
    """The files of a run, and a list of those that are missing."""

    def __init__(self, run: Path):
        self.run, self.skipped, self.budget = run, [], MediaBudget()

    def attempt(self, what: str, make: Callable[[], Value]) -> Value | None:
        """The result of a function; or None, and a line among what is skipped."""
        try:
            return make()
        except MissingError as error:
            self.skipped.append(Skipped(what, error.reason, error.command))
        except (ValueError, LookupError, TypeError, AttributeError) as error:  # a file of another shape than ours
            logger.debug("Where it failed:", exc_info=True)
            self.skipped.append(Skipped(what, f"a file of it is damaged ({type(error).__name__}: {error})"))
        return None

    def command(self, options: str = "", module: str = "evaluation") -> str:
        """A command that makes something of this run."""
        return f"python -m {module} {shlex.quote(str(self.run))}{options}"

    def read(self, name: str, parse: Callable[[str], Value], command: str) -> Value:
        """The content of a file.

        Raises:
            MissingError: It is not there, or `parse` finds that it is damaged.
        """
        path = self.run / name
        try:
            return parse(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise MissingError(f"{name} is not there", command) from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise MissingError(f"{name} is damaged ({place}: {first['msg']})", command) from error
        except (OSError, ValueError, LookupError, TypeError, AttributeError, yaml.YAMLError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise MissingError(f"{name} is damaged ({reason})", command) from error

    def picture(self, name: str, label: str, command: str) -> list[Picture]:
        """The picture in a file; none, and a line among what is skipped, if it is not there or is damaged."""

        def make() -> Picture:
            path = self.run / name
            if not path.is_file():
                raise MissingError(f"{name} is not there", command)
            return self.budget.picture(path.read_bytes(), label, path.absolute())

        picture = self.attempt(f"picture {name}", make)
        return [] if picture is None else [picture]

    @cached_property
    def logs(self) -> Logs:
        """The logs for TensorBoard."""
        logs, faults = read_logs(self.run / "runs")
        self.skipped += [Skipped("a log of training", fault) for fault in faults]
        return logs

    @cached_property
    def config(self) -> str:
        """The resolved configuration, as YAML."""
        path = find_run_config(self.run)
        name = "config.yaml" if path is None or path.parent == self.run else str(path.absolute())

        def parse(text: str) -> str:
            mapping_of(parse_yaml(text))
            return text

        return self.read(name, parse, TRAIN)

    @cached_property
    def depth_rows(self) -> list[DepthRow]:
        """The rows of `python -m evaluation`."""

        def parse(text: str) -> list[DepthRow]:
            rows = parse_rows(DepthRow, json.loads(text)["rows"])
            depth_tables(rows)  # whether the rows fit each other
            return rows

        return self.read("evaluation/depth.json", parse, self.evaluate())

    @cached_property
    def example_lines(self) -> list[dict[str, Any]]:
        """The scores of single examples."""

        def parse(text: str) -> list[dict[str, Any]]:
            lines = [json.loads(line) for line in text.splitlines()]
            for line in lines:
                line["num_steps"], line["source"], line["row" if "row" in line else "question"]
            return lines

        return self.read("evaluation/depth_examples.jsonl", parse, self.evaluate())

    @cached_property
    def efficiency(self) -> EfficiencyTable:
        """The table of `python -m evaluation --efficiency`."""

        def parse(text: str) -> EfficiencyTable:
            (table,) = parse_rows(EfficiencyTable, [json.loads(text)])
            efficiency_tables(table)
            return table

        return self.read("evaluation/efficiency.json", parse, self.evaluate(" --efficiency"))

    def evaluate(self, options: str = "") -> str:
        """The command that evaluates this run at depths, if it is one that has them."""
        if is_codec(self.run):
            raise MissingError("this is a codec, whose scores the evaluation writes to standard output", self.command())
        return self.command(f" --num-steps 1 2 4 8{options}")


def if_there(results: Results, name: str) -> Any | None:
    """An attribute of results, or None where it is missing, as the section says that is made of it."""
    try:
        return getattr(results, name)
    except MissingError:
        return None


def mapping_of(content: Any) -> dict[str, Any]:
    """The content of a file, if it is a mapping; ValueError for anything else."""
    if not isinstance(content, dict):
        raise ValueError("it holds no mapping")
    return content


def parse_rows(kind: type[Value], content: Any) -> list[Value]:
    """A list of plain values as one of dataclasses; pydantic's ValidationError says what does not fit."""
    return TypeAdapter(list[kind], config=ConfigDict(arbitrary_types_allowed=True)).validate_python(content)


# ------------------------------------------------------------------------------------------------------------- sections


def training_section(results: Results) -> Iterator[Part]:
    """The progress of the training, and its last figures."""
    state = results.read("trainer_state.json", lambda text: mapping_of(json.loads(text)), TRAIN)
    last: dict[str, Any] = {}
    for line in state.get("log_history", []):
        last |= line
    lines = [["steps", f"{state.get('global_step', '-')} of {state.get('max_steps', '-')}"]]
    lines += [["epochs", f"{state['epoch']:.4g}"]] if isinstance(state.get("epoch"), float) else []
    names = ("loss", "eval_loss", "best_metric")
    lines += [[name, f"{last[name]:.4f}"] for name in names if isinstance(last.get(name), float)]
    rows = if_there(results, "depth_rows")
    if rows:
        lines.append(["evaluated at", ", ".join(depth_name(row.num_steps) for row in rows) + " core steps"])
    yield Table("", ["", "last value"], lines)


def configuration_section(results: Results) -> Iterator[Part]:
    """The resolved configuration, folded away."""
    yield Words(results.config, is_verbatim=True, folded_under="config.yaml, which alone repeats the run")


def model_section(results: Results) -> Iterator[Part]:
    """Sizes by part, as training has logged them; operations at fixed depths, if they were counted."""
    if "train/model_size" not in results.logs.texts:
        raise MissingError("training has logged no sizes to TensorBoard", TRAIN_WITH_LOGS)
    lines = results.logs.texts["train/model_size"][1].splitlines()
    rows = [line.removeprefix("|").removesuffix("|").split("|") for line in lines if line.startswith("|")]
    cells = [[cell.strip() for cell in row] for row in rows]
    yield Table("Parameters", cells[0], cells[2:])
    yield from (Words(line) for line in lines if line and not line.startswith("|"))
    table = if_there(results, "efficiency")
    points = [it for it in table.points if it.criterion == FIXED] if table else []
    if points:
        body = [[depth_name(it.num_steps), f"{it.flops_per_token:.4g}"] for it in points]
        yield Table("Operations that were executed", ["core steps", "FLOPs per token"], body)


def data_section(results: Results) -> Iterator[Part]:
    """The sources of the configuration, and what of them was evaluated."""
    content = mapping_of(parse_yaml(results.config)).get("data") or {}
    lines = []
    for role in ("train", "validation"):
        for source in content.get(role) or []:
            name = source.get("name") or source.get("task") or source.get("path") or source.get("kind")
            known = [f"{key} {source[key]}" for key in SOURCE_KEYS if source.get(key) not in (None, [], 1.0)]
            lines.append([str(name), role, ", ".join(known)])
    yield Table("Sources", ["source", "role", "what it is"], lines)
    counts: dict[str, list[float]] = {}
    first = None
    for line in if_there(results, "example_lines") or []:
        first = line["num_steps"] if first is None else first
        if line["num_steps"] == first:
            numbers = counts.setdefault(line["source"], [0, 0, 0])
            kind = "row" in line
            for place, number in enumerate((kind, line.get("tokens", 0), not kind)):
                numbers[place] += number
    if counts:
        body = [[name, *(f"{int(number):,}" for number in numbers)] for name, numbers in counts.items()]
        yield Table("Evaluated", ["source", "rows", "tokens", "questions"], body)


def losses_section(results: Results) -> Iterator[Part]:
    """Curves of the losses, and some of their points."""
    curves = {name: curve for name in loss_names(results.logs) if (curve := results.logs.curve(name))}
    if not curves:
        raise MissingError("training has logged no loss to TensorBoard", TRAIN_WITH_LOGS)
    figure = new_figure(9, 4)
    axes = figure.subplots()
    for name, curve in curves.items():
        axes.plot(
            *zip(*curve, strict=True), label=name, ls="-" if name in LOSSES else "--", marker="." * (len(curve) < 30)
        )
    axes.set(xlabel="optimizer steps", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, dpi=110)
    yield results.budget.picture(stream.getvalue(), "losses by optimizer step")
    for name in filter(curves.get, LOSSES):
        curve = curves[name]
        count = min(SHOWN_POINTS, len(curve))
        shown = [curve[round(place * (len(curve) - 1) / max(1, count - 1))] for place in range(count)]
        yield Table(name, ["step", *(str(step) for step, _ in shown)], [["loss", *(f"{it:.4f}" for _, it in shown)]])


def loss_names(logs: Logs) -> list[str]:
    """Names of the curves that are drawn: the losses, and those of single sources and depths."""
    further = [
        name for name in logs.curves if "loss" in name.split("/")[-1] and name not in (*LOSSES, "train/train_loss")
    ]
    return [*LOSSES, *further[: MOST_CURVES - len(LOSSES)]]


def depth_section(results: Results) -> Iterator[Part]:
    """The tables of depth.json."""
    yield from depth_tables(results.depth_rows)
    yield from results.picture("evaluation/depth.png", "what depth buys", results.evaluate())


def controls_section(results: Results) -> Iterator[Part]:
    """The tables of controls.json, and its sentences."""
    command = results.evaluate(" --controls")

    def parse(text: str) -> list[Part]:
        parts: list[Part] = []
        for table in parse_rows(ControlTable, json.loads(text)["tables"]):
            parts += [*score_and_gap_tables(table), *map(Words, sentences_of(table))]
        return parts

    yield from results.read("evaluation/controls.json", parse, command)
    yield from results.picture("evaluation/controls.png", "schedules of steps, and parts of the gap", command)


def efficiency_section(results: Results) -> Iterator[Part]:
    """The tables of efficiency.json."""
    yield from efficiency_tables(results.efficiency)
    command = results.evaluate(" --efficiency")
    yield from results.picture(
        "evaluation/efficiency.png", "loss and exact answers against operations and time", command
    )


def media_section(results: Results) -> Iterator[Part]:
    """The tables of media.json, and contact sheets."""
    command = results.evaluate()

    def parse(text: str) -> list[Table]:
        content = json.loads(text)
        return media_tables(MediaTable(parse_rows(MediaRow, content["rows"]), content["real"], {}))

    generates = any(f"-> {kind}" in (if_there(results, "config") or "") for kind in ("image", "audio"))
    if not generates and not (results.run / "evaluation/media.json").exists():
        raise MissingError("no source of the run asks for images or audio")
    yield from results.read("evaluation/media.json", parse, command)
    for path in sorted((results.run / "evaluation").glob("media*.png")):
        yield from results.picture(f"evaluation/{path.name}", path.stem, command)


def dynamics_section(results: Results) -> Iterator[Part]:
    """The verdict of `python -m evaluation.dynamics`, its pictures and sounds."""
    command = results.command(' --prompt "Once"', "evaluation.dynamics")

    def parse(text: str) -> list[Part]:
        content = json.loads(text)
        (verdict,) = parse_rows(Verdict, [content["verdict"]])
        exits = [
            [name, f"{it['threshold']:g}", f"{sum(it['steps']) / len(it['steps']):.2f}"]
            for name, it in content["exits"].items()
        ]
        prompt = (
            f"Prompt: {content['prompt']!r}, {len(content['tokens'])} positions, {content['num_steps']} core steps."
        )
        exits = Table("Core steps after which a position would exit", ["criterion", "threshold", "mean"], exits)
        return [Words(prompt), Words(f"The iteration {verdict_sentence(verdict)}."), exits]

    yield from results.read("dynamics/dynamics.json", parse, command)
    for name, label in {"dynamics": "steps of the core", "lens": "the likeliest next token after each step"}.items():
        yield from results.picture(f"dynamics/{name}.png", label, command)
    if (results.run / "dynamics/items.png").exists():
        yield from results.picture("dynamics/items.png", "what is generated, by core steps", command)
    for path in sorted((results.run / "dynamics").glob("item_*.wav")):
        sound = results.attempt(
            f"sound {path.name}", lambda path=path: results.budget.sound(path.read_bytes(), path.stem)
        )
        yield from [] if sound is None else [sound]


def samples_section(results: Results) -> Iterator[Part]:
    """The samples of the training: texts, with what the model saw and heard."""
    logs, cards = results.logs, {}
    for name, (step, text) in logs.texts.items():
        if is_sample(name):
            cards[name] = Card(f"{short(name)}, step {step}", textwrap.dedent(text))
    makers = {**dict.fromkeys(logs.images, results.budget.picture), **dict.fromkeys(logs.sounds, results.budget.sound)}
    for name, (step, content) in {**logs.images, **logs.sounds}.items():
        group = "/".join(name.split("/")[:3])
        card = cards.setdefault(group, Card(f"{short(group)}, step {step}"))
        options = {"is_small": True} if name in logs.images else {}
        medium = results.attempt(short(name), partial(makers[name], content, short(name), **options))
        card.media += [] if medium is None else [medium]
    if not cards:
        raise MissingError("training has logged no samples to TensorBoard", TRAIN_WITH_LOGS)
    if len(cards) > MOST_CARDS:
        results.skipped.append(Skipped("further samples", f"{len(cards)} were logged, and {MOST_CARDS} are shown"))
    yield Cards(list(cards.values())[:MOST_CARDS])


def short(name: str) -> str:
    """A name of TensorBoard without what all samples share."""
    return name.removeprefix("train/")


def answers_section(results: Results) -> Iterator[Part]:
    """References and answers at each depth, the first of each source."""
    found: dict[str, dict[int, dict[str, str]]] = {}
    for line in results.example_lines:
        if "question" in line and line["question"] < MOST_ANSWERS and line.get("generated") is not None:
            row = found.setdefault(line["source"], {}).setdefault(
                line["question"], {"reference": str(line["reference"])}
            )
            row[f"{depth_name(line['num_steps'])} steps"] = f"{line['generated']} {'✓' if line['is_right'] else '✗'}"
    if not found:
        raise MissingError("no answers were generated: there are no questions, or --no-texts", results.evaluate())
    for source, rows in found.items():
        header = list(dict.fromkeys(name for row in rows.values() for name in row))
        yield Table(source, header, [[row.get(name, "-") for name in header] for row in rows.values()])


def speed_section(results: Results) -> Iterator[Part]:
    """Speed of the training, and of a forward pass at each depth."""
    body = []
    for name in SPEEDS:
        values = sorted(value for _, value in results.logs.curve(name))
        if values:
            body.append([short(name), f"{values[len(values) // 2]:,.1f}", f"{results.logs.curve(name)[-1][1]:,.1f}"])
    runtime = results.logs.curve("train/train_runtime")
    if runtime:
        body.append(["seconds of training", "-", f"{runtime[-1][1]:,.1f}"])
    if not body:
        raise MissingError("training has logged no speed to TensorBoard", TRAIN_WITH_LOGS)
    yield Table("Training", ["", "median", "last"], body)
    rows = if_there(results, "depth_rows")
    if rows:
        body = [[depth_name(row.num_steps), f"{row.milliseconds_per_token:.4f}"] for row in rows]
        yield Table("Forward passes of the evaluation", ["core steps", "ms per token"], body)


def environment_section(results: Results) -> Iterator[Part]:
    """Versions, when it was trained, and those that have made the report."""

    def parse(text: str) -> list[list[str]]:
        _, found, versions = text.partition("\n## Versions\n")
        if not found:
            raise ValueError("it has no versions")
        return [line.removeprefix("- ").split(" ", 1) for line in versions.strip().splitlines()]

    yield Words(f"This report was made by {describe_versions()}.")
    versions = results.attempt("versions of the training", lambda: results.read("README.md", parse, ""))
    yield from [] if versions is None else [Table("When it was trained", ["library", "version"], versions)]


SECTIONS: Mapping[str, Callable[[Results], Iterator[Part]]] = {
    "Training": training_section,
    "Configuration": configuration_section,
    "Model": model_section,
    "Data": data_section,
    "Losses": losses_section,
    "Depth": depth_section,
    "Controls": controls_section,
    "Efficiency": efficiency_section,
    "Generated media": media_section,
    "Dynamics": dynamics_section,
    "Samples": samples_section,
    "Answers": answers_section,
    "Speed": speed_section,
    "Environment": environment_section,
}


if __name__ == "__main__":
    sys.exit(main())
