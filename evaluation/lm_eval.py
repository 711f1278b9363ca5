"""Tasks of lm-evaluation-harness at several depths and with exits, in one run: `python -m evaluation.lm_eval
--model-args pretrained=runs/recurrent_lm --tasks my/task.yaml --num-steps 1 2 4 8`.
"""

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import importlib
import json
import logging
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import datasets

from inference import arguments
from inference.checkpoints import check_files, find_checkpoint
from inference.devices import choose_device, choose_threads, device_report
from inference.loading import build_checked, load_model_config
from inference.output import whole_folder, writable_folder, write_result
from model.exit_criteria import EXIT_CRITERIA

logger = logging.getLogger("evaluation.lm_eval")  # __name__ is __main__ when run with -m


def main(argv: Sequence[str] | None = None) -> int:
    """Score a checkpoint by tasks of lm-evaluation-harness; writes tables to standard output, and JSON and Markdown.

    Raises:
        SystemExit: Code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.exit_threshold is not None and args.exit_criterion in (None, "none"):
        parser.error("--exit-threshold has no effect without --exit-criterion: name one, or leave it out.")
    set_up_logging(args.log_level)
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()  # a bar in a file is noise
    logger.info("%s", device_report())
    with parser.one_line_errors():
        harness = import_harness()
        given = read_model_arguments(args.model_args)
        output = args.output or Path(given["pretrained"]) / "evaluation" / "lm_eval.json"
        if output.suffix != ".json":
            raise ValueError(f"--output is {output}, and a Markdown file of its name is written too: end it in .json.")
        writable_folder(output.parent)
        tasks = harness.load_tasks(args.tasks, args.include_path)
        usual = {"device": str(choose_device(args.device)), "batch_size": args.batch_size}
        with harness.wrong_input("lm-eval cannot load the model"):
            lm = harness.RecurrentLM(**usual | given | checkpoint_arguments(given["pretrained"]))
        choose_threads(lm.model.inner)
        settings = harness.depth_settings(lm.model.inner, args.num_steps, args.exit_criterion, args.exit_threshold)
        rows = harness.evaluate_tasks(lm, tasks, settings, args.limit, args.num_fewshot)
        about = {"model_args": given, "limit": args.limit, "num_fewshot": args.num_fewshot}
        text = harness.harness_markdown(rows)
        write_result(text)
        with whole_folder(output.parent) as made:
            content = about | {"rows": [asdict(row) for row in rows]}
            (made / output.name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            (made / output.name).with_suffix(".md").write_text(text, encoding="utf-8")
        write_result(f"\nwritten to {output}, {output.with_suffix('.md')}\n")
    return 0


def build_parser() -> arguments.OneLineParser:
    """The command line."""
    parser = arguments.OneLineParser(
        prog="evaluation.lm_eval",
        description="Scores of a model in tasks of lm-evaluation-harness, with intervals of 95 %, at one or several "
        "depths and with exits, over the same requests. lm-eval has to be installed: run `make extra`.",
    )
    parser.add_argument("--model", choices=["recurrent"], default="recurrent", help="model class of lm-eval")
    parser.add_argument(
        "--model-args",
        "--model_args",
        required=True,
        metavar="NAME=VALUE,...",
        help="pretrained=FOLDER, of a checkpoint or a run, and other arguments of the model class `hf`, such as "
        "dtype=bfloat16; the begin token is added, unless add_bos_token=False",
    )
    parser.add_argument(
        "--tasks", nargs="+", required=True, help="YAML files of tasks, or names of tasks or of groups of tasks"
    )
    parser.add_argument("--include-path", "--include_path", type=Path, help="folder of YAML files, to name their tasks")
    parser.add_argument(
        "--num-steps", type=arguments.core_steps, nargs="+", help="times the core is applied; default: the model's"
    )
    parser.add_argument(
        "--exit-criterion",
        choices=["none", *EXIT_CRITERIA],
        help="criterion that ends a token's steps early, at most the most of --num-steps; it is run beside the depths",
    )
    parser.add_argument(
        "--exit-threshold",
        type=arguments.finite,
        nargs="+",
        help="value of the criterion; default: some around the criterion's",
    )
    parser.add_argument(
        "--num-fewshot", "--num_fewshot", type=shots, help="examples before a question; default: the task's"
    )
    parser.add_argument("--limit", type=arguments.row_limit, help="examples of a task; default: all")
    parser.add_argument(
        "--batch-size", "--batch_size", type=arguments.batch_rows, default=8, help="rows in a forward pass"
    )
    parser.add_argument("--device", help="device such as cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument(
        "--output",
        type=Path,
        help="JSON file, beside which a Markdown file is written; default: evaluation/lm_eval.json in the given folder",
    )
    return parser


shots = partial(arguments.whole_number, minimum=0, why="give the number of examples before a question, 0 or more.")


def import_harness() -> ModuleType:
    """The module that needs lm-eval; ValueError where that is not installed."""
    try:
        return importlib.import_module("evaluation.harness")
    except ModuleNotFoundError as error:
        raise ValueError(f"lm-eval is not installed ({error}): run `make extra`.") from error


def read_model_arguments(text: str) -> dict[str, Any]:
    """The arguments of the model class, as lm-eval reads them; ValueError if no folder is among them."""
    from lm_eval.utils import simple_parse_args_string

    given = simple_parse_args_string(text)
    if not isinstance(given.get("pretrained"), str):
        raise ValueError(f"--model-args is {text!r}; give pretrained=FOLDER in it.")
    return given


def checkpoint_arguments(path: str) -> dict[str, str]:
    """The folder of the newest complete weights of a path, which fit their configuration, and the kind of model that is
    in it, as arguments of the model class; ValueError or OSError if there is none.
    """
    folder = find_checkpoint(path).resolve()  # so that it looks like no name on the hub
    check_files(folder)
    config = load_model_config(folder)
    build_checked(folder, config)
    return {"pretrained": str(folder), "backend": "seq2seq" if config.is_encoder_decoder else "causal"}


if __name__ == "__main__":
    sys.exit(main())
