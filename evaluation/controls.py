"""Controls of what more core steps buy: schedules of steps beside the plain ones, and a readout that is fitted anew,
over the same rows. `python -m evaluation RUN --controls` writes what is found.

With r the most steps, and k fewer:

    prefix(k)   k steps: the curve that is usually shown
    frozen(k)   r steps, of which those after step k attend to the keys and values of step k: nothing new is read
    suffix(k)   the last k of r steps, begun in the state that another row has after r - k steps
    recalibrated prefix(k), frozen(k): the logits divided by a temperature, and scale * s + shift in place of the last
                state s, both fitted on other rows than those that are scored

Source: the schedules and the share of the readout are those of the Depth Control Protocol (arXiv 2609.19934); that
`frozen` is recalibrated as well, so that the three shares have the sum 1, is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils.data import ConcatDataset, Subset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from .answers import Example
from .depth import Collate, DepthEvaluator, Item, answers_right, check_rows, evaluating, row_of
from .intervals import Interval, divided, interval_of, sums_of_draws, wilson_interval
from .metrics import token_nll
from .plots import label_depths, new_figure, show_band
from .results import save_table
from .tables import Table, figure_cell, percent, tables_markdown

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PART, SCORED, FITTED = 8, range(4), range(5, 7)
"""Rows of a source are taken in parts of so many: which of each part are scored, and which are fitted on. One is left
out between them, since a document may go on in the next row."""
FEWEST_ROWS, MOST_FITTED = 6, 64
"""Rows that the largest source needs, and rows of each that are fitted on at most, spread over all of it."""
FIT_ITERATIONS = 30
"""Iterations of L-BFGS, at most, for the temperature, and as many again for it and the affine map."""
SMALLEST_GAIN = 1e-6
"""Nats a token that an iteration has to gain, or it is the last."""
PRIOR_SPREAD = 0.3
"""Standard deviation of the normal prior of each number of the map around changing nothing: without one, a few rows
teach a map their noise, and it is worse than none on others."""
SHARES = ("readout", "applications", "distinct steps")
"""Parts of the gap, whose sum is 1."""
CURVES = ("prefix", "frozen", "suffix", "temperature", "recalibrated", "recalibrated frozen")
"""Schedules that are scored, by the names of their columns; of exact answers without that of the temperature alone."""


@dataclass
class ControlRow:
    """One number of steps k."""

    num_steps: int
    scores: dict[str, float]
    """Nats per token, or shares of right answers, by the names of `CURVES`."""
    intervals: dict[str, Interval]
    gap: float
    """The score of prefix(r) from that of prefix(k): of losses how much lower it is, of answers how much higher."""
    gap_interval: Interval
    shares: dict[str, float] = field(default_factory=dict)
    """Parts of the gap, by the names of `SHARES`; that of the temperature alone, which is part of the readout's, and
    what suffix(k) closes, as "last steps". Empty where the gap's interval is not above 0: there is nothing to share."""
    share_intervals: dict[str, Interval] = field(default_factory=dict)
    temperature: float = 1.0
    """The fitted one of prefix(k), without an affine map."""


@dataclass
class ControlTable:
    """Rows of one kind: of all validation sources together, or the questions of one."""

    name: str
    measure: str
    """"loss" or "exact"."""
    num_scored: int
    num_fitted: int
    rows: list[ControlRow]
    """By number of steps, the most last."""


class Readout(NamedTuple):
    """The numbers that are fitted between the core and the loss."""

    log_temperature: torch.Tensor
    scale: torch.Tensor
    """(hidden,), as `shift`."""
    shift: torch.Tensor

    def change(self, state: torch.Tensor) -> torch.Tensor:
        """States that are read in place of the last ones, (batch, sequence, hidden)."""
        return (state * self.scale + self.shift).to(state.dtype)


def untouched_readout(hidden_size: int, device: torch.device) -> Readout:
    """The readout that changes nothing."""
    scale = torch.ones(hidden_size, device=device)
    return Readout(torch.zeros((), device=device), scale, torch.zeros_like(scale))


# ------------------------------------------------------------------------------------------------------------ schedules


class FrozenSlot:
    """Keys and values that a layer has seen at one step, for this and all later ones. It takes the place of a slot of a
    cache, which it asks at that step, if there is one.
    """

    def __init__(self, slot: Any = None):
        self.slot, self.kept = slot, None

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, where: Any, rows: torch.LongTensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values that are attended to."""
        if self.kept is None:
            self.kept = (keys, values) if self.slot is None else self.slot.update(keys, values, where, rows)
        return self.kept


BeforeStep = Callable[[int, nn.Module, torch.Tensor, dict[str, Any]], None]
"""(steps taken, core, state, keyword arguments of the next step, which it may change)."""


@contextmanager
def at_each_step(
    core: nn.Module,
    before: BeforeStep | None = None,
    after: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
) -> Iterator[None]:
    """A context in which functions are called around each step of one forward pass.

    Args:
        core: The recurrent core of a model.
        before: Changes the arguments of a step.
        after: (steps taken, state before the last, state behind it) -> the state that goes on.
    """
    taken = 0

    def begin(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        if before is not None:
            before(taken, module, args[0], kwargs)
        return args, kwargs

    def end(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: torch.Tensor) -> torch.Tensor:
        nonlocal taken
        taken += 1
        return output if after is None else after(taken, args[0], output)

    hooks = [
        core.register_forward_pre_hook(begin, with_kwargs=True),
        core.register_forward_hook(end, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def freezing(step: int) -> BeforeStep:
    """Lets all steps after number `step` attend as this one does."""
    kept: dict[str, Any] = {}

    def before(taken: int, core: nn.Module, state: torch.Tensor, kwargs: dict[str, Any]) -> None:
        if taken + 1 == step:
            slots = kwargs["slots"] or [None] * len(core.order)
            kept.update(slots=[FrozenSlot(slot) for slot in slots], inputs=kwargs["inputs"])
        kwargs.update(kept)

    return before


def skipping(steps: int) -> BeforeStep:
    """Lets the first step be the one behind `steps` others, where a core knows which it is."""

    def before(taken: int, core: nn.Module, state: torch.Tensor, kwargs: dict[str, Any]) -> None:
        kwargs["step"] = None if kwargs["step"] is None else taken + steps
        kwargs["step_embeds"] = core.embed_step(taken + steps, state)

    return before


def states_of_next_rows(states: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
    """The states of each row's next one, of the last row the first one's, (batch, sequence, hidden); where the next
    row is shorter, it begins anew.
    """
    order = [(row + 1) % len(states) for row in range(len(states))]
    places = [torch.arange(states.shape[1], device=states.device) % lengths[row] for row in order]
    return torch.stack([states[row, at] for row, at in zip(order, places, strict=True)])


@dataclass
class ControlRunner:
    """One model at schedules of at most `most` steps.

    Args:
        evaluator: Makes batches, and runs the model.
        most: r.
    """

    evaluator: DepthEvaluator
    most: int

    @property
    def core(self) -> nn.Module:
        """The module of which one call is one step."""
        return self.evaluator.model.base_model.core

    def run(
        self,
        batch: dict[str, torch.Tensor],
        schedule: str,
        num_steps: int,
        readout: Readout | None = None,
        start: torch.Tensor | None = None,
        with_states: bool = False,
    ) -> Any:
        """Output of the model.

        Args:
            batch: Inputs and labels.
            schedule: "prefix", "frozen" or "suffix".
            num_steps: k.
            readout: Changes what is read of the last state. Default: nothing.
            start: The states in which a suffix begins.
            with_states: Whether the output has s_0 .. s_r.
        """
        steps = self.most if schedule == "frozen" else num_steps
        before = {"frozen": freezing(num_steps), "suffix": skipping(self.most - num_steps)}.get(schedule)

        def after(taken: int, state: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
            return output if readout is None or taken < steps else readout.change(output)

        further = {} if start is None else {"initial_state": start}
        further |= {"output_states": True} if with_states else {}
        with at_each_step(self.core, before, after):
            return self.evaluator.forward({**batch, **further}, steps)

    def batches(self, items: Sequence[Item]) -> Iterator[dict[str, torch.Tensor]]:
        """Batches of at least two rows, if there are as many, so that a row has a next one."""
        size = max(2, self.evaluator.batch_size)
        starts = list(range(0, len(items), size))
        if len(starts) > 1 and len(items) - starts[-1] == 1:
            starts.pop()
        for start, end in zip(starts, [*starts[1:], len(items)], strict=True):
            yield self.evaluator.batch_of([items[index] for index in range(start, end)])

    def lengths(self, batch: Mapping[str, torch.Tensor]) -> list[int]:
        """Tokens of each row of a batch, padding at its end left out."""
        is_of_source = self.evaluator.model.config.is_encoder_decoder
        mask = None if is_of_source else batch.get("attention_mask")
        rows, width = batch["labels"].shape
        return [width] * rows if mask is None or mask.ndim != 2 else mask.sum(dim=1).clamp(min=1).tolist()

    def score(
        self, items: Sequence[Item], depths: Sequence[int], readouts: Mapping[tuple[str, int], tuple[Readout, Readout]]
    ) -> dict[tuple[str, int], torch.Tensor]:
        """The scores of each row by (name of a curve, k): nats, tokens, and whether all of its tokens are the
        likeliest, float64 (rows, 3).
        """
        found: dict[tuple[str, int], list[torch.Tensor]] = {}
        for batch in self.batches(items):
            whole = self.run(batch, "prefix", self.most, with_states=True)
            donors, lengths = whole.states, self.lengths(batch)

            def note(name: str, steps: int, logits: torch.Tensor, batch=batch) -> None:
                logits, labels = self.evaluator.aligned(logits, batch)
                parts = (token_nll(logits, labels), answers_right(logits, labels)[:, None].double())
                found.setdefault((name, steps), []).append(torch.cat(parts, dim=1).cpu())

            for steps in depths:
                plain = self.run(batch, "prefix", steps).logits
                note("prefix", steps, plain)
                note("temperature", steps, plain / readouts["prefix", steps][0].log_temperature.exp())
                start = states_of_next_rows(donors[self.most - steps], lengths)
                note("frozen", steps, self.run(batch, "frozen", steps).logits)
                note("suffix", steps, self.run(batch, "suffix", steps, start=start).logits)
                for schedule, name in (("prefix", "recalibrated"), ("frozen", "recalibrated frozen")):
                    readout = readouts[schedule, steps][1]
                    logits = self.run(batch, schedule, steps, readout).logits
                    note(name, steps, logits / readout.log_temperature.exp())
        return {key: torch.cat(parts) for key, parts in found.items()}

    def fit(self, items: Sequence[Item], schedule: str, num_steps: int) -> tuple[Readout, Readout]:
        """The temperature that makes the loss over items lowest, alone, and together with an affine map."""
        known = []
        for batch in self.batches(items):
            known.append((batch, self.run(batch, schedule, num_steps, with_states=True).states[-1]))
        config = self.evaluator.model.config.get_text_config()
        begin = untouched_readout(config.hidden_size, self.evaluator.model.device)
        temperature = self.minimise(known, begin, 1)
        return temperature, self.minimise(known, temperature, 3)

    def minimise(
        self, known: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]], begin: Readout, num_parts: int
    ) -> Readout:
        """The readout with the lowest loss over batches with known last states, of which the first parts are fitted, by
        L-BFGS over all rows at once.
        """
        readout = Readout(*(part.clone().requires_grad_(index < num_parts) for index, part in enumerate(begin)))
        fitted = readout[:num_parts]
        tokens = sum((batch["labels"] != -100).sum() for batch, _ in known)
        options = {"max_iter": FIT_ITERATIONS, "tolerance_change": SMALLEST_GAIN, "line_search_fn": "strong_wolfe"}
        optimizer = torch.optim.LBFGS(fitted, **options)

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            total = 0.0
            for batch, state in known:
                loss = self.loss_from(batch, state, readout) / tokens
                for part, gradient in zip(fitted, torch.autograd.grad(loss, fitted), strict=True):
                    part.grad = gradient if part.grad is None else part.grad + gradient
                total = total + loss.detach()
            prior = self.prior(readout) / tokens
            of_prior = torch.autograd.grad(prior, fitted[1:]) if num_parts > 1 else ()
            for part, gradient in zip(fitted[1:], of_prior, strict=True):
                part.grad += gradient
            return total + prior.detach()

        with torch.enable_grad():
            optimizer.step(closure)
        return Readout(*(part.detach() for part in readout))

    def prior(self, readout: Readout) -> torch.Tensor:
        """The cost of the affine map, in nats."""
        return ((readout.scale - 1).square().sum() + readout.shift.square().sum()) / (2 * PRIOR_SPREAD**2)

    def loss_from(self, batch: dict[str, torch.Tensor], state: torch.Tensor, readout: Readout) -> torch.Tensor:
        """The sum of the losses of tokens, in nats, read from known last states: the one step that is taken from them
        is left out.
        """
        with at_each_step(self.core, after=lambda taken, before, output: readout.change(before)):
            logits = self.evaluator.forward({**batch, "initial_state": state}, 1).logits
        logits, labels = self.evaluator.aligned(logits, batch)
        logits = logits[:, :-1].float() / readout.log_temperature.exp()
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum")


# --------------------------------------------------------------------------------------------------------------- tables


def divide_rows(count: int) -> tuple[list[int], list[int]]:
    """The numbers of the rows of a source that are scored, and of those that are fitted on."""
    scored = [row for row in range(count) if row % PART in SCORED]
    fitted = [row for row in range(count) if row % PART in FITTED]
    most = min(MOST_FITTED, len(fitted))
    return scored, [fitted[index * len(fitted) // most] for index in range(most)]


def check_controls(
    depths: Sequence[int | None], texts: Mapping[str, Sequence[Item]], examples: Mapping[str, Sequence[Example]]
) -> None:
    """Raise ValueError for a model without a core, whose depth is None; where there is no smaller number of steps than
    the most; and where there are too few rows.
    """
    if depths[0] is None:
        raise ValueError(
            "--controls compare numbers of core steps, but this model has no core (num_core_layers is 0): leave it out."
        )
    if len(depths) < 2:
        raise ValueError(
            f"--controls compare fewer core steps with the most, but there is {depths[0]} alone: give --num-steps a "
            "smaller number as well, of a model whose depth can vary."
        )
    check_rows(texts, examples)
    for name, sources in {"validation": texts, **{name: {name: rows} for name, rows in examples.items()}}.items():
        largest = max(map(len, sources.values()))
        if largest < FEWEST_ROWS:
            raise ValueError(
                f"{name} has {largest} rows at most, but --controls need {FEWEST_ROWS} of a source, some of them to "
                "fit the readout on: give it more data, or a larger --limit."
            )


def control_tables(
    model: PreTrainedModel,
    depths: Sequence[int],
    texts: Mapping[str, Sequence[Item]],
    examples: Mapping[str, Sequence[Example]],
    collate: Collate,
    batch_size: int = 8,
) -> list[ControlTable]:
    """The controls of a model: of the loss over all validation sources together, and of the exact answers of each
    source that has them; it is left in the mode (train or eval) it came in.

    Args:
        model: Called as model(input_ids, ..., num_steps=k); its depth can vary.
        depths: Numbers of core steps; the largest is r.
        texts: Validation rows by source.
        examples: Rows with one answer each by source, as `depth_table` takes them; may be empty.
        collate: List of rows -> dict of tensors.
        batch_size: Rows in a forward pass; at least 2 are taken.

    Raises:
        ValueError: There are not two depths, or a source has no row or too few.
    """
    depths = sorted(set(depths))
    check_controls(depths, texts, examples)
    runner = ControlRunner(DepthEvaluator(model, collate, None, batch_size, None), depths[-1])
    groups = {("validation", "loss"): list(texts.values())}
    for name, rows in examples.items():
        groups[name, "exact"] = [[row_of(rows[index]) for index in range(len(rows))]]
    with evaluating(model):
        return [control_table(runner, depths, *group, sources) for group, sources in groups.items()]


def control_table(
    runner: ControlRunner, depths: Sequence[int], name: str, measure: str, sources: Sequence[Sequence[Item]]
) -> ControlTable:
    """The controls over the rows of sources together."""
    divided = [(rows, *divide_rows(len(rows))) for rows in sources]
    scored = ConcatDataset([Subset(rows, numbers) for rows, numbers, _ in divided])
    fitted = [rows[number] for rows, _, numbers in divided for number in numbers]
    wanted = [(schedule, steps) for steps in depths for schedule in ("prefix", "frozen")]
    readouts = {
        key: runner.fit(fitted, *key)
        for key in tqdm(wanted[:-1], desc=f"readouts of {name}", unit="fit", disable=None)  # frozen(r) is prefix(r)
    }
    readouts["frozen", depths[-1]] = readouts["prefix", depths[-1]]
    scores = {key: found.numpy() for key, found in runner.score(scored, depths, readouts).items()}
    temperatures = {steps: float(readouts["prefix", steps][0].log_temperature.exp()) for steps in depths}
    rows = control_rows(scores, depths, measure, temperatures)
    return ControlTable(name, measure, len(scored), len(fitted), rows)


def control_rows(
    scores: Mapping[tuple[str, int], np.ndarray],
    depths: Sequence[int],
    measure: str,
    temperatures: Mapping[int, float],
) -> list[ControlRow]:
    """Scores and shares at each number of steps, with intervals by a bootstrap over rows that is the same for all.

    Args:
        scores: Nats, tokens, and whether it is right, of each row, (rows, 3), by curve and steps.
        depths: Numbers of steps, the largest last.
        measure: "loss" or "exact".
        temperatures: The fitted ones, by steps.
    """
    keys, first = list(scores), next(iter(scores.values()))
    is_loss = measure == "loss"
    values = [scores[key][:, 0] if is_loss else 1 - scores[key][:, 2] for key in keys]
    columns = np.stack([first[:, 1] if is_loss else np.ones(len(first)), *values], axis=1)
    columns = columns[first[:, 1] > 0]
    sums = np.concatenate([columns.sum(axis=0, keepdims=True), sums_of_draws(columns)])
    found = {key: divided(sums[:, number + 1], sums[:, 0]) for number, key in enumerate(keys)}  # of all rows first
    names = [name for name in CURVES if is_loss or name != "temperature"]
    rows, most, count = [], depths[-1], len(columns)

    def of_share(right: float) -> Interval:
        return wilson_interval(round(right * count), count)

    for steps in depths:
        curves = {name: found[name, steps] for name in names}
        gap = found["prefix", steps] - found["prefix", most]
        row = ControlRow(
            num_steps=steps,
            scores={name: float(it[0] if is_loss else 1 - it[0]) for name, it in curves.items()},
            intervals={name: interval_of(it[1:]) if is_loss else of_share(1 - it[0]) for name, it in curves.items()},
            gap=float(gap[0]),
            gap_interval=interval_of(gap[1:]),
            temperature=temperatures[steps],
        )
        if row.gap_interval.low > 0:
            shares = shares_of_gap({name: found[name, most] for name in names}, curves, gap)
            row.shares = {name: float(it[0]) for name, it in shares.items()}
            row.share_intervals = {name: interval_of(it[1:]) for name, it in shares.items()}
        rows.append(row)
    return rows


def shares_of_gap(
    full: Mapping[str, np.ndarray], curves: Mapping[str, np.ndarray], gap: np.ndarray
) -> dict[str, np.ndarray]:
    """Parts of the gap between prefix(k) and prefix(r), of losses or shares of errors by curve, at k and at r.

    What is left of it once both ends are recalibrated is divided in two: what r - k further applications of the core
    bring that read nothing new, and what only steps of their own do. "last steps" is what suffix(k) closes.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        found = {
            "readout": 1 - (curves["recalibrated"] - full["recalibrated"]) / gap,
            "applications": (curves["recalibrated"] - curves["recalibrated frozen"]) / gap,
            "distinct steps": (curves["recalibrated frozen"] - full["recalibrated"]) / gap,
            "last steps": (curves["prefix"] - curves["suffix"]) / gap,
        }
        if "temperature" in curves:
            found["temperature"] = 1 - (curves["temperature"] - full["temperature"]) / gap
    return {name: np.where(np.isfinite(it), it, np.nan) for name, it in found.items()}


def controls_markdown(tables: Sequence[ControlTable]) -> str:
    """The scores of all schedules, the parts of the gap, and a sentence for each number of steps, table by table."""
    parts = []
    for table in tables:
        scores, gaps = score_and_gap_tables(table)
        sentences = "".join(f"- {it}\n" for it in sentences_of(table))
        parts += [tables_markdown([scores, gaps]), sentences]
    return "\n".join(parts)


def score_and_gap_tables(table: ControlTable) -> tuple[Table, Table]:
    """The scores of all schedules, and the parts of the gap, by steps."""
    is_loss = table.measure == "loss"
    cell = figure_cell if is_loss else percent
    what = "Loss of validation rows" if is_loss else f"Exact answers of {table.name}"
    title = f"{what}, of which {table.num_scored} are scored and {table.num_fitted} others fitted on"
    names = list(table.rows[0].scores)
    scores = [[str(row.num_steps), *(cell(row.scores[it], row.intervals[it]) for it in names)] for row in table.rows]
    gaps = [[str(row.num_steps), cell(row.gap, row.gap_interval), *share_cells(row)] for row in table.rows[:-1]]
    return Table(title, ["steps", *names], scores), Table("", ["steps", "gap", *SHARES, "last steps"], gaps)


def sentences_of(table: ControlTable) -> list[str]:
    """A sentence for each number of steps but the most."""
    return [sentence_of(row, table.rows[-1].num_steps, table.measure) for row in table.rows[:-1]]


def share_cells(row: ControlRow) -> list[str]:
    """Cells of the parts of a gap; dashes where there is none."""
    names = (*SHARES, "last steps")
    return [percent(row.shares[it], row.share_intervals[it]) if row.shares else "-" for it in names]


def sentence_of(row: ControlRow, most: int, measure: str) -> str:
    """One plain sentence about the gap between a number of steps and the most."""
    is_loss, cell = measure == "loss", figure_cell if measure == "loss" else percent
    gap = cell(row.gap, row.gap_interval)
    where = f"At {row.num_steps} of {most} steps"
    if not row.shares:
        what = "loss is" if is_loss else "share of wrong answers is"
        return f"{where} the {what} not clearly higher, by {gap}: there is no gap to explain."
    lower = f"the loss is {gap} nats a token higher" if is_loss else f"{gap} of the answers are lost"
    readout, applications, distinct, last = share_cells(row)
    return (
        f"{where} {lower}, of which {readout} is the readout, {applications} the number of applications, and "
        f"{distinct} distinct steps; those from step {most - row.num_steps + 1} on alone, begun in another row's "
        f"state, close {last}."
    )


def save_controls(tables: Sequence[ControlTable], folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write controls.json, controls.md and controls.png into the folder and return their paths.

    Args:
        tables: The result of `control_tables`.
        folder: Folder of the files, made if missing.
        about: What was evaluated; it stands next to the tables in the JSON.
    """
    content = {**about, "tables": [asdict(table) for table in tables]}
    paths = save_table(folder, "controls", content, controls_markdown(tables))
    plot_controls(tables, paths[-1])
    return paths


def plot_controls(tables: Sequence[ControlTable], path: Path) -> None:
    """The scores of all schedules against depth, and the parts of the gap, a line for each table, as PNG."""
    figure = new_figure(11, 4 * len(tables))
    for table, (scores, shares) in zip(tables, figure.subplots(len(tables), 2, squeeze=False), strict=True):
        depths = [row.num_steps for row in table.rows]
        for name in table.rows[0].scores:
            look = {"ls": "--", "marker": "."} if name.startswith(("recal", "temp")) else {"marker": "o"}
            scores.plot(depths, [row.scores[name] for row in table.rows], label=name, **look)
            if name == "prefix":  # those of the others are about as wide
                show_band(scores, depths, [row.intervals[name] for row in table.rows])
        scores.set(title=table.name, ylabel="loss (nats per token)" if table.measure == "loss" else "exact match")
        label_depths(scores, table.rows)
        with_gap = [row for row in table.rows if row.shares]
        if with_gap:
            plot_shares(with_gap, shares)
        else:
            shares.set_axis_off()
    figure.savefig(path, dpi=120)


def plot_shares(rows: Sequence[ControlRow], axes: Axes) -> None:
    """The parts of each gap with their intervals, of rows that have one."""
    depths = [row.num_steps for row in rows]
    for name in (*SHARES, "last steps"):
        axes.plot(depths, [row.shares[name] for row in rows], marker="o", label=name)
        show_band(axes, depths, [row.share_intervals[name] for row in rows])
    axes.axhline(0, color="grey", lw=0.8)
    axes.set(ylabel="share of the gap", ylim=(-0.5, 1.5))
    label_depths(axes, rows)
