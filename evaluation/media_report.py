"""What a model has written as Markdown, JSON, curves and contact sheets."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from .media_writing import MediaSample, MediaScores, MediaTable, Medium
from .report import depth_name, format_table, percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

VERBS = {"image": "Drawn", "audio": "Played"}
RIGHT, WRONG = "#2a9d2a", "#d62728"
WINDOW, HOP = 0.032, 0.008  # seconds of a frame of a spectrogram, and from one to the next
RANGE = 7.0  # powers of ten of a spectrogram that are shown

# --------------------------------------------------------------------------------------------------------------- tables


def media_markdown(table: MediaTable) -> str:
    """A table for each source: a line for each depth, and one for real media."""
    parts = []
    for name, first in table.rows[0].sources.items():
        title = f"{VERBS[first.medium]} for {name} ({first.num_examples}):\n"
        parts += [title, source_table(table, name)]
    return "\n".join(parts)


def source_table(table: MediaTable, name: str) -> str:
    """Checks, what judges say, what is read back, and time."""
    scores = [row.sources[name] for row in table.rows]
    lines = [[depth_name(row.num_steps), *cells(row.sources[name])] for row in table.rows]
    lines.append(["real", *real_cells(table.real[name], scores[0])])
    return format_table(["steps", *header_of(scores[0])], lines)


def check_names(checks: Mapping[str, float]) -> list[str]:
    """All of them together first."""
    return sorted(checks, key=lambda name: name != "all")


def header_of(scores: MediaScores) -> list[str]:
    """Names of the columns behind that of the depth."""
    judged = [f"{name} {what}" for name in scores.judged for what in ("judge", "Frechet", "KID")]
    judged += [f"{name} {what}" for name in scores.distances for what in ("Frechet", "KID")]
    read_back = ["read back", "read back WER"] if scores.read_back else []
    return [*check_names(scores.checks), *judged, *read_back, *(["mean steps"] if scores.mean_steps else []), "ms"]


def cells(scores: MediaScores) -> list[str]:
    """Figures of one depth, in the order of `header_of`."""
    found = [percent(scores.checks[name]) for name in check_names(scores.checks)]
    for it in scores.judged.values():
        found += [percent(it.accuracy), distance(it.frechet_distance), distance(it.kernel_distance)]
    for it in scores.distances.values():
        found += [distance(it.frechet_distance), distance(it.kernel_distance)]
    if scores.read_back:
        found += [percent(scores.read_back.exact_match), percent(scores.read_back.word_error_rate)]
    return [*found, *([f"{scores.mean_steps:.2f}"] if scores.mean_steps else []), f"{scores.milliseconds:.1f}"]


def real_cells(checks: Mapping[str, float], scores: MediaScores) -> list[str]:
    """The same figures of real media; a dash where there are none."""
    found = [percent(checks[name]) for name in check_names(scores.checks)]
    for it in scores.judged.values():
        found += [percent(it.real_accuracy), distance(it.real_frechet_distance), distance(it.real_kernel_distance)]
    for it in scores.distances.values():
        found += [distance(it.real_frechet_distance), distance(it.real_kernel_distance)]
    return [*found, *["-"] * (len(header_of(scores)) - len(found))]


def distance(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


# ------------------------------------------------------------------------------------------------------------- pictures


def plot_media(table: MediaTable, path: Path) -> None:
    """Each source's checks and accuracies against depth, as PNG; dotted lines are what real media reach."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(table.rows[0].sources)
    figure = Figure(figsize=(6.5 * len(names), 4.5), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a display
    depths = [row.num_steps or 0 for row in table.rows]
    for name, axes in zip(names, figure.subplots(1, len(names), squeeze=False)[0], strict=True):
        plot_source([row.sources[name] for row in table.rows], depths, table.real[name], axes)
        if len(depths) > 1:
            axes.set_xscale("log", base=2)
        axes.set_xticks(depths, [depth_name(row.num_steps) for row in table.rows])
        axes.set(xlabel="core steps", title=name, ylim=(-0.02, 1.02))
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=120)


def plot_source(scores: Sequence[MediaScores], depths: Sequence[int], real: Mapping[str, float], axes: Axes) -> None:
    """The curves of one source."""
    curves = {name: ([it.checks[name] for it in scores], real[name]) for name in check_names(scores[0].checks)}
    for name, first in scores[0].judged.items():
        curves[f"{name} judge"] = [it.judged[name].accuracy for it in scores], first.real_accuracy
    for name, (values, limit) in curves.items():
        (line,) = axes.plot(depths, values, marker="o" if name == "all" else ".", label=name)
        axes.axhline(limit, color=line.get_color(), ls=":", lw=0.8)
    if scores[0].read_back:
        axes.plot(depths, [it.read_back.exact_match for it in scores], marker=".", ls="--", label="read back")


def contact_sheet(samples: Sequence[MediaSample], path: Path) -> None:
    """A line for each prompt, as PNG: the reference, and what was written at each depth, framed by whether it is right.
    Of sound the spectrogram is shown.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    depths = list(samples[0].written)
    figure = Figure(figsize=(1.5 * (len(depths) + 1), 1.8 * len(samples)), layout="constrained")
    FigureCanvasAgg(figure)
    for sample, part in zip(samples, figure.subfigures(len(samples), squeeze=False)[:, 0], strict=True):
        part.suptitle(shortened(sample.prompt), fontsize=7, x=0.01, ha="left")
        first, *others = part.subplots(1, len(depths) + 1, squeeze=False)[0]
        show(sample.reference, first, "reference")
        for depth, axes in zip(depths, others, strict=True):
            show(sample.written[depth], axes, depth_name(depth))
            if depth in sample.is_right:
                axes.spines[:].set(color=RIGHT if sample.is_right[depth] else WRONG, linewidth=2)
    figure.savefig(path, dpi=150)


def show(medium: Medium | None, axes: Axes, label: str) -> None:
    """A picture, or the spectrogram of a recording; nothing of none."""
    axes.set(xticks=[], yticks=[])
    axes.set_xlabel(label, fontsize=7)
    if isinstance(medium, tuple):
        axes.imshow(spectrogram(*medium), origin="lower", aspect="auto", cmap="magma")
    elif medium is not None:
        axes.imshow(medium, interpolation="nearest")


def spectrogram(samples: np.ndarray, rate: int) -> np.ndarray:
    """Levels in powers of ten, (frequencies, frames), those far below the loudest cut off."""
    size, hop = round(WINDOW * rate), round(HOP * rate)
    waveform = torch.as_tensor(samples, dtype=torch.float32)
    window = torch.hann_window(size)
    spectrum = torch.stft(waveform, size, hop, window=window, pad_mode="constant", return_complex=True)
    levels = spectrum.abs().square().clamp(min=1e-12).log10()
    return levels.clamp(min=levels.max() - RANGE).numpy()


def shortened(prompt: str) -> str:
    """What stands above a line of a contact sheet."""
    words = " ".join(prompt.split())
    return words if len(words) <= 60 else f"{words[:57]}..."


# ---------------------------------------------------------------------------------------------------------------- files


def save_media_table(table: MediaTable, folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write media.json, media.md, media.png and a contact sheet media_SOURCE.png of each source into the folder and
    return their paths.

    Args:
        table: from `media_table`.
        folder: made if missing.
        about: what was evaluated; stands beside the rows in the JSON.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"media.{suffix}" for suffix in ("json", "md", "png")]
    content = {**about, "real": table.real, "rows": [asdict(row) for row in table.rows]}
    paths[0].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    paths[1].write_text(media_markdown(table), encoding="utf-8")
    plot_media(table, paths[2])
    for name, samples in table.samples.items():
        paths.append(folder / f"media_{''.join(it if it.isalnum() else '_' for it in name)}.png")
        contact_sheet(samples, paths[-1])
    return paths
