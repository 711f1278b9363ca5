"""What an iteration does, as Markdown and figures."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .iteration import Dynamics, Verdict
from .media_generation import GeneratedItem
from .plots import new_figure, show
from .tables import format_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_POSITIONS = 24
"""Positions that a picture shows, the last ones."""
MOST_CHARACTERS = 8


@dataclass
class LensStep:
    """What coda and head read after one step, by position: the likeliest next token, and its probability."""

    step: int
    ids: list[int]
    texts: list[str]
    probabilities: list[float]


@dataclass
class PositionExits:
    """After how many steps each position would exit by a criterion, judged by itself; all, where it never would."""

    threshold: float
    steps: list[int]

    @property
    def mean(self) -> float:
        """The mean over positions."""
        return sum(self.steps) / len(self.steps)


@dataclass
class DynamicsReport:
    """All that is measured of one prompt."""

    tokens: list[str]
    """What stands at the positions."""
    dynamics: Dynamics
    lens: list[LensStep]
    exits: dict[str, PositionExits]
    """By criterion."""
    items: dict[int, GeneratedItem | None]
    """Images or audio that were generated for the prompt, by core steps; None where the model generated none."""


# ---------------------------------------------------------------------------------------------------------------- words


def verdict_sentence(verdict: Verdict) -> str:
    """The verdict and what it rests on."""
    period = "" if verdict.period is None else f" with a period of {verdict.period} steps"
    factor, radius = verdict.step_factor, verdict.spectral_radius
    steps = "steps have shrunk to nothing" if factor is None else f"each step is {factor:.3f} times as long as the last"
    return f"{verdict.name}{period}: {steps}; a step multiplies small differences by {radius:.3f}"


def dynamics_markdown(report: DynamicsReport) -> str:
    """The verdict, and tables of steps, of step sizes that were tried, and of exits."""
    found = report.dynamics
    lines = []
    for number, read in enumerate(report.lens, start=1):
        figures = [
            (found.step_sizes[number - 1], "{:.4f}"),
            (found.angles[number - 2] if number > 1 else None, "{:.1f}"),
            (found.residuals[number], "{:.4f}"),
            (found.spectral_radii[number], "{:.3f}"),
            (found.effective_ranks[number], "{:.2f}"),
        ]
        cells = ["-" if value is None else style.format(value) for value, style in figures]
        lines.append(
            [str(number), *cells, f"{shown(read.texts[-1])} {100 * read.probabilities[-1]:.1f} %".replace("|", r"\|")]
        )
    residual = f"to step {4 * found.num_steps}"
    header = ["step", "step size", "angle", residual, "spectral radius", "effective rank", "next token"]
    scan = [
        [f"{it.gamma:g}", f"{it.changes[-1]:.2g}", f"{it.distance:.4f}", f"{it.verdict.spectral_radius:.3f}", named(it)]
        for it in found.scan
    ]
    exits = [[name, f"{it.threshold:g}", f"{it.mean:.2f}", str(max(it.steps))] for name, it in report.exits.items()]
    parts = [
        f"{len(report.tokens)} positions, {found.num_steps} core steps, followed for {found.num_followed}. The "
        f"iteration {verdict_sentence(found.verdict)}.\n",
        format_table(header, lines),
        f"s + gamma (core(s) - s), after {found.num_followed} steps:\n",
        format_table(["gamma", "core(s) - s", "distance to gamma 1", "spectral radius", "verdict"], scan),
        "Core steps after which a position would exit:\n",
        format_table(["criterion", "threshold", "mean", "most"], exits),
    ]
    return "\n".join(parts)


def named(line: Any) -> str:
    """The verdict of a line of the scan, with its period."""
    verdict = line.verdict
    return verdict.name if verdict.period is None else f"{verdict.name} ({verdict.period})"


def shown(text: str) -> str:
    """A token in characters that every font has, shortened; one of spaces alone in quotes."""
    text = ascii(text) if text.isspace() else ascii(text)[1:-1]
    return text if len(text) <= MOST_CHARACTERS else f"{text[: MOST_CHARACTERS - 2]}.."


# -------------------------------------------------------------------------------------------------------------- figures


def lens_figure(report: DynamicsReport) -> Figure:
    """A heat map: down the core steps, to the right the positions, in each cell the token that it would say."""
    first = max(0, len(report.tokens) - MOST_POSITIONS)
    places = range(first, len(report.tokens))
    shares = np.array([[it.probabilities[place] for place in places] for it in report.lens])
    figure = new_figure(2.5 + 0.7 * len(places), 1.5 + 0.32 * len(report.lens))
    axes = figure.subplots()
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    for row, read in enumerate(report.lens):
        for column, place in enumerate(places):
            colour = "white" if shares[row, column] < 0.6 else "black"
            look = {"fontsize": 7, "ha": "center", "va": "center", "color": colour, "parse_math": False}
            axes.text(column, row, shown(read.texts[place]), **look)
    labels = [shown(report.tokens[place]).replace("$", r"\$") for place in places]
    axes.set_xticks(range(len(places)), labels, rotation=60, ha="right", fontsize=7)
    axes.set_yticks(range(len(report.lens)), [str(read.step) for read in report.lens], fontsize=7)
    axes.set(xlabel="token read", ylabel="core steps", title="the likeliest next token after each step")
    figure.colorbar(image, label="its probability")
    return figure


def dynamics_figure(report: DynamicsReport) -> Figure:
    """Step sizes, angles, residuals, spectral radii, effective ranks, the scan of step sizes, and exits."""
    found = report.dynamics
    figure = new_figure(18, 8)
    panels = figure.subplots(2, 4).flat
    draw_curve(next(panels), found.step_sizes, 1, "|s_i - s_{i-1}| / |s_i|", is_log=True)
    draw_curve(next(panels), found.angles, 1, "degrees between successive updates")
    draw_curve(next(panels), found.residuals, 0, f"|s_i - s_{4 * found.num_steps}| / |s_{4 * found.num_steps}|", True)
    radii = next(panels)
    draw_curve(radii, found.spectral_radii, 0, "spectral radius of the next step")
    radii.axhline(1, color="gray", ls=":")
    draw_curve(next(panels), found.effective_ranks, 0, "effective rank")
    scan = next(panels)
    for line in found.scan:
        draw_curve(scan, line.changes, 0, "|core(s) - s| / |s|", True, f"gamma {line.gamma:g}, {named(line)}")
    exits, steps = next(panels), np.arange(1, found.num_steps + 2)
    width = 0.9 / max(1, len(report.exits))
    for number, (name, it) in enumerate(report.exits.items()):
        counts, _ = np.histogram(it.steps, bins=steps)
        exits.bar(steps[:-1] - 0.45 + (number + 0.5) * width, counts, width, label=name)
    exits.set(xlabel="core steps", title="positions that exit")
    exits.legend(fontsize="x-small")
    by_position = next(panels)
    sizes = np.array(found.position_step_sizes)
    image = by_position.imshow(np.log10(np.maximum(sizes, 1e-12)), aspect="auto", cmap="magma", interpolation="none")
    image.axes.set_yticks(range(len(sizes)), range(1, len(sizes) + 1), fontsize=6)
    by_position.set(xlabel="position", ylabel="core steps", title="step sizes, powers of ten")
    figure.colorbar(image, ax=by_position)
    figure.suptitle(verdict_sentence(found.verdict))
    return figure


def draw_curve(
    axes: Axes, values: Sequence[float], first: int, title: str, is_log: bool = False, label: str | None = None
) -> None:
    """A curve of numbers by step, from step `first` on."""
    axes.plot(range(first, first + len(values)), values, marker=".", label=label)
    axes.set(xlabel="core steps", title=title)
    axes.grid(alpha=0.3)
    if is_log and any(value > 0 for value in values if math.isfinite(value)):
        axes.set_yscale("log")
    if label is not None:
        axes.legend(fontsize="x-small")


def items_figure(items: Mapping[int, GeneratedItem | None]) -> Figure:
    """The items side by side, by core steps; spectrograms of audio."""
    figure = new_figure(1.8 * len(items), 2.2)
    for axes, (depth, item) in zip(figure.subplots(1, len(items), squeeze=False)[0], items.items(), strict=True):
        show(item, axes, str(depth))
    return figure


# ---------------------------------------------------------------------------------------------------------------- files


def save_dynamics(report: DynamicsReport, folder: Path, about: Mapping[str, Any]) -> dict[str, Figure]:
    """Write dynamics.json, dynamics.md, dynamics.png, lens.png and, where there are items, items.png into a folder;
    the figures by name.
    """
    content = {
        **about,
        "tokens": report.tokens,
        **asdict(report.dynamics),
        "lens": [asdict(it) for it in report.lens],
        "exits": {name: asdict(it) for name, it in report.exits.items()},
    }
    (folder / "dynamics.json").write_text(json.dumps(without_nan(content), ensure_ascii=False) + "\n", "utf-8")
    (folder / "dynamics.md").write_text(dynamics_markdown(report), "utf-8")
    figures = {"dynamics": dynamics_figure(report), "lens": lens_figure(report)}
    if report.items:
        figures["items"] = items_figure(report.items)
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=110)
    return figures


def without_nan(content: Any) -> Any:
    """The same with None for numbers that JSON cannot hold."""
    if isinstance(content, dict):
        return {key: without_nan(value) for key, value in content.items()}
    if isinstance(content, list):
        return [without_nan(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
