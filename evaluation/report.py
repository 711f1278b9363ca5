"""What depth buys as Markdown, JSON and a picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .answers import WrittenScores
from .depth import DepthRow, ModalityScores

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WRITTEN = ("exact text", "WER", "CER", "BLEU", "chrF")
LINES = ("-", "--", ":", "-.")


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def depth_name(num_steps: int | None) -> str:
    return "no core" if num_steps is None else str(num_steps)


# --------------------------------------------------------------------------------------------------------------- tables


def markdown_table(rows: Sequence[DepthRow]) -> str:
    """The table as Markdown: one line per depth; then tables of modalities, of difficulties and of what was written, as
    far as there are any.
    """
    names = list(rows[0].exact_match)
    header = ["steps", "loss", "perplexity", "bits per byte", *(f"exact {name}" for name in names), "ms per token"]
    body = []
    for row in rows:
        bits = "-" if row.bits_per_byte is None else f"{row.bits_per_byte:.4f}"
        exact = [percent(row.exact_match[name].total) for name in names]
        figures = [f"{row.loss:.4f}", f"{row.perplexity:.3f}", bits, *exact, f"{row.milliseconds_per_token:.4f}"]
        body.append([depth_name(row.num_steps), *figures])
    parts = [format_table(header, body)]
    if rows[0].modalities:
        parts += ["By modality:\n", modality_table(rows)]
    for name in names:
        if len(rows[0].exact_match[name].by_difficulty) > 1:
            parts += [f"Exact match of {name} by difficulty:\n", difficulty_table(rows, name)]
    for name, first in rows[0].written.items():
        parts += [f"Texts written for {name} ({first.num_examples}):\n", written_table(rows, name)]
    return "\n".join(parts)


def difficulty_table(rows: Sequence[DepthRow], name: str) -> str:
    """Exact match of a source by depth and difficulty."""
    levels = list(rows[0].exact_match[name].by_difficulty)
    lines = [
        [depth_name(row.num_steps), *(percent(row.exact_match[name].by_difficulty[level]) for level in levels)]
        for row in rows
    ]
    return format_table(["steps", *map(str, levels)], lines)


def modality_table(rows: Sequence[DepthRow]) -> str:
    """A line for each modality and depth."""
    with_texts = bool(rows[0].written)
    lines = [
        [name, depth_name(row.num_steps), *modality_cells(row.modalities[name], with_texts)]
        for name in rows[0].modalities
        for row in rows
    ]
    return format_table(["modality", "steps", "loss", "exact", *(WRITTEN[1:] if with_texts else ())], lines)


def modality_cells(scores: ModalityScores, with_texts: bool) -> list[str]:
    """Figures of one modality; a dash where there are none."""
    loss = f"{scores.losses['loss']:.4f}" if scores.losses else "-"
    exact = "-" if scores.exact_match is None else percent(scores.exact_match)
    texts = ["-"] * (len(WRITTEN) - 1) if scores.written is None else written_cells(scores.written)[1:]
    return [loss, exact, *(texts if with_texts else ())]


def written_table(rows: Sequence[DepthRow], name: str) -> str:
    """Scores of the texts of a source, and of the attributes that they name."""
    attributes = list(rows[0].written[name].attributes)
    lines = []
    for row in rows:
        scores = row.written[name]
        named = [percent(scores.attributes[attribute]) for attribute in attributes]
        lines.append([depth_name(row.num_steps), *written_cells(scores), *named])
    return format_table(["steps", *WRITTEN, *attributes], lines)


def written_cells(scores: WrittenScores) -> list[str]:
    """In the order of `WRITTEN`."""
    errors = (scores.word_error_rate, scores.character_error_rate)
    return [percent(share) for share in (scores.exact_match, *errors, scores.bleu, scores.chrf)]


def format_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, figures to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *body, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in (header, *body)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# -------------------------------------------------------------------------------------------------------------- picture


def plot(rows: Sequence[DepthRow], path: Path) -> None:
    """Loss, exact match and time against depth, side by side, as PNG; depth on a logarithmic axis. Below them, if texts
    were written, error rates, BLEU and chrF, and attributes.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    num_lines = 2 if rows[0].written else 1
    figure = Figure(figsize=(13, 4 * num_lines), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    panels = figure.subplots(num_lines, 3, squeeze=False)
    plot_losses(rows, *panels[0])
    if rows[0].written:
        plot_texts(rows, *panels[1])
    depths = depths_of(rows)
    for axes in panels.flat:
        if len(depths) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [depth_name(row.num_steps) for row in rows])
        axes.set_xlabel("core steps")
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def depths_of(rows: Sequence[DepthRow]) -> list[int]:
    """Places on the axis."""
    return [row.num_steps or 0 for row in rows]


def plot_losses(rows: Sequence[DepthRow], loss: Axes, exact: Axes, duration: Axes) -> None:
    """The panels that every evaluation has."""
    depths = depths_of(rows)
    modalities = [name for name, scores in rows[0].modalities.items() if scores.losses]
    loss.plot(depths, [row.loss for row in rows], marker="o", label="all" if modalities else None)
    for name in modalities:
        loss.plot(depths, [row.modalities[name].losses["loss"] for row in rows], marker=".", ls="--", label=name)
    loss.set_ylabel("loss (nats per token)")
    for name in rows[0].exact_match:
        exact.plot(depths, [row.exact_match[name].total for row in rows], marker="o", label=name)
    exact.set_ylabel("exact match")
    exact.set_ylim(-0.02, 1.02)
    duration.plot(depths, [row.milliseconds_per_token for row in rows], marker="o")
    duration.set_ylabel("milliseconds per token")
    duration.set_ylim(bottom=0)


def plot_texts(rows: Sequence[DepthRow], errors: Axes, scores: Axes, attributes: Axes) -> None:
    """The panels of what was written."""
    depths = depths_of(rows)
    for number, (name, first) in enumerate(rows[0].written.items()):
        written = [row.written[name] for row in rows]
        (line,) = errors.plot(depths, [it.word_error_rate for it in written], marker="o", label=f"{name}, words")
        look = {"color": line.get_color(), "marker": ".", "ls": "--"}
        errors.plot(depths, [it.character_error_rate for it in written], label=f"{name}, characters", **look)
        scores.plot(depths, [it.bleu for it in written], marker="o", color=line.get_color(), label=f"{name}, BLEU")
        scores.plot(depths, [it.chrf for it in written], label=f"{name}, chrF", **look)
        for attribute in first.attributes:
            look = {"marker": ".", "ls": LINES[number % len(LINES)], "label": f"{name}, {attribute}"}
            attributes.plot(depths, [it.attributes[attribute] for it in written], **look)
    errors.set_ylabel("error rate")
    errors.set_ylim(bottom=0)
    for axes, what in ((scores, "BLEU and chrF"), (attributes, "attributes that are right")):
        axes.set_ylabel(what)
        axes.set_ylim(-0.02, 1.02)


# ---------------------------------------------------------------------------------------------------------------- files


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
