"""Plots of what depth buys, and contact sheets of what a model has generated."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .depth import DepthRow
from .efficiency import EfficiencyPoint, EfficiencyTable
from .intervals import Interval
from .media_generation import GeneratedItem, MediaRow, MediaSample, MediaScores, MediaTable
from .tables import depth_name, names_of_checks

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES = ("-", "--", ":", "-.")
RIGHT, WRONG = "#2a9d2a", "#d62728"
WINDOW, HOP = 0.032, 0.008  # seconds of a frame of a spectrogram, and from one to the next
RANGE = 7.0  # powers of ten of a spectrogram that are shown


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


def plot_efficiency(table: EfficiencyTable, path: Path) -> None:
    """Loss and exact answers against executed operations and against time, as PNG; rings are the Pareto front."""
    measures = ["loss", *(["exact"] if table.points[0].exact is not None else [])]
    figure = new_figure(11, 4 * len(measures))
    units = {"flops_per_token": "executed FLOPs per token", "milliseconds_per_token": "milliseconds per token"}
    for measure, panels in zip(measures, figure.subplots(len(measures), 2, squeeze=False), strict=True):
        for (name, unit), axes in zip(units.items(), panels, strict=True):
            plot_settings(table.points, name, measure, axes)
            axes.set(xlabel=unit, ylabel="loss (nats per token)" if measure == "loss" else "exact match")
            if name == "flops_per_token":
                front = [point for point in table.points if measure in point.on_front]
                place = [point.flops_per_token for point in front], [getattr(point, measure) for point in front]
                axes.plot(*place, ls=":", color="grey", marker="o", ms=12, mfc="none", label="Pareto front")
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def plot_settings(points: Sequence[EfficiencyPoint], name: str, measure: str, axes: Axes) -> None:
    """A curve for fixed depths and for each criterion, with intervals; labels are core steps, and thresholds."""
    for criterion in dict.fromkeys(point.criterion for point in points):
        kind = [point for point in points if point.criterion == criterion]
        places, values = ([getattr(point, it) for point in kind] for it in (name, measure))
        axes.plot(places, values, marker=".", label=criterion)
        show_band(axes, places, [point.intervals[measure] for point in kind])
        for point, place, value in zip(kind, places, values, strict=True):
            label = depth_name(point.num_steps) if point.threshold is None else f"{point.threshold:g}"
            axes.annotate(label, (place, value), (3, 4), textcoords="offset points", fontsize=7)
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
