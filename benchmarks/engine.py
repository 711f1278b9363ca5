"""The engine against `generate` in static batches, with the same number of places: requests of different lengths and
depths, that come all at once or one after the other.

python -m benchmarks.engine runs/recurrent_lm --exit-threshold 0.01
python -m benchmarks.engine --requests 8 32 100 --arrivals 0 0.05         # seconds between two, on average
"""

from __future__ import annotations

import inference.logs  # noqa: F401  first: it sets up what libraries say while they are imported

# isort: split
import argparse
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks import timing
from benchmarks.equal_time import memory
from benchmarks.wavefront import build, load, padded
from inference.devices import choose_device, choose_threads
from inference.engine import InferenceEngine, TextRequest
from model import ExitOptions
from model.scheduler import Item, Scheduler

STATIC, OWN_STATIC = "generate, static batches", "engine, static batches"


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write a table to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = timing.parsed(parser, argv)
    args.batch_sizes, args.check = args.requests, None
    try:
        device = choose_device(args.device)
        model, prompts = (load if args.checkpoint else build)(args, device)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    choose_threads(model, args.threads)
    model.generation_config.eos_token_id = None
    sys.stdout.write(f"{args.places} places; {timing.describe_setting(args, device)}.\n\n")
    for count in args.requests:
        for gap in args.arrivals:
            of_each = [prompts[number % len(prompts)] for number in range(count)]
            found = measure(model, requests_of(of_each, args), arrivals_of(count, gap), args)
            sys.stdout.write(report(found, count, gap))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = timing.build_parser("engine", "The engine against generate in static batches.")
    parser.add_argument("checkpoint", nargs="?", help="folder of a checkpoint, or of a run; else weights are random")
    parser.add_argument("--requests", type=timing.count, nargs="+", default=[32], help="numbers of requests")
    parser.add_argument("--arrivals", type=float, nargs="+", default=[0.0], help="mean seconds between two; 0: at once")
    parser.add_argument("--places", type=timing.count, default=8, help="requests that go on at a time")
    parser.add_argument("--new-tokens", type=timing.count, nargs=2, default=[16, 128], help="fewest and most")
    parser.add_argument("--num-steps", type=timing.count, nargs=2, default=[4, 16], help="fewest and most core steps")
    parser.add_argument("--exit-threshold", type=float, help="of exits by kl_divergence; default: none exits")
    return parser


def requests_of(prompts: Sequence[torch.LongTensor], args: argparse.Namespace) -> list[TextRequest]:
    """Requests of lengths and depths that are drawn evenly between their bounds."""
    draw = torch.Generator().manual_seed(1)

    def drawn(bounds: Sequence[int]) -> list[int]:
        return torch.randint(bounds[0], bounds[1] + 1, (len(prompts),), generator=draw).tolist()

    exits = ExitOptions() if args.exit_threshold is None else ExitOptions("kl_divergence", args.exit_threshold)
    options = zip(prompts, drawn(args.new_tokens), drawn(args.num_steps), strict=True)
    return [TextRequest({"input_ids": ids[None]}, new, steps, exits) for ids, new, steps in options]


def arrivals_of(count: int, gap: float) -> list[float]:
    """When each of `count` requests comes, in seconds: a Poisson process."""
    draw = torch.Generator().manual_seed(2)
    return (torch.empty(count).exponential_(generator=draw).cumsum(0) * gap).tolist()


# ---------------------------------------------------------------------------------------------------------------- ways


class InTurns(InferenceEngine):
    """The engine without refill: requests begin when all before them have ended."""

    prompt_items = 1000  # so that as many begin as there are places

    def step(self) -> None:
        waiting = self.waiting
        self.waiting = deque() if self.jobs else waiting
        super().step()
        self.waiting = waiting


class InStep(Scheduler):
    """Rows that begin their tokens together: those that have finished one wait for the others."""

    def _step(self, items: Sequence[Item]) -> None:
        super()._step([item for item in items if item.step] or items)


def serve(
    engine: InferenceEngine, requests: Sequence[TextRequest], arrivals: Sequence[float], costs: Sequence[tuple]
) -> dict[str, Any]:
    """The seconds until all is there, those of each request, what the engine has counted, what share of the time, that
    of prompts that are read by themselves left out, its launches would have taken by what they cost alone, and by how
    many MiB the process has grown since a tenth of the requests was done.
    """
    left, streams, done = deque(zip(arrivals, requests, strict=True)), [], {}
    counts, launched, before_most = engine.scheduler.counts, [], 0.0
    prompts, checks = timed(engine, "_read"), timed(engine.scheduler, "_judge")
    start = time.perf_counter()
    while left or not engine.is_idle:
        now = time.perf_counter() - start
        while left and left[0][0] <= now:
            come, request = left.popleft()
            streams.append((come, engine.submit(request)))
        launched.append((counts.new_items, counts.items, counts.readings))
        engine.step()
        for come, stream in streams:
            if stream.is_done and stream not in done:
                done[stream] = time.perf_counter() - start - come
                before_most = before_most or (10 * len(done) >= len(requests) and memory("VmRSS"))
    seconds = time.perf_counter() - start
    launched.append((counts.new_items, counts.items, counts.readings))
    ideal = 0.0
    for before, after in pairwise(launched):
        for count, earlier, cost in zip(after, before, costs, strict=True):
            ideal += float(np.interp(count - earlier, *cost)) if count > earlier else 0.0
    steps = [stream.exit_steps[1:] for _, stream in streams]  # the first token is the prompt's
    results = {"texts": [stream.tokens for _, stream in streams], "steps": steps, "waits": list(done.values())}
    results["grown"] = memory("VmRSS") - before_most
    results |= {"share": ideal / (seconds - sum(prompts)), "checks": sum(checks) / seconds}
    return results | {"seconds": seconds, "counts": counts}


def timed(owner: object, name: str) -> list[float]:
    """The seconds of each call of a method from now on."""
    method, seconds = getattr(owner, name), []

    def call(*args: object) -> object:
        before = time.perf_counter()
        found = method(*args)
        seconds.append(time.perf_counter() - before)
        return found

    setattr(owner, name, call)
    return seconds


def serve_static(
    model: PreTrainedModel, requests: Sequence[TextRequest], arrivals: Sequence[float], places: int, is_sorted: bool
) -> dict[str, Any]:
    """Static batches by `generate`: the next one is of what has come, as many as there are places, in the order in
    which they came, or of their lengths.
    """
    left, waits, texts, start = list(enumerate(requests)), [], {}, time.perf_counter()
    while left:
        now = time.perf_counter() - start
        here = [pair for pair in left if arrivals[pair[0]] <= now]
        if not here:
            continue
        here = (sorted(here, key=lambda pair: pair[1].max_new_tokens) if is_sorted else here)[:places]
        batch = [request for _, request in here]
        options = {"num_steps": torch.tensor([request.num_steps for request in batch])}
        if batch[0].exits.criterion != "none":
            options |= {"exit_criterion": batch[0].exits.criterion, "exit_threshold": batch[0].exits.threshold}
        longest = max(request.max_new_tokens for request in batch)
        given = padded([request.inputs["input_ids"][0] for request in batch])
        found = model.generate(**given, **options, max_new_tokens=longest, do_sample=False, pad_token_id=0)
        for (number, request), row in zip(here, found[:, given["input_ids"].shape[1] :].tolist(), strict=True):
            texts[number] = row[: request.max_new_tokens]
            waits.append(time.perf_counter() - start - arrivals[number])
        left = [pair for pair in left if pair[0] not in texts]
    return {"seconds": time.perf_counter() - start, "waits": waits, "texts": [texts[it] for it in sorted(texts)]}


def measure(
    model: PreTrainedModel, requests: Sequence[TextRequest], arrivals: Sequence[float], args: argparse.Namespace
) -> dict[str, list[dict[str, Any]]]:
    """Results of each round, by the name of the way."""
    room = {"num_places": args.places, "max_steps": max(request.num_steps for request in requests)}
    room["max_length"] = max(request.num_tokens + request.max_new_tokens for request in requests)

    def engine(kind: type[InferenceEngine] = InferenceEngine, in_step: bool = False, drafts: bool = False) -> dict:
        made = kind(model, **room, drafts=drafts)
        if in_step:
            made.scheduler = InStep(model, made.cache, made._choose, made._accept)
        return serve(made, requests, arrivals, costs)

    costs: list[tuple] = []
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        STATIC: partial(serve_static, model, requests, arrivals, args.places, False),
        "generate, sorted by length": partial(serve_static, model, requests, arrivals, args.places, True),
        OWN_STATIC: partial(engine, InTurns, True),
        "engine, refill": partial(engine, InferenceEngine, True),
        "engine, depths mixed": partial(engine),
        "engine, drafts": partial(engine, drafts=True),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    for index in range(-args.warmup, args.rounds):
        empty = InferenceEngine(model, **room, drafts=False)
        costs[:] = [empty.measure_launches(kind) for kind in ("prelude", "core", "coda")]
        for name, run in ways.items():
            result = run()
            if index >= 0:
                found[name].append(result)
    return found


def report(found: dict[str, list[dict[str, Any]]], count: int, gap: float) -> str:
    """A table with a line for each way."""
    seconds = {name: [each["seconds"] for each in rounds] for name, rounds in found.items()}
    ratios, expected = timing.speed_ratios(seconds, STATIC), found[STATIC][0]["texts"]
    own_ratios = timing.speed_ratios(seconds, OWN_STATIC)
    rows = []
    for name, rounds in found.items():
        last, tokens = rounds[-1], sum(map(len, rounds[-1]["texts"]))
        waits, same = torch.tensor(last["waits"]), sum(map(list.__eq__, last["texts"], expected))
        of_engine = ["-"] * 5
        if "counts" in last:
            counts = last["counts"]
            wasted = 1 - sum(map(sum, last["steps"])) / (counts.items - counts.prompt_items)
            shares = [timing.quartiles([each[part] for each in rounds])[1] for part in ("share", "checks")]
            of_engine = [f"{counts.items / counts.ticks:.2f}", *(f"{share:.0%}" for share in shares), f"{wasted:.0%}"]
            of_engine.append(f"{last['grown']:.0f}")
        middle, late = waits.quantile(torch.tensor([0.5, 0.95])).tolist()
        speed = f"{tokens / timing.quartiles(seconds[name])[1]:.0f}"
        both = [timing.describe_ratio(of[name]) for of in (ratios, own_ratios)]
        rows.append([name, speed, *both, f"{middle:.2f}, {late:.2f}", *of_engine, str(same)])
    header = [
        "way",
        "tokens per second",
        "speed / static",
        "/ own static",
        "seconds to wait: median, 95 %",
        "items a launch",
    ]
    header += [
        "ideal / time",
        "exit checks / time",
        "items in vain",
        "MiB grown",
        f"texts as in static batches, of {count}",
    ]
    title = f"{count} requests, {'all at once' if not gap else f'one in {gap:g} s'}\n\n"
    return title + timing.markdown_table(header, rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
