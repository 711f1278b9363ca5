"""What depth buys, and what a model has generated, as Markdown, JSON, curves and contact sheets."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from model import TARGET_MODALITIES

from .answers import TextScores
from .classifiers import ClassifierScores
from .depth import DepthRow, ModalityScores
from .intervals import Interval
from .media_generation import GeneratedItem, MediaRow, MediaSample, MediaScores, MediaTable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TEXT_SCORES = ("exact text", "WER", "CER", "BLEU", "chrF", "ROUGE-1", "ROUGE-2", "ROUGE-L")
LINES = ("-", "--", ":", "-.")
VERBS = {"image": "Drawn", "audio": "Played"}
RIGHT, WRONG = "#2a9d2a", "#d62728"
WINDOW, HOP = 0.032, 0.008  # seconds of a frame of a spectrogram, and from one to the next
RANGE = 7.0  # powers of ten of a spectrogram that are shown


def percent(share: float, interval: Interval | None = None) -> str:
    """A share in per cent, and its interval, if it has one."""
    around = "" if interval is None else f" ({100 * interval.low:.1f} to {100 * interval.high:.1f})"
    return f"{100 * share:.1f} %{around}"


def figure_cell(value: float | None, interval: Interval | None = None, digits: int = 4) -> str:
    """A figure and its interval, if it has one; a dash for none."""
    around = "" if interval is None else f" ({interval.low:.{digits}f} to {interval.high:.{digits}f})"
    return "-" if value is None else f"{value:.{digits}f}{around}"


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
        loss = figure_cell(row.loss, row.intervals.get("loss"))
        bits = figure_cell(row.bits_per_byte, row.intervals.get("bits_per_byte"))
        exact = [percent(row.exact_match[name].total, row.exact_match[name].interval) for name in names]
        perplexity = figure_cell(row.perplexity, digits=3)
        figures = [loss, perplexity, bits, *exact, figure_cell(row.milliseconds_per_token)]
        body.append([depth_name(row.num_steps), *figures])
    parts = [format_table(header, body)]
    if rows[0].modalities:
        parts += ["By modality:\n", modality_table(rows)]
    for name in names:
        levels = list(rows[0].exact_match[name].by_difficulty)
        if len(levels) > 1:
            lines = []
            for row in rows:
                match = row.exact_match[name]
                cells = [percent(match.by_difficulty[it], match.difficulty_intervals.get(it)) for it in levels]
                lines.append([depth_name(row.num_steps), *cells])
            parts += [f"Exact match of {name} by difficulty:\n", format_table(["steps", *map(str, levels)], lines)]
    for name, first in rows[0].generated.items():
        lines = []
        for row in rows:
            scores = row.generated[name]
            named = [percent(scores.attributes[it], scores.intervals.get(it)) for it in first.attributes]
            lines.append([depth_name(row.num_steps), *text_cells(scores), *named])
        title = f"Texts generated for {name} ({first.num_examples}):\n"
        parts += [title, format_table(["steps", *TEXT_SCORES, *first.attributes], lines)]
    return "\n".join(parts)


def modality_table(rows: Sequence[DepthRow]) -> str:
    """A line for each modality and depth; a dash where there is no figure."""
    titles = TEXT_SCORES[1:] if rows[0].generated else ()
    with_flows = any(flow_name(scores) is not None for scores in rows[0].modalities.values())
    lines = []
    for name, row in product(rows[0].modalities, rows):
        scores = row.modalities[name]
        losses = ["loss", *([flow_name(scores)] if with_flows else ())]
        shown = [figure_cell(scores.losses.get(it), scores.intervals.get(it)) for it in losses]
        exact = "-" if scores.exact_match is None else percent(scores.exact_match, scores.intervals.get("exact_match"))
        texts = ["-"] * len(titles) if scores.generated is None else text_cells(scores.generated)[1:]
        lines.append([name, depth_name(row.num_steps), *shown, exact, *texts])
    return format_table(["modality", "steps", "loss", *(["flow loss"] if with_flows else ()), "exact", *titles], lines)


def flow_name(scores: ModalityScores) -> str | None:
    """The name of the mean loss of the latents of a modality, if it has any."""
    return next((name for name in scores.losses if name.startswith("flow_loss_")), None)


def text_cells(scores: TextScores) -> list[str]:
    """Cells in the order of `TEXT_SCORES`."""
    errors, others = ("word_error_rate", "character_error_rate"), ("bleu", "chrf", "rouge1", "rouge2", "rouge_l")
    names = ("exact_match", *errors, *others)
    return [percent(getattr(scores, name), scores.intervals.get(name)) for name in names]


def format_table(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, figures to the right."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *body, strict=True)]
    lines = [[cell.rjust(width) for cell, width in zip(line, widths, strict=True)] for line in (header, *body)]
    lines.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def media_markdown(table: MediaTable) -> str:
    """A table for each source of media: a line for each depth, and one for real media."""
    parts = []
    for name, first in table.rows[0].sources.items():
        columns = [media_columns(row.sources[name], table.real[name]) for row in table.rows]
        header, _, real = zip(*columns[0], strict=True)
        lines = [
            [depth_name(row.num_steps), *(figure for _, figure, _ in found)]
            for row, found in zip(table.rows, columns, strict=True)
        ]
        parts.append(f"{VERBS[first.modality]} for {name} ({first.num_examples}):\n")
        parts.append(format_table(["steps", *header], [*lines, ["real", *real]]))
    return "\n".join(parts)


def names_of_checks(checks: Mapping[str, float]) -> list[str]:
    """All of them together first."""
    return sorted(checks, key=lambda name: name != "all")


def media_columns(scores: MediaScores, real: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """Title, figure, and the same figure of real media, a dash where there is none, of the columns of a source."""
    names, intervals = names_of_checks(scores.checks), scores.intervals
    columns = [(name, percent(scores.checks[name], intervals.get(name)), percent(real[name])) for name in names]
    for name, it in [*scores.classified.items(), *scores.distances.items()]:
        if isinstance(it, ClassifierScores):
            columns.append((f"{name} classifier", percent(it.accuracy, it.interval), percent(it.real_accuracy)))
        distances = (it.frechet_distance, it.real_frechet_distance), (it.kernel_distance, it.real_kernel_distance)
        for title, pair in zip(("Frechet", "KID"), distances, strict=True):
            columns.append((f"{name} {title}", *("-" if value is None else f"{value:.3f}" for value in pair)))
    if scores.round_trip:
        exact, errors, *_ = text_cells(scores.round_trip)
        columns += [("round trip", exact, "-"), ("round trip WER", errors, "-")]
    if scores.mean_steps:
        columns.append(("mean steps", f"{scores.mean_steps:.2f}", "-"))
    return [*columns, ("ms", f"{scores.milliseconds:.1f}", "-")]


# --------------------------------------------------------------------------------------------------------------- curves


def plot_depths(rows: Sequence[DepthRow], path: Path) -> None:
    """Loss, exact match and time against depth, side by side, as PNG; depth on a logarithmic axis. Below them, if texts
    were generated, error rates, BLEU and chrF, and attributes.
    """
    num_lines = 2 if rows[0].generated else 1
    figure = new_figure(13, 4 * num_lines)
    panels = figure.subplots(num_lines, 3, squeeze=False)
    plot_losses(rows, *panels[0])
    if rows[0].generated:
        plot_texts(rows, *panels[1])
    for axes in panels.flat:
        label_depths(axes, rows)
    figure.savefig(path, dpi=120)


def plot_media(table: MediaTable, path: Path) -> None:
    """Each source's checks and accuracies against depth, as PNG; dotted lines are what real media reach."""
    names = list(table.rows[0].sources)
    figure = new_figure(6.5 * len(names), 4.5)
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        plot_source([row.sources[name] for row in table.rows], places_of(table.rows), table.real[name], axes)
        label_depths(axes, table.rows)
        axes.set(title=name, ylim=(-0.02, 1.02))
    figure.savefig(path, dpi=120)


def new_figure(width: float, height: float) -> Figure:
    """A figure of a size in inches that is drawn without a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def label_depths(axes: Axes, rows: Sequence[DepthRow | MediaRow]) -> None:
    """Make the horizontal axis that of the depths, and add grid and legend."""
    if len(rows) > 1:
        axes.set_xscale("log", base=2)
    axes.set_xticks(places_of(rows), [depth_name(row.num_steps) for row in rows])
    axes.set_xlabel("core steps")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize="small")


def places_of(rows: Sequence[DepthRow | MediaRow]) -> list[int]:
    """Places of the depths on the horizontal axis."""
    return [row.num_steps or 0 for row in rows]


def plot_losses(rows: Sequence[DepthRow], loss: Axes, exact: Axes, duration: Axes) -> None:
    """The panels that every evaluation has."""
    depths = places_of(rows)
    modalities = [name for name, scores in rows[0].modalities.items() if scores.losses]
    loss.plot(depths, [row.loss for row in rows], marker="o", label="all" if modalities else None)
    show_band(loss, depths, [row.intervals.get("loss") for row in rows])
    for name in modalities:
        loss.plot(depths, [row.modalities[name].losses["loss"] for row in rows], marker=".", ls="--", label=name)
    loss.set_ylabel("loss (nats per token)")
    for name in rows[0].exact_match:
        exact.plot(depths, [row.exact_match[name].total for row in rows], marker="o", label=name)
        show_band(exact, depths, [row.exact_match[name].interval for row in rows])
    exact.set_ylabel("exact match")
    exact.set_ylim(-0.02, 1.02)
    duration.plot(depths, [row.milliseconds_per_token for row in rows], marker="o")
    duration.set_ylabel("milliseconds per token")
    duration.set_ylim(bottom=0)


def show_band(axes: Axes, depths: Sequence[int], intervals: Sequence[Interval | None]) -> None:
    """The intervals around the curve that was plotted last, in its colour; where it is a single point, a line."""
    if any(it is None for it in intervals):
        return
    color, (lows, highs) = axes.lines[-1].get_color(), zip(*intervals, strict=True)
    axes.fill_between(depths, lows, highs, color=color, alpha=0.15, linewidth=0)
    if len(depths) == 1:
        axes.vlines(depths, lows, highs, color=color)


def plot_texts(rows: Sequence[DepthRow], errors: Axes, scores: Axes, attributes: Axes) -> None:
    """The panels of what was written."""
    depths = places_of(rows)
    for number, (name, first) in enumerate(rows[0].generated.items()):
        written = [row.generated[name] for row in rows]
        (line,) = errors.plot(depths, [it.word_error_rate for it in written], marker="o", label=f"{name}, words")
        show_band(errors, depths, [it.intervals.get("word_error_rate") for it in written])
        look = {"color": line.get_color(), "marker": ".", "ls": "--"}
        errors.plot(depths, [it.character_error_rate for it in written], label=f"{name}, characters", **look)
        scores.plot(depths, [it.bleu for it in written], marker="o", color=line.get_color(), label=f"{name}, BLEU")
        show_band(scores, depths, [it.intervals.get("bleu") for it in written])
        scores.plot(depths, [it.chrf for it in written], label=f"{name}, chrF", **look)
        for attribute in first.attributes:
            look = {"marker": ".", "ls": LINES[number % len(LINES)], "label": f"{name}, {attribute}"}
            attributes.plot(depths, [it.attributes[attribute] for it in written], **look)
            show_band(attributes, depths, [it.intervals.get(attribute) for it in written])
    errors.set_ylabel("error rate")
    errors.set_ylim(bottom=0)
    for axes, what in ((scores, "BLEU and chrF"), (attributes, "attributes that are right")):
        axes.set_ylabel(what)
        axes.set_ylim(-0.02, 1.02)


def plot_source(scores: Sequence[MediaScores], depths: Sequence[int], real: Mapping[str, float], axes: Axes) -> None:
    """The curves of one source."""
    curves = {
        name: ([it.checks[name] for it in scores], [it.intervals.get(name) for it in scores], real[name])
        for name in names_of_checks(scores[0].checks)
    }
    for name, first in scores[0].classified.items():
        found = [it.classified[name] for it in scores]
        curves[f"{name} classifier"] = [it.accuracy for it in found], [it.interval for it in found], first.real_accuracy
    for name, (values, intervals, limit) in curves.items():
        (line,) = axes.plot(depths, values, marker="o" if name == "all" else ".", label=name)
        if name == "all" or len(curves) == 1:
            show_band(axes, depths, intervals)
        axes.axhline(limit, color=line.get_color(), ls=":", lw=0.8)
    if scores[0].round_trip:
        axes.plot(depths, [it.round_trip.exact_match for it in scores], marker=".", ls="--", label="round trip")


def save_contact_sheet(samples: Sequence[MediaSample], path: Path) -> None:
    """A line for each prompt, as PNG: the reference, and what was written at each depth, framed by whether it is right.
    Of sound the spectrogram is shown.
    """
    depths = list(samples[0].generated)
    figure = new_figure(1.5 * (len(depths) + 1), 1.8 * len(samples))
    for sample, part in zip(samples, figure.subfigures(len(samples), squeeze=False)[:, 0], strict=True):
        part.suptitle(textwrap.shorten(sample.prompt, 60, placeholder="..."), fontsize=7, x=0.01, ha="left")
        first, *others = part.subplots(1, len(depths) + 1, squeeze=False)[0]
        show(sample.reference, first, "reference")
        for depth, axes in zip(depths, others, strict=True):
            show(sample.generated[depth], axes, depth_name(depth))
            if depth in sample.is_right:
                axes.spines[:].set(color=RIGHT if sample.is_right[depth] else WRONG, linewidth=2)
    figure.savefig(path, dpi=150)


def show(medium: GeneratedItem | None, axes: Axes, label: str) -> None:
    """An image, or the spectrogram of a waveform; nothing of none."""
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(label, fontsize=7)
    if isinstance(medium, tuple):
        axes.imshow(spectrogram_levels(*medium), origin="lower", aspect="auto", cmap="magma")
    elif medium is not None:
        axes.imshow(medium, interpolation="nearest")


def spectrogram_levels(samples: np.ndarray, rate: int) -> np.ndarray:
    """Levels in powers of ten, (frequencies, frames), those far below the loudest cut off."""
    size, hop = round(WINDOW * rate), round(HOP * rate)
    waveform = torch.as_tensor(samples, dtype=torch.float32)
    window = torch.hann_window(size)
    spectrum = torch.stft(waveform, size, hop, window=window, pad_mode="constant", return_complex=True)
    levels = spectrum.abs().square().clamp(min=1e-12).log10()
    return levels.clamp(min=levels.max() - RANGE).numpy()


# ---------------------------------------------------------------------------------------------------------------- files


def save_depth_table(rows: Sequence[DepthRow], folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write depth.json, depth.md and depth.png into the folder, and depth_examples.jsonl, a line for each example at
    each depth, if these are known; return their paths.

    Args:
        rows: The result of `depth_table`.
        folder: Folder of the files, made if missing.
        about: What was evaluated (checkpoint, sources, limit); it stands next to the rows in the JSON.
    """
    content = {**about, "rows": [asdict(replace(row, examples=None)) for row in rows]}
    paths = save_table(folder, "depth", content, markdown_table(rows))
    plot_depths(rows, paths[-1])
    lines = [json.dumps(line, ensure_ascii=False) + "\n" for row in rows for line in example_lines(row)]
    if lines:
        paths.append(folder / "depth_examples.jsonl")
        paths[-1].write_text("".join(lines), encoding="utf-8")
    return paths


def example_lines(row: DepthRow) -> Iterator[dict[str, Any]]:
    """What is known of each example at one depth: of a row of a validation source, the sum of its losses in nats, its
    tokens and bytes, and the losses of its latents; of a question, whether it is right, and what was written.
    """
    if row.examples is None:
        return
    for source, sums in row.examples.texts.items():
        for number, (tokens, latents) in enumerate(zip(sums.tokens.sum(dim=1).tolist(), sums.latents, strict=True)):
            names = ("nats", "tokens", "bytes")[: len(tokens)]  # bytes may be unknown
            line = {
                "num_steps": row.num_steps,
                "source": source,
                "row": number,
                **dict(zip(names, tokens, strict=True)),
            }
            for name, (total, count) in zip(TARGET_MODALITIES, latents.tolist(), strict=True):
                line |= {f"{name}_loss": total, f"{name}_latents": count} if count else {}
            yield line
    for source, answers in row.examples.answers.items():
        for number, answer in enumerate(answers):
            known = {name: getattr(answer, name) for name in ("is_right", "difficulty", "reference", "generated")}
            yield {"num_steps": row.num_steps, "source": source, "question": number, **known}


def save_media_table(table: MediaTable, folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write media.json, media.md, media.png and a contact sheet media_SOURCE.png of each source into the folder and
    return their paths.

    Args:
        table: The result of `media_table`.
        folder: Folder of the files, made if missing.
        about: What was evaluated; it stands next to the rows in the JSON.
    """
    content = {**about, "real": table.real, "rows": [asdict(row) for row in table.rows]}
    paths = save_table(folder, "media", content, media_markdown(table))
    plot_media(table, paths[-1])
    for name, samples in table.samples.items():
        paths.append(folder / f"media_{''.join(it if it.isalnum() else '_' for it in name)}.png")
        save_contact_sheet(samples, paths[-1])
    return paths


def save_table(folder: Path, name: str, content: Mapping[str, Any], markdown: str) -> list[Path]:
    """Write NAME.json and NAME.md, and return their paths with that of NAME.png, which is still to be drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    paths[1].write_text(markdown, encoding="utf-8")
    return paths
