"""The files of an evaluation: JSON, Markdown and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from model import TARGET_MODALITIES

from .depth import DepthRow
from .efficiency import EfficiencyTable, efficiency_markdown
from .media_generation import MediaTable
from .plots import plot_depths, plot_efficiency, plot_media, save_contact_sheet
from .tables import markdown_table, media_markdown


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


def save_efficiency(table: EfficiencyTable, folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write efficiency.json, efficiency.md and efficiency.png into the folder and return their paths.

    Args:
        table: The result of `efficiency_table`.
        folder: Folder of the files, made if missing.
        about: What was evaluated; it stands next to the points in the JSON.
    """
    paths = save_table(folder, "efficiency", {**about, **asdict(table)}, efficiency_markdown(table))
    plot_efficiency(table, paths[-1])
    return paths


def save_table(folder: Path, name: str, content: Mapping[str, Any], markdown: str) -> list[Path]:
    """Write NAME.json and NAME.md, and return their paths with that of NAME.png, which is still to be drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.{suffix}" for suffix in ("json", "md", "png")]
    paths[0].write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    paths[1].write_text(markdown, encoding="utf-8")
    return paths
