"""Damaged inputs of every kind, each read in a fork of one warm parent: what is refused, and what crashes.

python -m benchmarks.fuzz --inputs 3000 --seed 0
python -m benchmarks.fuzz --keep fuzzed            # crashing inputs as folders
python -m benchmarks.fuzz --replay fuzzed/*

Refused is what ends in a `ValueError` or an `OSError`, or in exit code 2: commands make one line of each. A crash is a
signal, any other exception, more than 10 seconds, or more than 1 GiB above the parent. For Linux.
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import gc
import itertools
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import NoReturn

import datasets
import huggingface_hub.constants
import torch
import transformers

from benchmarks.fuzz_mutations import mutate
from benchmarks.fuzz_samples import ODD_FILES, Sample, build_samples, make_odd
from benchmarks.timing import count, markdown_table
from inference import arguments
from inference.devices import cpu_model, usable_cores

WEIGHTS = {"media": 6, "metadata": 5, "chat": 5, "yaml": 2, "tar": 3, "parquet": 3, "checkpoints": 3}
"""How many inputs of each kind there are, relatively."""
ODD_SHARE = 0.02
"""The share of the inputs in which a link, or what is no file, stands in the place of a file."""
MOST_SECONDS = 10.0
MOST_BYTES = 2**30
LARGEST_FILE = 2**28
ACCEPTED, REFUSED, CRASHED = 0, 2, 3
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Input:
    """A sample with one file damaged.

    Args:
        number: Which of the inputs of a seed.
        sample: What was damaged.
        name: The file.
        content: What is in it now, or which of `ODD_FILES` stands in its place.
    """

    number: int
    sample: Sample
    name: str
    content: bytes | str

    def write(self, folder: Path) -> None:
        """All files of it."""
        self.sample.write(folder)
        path = folder / self.name
        if isinstance(self.content, bytes):
            path.write_bytes(self.content)
        else:
            path.unlink()
            make_odd(path, self.content)


@dataclass(frozen=True)
class Outcome:
    """The result of an input.

    Args:
        verdict: "accepted", "refused", or why it counts as a crash.
        report: The error, or the traceback.
        seconds: Until the fork ended, by the clock, but for those in which no processor was free for it.
        extra_bytes: The most memory that the fork held, beyond what the parent does.
    """

    verdict: str
    report: str
    seconds: float
    extra_bytes: int

    @property
    def is_crash(self) -> bool:
        """Whether it is one."""
        return self.verdict not in ("accepted", "refused")


def main(argv: Sequence[str] | None = None) -> int:
    """Try all inputs, and write a table to standard output; 1 if any crashed.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    args = build_parser().parse_args(argv)
    set_up_logging(args.log_level)
    samples = build_samples()
    with tempfile.TemporaryDirectory() as scratch:
        warm_up(samples, Path(scratch))
        if args.replay:
            return replay([read_kept(place, samples) for place in args.replay], Path(scratch))
        start, computed, outcomes = time.perf_counter(), computation(), {}
        inputs = draw_inputs(samples, args.inputs, args.seed, args.kinds)
        for tried, outcome in try_inputs(inputs, Path(scratch), args.workers):
            outcomes[tried.number] = (tried, outcome)
            if outcome.is_crash:
                sys.stderr.write(f"{describe_crash(tried, outcome)}\n")
                keep(args.keep, args.seed, tried, outcome)
    took = f"{time.perf_counter() - start:.0f} s, {computation() - computed:.0f} s of computation"
    sys.stdout.write(f"{setting(args)}: {took}\n\n{table(list(outcomes.values()))}")
    return int(any(outcome.is_crash for _, outcome in outcomes.values()))


def replay(inputs: Sequence[Input], scratch: Path) -> int:
    """Write the results of inputs, with their tracebacks, to standard output; 1 if any crashes."""
    has_crashed = False
    for tried, outcome in try_inputs(inputs, scratch, 1):
        what = f"{tried.sample.kind} {tried.number}: {outcome.verdict}, {describe(outcome)}\n{outcome.report}\n"
        sys.stdout.buffer.write(what.encode("utf-8", "backslashreplace"))
        sys.stdout.flush()
        has_crashed |= outcome.is_crash
    return int(has_crashed)


def build_parser() -> arguments.OneLineParser:
    parser = arguments.OneLineParser(prog="benchmarks.fuzz", description="Read damaged inputs, and count the crashes.")
    parser.add_argument("--inputs", type=count, default=3000, help="how many")
    parser.add_argument(
        "--seed", type=arguments.seed, default=0, help="of what is drawn; the same seed, the same inputs"
    )
    parser.add_argument("--kinds", choices=list(WEIGHTS), nargs="+", default=list(WEIGHTS), help="of what is damaged")
    parser.add_argument("--workers", type=count, default=usable_cores(), help="forks at a time")
    parser.add_argument("--keep", type=Path, help="folder in which each input that crashes is kept as a folder")
    parser.add_argument(
        "--replay", type=Path, nargs="+", help="such folders: those inputs alone, with their tracebacks"
    )
    parser.set_defaults(log_level="error")
    return parser


# -------------------------------------------------------------------------------------------------------------- inputs


def draw_inputs(samples: Sequence[Sample], number: int, seed: int, kinds: Sequence[str]) -> Iterator[Input]:
    """The first inputs of a seed; each depends on the seed and its number alone."""
    of_kind = {kind: [sample for sample in samples if sample.kind == kind] for kind in kinds}
    for index in range(number):
        rng = Random(f"{seed} {index}")
        kind = rng.choices(kinds, [WEIGHTS[kind] for kind in kinds])[0]
        sample = rng.choice(of_kind[kind])
        name = rng.choice(sample.damaged)
        is_odd = rng.random() < ODD_SHARE
        content = rng.choice(ODD_FILES) if is_odd else mutate(sample.files[name], Path(name).suffix, rng)
        yield Input(index, sample, name, content)


def keep(folder: Path | None, seed: int, tried: Input, outcome: Outcome) -> None:
    """Write an input, if they are to be kept, in such a way that `read_kept` reads it."""
    if folder is None:
        return
    place = folder / f"{tried.sample.kind}-{seed}-{tried.number}"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    is_odd = isinstance(tried.content, str)
    if not is_odd:
        (place / "content").write_bytes(tried.content)
    (place / "report.txt").write_text(outcome.report, encoding="utf-8", errors="backslashreplace")
    about = {"kind": tried.sample.kind, "sample": tried.sample.name, "file": tried.name, "number": tried.number}
    about |= {"odd": tried.content if is_odd else None, "verdict": outcome.verdict}
    (place / "input.json").write_text(json.dumps(about, indent=2) + "\n")


def read_kept(place: Path, samples: Iterable[Sample]) -> Input:
    """The input in a folder that `keep` wrote."""
    about = json.loads((place / "input.json").read_text())
    sample = next(it for it in samples if (it.kind, it.name) == (about["kind"], about["sample"]))
    return Input(about["number"], sample, about["file"], about["odd"] or (place / "content").read_bytes())


# --------------------------------------------------------------------------------------------------------------- forks


def warm_up(samples: Sequence[Sample], scratch: Path) -> None:
    """Read each sample as it should be, so that all is imported, and what is refused later is so for its damage. From
    then on there is no network and one thread, and what is there is left alone by the collector.
    """
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    datasets.config.HF_DATASETS_CACHE = str(scratch / "cache")
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    for number, sample in enumerate(samples):
        sample.write(scratch / f"sample-{number}")
        sample.read(scratch / f"sample-{number}")
        shutil.rmtree(scratch / f"sample-{number}")
    gc.collect()
    gc.freeze()


def try_inputs(inputs: Iterable[Input], scratch: Path, workers: int) -> Iterator[tuple[Input, Outcome]]:
    """Yield each input with its result, in the order in which they end."""
    running: list[Fork] = []
    waiting = iter(inputs)
    while True:
        running += [Fork(tried, scratch) for tried in itertools.islice(waiting, workers - len(running))]
        if not running:
            return
        poll = select.poll()
        for fork in running:
            poll.register(fork.handle, select.POLLIN)
        ended = {handle for handle, _ in poll.poll(50)}
        for fork in list(running):
            outcome = fork.end() if fork.handle in ended else fork.watch()
            if outcome is not None:
                running.remove(fork)
                yield fork.tried, outcome


class Fork:
    """A process that reads an input, seen from its parent."""

    def __init__(self, tried: Input, scratch: Path) -> None:
        self.tried, self.folder = tried, scratch / str(tried.number)
        tried.write(self.folder)
        self.report = scratch / f"{tried.number}.txt"
        self.held = anonymous_bytes()
        self.start = time.perf_counter()
        self.process = os.fork()
        if self.process == 0:
            read_and_leave(tried, self.folder, self.report, self.start)
        self.handle = os.pidfd_open(self.process)

    def watch(self) -> Outcome | None:
        """The result of a fork that takes too much time or memory, and is killed; None for one that may go on."""
        if seconds_of(self.process, self.start) > MOST_SECONDS:
            return self.end("time")
        return self.end("memory") if resident_bytes(self.process) - self.held > MOST_BYTES else None

    def end(self, why: str | None = None) -> Outcome:
        """The result of a fork that has ended, or is killed: `why` is the reason."""
        if why is not None:
            with suppress(ProcessLookupError):  # it leads no group yet
                os.killpg(self.process, signal.SIGKILL)
            os.kill(self.process, signal.SIGKILL)
        select.select([self.handle], [], [])
        seconds = seconds_of(self.process, self.start)  # while it can still be asked
        _, status, usage = os.wait4(self.process, 0)
        os.close(self.handle)
        extra, report = max(0, usage.ru_maxrss * 1024 - self.held), ""
        if why is None and self.report.exists():
            own_seconds, _, report = self.report.read_text(encoding="utf-8").partition("\n")
            seconds = float(own_seconds)  # this process may have had to wait until it saw the end
        shutil.rmtree(self.folder)
        self.report.unlink(missing_ok=True)
        over = {"time": seconds > MOST_SECONDS, "memory": extra > MOST_BYTES}
        why = why or next((name for name, is_over in over.items() if is_over), verdict_of(status))
        return Outcome(why, report, seconds, extra)


def seconds_of(process: int, start: float) -> float:
    """How long a process has taken since then, without the time for which all processors had others to serve."""
    waited = int(Path(f"/proc/{process}/schedstat").read_text().split()[1])
    return time.perf_counter() - start - waited / 1e9


def verdict_of(status: int) -> str:
    """The verdict on a process that has ended itself."""
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return {ACCEPTED: "accepted", REFUSED: "refused"}.get(os.waitstatus_to_exitcode(status), "exception")


def read_and_leave(tried: Input, folder: Path, report: Path, start: float) -> NoReturn:
    """Read the input in the fork, write the result, and end."""
    os.setsid()
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nothing, stream)
    code, text = CRASHED, ""
    try:
        tried.sample.read(folder)
        code = ACCEPTED
    except (ValueError, OSError) as error:
        code, text = REFUSED, f"{type(error).__name__}: {error}"
    except SystemExit as error:
        code, text = error.code if isinstance(error.code, int) else CRASHED, traceback.format_exc()
    except BaseException:
        text = traceback.format_exc()
        raise
    finally:
        took = seconds_of(os.getpid(), start)
        report.write_text(f"{took}\n{text}", encoding="utf-8", errors="backslashreplace")
        os._exit(code)


def anonymous_bytes() -> int:
    """Memory of this process that a fork begins with: all but what is read from files, which it maps again."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])


def resident_bytes(process: int) -> int:
    """Memory that a process holds now."""
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):  # it has just ended
        return 0


# -------------------------------------------------------------------------------------------------------------- report


def describe(outcome: Outcome) -> str:
    return f"{outcome.seconds:.1f} s, {outcome.extra_bytes / 2**20:.0f} MiB"


def describe_crash(tried: Input, outcome: Outcome) -> str:
    """In one line."""
    last = outcome.report.strip().splitlines()[-1:] or [""]
    where = f"{tried.sample.kind} {tried.number} ({tried.sample.name}, {tried.name})"
    return f"{where}: {outcome.verdict}, {describe(outcome)}: {last[0][:200]!r}"


def setting(args: argparse.Namespace) -> str:
    return f"{args.inputs} inputs, seed {args.seed}, {args.workers} forks at a time; {cpu_model()}"


def computation() -> float:
    """Seconds that processors have spent on this process and on its forks that have ended."""
    return sum(os.times()[:4])


def table(tried: Sequence[tuple[Input, Outcome]]) -> str:
    """A line for each kind, and one for all."""
    kinds = [kind for kind in WEIGHTS if any(it.sample.kind == kind for it, _ in tried)]
    rows = [row_of(kind, [outcome for it, outcome in tried if it.sample.kind == kind]) for kind in kinds]
    rows.append(row_of("all", [outcome for _, outcome in tried]))
    return markdown_table(["kind", "inputs", "accepted", "refused", "crashes", "slowest, s", "largest, MiB"], rows)


def row_of(name: str, outcomes: Sequence[Outcome]) -> list[str]:
    counts = [sum(it.verdict == verdict for it in outcomes) for verdict in ("accepted", "refused")]
    slowest, largest = max(it.seconds for it in outcomes), max(it.extra_bytes for it in outcomes)
    crashes = sum(it.is_crash for it in outcomes)
    return [name, str(len(outcomes)), *map(str, counts), str(crashes), f"{slowest:.1f}", f"{largest / 2**20:.0f}"]


if __name__ == "__main__":
    sys.exit(main())
