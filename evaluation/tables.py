"""Tables of what depth buys, and of what a model has generated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import NamedTuple

from .answers import TextScores
from .classifiers import ClassifierScores
from .depth import DepthRow, ModalityScores
from .intervals import Interval
from .media_generation import MediaScores, MediaTable

TEXT_SCORES = ("exact text", "WER", "CER", "BLEU", "chrF", "ROUGE-1", "ROUGE-2", "ROUGE-L")
VERBS = {"image": "Drawn", "audio": "Played"}


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


class Table(NamedTuple):
    """A table of text."""

    title: str
    """Empty for none."""
    header: list[str]
    body: list[list[str]]


def tables_markdown(tables: Sequence[Table]) -> str:
    """Tables below each other as Markdown, with their titles."""
    titled = ([f"{it.title}:\n"] * bool(it.title) + [format_table(it.header, it.body)] for it in tables)
    return "\n".join(part for parts in titled for part in parts)


def markdown_table(rows: Sequence[DepthRow]) -> str:
    """The `depth_tables` as Markdown."""
    return tables_markdown(depth_tables(rows))


def depth_tables(rows: Sequence[DepthRow]) -> list[Table]:
    """A table with a line per depth; then tables of modalities, of difficulties and of what was written, as far as
    there are any.
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
    tables = [Table("", header, body)]
    if rows[0].modalities:
        tables.append(modality_table(rows))
    for name in names:
        levels = list(rows[0].exact_match[name].by_difficulty)
        if len(levels) > 1:
            lines = []
            for row in rows:
                match = row.exact_match[name]
                cells = [percent(match.by_difficulty[it], match.difficulty_intervals.get(it)) for it in levels]
                lines.append([depth_name(row.num_steps), *cells])
            tables.append(Table(f"Exact match of {name} by difficulty", ["steps", *map(str, levels)], lines))
    for name, first in rows[0].generated.items():
        lines = []
        for row in rows:
            scores = row.generated[name]
            named = [percent(scores.attributes[it], scores.intervals.get(it)) for it in first.attributes]
            lines.append([depth_name(row.num_steps), *text_cells(scores), *named])
        title = f"Texts generated for {name} ({first.num_examples})"
        tables.append(Table(title, ["steps", *TEXT_SCORES, *first.attributes], lines))
    return tables


def modality_table(rows: Sequence[DepthRow]) -> Table:
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
    header = ["modality", "steps", "loss", *(["flow loss"] if with_flows else ()), "exact", *titles]
    return Table("By modality", header, lines)


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
    """The `media_tables` as Markdown."""
    return tables_markdown(media_tables(table))


def media_tables(table: MediaTable) -> list[Table]:
    """A table for each source of media: a line for each depth, and one for real media."""
    tables = []
    for name, first in table.rows[0].sources.items():
        columns = [media_columns(row.sources[name], table.real[name]) for row in table.rows]
        header, _, real = zip(*columns[0], strict=True)
        lines = [
            [depth_name(row.num_steps), *(figure for _, figure, _ in found)]
            for row, found in zip(table.rows, columns, strict=True)
        ]
        title = f"{VERBS[first.modality]} for {name} ({first.num_examples})"
        tables.append(Table(title, ["steps", *header], [*lines, ["real", *real]]))
    return tables


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
