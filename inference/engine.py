"""Many requests at once: each has its own depth, exits, sampling and seed, begins when there is a place for it, and
ends for itself. What runs beside a request changes nothing of what it says.

A step of the engine reads a part of the prompts that wait, and then lets the scheduler take one step of the core with
all tokens that are on their way, each at its own. Where a launch has room, tokens are followed by drafts of the next.
"""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import LogitsProcessor, PreTrainedTokenizerBase
from transformers.generation import (
    RepetitionPenaltyLogitsProcessor,
    StopStringCriteria,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from model import ExitOptions, KeyedSampling, RecurrentCache
from model.exit_criteria import EXIT_CRITERIA
from model.scheduler import Item, Scheduler, TextRow

OF_TEXTS = ("input_ids", "attention_mask")
PRIOR = (7, 10)
"""Drafts that have held, of so many, before any has been seen."""


@dataclass(frozen=True)
class TextRequest:
    """A text that is asked for.

    Args:
        inputs: Output of the tokenizer or the processor for one prompt: `input_ids`, (1, tokens), and its media.
        max_new_tokens: The most new tokens.
        num_steps: The most core steps of each token. Default: `config.num_steps`, else the mean.
        exits: What ends the steps of new tokens earlier.
        sampling_seed: The seed of samples; None: the likeliest tokens.
        temperature, top_k, top_p, repetition_penalty: Those of transformers' `generate`; a `top_k` of 0 leaves all.
        end_tokens: Tokens that end the text. Default: those of the model's generation config.
        stop_strings: Strings that end the text; they need the engine's tokenizer.
        drafts: Whether its tokens may be followed by drafts; what it says is the same.
        num_likely: So many of the likeliest tokens come with each token, with what the model gives them before anything
            is done to its logits. None: no probabilities are kept.
    """

    inputs: Mapping[str, Any]
    max_new_tokens: int = 20
    num_steps: int | None = None
    exits: ExitOptions = field(default_factory=ExitOptions)
    sampling_seed: int | None = None
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    end_tokens: Sequence[int] | None = None
    stop_strings: Sequence[str] = ()
    drafts: bool = True
    num_likely: int | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the prompt."""
        return self.inputs["input_ids"].shape[1]

    @property
    def has_media(self) -> bool:
        """Whether more is read than tokens."""
        return bool(self.media)

    @property
    def media(self) -> dict[str, Any]:
        """The media of the prompt, by the names of the model's arguments."""
        return {name: value for name, value in self.inputs.items() if name not in OF_TEXTS and value is not None}


@dataclass(frozen=True)
class Likelihood:
    """The probability of a token by the model.

    Args:
        log_probability: That of the token, natural.
        likely: The likeliest tokens at its place, with theirs.
    """

    log_probability: float
    likely: tuple[tuple[int, float], ...] = ()


class Stream:
    """Tokens of a request, and why there are no more.

    Args:
        request: The request.
    """

    def __init__(self, request: TextRequest):
        self.request = request
        self.tokens: list[int] = []
        self.exit_steps: list[int] = []
        """The steps that each token took."""
        self.likelihoods: list[Likelihood] = []
        """One for each token, if the request asks for them."""
        self.finish_reason: str | None = None
        """"stop", "length", "cancelled", or None while it goes on."""
        self._taken = 0

    @property
    def is_done(self) -> bool:
        return self.finish_reason is not None

    def take(self) -> list[int]:
        """The tokens that have come since the last call."""
        new = self.tokens[self._taken :]
        self._taken += len(new)
        return new


class Job:
    """A request that has a place; it makes tokens of logits."""

    def __init__(
        self,
        stream: Stream,
        place: int,
        num_steps: int,
        end_tokens: set[int],
        suppressed: list[int],
        tokenizer: PreTrainedTokenizerBase | None,
    ):
        request = stream.request
        self.stream, self.place, self.num_steps, self.end_tokens = stream, place, num_steps, end_tokens
        self.ids = nn.functional.pad(request.inputs["input_ids"], (0, request.max_new_tokens))
        self.length = self.num_written = request.num_tokens
        self.processors: list[LogitsProcessor] = []  # LogitsProcessorList looks at the signature of each, each time
        if request.repetition_penalty != 1:
            self.processors.append(RepetitionPenaltyLogitsProcessor(float(request.repetition_penalty)))
        if suppressed:
            self.processors.append(SuppressTokensLogitsProcessor(suppressed, device=self.ids.device))
        self.sampling = None
        if request.sampling_seed is not None:
            self.sampling = KeyedSampling([request.sampling_seed], self.length)
            if request.temperature != 1:
                self.processors.append(TemperatureLogitsWarper(float(request.temperature)))
            if request.top_k:
                self.processors.append(TopKLogitsWarper(request.top_k))
            if request.top_p < 1:
                self.processors.append(TopPLogitsWarper(request.top_p))
        self.read: dict[int, torch.Tensor] = {}  # the last logits of tokens that are not final, by their place
        self.stopping = StopStringCriteria(tokenizer, list(request.stop_strings)) if request.stop_strings else None

    @property
    def is_greedy(self) -> bool:
        """Whether its token is the likeliest, whatever was before."""
        return not self.processors and self.sampling is None and self.stream.request.num_likely is None

    def pick(self, logits: torch.Tensor, drafts: Sequence[int]) -> int:
        """The token that logits, (1, vocab) in float32, say behind drafts."""
        ids, length = self._ids(drafts), self.length + len(drafts)
        if self.stream.request.num_likely is not None:
            self.read[length] = logits
        scores = logits
        for processor in self.processors:
            scores = processor(ids, scores)
        if self.sampling is not None:
            index = length - self.stream.request.num_tokens
            scores = scores + self.sampling.noise(0, index, scores.shape[-1]).to(scores)
        return int(scores.argmax(-1))

    def _ids(self, drafts: Sequence[int] = ()) -> torch.LongTensor:
        """The text up to drafts, (1, tokens)."""
        end = self.length + len(drafts)
        new = [*self.stream.tokens[self.num_written - self.stream.request.num_tokens :], *drafts]
        self.ids[0, self.num_written : end] = torch.tensor(new, dtype=self.ids.dtype, device=self.ids.device)
        self.num_written = self.length
        return self.ids[:, :end]

    def accept(self, token: int, steps: int) -> bool:
        """Notes a final token; whether the text goes on."""
        stream = self.stream
        if stream.request.num_likely is not None:
            stream.likelihoods.append(likelihood(self.read.pop(self.length), token, stream.request.num_likely))
        self.length += 1
        stream.tokens.append(token)
        stream.exit_steps.append(steps)
        if token in self.end_tokens or (self.stopping is not None and self.stopping(self._ids(), None)):
            stream.finish_reason = "stop"
        elif len(stream.tokens) == stream.request.max_new_tokens:
            stream.finish_reason = "length"
        return not stream.is_done


def likelihood(logits: torch.Tensor, token: int, count: int) -> Likelihood:
    """The likelihood of a token and so many of the likeliest, from logits, (1, vocab) in float32."""
    values = logits[0].log_softmax(-1)
    likely = values.topk(min(count, len(values)))
    return Likelihood(float(values[token]), tuple(zip(likely.indices.tolist(), likely.values.tolist(), strict=True)))


@dataclass
class Reading:
    """Prompts that are read together, with padding on the left."""

    jobs: list[Job]
    cache: RecurrentCache
    ids: torch.LongTensor
    mask: torch.LongTensor
    num_read: int = 0


class TimedScheduler(Scheduler):
    """A scheduler whose launches are timed one by one."""

    @torch.inference_mode()
    def seconds_of(self, kind: str, items: Sequence[Item]) -> float:
        """How long a launch with such items takes, of the "prelude", the "core", or the "coda" with the head; it writes
        to their places.
        """
        self.inputs = None, None  # those of the launch before, as if other items had been in it
        steps, start = [item.step for item in items], time.perf_counter()
        {"prelude": self._embed, "core": self._step, "coda": self._read}[kind](items)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for item, count in zip(items, steps, strict=True):
            del item.states[count:]
        return time.perf_counter() - start


class InferenceEngine:
    """Requests in, tokens out; one thread.

    A short prompt goes through the launches of others; a longer one is cheaper by itself, where its tokens share what
    they see.

    Args:
        model: A model with a head and a core.
        num_places: Requests that go on at a time.
        max_length: Tokens, those of the prompt among them, of a request. Together with `max_steps` this bounds the
            memory: the cache takes `num_bytes`, once.
        max_steps: Core steps of a token. Default: those that the model takes by itself.
        prefill_tokens: Tokens of prompts that are read in one step of the engine, so that tokens of others do not wait
            for long prompts.
        drafts: Whether tokens may be followed by drafts of the next, where it pays.
        tokenizer: Tokenizer of the model, which stop strings need.

    Raises:
        ValueError: the model has no core, its attention is not sdpa, or a number is below 1.
    """

    short_prompt, prompt_items = 16, 32
    """The most tokens of a short prompt, and of all those that go through launches at a time."""

    def __init__(
        self,
        model: nn.Module,
        num_places: int = 8,
        max_length: int = 512,
        max_steps: int | None = None,
        prefill_tokens: int = 512,
        drafts: bool = True,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ):
        self.model, self.config = model, model.text_config
        if model.model.core is None:
            raise ValueError("the engine needs a model with a core (num_core_layers is 0); use generate")
        if self.config.recurrence.untied_core:
            raise ValueError("the engine takes steps by one core for all, which untied_core has not; use generate")
        if self.config.recurrence.cache_policy == "first":
            raise ValueError(
                "the engine keeps all steps, which a model of cache policy 'first' does not see; use generate"
            )
        if min(num_places, max_length, prefill_tokens, 1 if max_steps is None else max_steps) < 1:
            raise ValueError("num_places, max_length, max_steps and prefill_tokens must be at least 1")
        if self.config._attn_implementation != "sdpa":
            raise ValueError(f"attention {self.config._attn_implementation!r} is not possible here; use sdpa")
        self.usual_steps = self.config.num_steps or self.config.recurrence.mean_steps
        self.max_length, self.max_steps = max_length, max_steps or self.usual_steps
        self.prefill_tokens, self.tokenizer = prefill_tokens, tokenizer
        self.cache = RecurrentCache(self.config, "full")
        weight = model.model.embed_tokens.weight
        like = weight.new_empty(num_places, self.config.num_key_value_heads, 0, self.config.head_dim)
        self.cache.allocate(like, max_length, self.max_steps)
        state = model.model.fixed_state(weight)
        self.state = None if state is None else state[:, 0]
        self.scheduler = Scheduler(model, self.cache, self._choose, self._accept)
        self.num_places, self.free = num_places, list(range(num_places))
        self.waiting: deque[Stream] = deque()
        self.reading: Reading | None = None
        self.jobs: dict[TextRow, Job] = {}
        self.num_tokens = self.num_steps_taken = 0
        self.lost = 0.0  # launches that free places would have been worth since prompts were read last
        self.costs = self.measure_launches() if drafts else None

    @property
    def num_bytes(self) -> int:
        """Memory of the cache."""
        return self.cache.num_bytes

    # -------------------------------------------------------------------------------------------------------- requests

    def submit(self, request: TextRequest) -> Stream:
        """A request, which begins after those that came before it.

        Raises:
            ValueError: it is longer or deeper than there is room for, or an option is not possible.
        """
        length, steps = request.num_tokens + request.max_new_tokens, request.num_steps or self.usual_steps
        if not request.num_tokens or request.max_new_tokens < 1:
            raise ValueError("a request needs a prompt of at least one token, and max_new_tokens of at least 1")
        if length > self.max_length:
            raise ValueError(
                f"{request.num_tokens} + {request.max_new_tokens} tokens are more than a place has, {self.max_length}; "
                "shorten the request, or raise max_length"
            )
        if not 1 <= steps <= self.max_steps:
            raise ValueError(f"num_steps ({steps}) must be at least 1 and at most max_steps, {self.max_steps}")
        criterion = request.exits.criterion
        if criterion == "schedule" or (
            criterion != "none" and not EXIT_CRITERIA[criterion].is_in(self.model.text_config)
        ):
            raise ValueError(f"exit_criterion {request.exits.criterion!r} is not possible here; choose another")
        if request.stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings need a tokenizer; give the engine one")
        stream = Stream(request)
        self.waiting.append(stream)
        return stream

    def cancel(self, stream: Stream) -> None:
        """Ends a request, whose place is free at once."""
        if stream.is_done:
            return
        stream.finish_reason = "cancelled"
        if stream in self.waiting:
            self.waiting.remove(stream)
            return
        for row, job in list(self.jobs.items()):
            if job.stream is stream:
                self.scheduler.close(row)
                self._release(row)
        if self.reading is not None:
            self.free += [job.place for job in self.reading.jobs if job.stream is stream]
            if all(job.stream.is_done for job in self.reading.jobs):
                self.reading = None

    def _release(self, row: TextRow) -> None:
        self.free.append(self.jobs.pop(row).place)

    @property
    def is_idle(self) -> bool:
        """Whether there is nothing to do."""
        return not (self.waiting or self.reading or self.jobs)

    # ------------------------------------------------------------------------------------------------------------ step

    @torch.inference_mode()
    def step(self) -> None:
        """A part of the prompts that wait, and one step of the core for all that goes on."""
        while self.waiting and self.free and self._is_short(self.waiting[0].request):
            self._begin_short()
        if self.waiting and self.free and self.reading is None:
            self.lost += len(self.free) / self.num_places
            if not self._waits():
                self._begin_reading()
        if self.reading is not None:
            self._read()
        if self.jobs:
            self._choose_width()
            self.scheduler.tick()

    def _waits(self) -> bool:
        """Whether free places wait for others, so that their prompts are read together, in about the time of one: while
        more wait than there is room for, and free places have lost less than the launches of a reading.
        """
        number = len(self.free)
        if not self.jobs or len(self.waiting) <= number:
            return False
        requests = [stream.request for stream in itertools.islice(self.waiting, number + 1)]
        longest = max(request.num_tokens for request in requests)
        if requests[0].has_media or longest * len(requests) > self.prefill_tokens:
            return False
        return self.lost < max(request.num_steps or self.usual_steps for request in requests)

    def run(self) -> None:
        """Steps until nothing is left."""
        while not self.is_idle:
            self.step()

    # --------------------------------------------------------------------------------------------------------- prompts

    def _is_short(self, request: TextRequest) -> bool:
        """Whether a prompt goes through the launches of others now."""
        on_way = sum(len(row.items) for row in self.scheduler.rows if row.items[0].place < row.prompt_end)
        is_short = request.num_tokens <= min(self.short_prompt, self.prefill_tokens)
        return is_short and not request.has_media and on_way + request.num_tokens <= self.prompt_items

    def _begin_short(self) -> None:
        """The first of those that wait gets a place, and its tokens are items from the next launch on."""
        job = self._job(self.waiting.popleft())
        self.scheduler.open(self._row(job, job.length - 1), 0, job.ids[0, : job.length].tolist())

    def _begin_reading(self) -> None:
        """Takes waiting requests, in their order, as many as there are places and tokens for. One with media is read
        alone, and if it is not the first, it is the next.
        """
        jobs, passed, longest, self.lost = [], [], 0, 0.0
        while self.waiting and self.free:
            request = self.waiting[0].request
            if jobs and request.has_media:
                passed.append(self.waiting.popleft())
                continue
            longest = max(longest, request.num_tokens)
            if jobs and longest * (len(jobs) + 1) > self.prefill_tokens:
                break
            jobs.append(self._job(self.waiting.popleft()))
            if request.has_media:
                break
        self.waiting.extendleft(reversed(passed))
        longest = max(job.length for job in jobs)
        ids = torch.cat([nn.functional.pad(job.ids[:, : job.length], (longest - job.length, 0)) for job in jobs])
        mask = torch.ones_like(ids)
        for row, job in zip(mask, jobs, strict=True):
            row[: longest - job.length] = 0
        self.reading = Reading(jobs, RecurrentCache(self.config, "full"), ids, mask)

    def _job(self, stream: Stream) -> Job:
        request, config = stream.request, self.model.generation_config
        ends = config.eos_token_id if request.end_tokens is None else request.end_tokens
        ends = {ends} if isinstance(ends, int) else set(ends or ())
        steps = request.num_steps or self.usual_steps
        return Job(stream, self.free.pop(0), steps, ends, self.model.placeholder_ids, self.tokenizer)

    def _read(self) -> None:
        """A chunk of the prompts that are read; behind the last, their first tokens."""
        reading = self.reading
        media = [job.stream.request.media for job in reading.jobs if job.stream.request.has_media]
        first, longest = reading.num_read, reading.ids.shape[1]
        size = longest if media else max(1, self.prefill_tokens // len(reading.jobs))
        chunk = (longest - first) % size or size  # counted from the end, so that padding moves none
        last, steps = first + chunk, [job.num_steps for job in reading.jobs]
        outputs = self.model(
            **{**(media[0] if media else {}), "input_ids": reading.ids[:, first:last]},
            attention_mask=reading.mask[:, :last],
            cache=reading.cache,
            num_steps=steps[0] if len(set(steps)) == 1 else torch.tensor(steps),
            use_cache=True,
            logits_to_keep=1,
        )
        reading.num_read = last
        if last < longest:
            return
        self.reading = None
        for number, job in enumerate(reading.jobs):
            if not job.stream.is_done:  # cancelled
                self._open(job, number, reading, outputs.logits[number : number + 1, -1].float())

    def _open(self, job: Job, number: int, reading: Reading, logits: torch.Tensor) -> None:
        """Puts what was read of a prompt into its place, and goes on behind its first token."""
        longest, length = reading.ids.shape[1], job.length
        for layer, read in zip(self.cache.layers, reading.cache.layers, strict=True):
            found = read.buffer[:, :, number, :, longest - length : longest]
            place = layer.buffer[:, :, job.place, :, :length]
            place[: len(found)] = found
            place[len(found) :] = found[-1]
        row, token = self._row(job), job.pick(logits, [])
        if job.accept(token, job.num_steps):
            self.scheduler.open(row, length, [token])
        else:
            self._release(row)

    def _row(self, job: Job, prompt_end: int = -1) -> TextRow:
        """The row of the scheduler that is a request's."""
        request = job.stream.request
        last = request.num_tokens + request.max_new_tokens - 2
        row = TextRow(job.place, 0, last, job.num_steps, self.state, request.exits, prompt_end=prompt_end)
        self.jobs[row] = job
        return row

    # ---------------------------------------------------------------------------------------------------------- tokens

    def _choose(self, items: Sequence[Item], logits: torch.Tensor) -> list[int]:
        """The token that each item says."""
        logits = logits.float()
        chosen = logits.argmax(-1).tolist()
        for number, item in enumerate(items):
            job = self.jobs[item.row]
            if not job.is_greedy:
                chosen[number] = job.pick(logits[number : number + 1], item.drafts)
        return chosen

    def _accept(self, row: TextRow, token: int, steps: int) -> bool:
        self.num_tokens, self.num_steps_taken = self.num_tokens + 1, self.num_steps_taken + steps
        goes_on = self.jobs[row].accept(token, steps)
        if not goes_on:
            self._release(row)
        return goes_on

    # ----------------------------------------------------------------------------------------------------------- widths

    def _choose_width(self) -> None:
        """Drafts begin after so many steps as promise the least time for a token: with a share a of drafts that hold, a
        token of r steps takes d a + r (1 - a) launches, of r / d items of each row.
        """
        counts, rows = self.scheduler.counts, self.scheduler.rows
        if self.costs is None or not rows:
            return
        held = (counts.kept_drafts + PRIOR[0]) / (counts.drafts + PRIOR[1])
        depth = self.num_steps_taken / self.num_tokens if self.num_tokens else self.usual_steps

        def seconds(steps: float) -> float:
            width = len(rows) * depth / steps
            cost = np.interp(width, *self.costs) * max(1, width / self.costs[0][-1])
            return cost * (steps * held + depth * (1 - held))

        choices = {steps: seconds(steps) for steps in (1, 2, 4, 8) if steps < depth}
        choices[None] = float(np.interp(len(rows), *self.costs)) * depth
        best = min(choices, key=choices.get)
        for row in rows:
            row.draft_steps = best if self.jobs[row].stream.request.drafts else None

    def measure_launches(self, kind: str = "core", rounds: int = 9) -> tuple[list[int], list[float]]:
        """Numbers of items, and the seconds of a launch with so many, at different steps, of the "prelude", the "core",
        or the "coda" with the head. It writes to places, so that nobody may have one yet.
        """
        counts, found = [1, 2, 4, 8, 16, 32], []
        state = self.model.model.embed_tokens.weight[:1] if self.state is None else self.state
        rows = [TextRow(place, 0, 0, self.max_steps, self.state) for place in self.free]
        probe = TimedScheduler(self.model, self.cache, lambda items, logits: [0] * len(items), self._accept)
        for count in counts:
            seconds = []
            for shift in range(rounds):  # to other steps each time, since what was read just before is fast
                items = []
                for number in range(count):
                    place = max(self.max_length // 2 - number // len(rows), 0)
                    step = (3 * number + 5 * shift) % self.max_steps
                    options = {"states": [state] * step, "term": state, "first_state": state}
                    items.append(Item(rows[number % len(rows)], place, 0, **options))
                seconds.append(probe.seconds_of(kind, items))
            found.append(statistics.median(seconds))
        return counts, found
