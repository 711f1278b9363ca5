"""Serve models by HTTP, in OpenAI's format: `python -m inference.serve runs/recurrent_vlm`."""

from .logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from types import FrameType

import torch
import uvicorn

from . import arguments
from .checkpoints import find_checkpoint
from .devices import device_report, usable_cores
from .serving.app import build_app
from .serving.guard import timed_protocol
from .serving.limits import Limits, add_limits, limits_of
from .serving.metrics import Metrics
from .serving.pool import LoadingError, Pool
from .serving.worker import Settings

logger = logging.getLogger("inference.serve")  # __name__ is __main__ when run with -m

port_number = partial(arguments.whole_number, minimum=0, why="give a port up to 65535; 0 takes one that is free.")


def build_parser() -> arguments.OneLineParser:
    parser = arguments.OneLineParser(
        prog="inference.serve",
        description="Answer requests in OpenAI's format: chat, completions, images and sound. `docs/serving.md` has "
        "what clients may ask for.",
    )
    parser.add_argument(
        "runs", nargs="+", help="folders of checkpoints, or of runs (their newest complete checkpoints)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address that is listened at; 0.0.0.0: all of this machine")
    parser.add_argument("--port", type=port_number, default=8000, help="port that is listened at; 0: one that is free")
    parser.add_argument("--device", help="device such as cpu, cuda:1; default: each GPU has a worker, else the CPU")
    parser.add_argument(
        "--num-workers",
        type=arguments.counted("the number of processes, 1 or more"),
        help="processes with the models; default: one for each GPU, on a CPU one",
    )
    parser.add_argument("--api-key-file", type=Path, help="file of keys, one a line, of which each request needs one")
    parser.add_argument(
        "--allow-hosts",
        nargs="+",
        type=str.lower,
        default=[],
        metavar="HOST[:PORT]",
        help="hosts of which images at http and https addresses are fetched, and no others; default: none",
    )
    add_limits(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Raises:
        SystemExit: the input is bad; the code is 2, after one line on standard error.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    logger.info("%s", device_report())
    if args.port > 65535:
        parser.error(f"--port {args.port} is above 65535: give a port up to 65535.")
    with parser.one_line_errors():
        runs, keys = named_runs(args.runs), read_keys(args.api_key_file)
        asyncio.run(serve(args, runs, keys, limits_of(args)))
    return 0


def named_runs(paths: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """The name of each model, that of its folder, and its path. ValueError: two have the same, or one is no model."""
    found: dict[str, str] = {}
    for path in paths:
        find_checkpoint(path)
        name = Path(path).resolve().name
        if name in found:
            raise ValueError(f"{path} and {found[name]} have the same name, {name}; serve one, or rename its folder")
        found[name] = path
    return tuple(found.items())


def read_keys(path: Path | None) -> list[str]:
    """The keys of a file, one a line. ValueError: there is none, or one is too short to be one."""
    if path is None:
        return []
    keys = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    if not keys or min(map(len, keys)) < 8:
        raise ValueError(f"--api-key-file {path} needs keys of 8 characters or more, one a line")
    return keys


async def serve(args: argparse.Namespace, runs: tuple[tuple[str, str], ...], keys: list[str], limits: Limits) -> None:
    """Loads the models, and answers until a signal ends it. ValueError: a model, or the address, cannot be used."""
    metrics, devices = Metrics(), devices_of(args.device, args.num_workers)
    threads = max(1, usable_cores() // len(devices)) if devices[0] == "cpu" else None
    pool = Pool(Settings(runs, limits, most_threads=threads), len(devices), metrics, devices)
    with ending() as is_ending:
        starting = asyncio.ensure_future(pool.start())
        await asyncio.wait({starting, asyncio.ensure_future(is_ending.wait())}, return_when=asyncio.FIRST_COMPLETED)
        try:
            if not starting.done():
                return
            await starting
            await listen(args, build_app(pool, limits, metrics, keys, args.allow_hosts), pool, is_ending)
        except LoadingError as error:
            raise ValueError(str(error)) from error
        finally:
            starting.cancel()
            pool.stop()


async def listen(args: argparse.Namespace, app: object, pool: Pool, is_ending: asyncio.Event) -> None:
    """Answers requests until it is told to end, and those that run then."""
    limits = pool.limits
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        http=timed_protocol(limits.read_seconds),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=limits.max_connections,
        timeout_graceful_shutdown=5,  # for clients that do not read; all jobs have ended before
    )
    server = Server(config)
    try:
        (listener,) = (config.bind_socket(),)
    except SystemExit:
        raise ValueError(f"--host {args.host} --port {args.port} cannot be listened at; choose others") from None
    serving = asyncio.ensure_future(server.serve(sockets=[listener]))
    while not (server.started or serving.done()):
        await asyncio.sleep(0.01)
    sys.stderr.write(f"ready: http://{args.host}:{listener.getsockname()[1]}\n")
    await asyncio.wait({serving, asyncio.ensure_future(is_ending.wait())}, return_when=asyncio.FIRST_COMPLETED)
    await pool.drain()
    server.should_exit = True
    await serving


class Server(uvicorn.Server):
    """A server that leaves signals to whoever runs it: uvicorn's would end the process by the signal it got."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


@contextlib.contextmanager
def ending() -> Iterator[asyncio.Event]:
    """An event that SIGTERM and SIGINT set; a server that was asked to end has finished, and its code is 0."""
    event, loop = asyncio.Event(), asyncio.get_running_loop()

    def end(number: int, frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(event.set)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def devices_of(device: str | None, num_workers: int | None) -> list[str]:
    """The device of each worker."""
    if device is None and torch.cuda.is_available():
        count = torch.cuda.device_count()
        return [f"cuda:{number % count}" for number in range(num_workers or count)]
    return [device or "cpu"] * (num_workers or 1)


if __name__ == "__main__":
    sys.exit(main())
