"""The server against the engine alone, and many clients at once.

python -m benchmarks.serving --requests 32                       # tokens in a second by HTTP, and by the engine alone
python -m benchmarks.serving --load runs/a runs/b --clients 100 --seconds 60
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import asyncio
import base64
import io
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from PIL import Image

from benchmarks import timing
from benchmarks.engine import build_parser as build_engine_parser
from benchmarks.engine import requests_of, serve
from benchmarks.wavefront import build
from dataset_loading import train_tokenizer
from inference.devices import choose_device, choose_threads
from inference.engine import InferenceEngine, TextRequest
from inference.loading import load_model
from inference.prompts import encode_prompt

TEXTS = (
    "The wind has turned and nobody in the harbour knows why. What is 2*21? Tell me of the sea, the ships and the rain."
)
BUSY = (429, 503)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write tables to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    try:
        sys.stdout.write(asyncio.run(load(args)) if args.load else throughput(args))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = build_engine_parser()
    parser.prog, parser.description = "benchmarks.serving", "The server against the engine alone, or many clients."
    parser.add_argument("--load", nargs="+", metavar="RUN", help="models that many clients ask for a while")
    parser.add_argument("--clients", type=timing.count, default=100, help="clients, each with a request at a time")
    parser.add_argument("--seconds", type=timing.count, default=60, help="seconds until no client asks again")
    parser.add_argument("--compared", type=timing.count, default=20, help="sampled requests that are compared")
    return parser


# -------------------------------------------------------------------------------------------------------------- server


@contextmanager
def server(runs: Sequence[Path | str], *options: Any) -> Iterator[tuple[str, int]]:
    """The address and the process of a server."""
    command = [sys.executable, "-m", "inference.serve", *map(str, runs), "--port", "0", *map(str, options)]
    with tempfile.TemporaryFile("w+") as log, subprocess.Popen(command, stderr=log) as process:
        try:
            address = None
            while address is None:
                if process.poll() is not None:
                    log.seek(0)
                    raise ValueError(f"the server has ended: {log.read()[-500:]}")
                time.sleep(0.2)
                log.seek(0)
                address = re.search(r"^ready: (\S+)$", log.read(), re.MULTILINE)
            yield address[1], process.pid
        finally:
            process.terminate()


def resident_mib(pid: int) -> float:
    """Memory of a process and those that it has started."""
    found, left = 0.0, [pid]
    while left:
        folder = Path(f"/proc/{left.pop()}")
        status = (folder / "status").read_text()
        found += int(re.search(r"^VmRSS:\s+(\d+) kB", status, re.MULTILINE)[1]) / 1024
        left += [
            int(child) for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()
        ]
    return found


# ---------------------------------------------------------------------------------------------------------- throughput


def throughput(args: argparse.Namespace) -> str:
    """Tokens in a second of each way, in rounds in which each has its turn."""
    if args.checkpoint:
        raise ValueError("the throughput is that of random weights; leave the checkpoint out, and give their sizes")
    args.batch_sizes, args.check = args.requests, None
    model, prompts = build(args, choose_device("cpu"))
    choose_threads(model, args.threads)
    requests = requests_of([prompts[number % len(prompts)] for number in range(args.requests[0])], args)
    most = max(request.num_tokens for request in requests), max(request.max_new_tokens for request in requests)
    most_steps = max(request.num_steps for request in requests)
    found: dict[str, list[float]] = {"engine": [], "server": [], "server, streams": []}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        train_tokenizer([], 259).save_pretrained(folder)
        limits = ("--max-places", args.places, "--max-queue", len(requests), "--max-steps", most_steps)
        limits += ("--max-prompt-tokens", most[0], "--max-new-tokens", most[1])
        with server([folder], *limits) as (address, _):
            for index in range(-args.warmup, args.rounds):
                for way in found:
                    rate = asyncio.run(rate_of(address, requests, "streams" in way)) if "server" in way else None
                    if rate is None:
                        engine = InferenceEngine(model, args.places, sum(most), most_steps)
                        served = serve(engine, requests, [0.0] * len(requests), engine_costs())
                        rate = sum(map(len, served["texts"])) / served["seconds"]
                    found[way] += [rate] if index >= 0 else []
    lines = [f"{len(requests)} requests at once; {timing.describe_setting(args, choose_device('cpu'))}.\n"]
    lines += ["| | tokens/s | of the engine alone |", "|---|---|---|"]
    for way, rates in found.items():
        shares = np.array(rates) / np.array(found["engine"])
        lines.append(
            f"| {way} | {np.median(rates):.0f} | {np.median(shares):.2f} ({shares.min():.2f} to {shares.max():.2f}) |"
        )
    return "\n".join(lines) + "\n"


def engine_costs() -> list[tuple[list[int], list[float]]]:
    """Costs of launches, where nobody asks for them."""
    return [([0, 1], [0.0, 0.0])] * 3


async def rate_of(address: str, requests: Sequence[TextRequest], is_stream: bool) -> float:
    """Tokens in a second when all requests come at once."""
    async with connected(address) as session:
        bodies = [
            {
                "prompt": request.inputs["input_ids"][0].tolist(),
                "max_tokens": request.max_new_tokens,
                "num_steps": request.num_steps,
                "temperature": 0,
            }
            for request in requests
        ]
        start = time.perf_counter()
        answers = await asyncio.gather(*(ask(session, "/v1/completions", body, is_stream) for body in bodies))
        seconds = time.perf_counter() - start
    faults = [answer for answer in answers if answer.status != 200]
    if faults:
        raise ValueError(f"{len(faults)} requests have failed, the first with status {faults[0].status}")
    return sum(answer.num_tokens for answer in answers) / seconds


# ------------------------------------------------------------------------------------------------------------- clients


@dataclass
class Answer:
    """The end of a request."""

    status: int
    text: str = ""
    num_tokens: int = 0


def connected(address: str) -> httpx2.AsyncClient:
    """A client that waits for as long, and has as many connections, as it takes."""
    return httpx2.AsyncClient(
        base_url=address, timeout=None, limits=httpx2.Limits(max_connections=None), trust_env=False
    )


async def ask(session: httpx2.AsyncClient, path: str, body: dict[str, Any], is_stream: bool) -> Answer:
    """One request, as a whole or as a stream. Status 0: the stream has an error in it, or no end."""
    if not is_stream:
        response = await session.post(path, json=body)
        if response.status_code != 200:
            return Answer(response.status_code, response.text)
        reply = response.json()
        choice = reply["choices"][0]
        text = choice["text"] if "text" in choice else choice["message"]["content"] or ""
        return Answer(200, text, reply["usage"]["completion_tokens"])
    body = {**body, "stream": True, "stream_options": {"include_usage": True}}
    async with session.stream("POST", path, json=body) as response:
        if response.status_code != 200:
            return Answer(response.status_code, (await response.aread()).decode())
        events = [line async for line in response.aiter_lines() if line.startswith("data: ")]
    if events[-1] != "data: [DONE]":
        return Answer(0, events[-1])
    chunks = [json.loads(event[6:]) for event in events[:-1]]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    text = "".join(choice["text"] if "text" in choice else choice["delta"].get("content", "") for choice in choices)
    return Answer(200, text, chunks[-1]["usage"]["completion_tokens"])


@dataclass
class Seen:
    """The sum of what clients have seen."""

    statuses: Counter = field(default_factory=Counter)
    kinds: dict[str, list[float]] = field(default_factory=dict)
    waits: list[list[tuple[float, int]]] = field(default_factory=list)
    sampled: list[tuple[dict[str, Any], str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


async def load(args: argparse.Namespace) -> str:
    """Clients that ask again and again: what they were answered, how even it was, and whether it was right."""
    seen = Seen(waits=[[] for _ in range(args.clients)])
    with server(args.load, "--max-new-tokens", 64, "--max-prompt-tokens", 192, "--max-steps", 8) as (address, pid):
        async with connected(address) as session:
            models = (await session.get("/v1/models")).json()["data"]
            ends = time.monotonic() + args.seconds
            clients = [one_client(session, models, number, ends, seen) for number in range(args.clients)]
            memory = asyncio.ensure_future(watch_memory(pid, ends))
            await asyncio.gather(*clients)
        sizes = await memory
    wrong = [(text, body) for body, text in seen.sampled[: args.compared] if text != expected(args.load, body)]
    each = [sum(seconds for seconds, _ in waits) / sum(tokens for _, tokens in waits) for waits in seen.waits if waits]
    means = [float(np.mean([seconds / tokens for seconds, tokens in waits])) for waits in seen.waits if waits]
    lines = [
        f"{args.clients} clients for {args.seconds} s; {timing.device_report()}; {timing.cpu_model()}.\n",
        f"- answers by status: {dict(seen.statuses)}",
        *(
            f"- {kind}: {len(waits)} answers; median of {np.median([seconds for seconds, _ in waits]):.2f} s and "
            f"{np.median([tokens for _, tokens in waits]):.0f} tokens"
            for kind, waits in sorted(seen.kinds.items())
        ),
        f"- faults that are not documented: {len(seen.faults)} {seen.faults[:2]}",
        f"- clients that got an answer: {len(each)}; seconds of a client by its tokens: {spread(each)}",
        f"- the mean over its answers instead, in which one answer of a single token weighs most: {spread(means)}",
        f"- sampled texts that differ from generate: {len(wrong)} of {len(seen.sampled[: args.compared])}",
        f"- memory of all processes after a third of the time {sizes[len(sizes) // 3]:.0f} MiB, at the end "
        f"{sizes[-1]:.0f} MiB",
    ]
    return "\n".join(lines) + "\n"


def spread(values: Sequence[float]) -> str:
    """The median, and how far the largest is from it."""
    return f"median {np.median(values):.3f}, slowest {max(values):.3f}, {max(values) / np.median(values):.2f} times it"


async def watch_memory(pid: int, ends: float) -> list[float]:
    """Memory, second by second."""
    sizes = []
    while time.monotonic() < ends:
        sizes.append(resident_mib(pid))
        await asyncio.sleep(1)
    return sizes


async def one_client(session: httpx2.AsyncClient, models: Sequence[dict], number: int, ends: float, seen: Seen) -> None:
    """Asks until the time is over; where the server is busy, again after a while."""
    draw = random.Random(number)
    while time.monotonic() < ends:
        path, body = drawn_request(draw, models)
        is_stream, start = draw.random() < 0.5, time.monotonic()
        answer = await ask(session, path, body, is_stream)
        while answer.status in BUSY and time.monotonic() < ends:
            seen.statuses[answer.status] += 1
            await asyncio.sleep(draw.uniform(0.5, 1.5))
            answer = await ask(session, path, body, is_stream)
        seen.statuses[answer.status] += 1
        if answer.status == 200:
            kind = ", image" if "modalities" in body else ", reads an image" if "data:image" in str(body) else ""
            wait = time.monotonic() - start, max(1, answer.num_tokens)
            seen.kinds.setdefault(f"{path}{kind}{', streamed' if is_stream else ''}", []).append(wait)
            seen.waits[number].append(wait)
            if path == "/v1/completions" and body["temperature"]:
                seen.sampled.append((body, answer.text))
        elif answer.status not in BUSY:
            seen.faults.append(f"{answer.status} {answer.text}")


def drawn_request(draw: random.Random, models: Sequence[dict]) -> tuple[str, dict[str, Any]]:
    """A path and a body: a text, or a conversation that may have an image or ask for one; sampled or not, of some
    depth, with exits or without.
    """
    start, model = draw.randrange(len(TEXTS) - 40), draw.choice(models)
    text = TEXTS[start : start + draw.randint(1, 40)].strip() or "?"
    body = {"model": model["id"], "num_steps": draw.randint(1, 8), "seed": draw.randrange(2**31)}
    messages = [{"role": "user", "content": text}]
    if "image" in model["writes"] and draw.random() < 0.1:
        return "/v1/chat/completions", {**body, "messages": messages, "modalities": ["image"]}
    body |= {"max_tokens": draw.randint(4, 32), "temperature": draw.choice([0, 0.8, 1.0])}
    if draw.random() < 0.3:
        body |= {"exit_criterion": "kl_divergence", "exit_threshold": 0.05}
    if draw.random() < 0.5:
        return "/v1/completions", {**body, "prompt": text}
    if "image" in model["reads"] and draw.random() < 0.5:
        image = {"type": "image_url", "image_url": {"url": drawn_image(draw)}}
        messages = [{"role": "user", "content": [image, {"type": "text", "text": text}]}]
    return "/v1/chat/completions", {**body, "messages": messages}


def drawn_image(draw: random.Random) -> str:
    """A `data:` URI of an image of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), tuple(draw.randbytes(3))).save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def expected(runs: Sequence[str], body: dict[str, Any]) -> str:
    """The text that `generate` writes for a body."""
    model, processor = load_model(next(run for run in runs if Path(run).resolve().name == body["model"]))
    tokenizer = getattr(processor, "tokenizer", processor)
    inputs = encode_prompt(tokenizer, body["prompt"])
    names = ("num_steps", "exit_criterion", "exit_threshold", "temperature")
    options = {name: body[name] for name in names if name in body}
    ids = model.generate(
        **inputs,
        **options,
        do_sample=True,
        top_k=0,
        sampling_seed=body["seed"],
        max_new_tokens=body["max_tokens"],
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")  # the server keeps half a character back


if __name__ == "__main__":
    sys.exit(main())
