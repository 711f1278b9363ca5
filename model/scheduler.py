"""Decoding of a looped model by items (row, position, step): a step has the same weights for all, so that items of
different rows, positions and depths share one launch of the core.

Step i of position t + 1 reads what t has left at step i. So t + 1 may follow t in a wave, some steps less deep, as soon
as its token is known: a draft, read off t before its last step. When t has taken that, the token that it says is final.
If it is the draft, t + 1 goes on from where it is; else what follows t is dropped, and t + 1 begins anew. So what is
final is what plain decoding says, whatever was drafted. Which token logits say, and what becomes of it, the caller
decides: nothing here knows of tokenizers or of sampling. What stands for a token may be something else.

Sources: WaveFront Decoding, arXiv 2609.23033; Continuous Depth Batching, arXiv 2608.09444.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import nn

from .attention import AttentionInputs, TokenInputs, alibi_bias, rotary_angles, rotary_tables, token_tables
from .blocks import BlockStack, pass_token, sinusoids
from .cache import BLOCK, CacheLayer, RecurrentCache
from .exit_criteria import EXIT_CRITERIA, ExitCheck, ExitCriterion, ExitOptions
from .item_slots import ItemPlaces, ItemSlot, causal_rows
from .recurrence import TokenStep
from .token_pass import token_norm, token_product


@dataclass(eq=False)
class TextRow:
    """A text that is continued.

    Args:
        index: Its row of the cache.
        start: The first place of that row which is no padding.
        last_place: The place of the last token that is read.
        num_steps: The most steps of a token.
        initial_state: s_0 of each token, (1, hidden); None: it follows from what the token embeds.
        exits: What ends the steps of a token earlier.
        draft_steps: Steps after which a token says a draft of the next. None: there are no drafts.
        prompt_end: The last place of a prompt that is read here, whose tokens take all steps; only the last says one.
    """

    index: int
    start: int
    last_place: int
    num_steps: int
    initial_state: torch.Tensor | None
    exits: ExitOptions = field(default_factory=ExitOptions)
    draft_steps: int | None = None
    prompt_end: int = -1
    items: list["Item"] = field(default_factory=list)
    """Those on their way, by position."""
    criterion: ExitCriterion | None = None
    """That of its exits, if there are any."""


@dataclass(eq=False)
class Item:
    """A position of a row on its way through the core.

    Args:
        row: The row.
        place: Where its keys and values stand in the cache.
        token: What is read there; behind the first item of a row, a draft.
    """

    row: TextRow
    place: int
    token: int
    is_done: bool = False
    """Whether it takes no more steps."""
    states: list[torch.Tensor] = field(default_factory=list)
    """s_1 and on, (1, hidden) each."""
    term: torch.Tensor | None = None
    """What is injected, (1, hidden)."""
    first_state: torch.Tensor | None = None
    """s_0, (1, hidden)."""
    reading: tuple[torch.Tensor, int] | None = None
    """Logits of all items that were read last together with it, (items, vocab), and its number among them."""
    choice: int | None = None
    """The token that they say."""
    value: float | None = None
    """The value that the criterion gave at its last check, where the next depends on it."""

    @property
    def drafts(self) -> list[int]:
        """Tokens of the row that are drafts, up to this one."""
        return [item.token for item in self.row.items[1:] if self.row.prompt_end < item.place <= self.place]

    @property
    def step(self) -> int:
        """Steps taken."""
        return len(self.states)

    @property
    def state(self) -> torch.Tensor:
        """(1, hidden)."""
        return self.states[-1] if self.states else self.first_state

    @property
    def state_before(self) -> torch.Tensor:
        """Its state at the check of its exit before this one, (1, hidden); at the first, the initial one."""
        exits = self.row.exits
        return self.first_state if self.step == exits.min_steps else self.states[-1 - exits.check_interval]


@dataclass
class Counts:
    """Numbers of launches, new items, items in all launches, those of prompts among them, readings, and drafts."""

    ticks: int = 0
    new_items: int = 0
    items: int = 0
    prompt_items: int = 0
    readings: int = 0
    drafts: int = 0
    kept_drafts: int = 0


class Scheduler:
    """Rows and their items, one launch after the other.

    Args:
        model: A model with a head, whose weights stay as they are.
        cache: That of the rows, of policy "full", with room for the steps and places of all.
        choose: (items, logits (items, vocab)) -> the token that each says; those before it may be drafts.
        accept: (row, token, steps) -> whether the row goes on behind this token, which is final, and is said after so
            many steps.
    """

    def __init__(
        self,
        model: nn.Module,
        cache: RecurrentCache,
        choose: Callable[[Sequence[Item], torch.Tensor], Sequence[int]],
        accept: Callable[[TextRow, int, int], bool],
    ):
        self.base, self.config = model.model, model.text_config
        self.positions, self.reads_normed = (
            self.config.position_embedding,
            self.config.recurrence.state_norm == "shared",
        )
        self.choose, self.accept, self.counts = choose, accept, Counts()
        self.take_step, self.norm = TokenStep(self.base.core), token_norm(self.base.norm)
        self.head, self.cap = token_product(model.lm_head), self.config.final_logit_softcapping
        self.functions: dict[nn.Module, Callable] = {}
        self.criteria: dict[str, ExitCriterion] = {}
        self.table: tuple[torch.Tensor, list[int]] | None = None
        self.masks: torch.Tensor | None = None
        self.inputs: tuple = None, None  # of the launch before, by where its items were
        self.logits_before: torch.Tensor | None = None  # of the last check of each row's first item, (rows, vocab)
        first, after = self.config.num_prelude_layers, self.config.num_prelude_layers + self.config.num_core_layers
        self.prelude_layers, self.core_layers = cache.layers[:first], cache.layers[first:after]
        self.coda_layers = cache.layers[after:]
        self.rows: list[TextRow] = []
        self.device, self.dtype = self.base.embed_tokens.weight.device, self.base.embed_tokens.weight.dtype

    def open(self, row: TextRow, place: int, tokens: Sequence[int]) -> None:
        """Goes on with a row by final tokens, from this place of the cache on. ValueError: there are step hooks."""
        if self.base.has_step_hooks:
            raise ValueError(
                "the model has step hooks, and a launch here takes steps of different numbers at once: remove them, or "
                "generate with plain decoding"
            )
        row.items = [Item(row, place + number, token) for number, token in enumerate(tokens)]
        self.counts.prompt_items += row.num_steps * sum(item.place <= row.prompt_end for item in row.items)
        row.criterion = self._criterion(row.exits.criterion)
        self.rows.append(row)

    def close(self, row: TextRow) -> None:
        """Forgets a row; what it has in the cache may be written over."""
        self.rows.remove(row)
        row.items = []

    # ------------------------------------------------------------------------------------------------------------ tick

    @torch.no_grad()
    def tick(self) -> None:
        """One step of all items that are on their way, and what follows from it."""
        items = [item for row in self.rows for item in reversed(row.items) if not item.is_done]
        self._embed([item for item in items if item.term is None])
        self._step(items)
        for item in items:
            if item.step == item.row.num_steps:
                self._finish(item)
        for item in self._judge([item for item in items if self._is_judged(item, by_logits=False)]):
            self._finish(item)
        judged = [row.items[0] for row in self.rows if self._is_judged(row.items[0], by_logits=True)]
        rows = [row for row in self.rows if row.items[0] in judged or self._is_read(row)]
        self._read([item for row in rows for item in reversed(row.items)])
        for item in self._judge(judged):
            self._finish(item)
        for row in rows:
            self._settle(row)

    def _embed(self, items: Sequence[Item]) -> None:
        """Prelude of new items."""
        if not items:
            return
        x = self._embeds(items)
        if self.positions in ("learned", "sinusoidal"):
            positions = torch.tensor([[item.place - item.row.start] for item in items], device=self.device)
            x = self.base.add_positions(x.unsqueeze(1), positions).squeeze(1)
        embeds = self._pass(self.base.prelude, self.prelude_layers, x, items)
        for item, term in zip(items, self.take_step.term(embeds).split(1), strict=True):
            item.term, item.first_state = term, item.row.initial_state
        for number, item in enumerate(items):
            if item.first_state is None:
                item.first_state = self.base.start(embeds[number : number + 1]).view(1, -1)
        self.counts.new_items += len(items)

    def _embeds(self, items: Sequence[Item]) -> torch.Tensor:
        """Embeddings of what the items read, (items, hidden)."""
        return self.base.embed_tokens(torch.tensor([item.token for item in items], device=self.device))

    def _step(self, items: Sequence[Item]) -> None:
        """One launch of the core."""
        if not items:
            return
        states, terms = torch.cat([item.state for item in items]), torch.cat([item.term for item in items])
        embedded = None
        if self.base.core.has_step_embedding:
            steps = torch.tensor([item.step + 1 for item in items], device=self.device)
            embedded = sinusoids(steps, self.config.hidden_size).to(states)
        places = self._places(items, [item.step for item in items])
        slots = [ItemSlot(layer, places) for layer in self.core_layers]
        states = self.take_step(states, terms, self._inputs(places), slots, embedded)
        for item, state in zip(items, states.split(1), strict=True):
            item.states.append(state)
        self.counts.ticks += 1
        self.counts.items += len(items)

    def _read(self, items: Sequence[Item]) -> None:
        """Items are read: norm, if states have that, coda, norm, head."""
        if not items:
            return
        states = torch.cat([item.state for item in items])
        states = self.norm(states) if self.reads_normed else states
        hidden = self._pass(self.base.coda, self.coda_layers, states, items)
        saying = [number for number, item in enumerate(items) if item.place >= item.row.prompt_end]
        if len(saying) < len(items):
            items, hidden = [items[number] for number in saying], hidden[saying]
        hidden = self.norm(hidden)
        logits = self.head(hidden)
        logits = logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)
        for number, (item, token) in enumerate(zip(items, self._choices(items, hidden, logits), strict=True)):
            item.reading, item.choice = (logits, number), token
        self.counts.readings += len(items)

    def _choices(self, items: Sequence[Item], hidden: torch.Tensor, logits: torch.Tensor) -> Sequence[int]:
        return self.choose(items, logits)

    def _holds(self, draft: int, choice: int) -> bool:
        """Whether a draft is what is said now."""
        return draft == choice

    def _is_read(self, row: TextRow) -> bool:
        """Whether a row is read, besides for its exits: all of it, which also shows drafts that hold no more."""
        return row.items[0].is_done or self._may_draft(row.items[-1])

    def _may_draft(self, last: Item) -> bool:
        """Whether the next position may begin behind the last item of a row."""
        row = last.row
        has_room = row.draft_steps is not None and row.prompt_end < last.place < row.last_place
        return has_room and (last.is_done or last.step >= row.draft_steps)

    def _finish(self, item: Item) -> None:
        """An item takes no more steps: deeper readers find what it has left last."""
        item.is_done = True
        row, left = item.row, item.row.num_steps - item.step
        for layer in self.core_layers if left else ():
            entries = layer.buffer.select(2, row.index).select(3, item.place)  # (steps, 2, key/value heads, head_dim)
            entries.narrow(0, item.step, left).copy_(entries[item.step - 1])

    def _settle(self, row: TextRow) -> None:
        """A row that has been read gets final tokens and new items, and loses drafts that do not hold."""
        while row.items[0].is_done:
            item, *behind = row.items
            if item.place < row.prompt_end:
                row.items = behind
                continue
            holds = bool(behind) and self._holds(behind[0].token, item.choice)
            if not self.accept(row, behind[0].token if holds else item.choice, item.step):
                self.close(row)
                return
            self.counts.drafts += bool(behind)
            self.counts.kept_drafts += holds
            row.items = behind if holds else [Item(row, item.place + 1, item.choice)]
            if not holds:
                return
            self._catch_up(row)
        for number, (item, behind) in enumerate(pairwise(row.items)):
            if not self._holds(behind.token, item.choice):
                del row.items[number + 1 :]
                break
        last = row.items[-1]
        if self._may_draft(last) and last.choice is not None:
            row.items.append(Item(row, last.place + 1, last.choice))

    # ----------------------------------------------------------------------------------------------------------- exits

    def _criterion(self, name: str) -> ExitCriterion | None:
        if name == "none":
            return None
        if name not in self.criteria:  # one for all rows, whose items are judged together
            self.criteria[name] = EXIT_CRITERIA[name].of(self.base)
        return self.criteria[name]

    def _is_judged(self, item: Item, by_logits: bool) -> bool:
        """Whether an exit is looked for after the step of an item, by what it says or by its state. What an item says
        is final only when all before it is; until then it is not asked.
        """
        row, criterion = item.row, item.row.criterion
        is_over = item.is_done or item.step == row.num_steps or item.place <= row.prompt_end
        if is_over or criterion is None or criterion.reads_logits != by_logits:
            return False
        steps = item.step - row.exits.min_steps
        return steps >= 0 and steps % row.exits.check_interval == 0

    def _judge(self, items: Sequence[Item]) -> list[Item]:
        """Those of the items that stop where they are."""
        stopped, groups = [], {}
        for item in items:
            criterion = item.row.criterion
            groups.setdefault((criterion, item.value is None and not criterion.starts_uniform), []).append(item)
        for (criterion, is_first), group in groups.items():
            if criterion.reads_logits:
                now, before = self._logits_of(group, is_first)
            else:
                states = zip(*((item.state, item.state_before) for item in group), strict=True)
                now, before = (ExitCheck(0, torch.stack(each)) for each in states)
            if not is_first and not criterion.starts_uniform:
                before.value = torch.tensor([item.value for item in group], device=self.device)
            values = criterion.value(now, before)
            limits = [item.row.exits.threshold or criterion.default_threshold for item in group]
            limit = limits[0] if len(set(limits)) == 1 else torch.tensor(limits, device=self.device)
            stops = criterion.stops(values, limit).tolist()
            for item, value, is_last in zip(group, values.tolist(), stops, strict=True):
                item.value = value if criterion.reads_logits or criterion.adds_up else None
                if is_last:
                    stopped.append(item)
        return stopped

    def _logits_of(self, items: Sequence[Item], is_first: bool) -> tuple[ExitCheck, ExitCheck]:
        """Logits of the first items of rows, and those that these had before, which they replace."""
        logits = items[0].reading[0]  # all have been read together
        if self.logits_before is None:  # the last line is that of items which have said nothing: all are alike
            self.logits_before = logits.new_zeros(self.core_layers[0].batch + 1, logits.shape[1])
        numbers, rows = [item.reading[1] for item in items], [item.row.index for item in items]
        earlier = [len(self.logits_before) - 1 if item.value is None else item.row.index for item in items]
        numbers, rows, earlier = torch.tensor([numbers, rows, earlier], device=self.device).unbind()
        logits = logits if len(items) == len(logits) else logits.index_select(0, numbers)
        before = None if is_first else self.logits_before.index_select(0, earlier)
        self.logits_before.index_copy_(0, rows, logits)
        return ExitCheck(0, logits=logits), ExitCheck(0, logits=before)

    def _catch_up(self, row: TextRow) -> None:
        """The first item says what is final, since all before it is: exits that this decides are looked for after each
        of its steps, by readings of their own. Items behind it that have gone deeper go back.
        """
        first, states = row.items[0], row.items[0].states
        criterion = row.criterion
        if criterion is None or not criterion.reads_logits:
            return
        for step in range(1, len(states) + 1):
            first.states = states[:step]
            if self._is_judged(first, by_logits=True):
                self._read([first])
                if self._judge([first]):
                    self._finish(first)
                    for item in row.items[1:]:
                        del item.states[step:]
                    return

    # --------------------------------------------------------------------------------------------------- masks, places

    def _pass(
        self, stack: BlockStack, layers: Sequence[CacheLayer], x: torch.Tensor, items: Sequence[Item]
    ) -> torch.Tensor:
        """Items through prelude or coda, (items, hidden) -> the same."""
        if not layers:
            return x
        places = self._places(items, [0] * len(items))
        blocks, slots = [stack.layers[index] for index in stack.order], [ItemSlot(layer, places) for layer in layers]
        return pass_token(blocks, x, self._inputs(places), slots)

    def _places(self, items: Sequence[Item], steps: Sequence[int]) -> ItemPlaces:
        rows, starts = [item.row.index for item in items], [item.row.start for item in items]
        return ItemPlaces(rows, [item.place for item in items], steps, starts, self.device)

    def _inputs(self, places: ItemPlaces) -> AttentionInputs:
        """Mask and positions of items, made once where the same are passed through several parts."""
        key = places.rows, places.places, places.starts
        if self.inputs[0] == key:
            return self.inputs[1]
        if self.masks is None or len(self.masks) < places.end:
            self.masks = causal_rows(-(-places.end // BLOCK) * BLOCK, self.dtype, self.device)
        mask, rotary, token = places.mask(self.masks), None, None
        positions = [place - start for place, start in zip(places.places, places.starts, strict=True)]
        if self.positions == "rope":
            table, widths = self._table(max(positions) + 1)
            if len(positions) == 1:
                found = table[positions[0]].unsqueeze(0)
            else:
                index = torch.tensor(positions, device=self.device) if any(places.starts) else places.index[2]
                found = table.index_select(0, index)
            *rotary, cos, sin = found.split(widths, dim=1)
            token = cos, sin
        elif self.positions == "alibi":
            starts = torch.tensor(places.starts, device=self.device)[:, None]
            keys = torch.arange(places.start, places.end, device=self.device) - starts
            positions = torch.tensor(positions, device=self.device)[:, None]
            bias = alibi_bias(positions, keys, self.config.num_attention_heads).to(self.dtype)
            mask = bias if mask is None else mask + bias
        self.inputs = key, AttentionInputs(mask, rotary, token=TokenInputs(token, self.functions))
        return self.inputs[1]

    def _table(self, count: int) -> tuple[torch.Tensor, list[int]]:
        """Those of RoPE in one, (positions, widths, head_dim): for modules, of width 1 each, and for all heads."""
        if self.table is None or len(self.table[0]) < count:
            positions = torch.arange(-(-count // BLOCK) * BLOCK, device=self.device)[:, None]
            angles = rotary_angles(positions, self.config.head_dim, self.config.rope_theta)
            pair = rotary_tables(angles, self.dtype)
            parts = [*pair, *token_tables(self.config, *pair)]
            self.table = torch.cat(parts, dim=1), [part.shape[1] for part in parts]
        return self.table
