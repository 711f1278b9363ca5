"""`generate(decoding="wavefront")`: texts by a scheduler of items, the same tokens as by plain decoding.

Drafts go through the logits processors as final tokens do; stopping criteria and streamers see final tokens alone.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
from transformers.generation import GenerateDecoderOnlyOutput

from .cache import RecurrentCache
from .depth import DepthOptions, resolve_depth
from .exit_criteria import ExitOptions
from .outputs import CACHE_NAME
from .sampling import KeyedSampling
from .scheduler import Item, Scheduler, TextRow


@dataclass
class WavefrontLoop:
    """The loop that `generate` runs in place of transformers' own, as `custom_generate`.

    Args:
        depth: Steps and exits of each token.
        draft_steps: Steps after which a token says a draft of the next; "auto": what takes the least time.
        streamer: Gets final tokens; transformers gives it the prompt.
        num_cached: Tokens of the prompt that the cache holds.
    """

    depth: DepthOptions
    draft_steps: int | str
    streamer: Any = None
    num_cached: int = 0

    def __call__(
        self,
        model: nn.Module,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.LongTensor:
        """Generates until no row goes on."""
        run = WavefrontRun(model, self, input_ids, logits_processor, stopping_criteria, generation_config)
        run.read_prompt(model_kwargs)
        run.decode()
        return run.output()


class WavefrontRun:
    """One call of `generate`: rows of the cache, and the tokens that are final."""

    def __init__(
        self,
        model: nn.Module,
        loop: WavefrontLoop,
        input_ids: torch.LongTensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ):
        self.model, self.loop, self.config, self.streamer = model, loop, generation_config, loop.streamer
        self.stopping_criteria = stopping_criteria
        self.sampling = next((it for it in logits_processor if isinstance(it, KeyedSampling)), None)
        self.processors = LogitsProcessorList(it for it in logits_processor if it is not self.sampling)
        self.prompt_length, room = input_ids.shape[1], generation_config.max_length - input_ids.shape[1]
        self.ids = nn.functional.pad(input_ids, (0, room))  # (rows, all tokens)
        self.lengths = [self.prompt_length] * len(input_ids)
        self.steps: list[list[int]] = [[] for _ in input_ids]
        self.rows: list[TextRow] = []

    def read_prompt(self, model_kwargs: dict[str, Any]) -> None:
        """Reads the prompts as plain decoding does, and opens the rows that go on behind their first new token."""
        model, mask = self.model, model_kwargs.get("attention_mask")
        prompt = self.ids[:, : self.prompt_length]
        new = self.prompt_length - self.loop.num_cached if self.loop.num_cached else None
        inputs = model.prepare_inputs_for_generation(
            prompt, next_sequence_length=new, is_first_iteration=True, **model_kwargs
        )
        outputs = model(**inputs, return_dict=True)
        self.cache: RecurrentCache = outputs[CACHE_NAME]
        past = self.cache.get_seq_length()
        self.offset = past - self.prompt_length  # of places from numbers of tokens
        starts = [0] * len(prompt) if mask is None else first_tokens(mask)
        last, state = self.offset + self.config.max_length - 2, model_kwargs.get("initial_state")
        depth = self.loop.depth
        self.rows = text_rows(model, self.cache, starts, last, depth.num_steps, state, depth.exits)
        self.scheduler = Scheduler(model, self.cache, self.choose, self.accept)
        tokens = [self._pick(row, logits, []) for row, logits in enumerate(outputs.logits[:, -1:].float())]
        for row, token in zip(self.rows, tokens, strict=True):
            if self.accept(row, token, 0 if outputs.exit_steps is None else int(outputs.exit_steps[row.index])):
                self.scheduler.open(row, past, [token])

    def decode(self) -> None:
        """Final tokens, until no row goes on."""
        run_waves(self.scheduler, self.loop.draft_steps, lambda: max(self.lengths))
        if self.streamer is not None:
            self.streamer.end()

    def choose(self, items: Sequence[Item], logits: torch.Tensor) -> list[int]:
        """The token that each item says, behind the drafts before it."""
        logits = logits.float()
        if not self.processors and self.sampling is None:
            return logits.argmax(-1).tolist()
        chosen = []
        for item, of_item in zip(items, logits.split(1), strict=True):
            chosen.append(self._pick(item.row.index, of_item, item.drafts))
        return chosen

    def _pick(self, row: int, logits: torch.Tensor, drafts: list[int]) -> int:
        """The token that logits, (1, vocab), say behind a row and drafts that follow it."""
        length = self.lengths[row] + len(drafts)
        if drafts:
            self.ids[row, self.lengths[row] : length] = torch.tensor(drafts, device=self.ids.device)
        if self.processors:  # which may have something for each row
            logits = self.processors(self.ids[:, :length], logits.repeat(len(self.ids), 1))[row : row + 1]
        if self.sampling is not None:
            logits = logits + self.sampling.noise(row, length - self.prompt_length, logits.shape[-1]).to(logits)
        return int(logits.argmax(-1))

    def accept(self, row: TextRow, token: int, steps: int) -> bool:
        """Notes a final token; whether its row goes on."""
        number = row.index
        self.ids[number, self.lengths[number]] = token
        self.lengths[number] += 1
        self.steps[number].append(steps)
        ids = self.ids[number : number + 1, : self.lengths[number]]
        if self.streamer is not None:
            self.streamer.put(ids[:, -1].cpu())
        return not bool(self.stopping_criteria(ids, None))

    def output(self) -> GenerateDecoderOnlyOutput | torch.LongTensor:
        """The tokens, with padding behind the end of a row; where it is asked for, also the steps of each, and the
        cache, if all rows are of one length.
        """
        longest, pad = max(self.lengths), self.config.pad_token_id
        ids = self.ids[:, :longest]
        for row, length in enumerate(self.lengths):
            ids[row, length:] = 0 if pad is None else pad
        if not self.config.return_dict_in_generate:
            return ids
        new = longest - self.prompt_length
        steps = torch.tensor([taken + [0] * (new - len(taken)) for taken in self.steps])
        cache = after_wavefront(self.cache, [row.num_steps for row in self.rows], self.steps)
        output = GenerateDecoderOnlyOutput(sequences=ids, **{CACHE_NAME: cache})
        output["exit_steps"] = steps
        return output


def run_waves(scheduler: Scheduler, draft_steps: int | str, longest: Callable[[], int]) -> None:
    """Ticks until no row goes on. `longest` says how many tokens the longest row has."""
    pace = Pace(max((row.num_steps for row in scheduler.rows), default=1)) if draft_steps == "auto" else None
    while scheduler.rows:
        for row in scheduler.rows:
            row.draft_steps = draft_steps if pace is None else pace.draft_steps
        scheduler.tick()
        if pace is not None:
            pace.note(longest())


def text_rows(
    model: nn.Module,
    cache: RecurrentCache,
    starts: Sequence[int],
    last_place: int,
    num_steps: int | torch.Tensor | None,
    initial_state: torch.Tensor | None,
    exits: ExitOptions,
) -> list[TextRow]:
    """The rows of a cache that has read prompts, with room for all that they may say; `starts` are the places of their
    first tokens, `num_steps` and `initial_state`, (rows or 1, tokens, hidden), what the model is called with.
    """
    count, weight = len(starts), model.model.embed_tokens.weight
    depth = resolve_depth(num_steps, model.text_config, count)
    limits = [depth.total] * count if depth.rows is None else depth.rows.tolist()
    cache.reserve(last_place + 2, max(limits))
    state = model.model.fixed_state(weight) if initial_state is None else initial_state.to(weight)
    states = [None] * count if state is None else state[:, -1].expand(count, -1).split(1)
    return [
        TextRow(number, start, last_place, limit, state, exits)
        for number, (start, limit, state) in enumerate(zip(starts, limits, states, strict=True))
    ]


def after_wavefront(cache: RecurrentCache, limits: list[int], steps: list[list[int]]) -> RecurrentCache | None:
    """The cache, for what comes next, if all rows have as many new tokens; `limits` are the most steps of each row, and
    `steps` those of each of its new tokens, the first of which is the prompt's.
    """
    if len(set(map(len, steps))) > 1:
        return None
    cache.fill_deeper(limits)
    for of_rows in list(zip(*steps, strict=True))[1:]:
        cache.keep_steps(torch.tensor(of_rows), 1)
        cache.advance(1)
    return cache


def first_tokens(mask: torch.Tensor) -> list[int]:
    """Where the tokens of each row begin, of a mask (rows, tokens); ValueError if padding follows one."""
    if (mask.diff(dim=1) < 0).any():
        raise ValueError("decoding 'wavefront' needs padding on the left alone; attention_mask has some behind tokens")
    return mask.int().argmax(dim=1).tolist()


class Pace:
    """Draft steps that take the least time, None for no drafts: each is tried for some tokens, the best is kept for
    many more.

    Args:
        num_steps: The most steps of a token.
    """

    TRIED, KEPT = 8, 256

    def __init__(self, num_steps: int):
        self.numbers = [steps for steps in (None, 4, 2, 1) if steps is None or steps < num_steps]
        self._begin()

    def _begin(self) -> None:
        self.left, self.seconds = list(self.numbers), {}
        self.draft_steps, self.wanted, self.first = self.left.pop(), self.TRIED, None

    def note(self, tokens: int) -> None:
        """After a tick, with the tokens of the longest row."""
        now = time.perf_counter()
        if self.first is None:
            self.first = now, tokens
        since, before = self.first
        if tokens - before < self.wanted:
            return
        if self.wanted == self.KEPT:
            self._begin()
            return
        self.seconds[self.draft_steps] = (now - since) / (tokens - before)
        self.first = now, tokens
        if self.left:
            self.draft_steps = self.left.pop()
        else:
            self.draft_steps, self.wanted = min(self.seconds, key=self.seconds.get), self.KEPT
