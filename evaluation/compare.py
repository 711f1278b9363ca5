"""Two models, or one at two depths, on the same examples: `python -m evaluation.compare runs/a runs/b`.

Both have been evaluated by `python -m evaluation`, whose depth_examples.jsonl has the score of each example.
"""

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from inference import arguments
from inference.output import write_result

from .intervals import difference_interval, ratio_interval, sign_test
from .tables import depth_name, format_table

Line = Mapping[str, Any]
Examples = dict[str, dict[int, Line]]
"""Lines by source and number of an example."""


def main(argv: Sequence[str] | None = None) -> int:
    """Write tables of differences to standard output.

    Raises:
        SystemExit: Code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    with parser.one_line_errors():
        runs = {path: read_examples(path) for path in (args.first, args.second)}
        first, second = runs[args.first], runs[args.second]
        pairs = pairs_of_depths(runs, args)
        lines = [line for ours, theirs in pairs for line in score_differences(first, second, ours, theirs)]
        write_result(format_table(HEADER, lines))
    return 0


def build_parser() -> arguments.OneLineParser:
    """The command line."""
    parser = arguments.OneLineParser(
        prog="evaluation.compare",
        description="The differences between two models, or between two depths of one, on the same examples, with "
        "intervals of 95 % and the sign test: losses in nats per token by a bootstrap over rows, answers by those that "
        "one of both alone has right. Below 0 the second has the smaller loss; above 0 it has more answers right.",
    )
    parser.add_argument("first", type=Path, help="folder of a run that was evaluated")
    parser.add_argument("second", type=Path, help="folder of another, or of the same")
    parser.add_argument(
        "--num-steps",
        type=arguments.core_steps,
        nargs="+",
        help="core steps of the first and of the second, or one number for both; default: all that both have",
    )
    return parser


def read_examples(folder: Path) -> dict[int | None, Examples]:
    """The scores of examples by depth and source.

    Raises:
        ValueError: The folder was not evaluated, or its file is damaged.
    """
    path = next((it for it in (folder / "evaluation" / NAME, folder / NAME) if it.is_file()), None)
    if path is None:
        raise ValueError(f"{folder} has no evaluation/{NAME}: run python -m evaluation {folder} first.")
    found: dict[int | None, Examples] = {}
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            kind = "row" if "row" in line else "question"
            found.setdefault(line["num_steps"], {}).setdefault(f"{kind} {line['source']}", {})[line[kind]] = line
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"Line {number} of {path} is damaged ({error!r}): evaluate {folder} again.") from error
    return found


def pairs_of_depths(
    runs: Mapping[Path, Mapping[int | None, Examples]], args: argparse.Namespace
) -> list[tuple[int | None, int | None]]:
    """The depths of the first and of the second that are compared; a model without a core has one, None.

    Raises:
        ValueError: One was not evaluated at its depth, or there is none in common.
    """
    asked, folders = args.num_steps, (args.first, args.second)
    has_core = [set(runs[folder]) != {None} for folder in folders]
    if asked is None:
        pairs = [(ours, theirs) for ours in runs[args.first] for theirs in runs[args.second]]
        pairs = [pair for pair in pairs if pair[0] == pair[1] or not all(has_core)]
        if not pairs:
            at = " and ".join(f"{folder} at {depth_names(runs[folder])}" for folder in folders)
            raise ValueError(
                f"no number of core steps is common, with {at}: evaluate both at one, or name two by --num-steps."
            )
        return pairs
    if len(asked) > 2:
        raise ValueError(f"--num-steps has {len(asked)} numbers: give one of the first and one of the second.")
    for folder, depth, may_choose in zip(folders, (asked[0], asked[-1]), has_core, strict=True):
        if may_choose and depth not in runs[folder]:
            raise ValueError(
                f"{folder} was not evaluated at {depth} core steps, but at {depth_names(runs[folder])}: name one."
            )
    return [(asked[0] if has_core[0] else None, asked[-1] if has_core[1] else None)]


def depth_names(depths: Mapping[int | None, Any]) -> str:
    """Depths as they are shown."""
    return ", ".join(map(depth_name, depths))


def score_differences(
    first: Mapping[int | None, Examples], second: Mapping[int | None, Examples], steps: int | None, others: int | None
) -> list[list[str]]:
    """A line of the table for each source.

    Raises:
        ValueError: The sources or their examples are not the same.
    """
    ours, theirs = first[steps], second[others]
    if set(ours) != set(theirs) or any(set(ours[name]) != set(theirs[name]) for name in ours):
        raise ValueError(
            "the two were not evaluated on the same examples: evaluate both with the same data and --limit (--config "
            "FILE takes those of another run)."
        )
    shown = depth_name(steps) if steps == others else f"{depth_name(steps)} and {depth_name(others)}"
    return [[*name.split(" ", 1)[::-1], shown, *compared(list(pair_up(ours[name], theirs[name])))] for name in ours]


def pair_up(ours: Mapping[int, Line], theirs: Mapping[int, Line]) -> list[tuple[Line, Line]]:
    """Pairs of lines of the same example.

    Raises:
        ValueError: They are not of the same example.
    """
    pairs = [(ours[number], theirs[number]) for number in sorted(ours)]
    for name in ("tokens", "reference"):
        odd = next((one for one, other in pairs if one.get(name) != other.get(name)), None)
        if odd is not None:
            raise ValueError(
                f"the {name} of an example of {odd['source']!r} differ between the two: evaluate both on the same "
                "data, with the same tokenizer."
            )
    return pairs


def compared(pairs: Sequence[tuple[Line, Line]]) -> list[str]:
    """The cells of a source: both scores, their difference with its interval, the examples that either is better at,
    and the sign test.
    """
    if "row" in pairs[0][0]:
        tokens = [one["tokens"] for one, _ in pairs]
        nats = [[line["nats"] for line in lines] for lines in zip(*pairs, strict=True)]
        changes = [after - before for before, after in zip(*nats, strict=True)]
        values = [sum(it) / sum(tokens) for it in (*nats, changes)]
        better = [sum(change > 0 for change in changes), sum(change < 0 for change in changes)]
        digits, factor, interval = 4, 1, ratio_interval(changes, tokens)
    else:
        right = [(one["is_right"], other["is_right"]) for one, other in pairs]
        better = [sum(one and not other for one, other in right), sum(other and not one for one, other in right)]
        values = [sum(it) / len(right) for it in zip(*right, strict=True)]
        values.append(values[1] - values[0])
        digits, factor, interval = 1, 100, difference_interval(better[1], better[0], len(right))
    *both, change = (f"{factor * value:.{digits}f}" for value in values)
    ends = " to ".join(f"{factor * end:+.{digits}f}" for end in interval)
    change = f"{factor * values[2]:+.{digits}f} ({ends})"
    return [str(len(pairs)), *both, change, *map(str, better), f"{sign_test(*better):.2g}"]


NAME = "depth_examples.jsonl"
HEADER = ["source", "of", "steps", "examples", "first", "second", "difference", "first better", "second better", "p"]


if __name__ == "__main__":
    sys.exit(main())
