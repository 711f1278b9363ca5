"""Figures of what is observed in a model while it trains, drawn without a display."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GAP = 4  # pixels between two maps
_LEAST_SIDE = 96  # pixels of a small map
_DPI = 100


def blank_figure(width: float, height: float) -> Figure:
    """A figure of a size in inches."""
    from matplotlib.figure import Figure  # here, since most runs draw late or not at all

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def maps_figure(lines: dict[str, dict[int, torch.Tensor]]) -> Figure:
    """Attention maps, (query, key) in 0 .. 1, of one size, by line and column: a core step, or 0 for what runs once.
    Brighter is more, by its square root.
    """
    columns = sorted({column for line in lines.values() for column in line})
    size = len(next(iter(lines[next(iter(lines))].values())))
    pitch = size + _GAP
    canvas = np.full((len(lines) * pitch - _GAP, len(columns) * pitch - _GAP), np.nan, dtype=np.float32)
    for row, line in enumerate(lines.values()):
        for column, values in line.items():
            top, left = row * pitch, columns.index(column) * pitch
            canvas[top : top + size, left : left + size] = values.float().sqrt().cpu()
    scale = max(1, _LEAST_SIDE // size) / _DPI
    figure = blank_figure(2 + canvas.shape[1] * scale, 1 + canvas.shape[0] * scale)
    axes = figure.subplots()
    axes.imshow(canvas, cmap="magma", vmin=0, vmax=1, interpolation="none")
    centres = [place * pitch + size / 2 for place in range(max(len(lines), len(columns)))]
    axes.set_xticks(centres[: len(columns)], [f"step {column}" if column else "once" for column in columns])
    axes.set_yticks(centres[: len(lines)], list(lines))
    axes.set_title("attention, mean over heads; down: query, right: key", fontsize="small")
    return figure


def flow_figure(layers: dict[str, tuple[float, float]]) -> Figure:
    """Mean and largest absolute gradient by layer, on a logarithmic scale."""
    figure = blank_figure(2 + 0.4 * len(layers), 4)
    axes = figure.subplots()
    places = np.arange(len(layers))
    means, largest = zip(*layers.values(), strict=True)
    axes.bar(places, largest, color="tab:blue", alpha=0.4, label="largest")
    axes.bar(places, means, color="tab:blue", label="mean")
    if max(largest) > 0:
        axes.set_yscale("log")
    axes.set_xticks(places, list(layers), rotation=90)
    axes.set_ylabel("|gradient|")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3, axis="y")
    return figure


def exits_figure(counts: Sequence[int], criterion: str) -> Figure:
    """How many tokens would exit after step 1, 2 ..., of which the last is that of those which never would."""
    figure = blank_figure(5, 3.5)
    axes = figure.subplots()
    axes.bar(range(1, len(counts) + 1), counts)
    axes.set(xlabel="core steps", ylabel="tokens", title=f"exits by {criterion}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def trajectories_figure(points: torch.Tensor, distances: torch.Tensor) -> Figure:
    """The ways of states over the core steps, in the plane and by their distance to the last.

    Args:
        points: (steps + 1, tokens, 2), from s_0 on.
        distances: (steps, tokens), of s_0 .. s_{r-1}.
    """
    figure = blank_figure(10, 4.5)
    plane, distance = figure.subplots(1, 2)
    for token in range(points.shape[1]):
        (line,) = plane.plot(*points[:, token].T.cpu(), marker=".", linewidth=1)
        plane.plot(*points[-1, token].cpu(), marker="*", markersize=10, color=line.get_color())
        distance.plot(range(len(distances)), distances[:, token].cpu(), marker=".", color=line.get_color())
    plane.set(xlabel="first principal component", ylabel="second", title="states; *: the last")
    distance.set(xlabel="core steps", title="|s_i - s_r| / |s_r|")
    if math.isfinite(largest := distances.max().item()) and largest > 0:
        distance.set_yscale("log")
    distance.xaxis.get_major_locator().set_params(integer=True)
    distance.grid(alpha=0.3)
    return figure
