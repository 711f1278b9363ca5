"""Requests that mean harm: each is refused or answered, none stops the server or makes it wait.

python -m benchmarks.hostile runs/recurrent_vlm --number 2000
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import base64
import io
import json
import re
import socket
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from urllib.parse import urlsplit

import soundfile
from PIL import Image

from benchmarks import timing
from benchmarks.fuzz_mutations import NUMBERS, TEXTS, change_png, mutate
from benchmarks.serving import server
from inference.devices import cpu_model, device_report

CHAT, COMPLETE, DRAW, SPEAK = "/v1/chat/completions", "/v1/completions", "/v1/images/generations", "/v1/audio/speech"
MOST_SECONDS = 60.0
"""Within which an answer comes, or the connection is closed. The server waits 2 s for a request, and works 30 s."""
GOOD = {"prompt": "What", "max_tokens": 2, "num_steps": 1, "temperature": 0}
GIB = 2**30


@dataclass(frozen=True)
class Attack:
    """One connection.

    Args:
        kind: The name of what is tried.
        content: What is sent, with the head.
        then: What happens behind it: "wait" for an answer, "close" the sending half, "leave", or go on "slowly".
        zeros: Zeros that are sent behind the content.
    """

    kind: str
    content: bytes
    then: str = "wait"
    zeros: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """Attack, and write a table to standard output; returns 1 where something is wrong.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = timing.OneLineParser(prog="benchmarks.hostile", description="Requests that mean harm.")
    parser.add_argument("runs", nargs="+", help="folders of checkpoints, or of runs")
    parser.add_argument("--number", type=timing.count, default=2000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of what they are")
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    limits = ("--max-new-tokens", 32, "--max-steps", 8, "--read-seconds", 2, "--max-seconds", 30, "--max-body-mib", 4)
    try:
        with server(args.runs, *limits) as (address, _):
            text, faults = attack(address, Path(args.runs[-1]).resolve().name, args.number, args.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{device_report()}; {cpu_model()}.\n\n{text}")
    return int(bool(faults))


def attack(address: str, model: str, number: int, seed: int) -> tuple[str, list[str]]:
    """A table of what became of so many attacks, and the faults.

    Args:
        address: The server's.
        model: The name of one that reads media, if there is one.
        number: How many there are.
        seed: Of what they are.
    """
    rng, place = Random(seed), (urlsplit(address).hostname, urlsplit(address).port)
    counts: dict[str, Counter] = {kind: Counter() for kind in KINDS}
    faults, slowest, held = [], 0.0, []
    good = post(COMPLETE, json.dumps(GOOD).encode())
    for index in range(number):
        kind = list(KINDS)[index % len(KINDS)]
        tried = KINDS[kind](rng, model)
        if tried.then == "slowly":
            held.append((socket.create_connection(place), tried, time.perf_counter()))
            held[-1][0].sendall(tried.content)
            counts[kind]["held"] += 1
            held = [it for it in held if not drip(*it)]
        else:
            found, fault = outcome_of(place, tried)
            counts[kind][found] += 1
            faults += [f"{kind}: {fault}"] if fault else []
        start = time.perf_counter()
        found, fault = outcome_of(place, Attack("good", good))
        slowest = max(slowest, time.perf_counter() - start)
        if found != "200":
            faults.append(f"a good request after {kind}: {found} {fault}")
    for connection, tried, begun in held:
        while not drip(connection, tried, begun):
            if time.perf_counter() - begun > MOST_SECONDS:
                faults.append(f"{tried.kind}: the connection stays open")
                break
            time.sleep(0.1)
    lines = ["| what | answers |", "|---|---|"]
    lines += [
        f"| {kind} | {', '.join(f'{n} x {status}' for status, n in sorted(it.items()))} |"
        for kind, it in counts.items()
    ]
    lines += [
        "",
        f"{number} attacks, {len(faults)} faults; the slowest good request between them took {slowest:.2f} s.",
    ]
    return "\n".join([*lines, *faults[:10]]) + "\n", faults


def drip(connection: socket.socket, tried: Attack, begun: float) -> bool:
    """Sends one more byte of a request that never ends; whether the server has closed the connection."""
    try:
        connection.settimeout(0)
        connection.sendall(b"x")
        return not connection.recv(2**16)
    except BlockingIOError:
        return False
    except OSError:
        return True


def outcome_of(place: tuple[str | None, int | None], tried: Attack) -> tuple[str, str]:
    """The status of the answer, or "closed", and what is wrong, or nothing."""
    answer = b""
    try:
        with socket.create_connection(place, timeout=MOST_SECONDS) as connection:
            try:
                connection.sendall(tried.content)
                for _ in range(tried.zeros // 2**20):
                    connection.sendall(bytes(2**20))
                if tried.then == "leave":
                    return "left", ""
                if tried.then == "close":
                    connection.shutdown(socket.SHUT_WR)
            except TimeoutError:
                raise
            except OSError:
                pass  # the server has answered before the end, or closed
            while part := connection.recv(2**20):
                answer += part
    except ConnectionResetError:
        pass
    except TimeoutError:
        return "hangs", f"no answer within {MOST_SECONDS:g} s"
    if not answer:
        return (
            "closed",
            "" if tried.then != "wait" or tried.zeros or tried.kind in NO_REQUEST else "closed without an answer",
        )
    status = answer[9:12].decode("latin-1")
    if status >= "500" and status not in ("503", "504"):
        return status, f"status {status}"
    if re.search(rb"Traceback|File \"|/root/|/home/|/tmp/|\.py\b|root:x", answer):
        return status, f"the answer says too much: {answer[-300:]!r}"
    return status, ""


def post(path: str, body: bytes, head: bytes = b"content-type: application/json", length: int | None = None) -> bytes:
    """A request."""
    size = len(body) if length is None else length
    lines = [
        f"POST {path} HTTP/1.1".encode(),
        b"host: a",
        head,
        f"content-length: {size}".encode(),
        b"connection: close",
    ]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


# --------------------------------------------------------------------------------------------------------------- kinds


def body_of(rng: Random, model: str) -> tuple[str, dict]:
    """A good request of any kind."""
    depth = {"num_steps": rng.randint(1, 4)}
    messages = [{"role": "user", "content": "What is 2*21?"}]
    parts = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": data_uri(png(8, 8))}}]
    parts.append({"type": "input_audio", "input_audio": {"data": base64.b64encode(wav(800)).decode(), "format": "wav"}})
    text = {
        "max_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 1,
        "stop": ["x"],
        "n": 2,
        "stream": False,
        **depth,
    }
    bodies = [
        (CHAT, {"messages": messages, "logprobs": True, "top_logprobs": 2, **text}),
        (CHAT, {"messages": [{"role": "user", "content": parts}], "model": model, **text}),
        (CHAT, {"messages": messages, "model": model, "modalities": ["image"], **depth}),
        (COMPLETE, {"prompt": "What", "exit_criterion": "kl_divergence", "exit_threshold": 0.1, **text}),
        (COMPLETE, {"prompt": [1, 5, 9], "stream_options": {"include_usage": True}, **text, "stream": True}),
        (DRAW, {"prompt": "a red circle", "model": model, "n": 1, "size": "auto", **depth}),
        (SPEAK, {"input": "hello", "model": model, "voice": "default", **depth}),
        ("/load_model", {"model": model}),
    ]
    return rng.choice(bodies)


def png(width: int, height: int, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (width, height), 1).save(buffer, format="PNG")
    return buffer.getvalue()


def wav(samples: int) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, [0.1] * samples, 8000, format="WAV")
    return buffer.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def fuzzed(rng: Random, model: str) -> Attack:
    path, body = body_of(rng, model)
    return Attack("fuzzed JSON", post(path, mutate(json.dumps(body).encode(), ".json", rng)))


def huge_number(rng: Random, model: str) -> Attack:
    path, body = body_of(rng, model)
    names = [name for name, value in body.items() if isinstance(value, int | float)] or ["n"]
    number = rng.choice(
        [*map(json.dumps, NUMBERS), "1e999", "-1e999", "9" * 5000, "NaN", "Infinity", "-Infinity", "-0.0"]
    )
    text = json.dumps(body | {rng.choice(names): "@"}).replace('"@"', number)
    return Attack("numbers", post(path, text.encode()))


def deep(rng: Random, model: str) -> Attack:
    path, body = body_of(rng, model)
    depth, name = rng.choice([100, 2000, 100_000]), rng.choice([*body, "metadata"])
    opened, closed = rng.choice([("[", "]"), ('{"a":', "}")])
    text = json.dumps(body | {name: "@"}).replace('"@"', opened * depth + "1" + closed * depth)
    return Attack("deep nesting", post(path, text.encode()))


def wrong_type(rng: Random, model: str) -> Attack:
    path, body = body_of(rng, model)
    value = rng.choice([None, True, 1.5, "x", [], {}, [[]], [None], {"a": 1}, [1, "x"], "", -1])
    return Attack("wrong types", post(path, json.dumps(body | {rng.choice(list(body)): value}).encode()))


def bomb(rng: Random, model: str) -> Attack:
    """Images and sounds that are larger than they look, or broken."""
    is_image = rng.random() < 0.7
    if is_image:
        content = rng.choice(
            [
                lambda: png(30_000, 30_000, "1"),
                lambda: change_png(png(16, 16), rng),
                lambda: (
                    b"\x89PNG\r\n\x1a\n" + b"\0\0\0\x0dIHDR\xff\xff\xff\xff\xff\xff\xff\xff\x08\x02\0\0\0" + b"\0" * 20
                ),
                lambda: b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
                lambda: b"GIF89a" + b"\xff\xff\xff\xff" + bytes(100),
                lambda: zlib.compress(bytes(10**7)),
            ]
        )()
        uris = [data_uri(content), "data:,", "data:image/png;base64," + "%41" * 1000, data_uri(content, "text/html")]
        part = {"type": "image_url", "image_url": {"url": rng.choice(uris)}}
    else:
        whole = wav(800)
        content = rng.choice([whole[:60], whole[:40] + b"\xff\xff\xff\x7f" + whole[44:], mutate(whole, ".wav", rng)])
        part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(content).decode(), "format": "wav"}}
    parts = [part] * rng.choice([1, 1, 8, 100])
    body = {"model": model, "messages": [{"role": "user", "content": parts}], "max_tokens": 1, "num_steps": 1}
    return Attack("bombs", post(CHAT, json.dumps(body).encode()))


def slow(rng: Random, model: str) -> Attack:
    path, body = body_of(rng, model)
    content = post(path, json.dumps(body).encode(), length=10_000)
    return Attack("slow loris", content[: rng.randint(1, len(content))], "slowly")


def half_closed(rng: Random, model: str) -> Attack:
    path, body = body_of(rng, model)
    content = post(path, json.dumps(body | ({"stream": True} if path == CHAT else {})).encode())
    return Attack(
        "half-closed", content[: rng.choice([10, len(content) - 5, len(content)])], rng.choice(["close", "leave"])
    )


def large(rng: Random, model: str) -> Attack:
    """Bodies that are larger than allowed: one in a hundred is sent as a whole."""
    declared = rng.choice([GIB, 2**63, 5 * 2**20, 10**30])
    if declared == GIB and rng.random() < 0.1:
        return Attack("large bodies", post(CHAT, b"", length=GIB), zeros=GIB)
    if rng.random() < 0.3:
        chunks = b"".join(b"100000\r\n" + bytes(2**20) + b"\r\n" for _ in range(6)) + b"0\r\n\r\n"
        head = f"POST {CHAT} HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n".encode()
        return Attack("large bodies", head + chunks)
    return Attack("large bodies", post(CHAT, bytes(5 * 2**20), length=declared), "close")


def long_prompt(rng: Random, model: str) -> Attack:
    text = rng.choice(["x", "é", "\n", "<|end|>", "😀", "a b "]) * 10**6
    text, path = text[: 10**6], rng.choice([CHAT, COMPLETE, DRAW, SPEAK])
    body = {CHAT: {"messages": [{"role": "user", "content": text}]}, COMPLETE: {"prompt": text}}
    body |= {DRAW: {"prompt": text, "model": model}, SPEAK: {"input": text, "model": model}}
    return Attack("prompts of 10^6 characters", post(path, json.dumps(body[path]).encode()))


def control(rng: Random, model: str) -> Attack:
    tokens = [
        "<|begin|>",
        "<|end|>",
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|tool|>",
        "<|image|>",
        "<|image_start|>",
    ]
    text = " ".join(rng.choice([*tokens, *TEXTS[:12]])[:50] for _ in range(rng.randint(1, 6)))
    body = {"messages": [{"role": rng.choice(["user", "system", "assistant"]), "content": text}], "max_tokens": 2}
    return Attack("control tokens", post(CHAT, json.dumps(body | {"model": model, "num_steps": 1}).encode()))


def path_like(rng: Random, model: str) -> Attack:
    name = rng.choice(
        ["../../etc/passwd", "/etc/passwd", "..%2f..%2fetc%2fpasswd", "file:///etc/passwd", "a/" * 500, "\0", "."]
    )
    if rng.random() < 0.4:
        line = f"GET /v1/models/{name} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        return Attack("path-like names", line.encode())
    path, body = body_of(rng, model)
    return Attack("path-like names", post(path, json.dumps(body | {"model": name}).encode()))


def no_request(rng: Random, model: str) -> Attack:
    """Bytes that are no HTTP, or broken."""
    path, body = body_of(rng, model)
    text = json.dumps(body).encode()
    content = rng.choice(
        [
            rng.randbytes(200) + b"\r\n\r\n",
            b"GET " + b"/" * 100_000 + b" HTTP/1.1\r\n\r\n",
            b"POST " + path.encode() + b" HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n" + text,
            b"POST " + path.encode() + b" HTTP/9.9\r\nhost: a\r\n\r\n",
            b"DELETE " + path.encode() + b" HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n",
            post(path, text, b"content-type: text/plain"),
            post("/v1/audio/transcriptions", text, b"content-type: multipart/form-data; boundary=x"),
            post("/v1/audio/transcriptions", b"--x\r\n" * 1000, b"content-type: multipart/form-data; boundary=x"),
            post("/v1/audio/transcriptions", text, b"content-type: multipart/form-data"),
            post(path, text, b"x: " + b"y" * 200_000),
            post(path, text, b"\r\n".join(b"x%d: y" % number for number in range(5000))),
            post(path, b"\xff\xfe" + text),
            post(path, b""),
        ]
    )
    return Attack("no requests", content, "close")


KINDS: dict[str, Callable[[Random, str], Attack]] = {
    "fuzzed JSON": fuzzed,
    "numbers": huge_number,
    "deep nesting": deep,
    "wrong types": wrong_type,
    "bombs": bomb,
    "slow loris": slow,
    "half-closed": half_closed,
    "large bodies": large,
    "prompts of 10^6 characters": long_prompt,
    "control tokens": control,
    "path-like names": path_like,
    "no requests": no_request,
}
NO_REQUEST = ("path-like names", "no requests")
"""Kinds of which some are no HTTP; uvicorn may close these connections."""


if __name__ == "__main__":
    sys.exit(main())
