"""What depth buys: loss, exact answers and time of one model at several numbers of core steps."""

from __future__ import annotations

import json
import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from .metrics import metrics_from_sums, token_nll

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


@dataclass
class DepthRow:
    """One model at one depth."""

    num_steps: int | None
    """Core steps; None for a model without a core."""
    loss: float
    """Nats per token over all validation sources together, each token weighing the same."""
    perplexity: float
    bits_per_byte: float | None
    """None where the tokenizer's bytes are unknown."""
    milliseconds_per_token: float
    """Forward pass over the validation batches, divided by the number of positions in them, padding included."""
    sources: dict[str, dict[str, float]]
    """Loss, perplexity and bits per byte of each validation source."""
    exact_match: dict[str, ExactMatch]
    """By source with answers."""


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


def batches(items: Iterable[Item], size: int, collate: Collate, device: torch.device) -> Iterator[dict]:
    """Batches of at most `size` items, in order, on the device."""
    remaining = iter(items)
    while chunk := list(islice(remaining, size)):
        yield {name: tensor.to(device) for name, tensor in collate(chunk).items()}


def wait_for(device: torch.device) -> None:
    """Let queued work finish, so that the clock sees it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class DepthEvaluator:
    """Runs one model at one depth after the other over the same rows.

    Args:
        model: a causal language model; called as model(..., num_steps=r), without that argument where r is None.
        collate: list of items -> dict of tensors, with `input_ids` and `labels`.
        byte_lengths: `token_byte_lengths` of the tokenizer, or None for no bits per byte.
        batch_size: rows in a forward pass.
    """

    def __init__(
        self, model: torch.nn.Module, collate: Collate, byte_lengths: torch.LongTensor | None, batch_size: int
    ) -> None:
        self.model = model
        self.collate = collate
        self.byte_lengths = byte_lengths
        self.batch_size = batch_size
        self.device = next(model.parameters()).device

    def logits(self, batch: dict[str, torch.Tensor], num_steps: int | None) -> torch.Tensor:
        """(batch, sequence, vocabulary)."""
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        if num_steps is not None:
            inputs["num_steps"] = num_steps
        return self.model(**inputs, use_cache=False).logits

    def score_texts(self, items: Sequence[Item], num_steps: int | None) -> tuple[torch.Tensor, float, int]:
        """Sums of `token_nll` over all rows, seconds in forward passes, and positions passed."""
        sums, seconds, positions = 0, 0.0, 0
        for batch in batches(items, self.batch_size, self.collate, self.device):
            wait_for(self.device)
            start = time.perf_counter()
            logits = self.logits(batch, num_steps)
            wait_for(self.device)
            seconds += time.perf_counter() - start
            positions += batch["input_ids"].numel()
            sums = sums + token_nll(logits, batch["labels"], self.byte_lengths).sum(dim=0).cpu()
        return sums, seconds, positions

    def score_answers(self, examples: Sequence[Item], num_steps: int | None) -> ExactMatch:
        """Exact match over examples with `input_ids`, `labels` (on the answer only) and `difficulty`."""
        rows = [{"input_ids": example["input_ids"], "labels": example["labels"]} for example in examples]
        right: list[bool] = []
        for batch in batches(rows, self.batch_size, self.collate, self.device):
            right.extend(answers_right(self.logits(batch, num_steps), batch["labels"]).tolist())
        by_difficulty = defaultdict(list)
        for example, is_right in zip(examples, right, strict=True):
            if example.get("difficulty") is not None:
                by_difficulty[example["difficulty"]].append(is_right)
        return ExactMatch(
            total=sum(right) / len(right),
            num_examples=len(right),
            by_difficulty={level: sum(rows) / len(rows) for level, rows in sorted(by_difficulty.items())},
        )

    def row(
        self, num_steps: int | None, texts: Mapping[str, Sequence[Item]], examples: Mapping[str, Sequence[Item]]
    ) -> DepthRow:
        """All measures at one depth."""
        scores = {name: self.score_texts(items, num_steps) for name, items in texts.items()}
        total = metrics_from_sums(*sum(sums for sums, _, _ in scores.values()).tolist())
        seconds = sum(seconds for _, seconds, _ in scores.values())
        positions = sum(positions for _, _, positions in scores.values())
        return DepthRow(
            num_steps=num_steps,
            loss=total["loss"],
            perplexity=total["perplexity"],
            bits_per_byte=total.get("bits_per_byte"),
            milliseconds_per_token=1000 * seconds / positions,
            sources={name: metrics_from_sums(*sums.tolist()) for name, (sums, _, _) in scores.items()},
            exact_match={name: self.score_answers(rows, num_steps) for name, rows in examples.items()},
        )


def check_rows(texts: Mapping[str, Sequence[Item]], examples: Mapping[str, Sequence[Item]]) -> None:
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


@torch.no_grad()
def depth_table(
    model: torch.nn.Module,
    depths: Sequence[int | None],
    texts: Mapping[str, Sequence[Item]],
    examples: Mapping[str, Sequence[Item]],
    collate: Collate,
    byte_lengths: torch.LongTensor | None = None,
    batch_size: int = 8,
) -> list[DepthRow]:
    """Evaluate a model at each depth; it is left in the mode (train or eval) it came in.

    Args:
        model: called as model(input_ids, ..., num_steps=r).
        depths: numbers of core steps; [None] for a model whose depth cannot vary.
        texts: packed validation rows by source.
        examples: rows with one answer each (`input_ids`, `labels`, optional `difficulty`) by source; may be empty.
        collate: list of rows -> dict of tensors.
        byte_lengths: `token_byte_lengths` of the tokenizer; None leaves bits per byte out.
        batch_size: rows in a forward pass.

    Raises:
        ValueError: no source, a source without rows, or an example without an answer.
    """
    check_rows(texts, examples)
    evaluator = DepthEvaluator(model, collate, byte_lengths, batch_size)
    was_training = model.training
    model.eval()
    try:
        # The first passes pay for kernel selection and memory; they are not part of any depth's time.
        first = next(iter(texts.values()))
        evaluator.score_texts([first[index] for index in range(min(batch_size, len(first)))], depths[0])
        return [
            evaluator.row(num_steps, texts, examples)
            for num_steps in tqdm(depths, desc="depths", unit="depth", disable=None)
        ]
    finally:
        model.train(was_training)


# Writing the table


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def depth_name(num_steps: int | None) -> str:
    return "no core" if num_steps is None else str(num_steps)


def markdown_table(rows: Sequence[DepthRow]) -> str:
    """The table as Markdown: one line per depth, then one table per source with answers of several difficulties."""
    names = list(rows[0].exact_match)
    header = ["steps", "loss", "perplexity", "bits per byte", *(f"exact {name}" for name in names), "ms per token"]
    body = []
    for row in rows:
        bits = "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        exact = [percent(row.exact_match[name].total) for name in names]
        figures = [f"{row.loss:.4f}", f"{row.perplexity:.3f}", bits, *exact, f"{row.milliseconds_per_token:.4f}"]
        body.append([depth_name(row.num_steps), *figures])
    parts = [format_table(header, body)]
    for name in names:
        levels = list(rows[0].exact_match[name].by_difficulty)
        if len(levels) > 1:
            lines = [
                [depth_name(row.num_steps), *(percent(row.exact_match[name].by_difficulty[level]) for level in levels)]
                for row in rows
            ]
            parts.append(f"Exact match of {name} by difficulty:\n")
            parts.append(format_table(["steps", *map(str, levels)], lines))
    return "\n".join(parts)


def format_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, figures to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *body, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in (header, *body)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def plot(rows: Sequence[DepthRow], path: Path) -> None:
    """Loss, exact match and time against depth, side by side, as PNG; depth on a logarithmic axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    depths = [row.num_steps or 0 for row in rows]
    figure = Figure(figsize=(13, 4), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    loss, exact, duration = figure.subplots(1, 3)
    loss.plot(depths, [row.loss for row in rows], marker="o")
    loss.set_ylabel("loss (nats per token)")
    for name in rows[0].exact_match:
        exact.plot(depths, [row.exact_match[name].total for row in rows], marker="o", label=name)
    exact.set_ylabel("exact match")
    exact.set_ylim(-0.02, 1.02)
    if rows[0].exact_match:
        exact.legend()
    duration.plot(depths, [row.milliseconds_per_token for row in rows], marker="o")
    duration.set_ylabel("milliseconds per token")
    duration.set_ylim(bottom=0)
    for axes in (loss, exact, duration):
        if len(depths) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [depth_name(row.num_steps) for row in rows])
        axes.set_xlabel("core steps")
        axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def save_depth_table(rows: Sequence[DepthRow], folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write depth.json, depth.md and depth.png into the folder and return their paths.

    Args:
        rows: from `depth_table`.
        folder: made if missing.
        about: what was evaluated (checkpoint, sources, limit); stands beside the rows in the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"depth.{suffix}" for suffix in ("json", "md", "png")]
    content = {**about, "rows": [asdict(row) for row in rows]}
    paths[0].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    paths[1].write_text(markdown_table(rows), encoding="utf-8")
    plot(rows, paths[2])
    return paths
