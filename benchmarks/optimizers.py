"""Optimizers against AdamW, and Grokfast's filters against none: what each reaches, in how many updates, in what time.

- `language`: AdamW with the schedule of `configs/recurrent_lm.yaml` and `configs/plain_lm.yaml`, and Muon and AdaMuon
  with one of 0.8 times the updates. Each at several learning rates with one seed, and at its best three with all.
- `grokking`: a small transformer learns a + b modulo 97 from half of the pairs, at two widths and two weight decays;
  updates until 99 % of the other half are right.

Each finished run is a row of a JSON file, which the next call goes on from; `--minutes` says when to begin no other.

    python -m benchmarks.optimizers language --minutes 60
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.depth_pays import mean_and_interval
from configs import read_yaml
from model import MegaTransformerForCausalLM, MegaTransformerTextConfig
from trainers.gradient_filters import GradientFilter, GradientFilterOptions

ROOT = Path(__file__).parents[1]
Row = dict[str, Any]
RESULTS = ("loss", "seconds", "cpu_seconds", "machine", "grokked", "memorized")
"""Keys of a row that a run finds out; the others say which run it is."""


def main(argv: Sequence[str] | None = None) -> int:
    """Do the runs that have no row yet, and write the table of all rows to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    args = build_parser().parse_args(argv)
    set_up_logging()
    path = args.rows / f"{args.part}.json"
    rows = Rows(path)
    end = time.monotonic() + 60 * args.minutes
    plan, run, report = PARTS[args.part]
    for job in plan(rows, args):
        if time.monotonic() > end:
            break
        rows.add({**job, **run(job, args)})
    text = report(rows.rows)
    path.with_suffix(".md").write_text(text)
    sys.stdout.write(text)
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=list(PARTS), help="what is compared")
    parser.add_argument("--rows", type=Path, default=ROOT / "docs" / "optimizers", help="folder of the rows and tables")
    parser.add_argument("--runs", type=Path, default=Path("runs/optimizers"), help="folder for what is trained")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="after which no other run begins")
    parser.add_argument("--configs", nargs="+", choices=CONFIGS, default=list(CONFIGS), help="of language")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="the first is that of the sweep")
    parser.add_argument("--max-steps", type=int, help="updates; default: those of the config, or 10000")
    return parser


class Rows:
    """The rows of a file, which is whole after each.

    Args:
        path: JSON file; its folder is made where there is none.
    """

    def __init__(self, path: Path):
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text()) if path.exists() else []

    def find(self, job: Row) -> Row | None:
        """The row of a run; None where it has not been done."""
        return next((row for row in self.rows if {key: row.get(key) for key in row if key not in RESULTS} == job), None)

    def add(self, row: Row) -> None:
        """Append a row and write the file."""
        self.rows.append(row)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text("[\n" + ",\n".join(map(json.dumps, self.rows)) + "\n]\n")
        beside.replace(self.path)


# ------------------------------------------------------------------------------------------------------------ language

CONFIGS = ("recurrent_lm", "plain_lm")
RATES = {
    "adamw": (3e-3, 1.5e-3, 6e-3),
    "muon": (5e-3, 2.5e-3, 1e-2),
    "adamuon": (5e-3, 2.5e-3, 1e-2),
}
"""Learning rates of the sweep, which goes on by factors of 2 while the best is the least or the greatest; for Muon and
AdaMuon that of the matrices, and the rest has that of the config."""
SHARE = 0.8
"""Updates of Muon and AdaMuon, as a share of AdamW's."""
NUM_BEST = 3


def plan_language(rows: Rows, args: argparse.Namespace) -> Iterator[Row]:
    """Runs without a row: with the first seed a sweep of rates, and then the best of them with the other seeds."""
    for config in args.configs:
        for name in RATES:
            losses: dict[float, float] = {}
            for rate in rates_around_the_best(RATES[name], losses):
                job = language_job(config, name, rate, args.seeds[0], args)
                if rows.find(job) is None:
                    yield job
                losses[rate] = rows.find(job)["loss"]
            for rate in sorted(losses, key=losses.get)[:NUM_BEST]:
                jobs = [language_job(config, name, rate, seed, args) for seed in args.seeds[1:]]
                yield from (job for job in jobs if rows.find(job) is None)


def rates_around_the_best(rates: Sequence[float], losses: dict[float, float]) -> Iterator[float]:
    """The rates, and more, until the best has a neighbor on either side. `losses` are those that came of them."""
    yield from rates
    while (best := min(losses, key=losses.get)) in (least := min(losses), max(losses)):
        yield best / 2 if best == least else best * 2


def language_job(config: str, name: str, rate: float, seed: int, args: argparse.Namespace) -> Row:
    """Which run it is."""
    updates = args.max_steps or read_yaml(ROOT / "configs" / f"{config}.yaml")["training"]["max_steps"]
    updates = updates if name == "adamw" else round(SHARE * updates)
    return {"config": config, "optimizer": name, "learning_rate": rate, "seed": seed, "updates": updates}


def run_language(job: Row, args: argparse.Namespace) -> Row:
    """Train one model on one core and evaluate it at the end.

    Returns:
        loss, the mean of the validation losses; seconds of training; cpu_seconds of the whole command; the machine.
    """
    folder = args.runs.absolute() / "-".join(str(job[key]) for key in ("config", "optimizer", "learning_rate", "seed"))
    flags: dict[str, Any] = {"output_dir": folder, "max_steps": job["updates"], "seed": job["seed"]}
    flags |= {"eval_strategy": "steps", "eval_steps": job["updates"], "save_strategy": "no", "report_to": "none"}
    if job["optimizer"] == "adamw":
        flags["learning_rate"] = job["learning_rate"]
    else:
        flags |= {"optimizer": job["optimizer"], "muon_learning_rate": job["learning_rate"]}
    command = [
        "pretrain.py",
        "--config",
        ROOT / "configs" / f"{job['config']}.yaml",
        "--callbacks.samples.every_steps=1000000",
    ]
    command += [f"--training.{name}={value}" for name, value in flags.items()]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    if process.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{process.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = {key: value for entry in history for key, value in entry.items()}
    evaluations = sum(value for key, value in found.items() if key.startswith("eval_") and key.endswith("_runtime"))
    return {
        "loss": found["eval_loss"],
        "seconds": found["train_runtime"] - evaluations,
        "cpu_seconds": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        "machine": machine(),
    }


def machine() -> str:
    """The processor's name, and the vectors it has: without numbers of 16 bits, Muon's matrix products take long."""
    text = Path("/proc/cpuinfo").read_text()
    vectors = next((it for it in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if it in text), "no avx2")
    return f"{re.search('model name.*: (.*)', text)[1]}, {vectors}"


def report_language(rows: Sequence[Row]) -> str:
    """A line for each optimizer and learning rate."""
    machines = list(dict.fromkeys(row["machine"] for row in rows))
    names = " | ".join(f"CPU seconds, {name}" for name in machines)
    lines = [f"| config | optimizer | learning rate | updates | seeds | validation loss | {names} |"]
    lines.append("|---|---|---:|---:|---:|---:|" + "---:|" * len(machines))
    keys = ("config", "optimizer", "learning_rate", "updates")
    groups = dict.fromkeys(tuple(row[key] for key in keys) for row in rows)
    for group in sorted(groups, key=lambda group: (*map(str, group[:2]), group[2])):
        same = [row for row in rows if tuple(row[key] for key in keys) == group]
        mean, half = mean_and_interval([row["loss"] for row in same])
        interval = f" ± {half:.4f}" if len(same) > 1 else ""
        times = {name: [row["cpu_seconds"] for row in same if row["machine"] == name] for name in machines}
        seconds = " | ".join(f"{statistics.mean(own):.0f}" if own else "" for own in times.values())
        config, name, rate, updates = group
        lines.append(f"| {config} | {name} | {rate:g} | {updates} | {len(same)} | {mean:.4f}{interval} | {seconds} |")
    return "\n".join(lines) + "\n"


# ------------------------------------------------------------------------------------------------------------ grokking

MODULUS = 97
BATCH = 512
MOST_UPDATES = 5_000
CHECKED_EVERY = 50
WIDTHS = (64, 128)
WEIGHT_DECAYS = (1.0, 0.3)
FILTERS: dict[str, dict[str, Any]] = {
    "none": {},
    "ema 0.98": {"name": "ema", "decay": 0.98, "factor": 2.0},
    "ema 0.95": {"name": "ema", "decay": 0.95, "factor": 2.0},
    "ma 100": {"name": "ma", "window": 100, "factor": 5.0},
}


def plan_grokking(rows: Rows, args: argparse.Namespace) -> Iterator[Row]:
    """Runs without a row."""
    most = args.max_steps or MOST_UPDATES
    jobs = [
        {"width": width, "weight_decay": decay, "filter": name, "seed": seed, "most_updates": most}
        for seed in args.seeds
        for width in WIDTHS
        for decay in WEIGHT_DECAYS
        for name in FILTERS
    ]
    yield from (job for job in jobs if rows.find(job) is None)


def run_grokking(job: Row, args: argparse.Namespace) -> Row:
    """Train one model of two layers with AdamW at a rate of 1e-3 on batches of pairs.

    Returns:
        memorized and grokked, the first update, counted in 50s, after which 99 % of the pairs that were trained on, and
        of those that were not, are right, and None where that does not come; seconds.
    """
    start = time.perf_counter()
    torch.manual_seed(job["seed"])
    model = small_transformer(job["width"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.98), weight_decay=job["weight_decay"])
    if FILTERS[job["filter"]]:
        GradientFilter(GradientFilterOptions(**FILTERS[job["filter"]]), model).attach(optimizer)
    inputs, targets = all_pairs()
    order = torch.randperm(len(inputs))
    seen, unseen = order[: len(order) // 2], order[len(order) // 2 :]
    found: Row = {"memorized": None, "grokked": None}
    for update in range(1, job["most_updates"] + 1):
        chosen = seen[torch.randint(len(seen), (BATCH,))]
        loss = torch.nn.functional.cross_entropy(answers(model, inputs[chosen]), targets[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if update % CHECKED_EVERY == 0:
            for name, part in (("memorized", seen), ("grokked", unseen)):
                if found[name] is None and share_of_right_answers(model, inputs[part], targets[part]) >= 0.99:
                    found[name] = update
        if found["grokked"]:
            break
    return {**found, "seconds": time.perf_counter() - start}


def small_transformer(width: int) -> MegaTransformerForCausalLM:
    """Two plain layers that read two numbers and a sign of equality."""
    config = MegaTransformerTextConfig(
        vocab_size=MODULUS + 1,
        hidden_size=width,
        intermediate_size=4 * width,
        num_prelude_layers=2,
        num_core_layers=0,
        num_coda_layers=0,
        num_attention_heads=4,
        max_position_embeddings=4,
    )
    return MegaTransformerForCausalLM(config)


def all_pairs() -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of all additions, of shape (97 * 97, 3), and their sums modulo 97."""
    first, second = torch.cartesian_prod(torch.arange(MODULUS), torch.arange(MODULUS)).T
    return torch.stack([first, second, torch.full_like(first, MODULUS)], 1), (first + second) % MODULUS


def answers(model: MegaTransformerForCausalLM, inputs: torch.Tensor) -> torch.Tensor:
    """Logits of the sums, of shape (rows, vocabulary)."""
    return model(input_ids=inputs, use_cache=False, logits_to_keep=1).logits[:, 0]


@torch.no_grad()
def share_of_right_answers(model: MegaTransformerForCausalLM, inputs: torch.Tensor, targets: torch.Tensor) -> float:
    """From 0 to 1."""
    return (answers(model, inputs).argmax(-1) == targets).float().mean().item()


def report_grokking(rows: Sequence[Row]) -> str:
    """A line for each width, weight decay and filter."""
    keys = ("width", "weight_decay", "filter")
    lines = ["| width | weight decay | filter | seeds | updates to 99 % of trained pairs | of the others | seconds |"]
    lines.append("|---:|---:|---|---:|---:|---:|---:|")
    for group in dict.fromkeys(tuple(row[key] for key in keys) for row in rows):
        same = [row for row in rows if tuple(row[key] for key in keys) == group]
        counts = [" ".join(str(row[key] or "-") for row in same) for key in ("memorized", "grokked")]
        seconds = sum(row["seconds"] for row in same) / len(same)
        lines.append("| " + " | ".join([*map(str, group), str(len(same)), *counts, f"{seconds:.0f}"]) + " |")
    return "\n".join(lines) + "\n"


Plan = Callable[[Rows, argparse.Namespace], Iterator[Row]]
PARTS: dict[str, tuple[Plan, Callable[[Row, argparse.Namespace], Row], Callable[[Sequence[Row]], str]]] = {
    "language": (plan_language, run_language, report_language),
    "grokking": (plan_grokking, run_grokking, report_grokking),
}


if __name__ == "__main__":
    sys.exit(main())
