"""Do the alarms come in time? Two set-ups that are known to fail, and their healthy twin, 200 steps each on generated
text. Source of the set-ups: Geiping et al. 2025, arXiv 2502.05171, section 4.3, at a small size.

    python -m benchmarks.failed_runs --output runs/failed_runs
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from benchmarks.timing import count, markdown_table
from configs import load_config
from configs.pretraining import build_pretraining

ROOT = Path(__file__).parents[1]
STEPS, INTERVAL = 200, 20


@dataclass(frozen=True)
class SetUp:
    """A way to train the model of configs/recurrent_lm.yaml, and what it is to end in.

    Args:
        name: Its name.
        title: What it differs in.
        alarm: A pattern of the alarm that it is to raise; None for none at all.
        flags: Flags of `pretrain.py`.
    """

    name: str
    title: str
    alarm: str | None
    flags: tuple[str, ...]


ROWS = (
    "{kind: generated, task: addition, num_rows: 6000, difficulty: [1, 2], loss_on: answer, weight: 2}",
    "{kind: generated, task: stories, num_rows: 3000, difficulty: [1, 2]}",
)
COMMON = (
    *("--config", str(ROOT / "configs/recurrent_lm.yaml"), "--data.train", f"[{', '.join(ROWS)}]"),
    *("--model.hidden_size", "64", "--model.intermediate_size", "192", "--data.block_size", "64"),
    *("--training.lr_scheduler_type", "constant_with_warmup", "--training.warmup_steps", "20"),
    *("--training.logging_steps", str(INTERVAL), "--training.recurrence_logging_steps", str(INTERVAL)),
    *("--training.save_strategy", "no", "--training.eval_strategy", "no", "--training.report_to", "none"),
    *("--callbacks.samples.prompts", "[]", "--callbacks.stability.core_steps", str(INTERVAL)),
    *("--training.disable_tqdm", "true"),
)
HIGH_RATE = ("--training.learning_rate", "0.03")
"""Ten times that of the healthy twin, as in the source."""
NO_NORM_WEIGHTS = ("--training.freeze", "['*norm*']")
"""Norms stay at 1, as those without parameters."""
SET_UPS = (
    SetUp(
        "collapse",
        "norms without parameters, no scale of the embeddings, injection by addition",
        "the states of different tokens have a mean correlation",
        (*NO_NORM_WEIGHTS, "--model.embedding_scale", "1", "--model.recurrence.injection", "add", *HIGH_RATE),
    ),
    SetUp(
        "ignored",
        "pre norm, learned injection, scale of the embeddings",
        "the recurrence is being ignored",
        ("--model.norm_placement", "pre", *HIGH_RATE),
    ),
    SetUp("healthy", "sandwich norm, learned injection, scale of the embeddings, a tenth of the rate", None, ()),
)


class AlarmLog(logging.Handler):
    """Keeps the alarms of a run, with their steps."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.alarms: list[tuple[int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Take an alarm in."""
        found = re.fullmatch(r"step (\d+): (.*)", record.getMessage())
        self.alarms += [(int(found[1]), text) for text in found[2].split("; ")] if found else []


def main(argv: Sequence[str] | None = None) -> int:
    """Train all set-ups, and write a table.

    Returns:
        1 if one that is to fail raises no alarm of its kind in time, or the healthy one raises any.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("runs/failed_runs"), help="folder for runs and figures")
    parser.add_argument("--steps", type=count, default=STEPS, help="optimizer steps of each")
    args = parser.parse_args(argv)
    set_up_logging()
    datasets.disable_progress_bars()
    results = {set_up.name: train(set_up, args.output, args.steps) for set_up in SET_UPS}
    (args.output / "results.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(report(results))
    return int(any(has_surprised(set_up, results[set_up.name]["alarms"]) for set_up in SET_UPS))


def train(set_up: SetUp, output: Path, steps: int) -> dict[str, Any]:
    """The logs of a run, and its alarms with their steps."""
    folder = ("--training.output_dir", str(output / set_up.name), "--training.max_steps", str(steps))
    run, heard = load_config([*COMMON, *set_up.flags, *folder]), AlarmLog()
    trainer = build_pretraining(run)
    logging.getLogger("callbacks.stability").addHandler(heard)
    try:
        trainer.train()
    finally:
        logging.getLogger("callbacks.stability").removeHandler(heard)
    return {"alarms": heard.alarms, "logs": [entry for entry in trainer.state.log_history if "loss" in entry]}


def has_surprised(set_up: SetUp, alarms: Sequence[tuple[int, str]]) -> bool:
    """Whether the alarms of a set-up are not those that it is to raise."""
    if set_up.alarm is None:
        return bool(alarms)
    return not any(set_up.alarm in text for _, text in alarms)


def report(results: dict[str, dict[str, Any]]) -> str:
    """A row for each set-up: its first alarm of its kind, and what was measured last."""
    header = ("set-up", "first alarm at step", "loss", "depth gap", "correlation, most", "growth, most")
    rows = []
    for set_up in SET_UPS:
        alarms, logs = results[set_up.name]["alarms"], results[set_up.name]["logs"]
        steps = [step for step, text in alarms if (set_up.alarm or "") in text]
        most = [max(entry[name] for entry in logs) for name in ("token_correlation", "state_growth")]
        figures = [f"{value:.3f}" for value in (logs[-1]["loss"], logs[-1]["depth_gap"], *most)]
        rows.append((set_up.title, str(steps[0]) if steps else "-", *figures))
    return markdown_table(header, rows)


if __name__ == "__main__":
    sys.exit(main())
