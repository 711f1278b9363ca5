"""Does contrast between the states of a token help? Exact answers of a checkpoint to the questions of its validation
sources, by strength and by the step that the last one is contrasted with, at several depths.

python -m benchmarks.contrast runs/recurrent_lm --sources addition --num-steps 2 4 8
"""

from __future__ import annotations

import inference.logs  # noqa: F401  first: it sets up what libraries say while they are imported

# isort: split
import sys
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from benchmarks import timing
from configs import read_run_config
from dataset_loading import build_examples
from evaluation.answers import AnswerGenerator, Example, prompt_of, to_model
from evaluation.checks import CHECKS
from evaluation.depth import chunks
from evaluation.intervals import wilson_interval
from inference import arguments
from inference.devices import choose_device, choose_threads
from inference.loading import find_checkpoint, load_model

ROWS = 64
"""Questions that are answered at a time."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write a table for each source to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = timing.parsed(parser, argv)
    try:
        device = choose_device(args.device)
        checkpoint = find_checkpoint(args.checkpoint)
        model, processor = load_model(checkpoint, device)
        run = read_run_config(checkpoint, [])
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sources = {source.label: source for source in run.data.validation}
    unknown = [name for name in args.sources or () if name not in sources]
    if unknown:
        parser.error(f"the run has no validation source {unknown[0]!r}; it has {', '.join(sources)}")
    choose_threads(model, args.threads)
    for name in args.sources or sources:
        rows = build_examples(sources[name], run.data, processor, 4 * args.limit, run.seed, CHECKS)
        rows = [row for row in rows if not args.levels or row["difficulty"] in args.levels]
        rows = [row for row in rows if len(prompt_of(row))][: args.limit]
        if not rows:
            parser.error(f"source {name!r} has no questions with answers at these levels; name another in --sources")
        sys.stdout.write(f"{name}, {len(rows)} questions\n\n{report(model.eval(), processor, rows, args)}\n")
    return 0


def build_parser() -> arguments.OneLineParser:
    parser = arguments.OneLineParser(prog="benchmarks.contrast", description="Answers by strength of contrast.")
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    parser.add_argument("--sources", nargs="+", help="validation sources; default: all")
    parser.add_argument("--levels", type=int, nargs="+", help="difficulties; default: all")
    parser.add_argument("--limit", type=timing.count, default=500, help="most questions of a source")
    parser.add_argument("--num-steps", type=timing.count, nargs="+", default=[2, 4, 8], help="depths")
    parser.add_argument("--contrast-steps", type=timing.count, nargs="+", default=[1, 2], help="steps contrasted with")
    parser.add_argument(
        "--strengths", type=arguments.finite, nargs="+", default=[-0.2, 0.1, 0.2, 0.5, 1.0], help="of the contrast"
    )
    parser.add_argument("--threads", type=timing.count, help="threads of torch on the CPU; default: by the model")
    parser.add_argument("--device", help="for example cpu, cuda; default: a GPU if there is one")
    return parser


def report(model: PreTrainedModel, processor: Any, rows: Sequence[Example], args: Any) -> str:
    """Exact answers in per cent with 95 % intervals: a line for each strength, a column for each depth."""
    lines = [["none", "-", *(score(model, processor, rows, depth, {}) for depth in args.num_steps)]]
    for step in args.contrast_steps:
        for strength in args.strengths:
            options = {"contrast_strength": strength, "contrast_step": step}
            scores = [score(model, processor, rows, depth, options) for depth in args.num_steps]
            lines.append([f"{strength:g}", str(step), *scores])
    return timing.markdown_table(["strength", "step", *(f"{depth} steps" for depth in args.num_steps)], lines)


def score(model: PreTrainedModel, processor: Any, rows: Sequence[Example], depth: int, options: dict[str, Any]) -> str:
    """The share of answers, by greedy decoding, of which each token is right."""
    if options.get("contrast_step", 0) >= depth:
        return "-"
    writer, right = AnswerGenerator(processor), 0
    for chunk in chunks(rows, ROWS):
        inputs = to_model(writer.prompts(chunk), model)
        targets = [list(row["labels"][len(prompt_of(row)) :]) for row in chunk]
        options_of_text = {"max_new_tokens": max(map(len, targets)), "pad_token_id": writer.tokenizer.pad_token_id}
        found = model.generate(**inputs, num_steps=depth, do_sample=False, **options_of_text, **options)
        new = found[:, inputs["input_ids"].shape[1] :].tolist()
        right += sum(tokens[: len(target)] == target for tokens, target in zip(new, targets, strict=True))
    low, high = wilson_interval(right, len(rows))
    return f"{100 * right / len(rows):.1f} ({100 * low:.1f} to {100 * high:.1f})"


if __name__ == "__main__":
    sys.exit(main())
