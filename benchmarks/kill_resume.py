"""Runs that are killed again and again and started with the same command, beside the run that nobody disturbs.

python -m benchmarks.kill_resume
python -m benchmarks.kill_resume --kills 6 --scenarios one_rank

Each kill is a SIGKILL at a moment that the process itself knows by what it has just done: before its first checkpoint,
inside a save (also with half a file written, and while old checkpoints are deleted), between two steps, and behind the
last step. A run has to come to its end by nothing but the same command, with the same weights, bit for bit.

All processes are forks of this one, which has imported what takes seconds.
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import torch
import yaml
from safetensors.torch import load_file
from transformers import Trainer

import finetune
import pretrain
from benchmarks import timing
from inference.arguments import OneLineParser
from inference.shutdown import run_to_the_end

MAX_STEPS, SAVE_STEPS = 6, 2
TRAINING = {
    "max_steps": MAX_STEPS,
    "save_steps": SAVE_STEPS,
    "save_total_limit": 2,
    "per_device_train_batch_size": 2,
    "learning_rate": 3e-3,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 3,
    "recurrence_logging_steps": 0,
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": "none",
    "resume_from_checkpoint": "true",
}
DATA = {
    "block_size": 48,
    "train": [{"kind": "generated", "task": "addition", "num_rows": 200, "difficulty": [1, 2]}],
    "validation": [{"kind": "generated", "task": "addition", "num_rows": 20, "difficulty": [1, 2]}],
}
PRETRAINING = {
    "model": {
        "model_type": "megatransformer_text",
        "vocab_size": 259,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_attention_heads": 4,
        "num_core_layers": 1,
        "recurrence": {"mean_steps": 3, "backprop_steps": 2},
    },
    "tokenizer": {"vocab_size": 259},
    "data": DATA,
    "callbacks": {"samples": {"prompts": ["1+1="], "every_steps": 4, "num_steps": [1], "max_new_tokens": 2}},
    "training": TRAINING,
}
TUNING = {
    "trainer": "sft",
    "peft": {"rank": 2, "alpha": 4, "dropout": 0.1, "target_modules": {"core": "all-linear"}},
    "data": {**DATA, "train": [{**DATA["train"][0], "loss_on": "answer"}]},
    "training": TRAINING,
}
# Kinds of moments, and the share of the kills that each gets.
BEFORE, SAVE, BETWEEN, AFTER = "before the first checkpoint", "inside a save", "between steps", "behind the last step"
SHARES = {BEFORE: 0.2, SAVE: 0.45, BETWEEN: 0.15, AFTER: 0.2}


@dataclass(frozen=True)
class Kill:
    """One SIGKILL: when the process of a rank has done something of the name `event` for the `count`-th time."""

    kind: str
    event: str
    count: int = 1
    rank: int = 0


@dataclass
class Scenario:
    """A command, and how many processes run it.

    Args:
        main: The command's function.
        config: Its YAML; "base" in place of a path is that of the first scenario.
        ranks: Processes.
        flags: Further arguments.
    """

    main: Callable[[Sequence[str]], int]
    config: dict[str, Any]
    ranks: int = 1
    flags: tuple[str, ...] = ()


SCENARIOS = {
    "one_rank": Scenario(pretrain.main, PRETRAINING),
    "two_ranks_zero2": Scenario(pretrain.main, PRETRAINING, ranks=2, flags=("--training.deepspeed", "zero2")),
    "lora": Scenario(finetune.main, TUNING),
}


@dataclass
class Outcome:
    """What came of a scenario."""

    kills: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    is_equal: bool = False
    seconds: float = 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """Kill, restart, compare, and write a table to standard output; 1 if a run did not come to the same end.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    args = build_parser().parse_args(argv)
    set_up_logging(args.log_level)
    folder = Path(tempfile.mkdtemp(prefix="kill_resume-"))
    outcomes = {}
    base = run_alone(SCENARIOS["one_rank"], folder / "base", None)
    for name, number in zip(args.scenarios, shared(args.kills, len(args.scenarios)), strict=True):
        sys.stderr.write(f"{name}: {number} kills\n")
        outcomes[name] = disturb(SCENARIOS[name], folder / name, number, base)
    sys.stdout.write(table(outcomes))
    is_good = all(outcome.is_equal and not outcome.failures for outcome in outcomes.values())
    if is_good:
        shutil.rmtree(folder)
    else:
        sys.stderr.write(f"what the runs wrote is in {folder}\n")
    return int(not is_good)


def build_parser() -> OneLineParser:
    parser = OneLineParser(prog="benchmarks.kill_resume", description="Runs that are killed, and restarted.")
    parser.add_argument("--kills", type=timing.count, default=40, help="SIGKILLs, of all scenarios together")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="which commands")
    return parser


def shared(number: int, parts: int) -> list[int]:
    """A number in parts that differ by one at most."""
    return [number // parts + (index < number % parts) for index in range(parts)]


# ------------------------------------------------------------------------------------------------------------ scenarios


def disturb(scenario: Scenario, folder: Path, number: int, base: Path) -> Outcome:
    """Kill a run so many times, let it end, and compare it with one that ran alone."""
    begun, outcome = time.monotonic(), Outcome()
    alone = run_alone(scenario, folder / "alone", base)
    out = folder / "killed"
    for index, kill in enumerate(plan(number, [events_of(alone, rank) for rank in range(scenario.ranks)])):
        codes = attempt(scenario, out, base, kill, folder / f"log-{index:02}")
        if codes[kill.rank] == -signal.SIGKILL:
            outcome.kills[kill.kind] += 1
        else:
            outcome.failures.append(f"{kill}: ended with {codes}, see {folder}/log-{index:02}*")
        sys.stderr.write(f"  {kill.kind}: {kill.event} {kill.count} of rank {kill.rank}: {codes}\n")
    codes = attempt(scenario, out, base, None, folder / "log-last")
    if any(codes):
        outcome.failures.append(f"the last start ended with {codes}, see {folder}/log-last*")
    outcome.is_equal = not any(codes) and are_equal(alone, out)
    outcome.seconds = time.monotonic() - begun
    return outcome


def run_alone(scenario: Scenario, out: Path, base: Path | None) -> Path:
    """The folder of a run that is not killed.

    Raises:
        RuntimeError: it did not succeed.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    codes = attempt(scenario, out, base, None, out.with_name(f"{out.name}-log"))
    if any(codes):
        raise RuntimeError(f"a run that nobody disturbs ended with {codes}: see {out}-log*")
    return out


def plan(number: int, events: Sequence[Counter]) -> Iterator[Kill]:
    """The kills of a run, in the order of its steps.

    Args:
        number: How many.
        events: What each rank of an undisturbed run did, and how often.
    """
    counts = {kind: int(share * number) for kind, share in SHARES.items()}
    counts[SAVE] += number - sum(counts.values())
    saves = list(range(SAVE_STEPS, MAX_STEPS + 1, SAVE_STEPS))
    early = [Kill(BEFORE, event) for event in ("built", "step 0", "step 1")]
    yield from (early[index % len(early)] for index in range(counts[BEFORE]))
    between = [Kill(BETWEEN, f"step {step}") for step in range(SAVE_STEPS, MAX_STEPS)]
    late = shared(counts[BETWEEN], len(saves) - 1)
    for index, (step, of_save) in enumerate(zip(saves, shared(counts[SAVE], len(saves)), strict=True)):
        for part in range(of_save):
            rank = part % len(events)
            total = events[rank][f"save {step}"]
            yield Kill(SAVE, f"save {step}", 1 + (total - 1) * part // max(of_save - 1, 1), rank)
        if index < len(late):
            yield from between[2 * index : 2 * index + late[index]]
    for part in range(counts[AFTER]):
        rank = part % len(events)
        total = events[rank]["end"]
        yield Kill(AFTER, "end", 1 + (total - 1) * part // max(counts[AFTER] - 1, 1), rank)


def are_equal(ours: Path, theirs: Path) -> bool:
    """Whether two runs left the same weights, bit for bit."""
    names = sorted(path.name for path in ours.glob("*.safetensors"))
    if not names or names != sorted(path.name for path in theirs.glob("*.safetensors")):
        return False
    return all(same_tensors(load_file(ours / name), load_file(theirs / name)) for name in names)


def same_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    """Whether two files hold the same."""
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def table(outcomes: dict[str, Outcome]) -> str:
    """Markdown."""
    header = ["", *SHARES, "would have needed a hand", "weights", "s"]
    rows = [
        [
            name,
            *(str(outcome.kills[kind]) for kind in SHARES),
            str(len(outcome.failures)),
            "equal" if outcome.is_equal else "DIFFERENT",
            f"{outcome.seconds:.0f}",
        ]
        for name, outcome in outcomes.items()
    ]
    failures = "".join(f"\n{name}: {line}" for name, outcome in outcomes.items() for line in outcome.failures)
    return timing.markdown_table(header, rows) + failures


# ------------------------------------------------------------------------------------------------------------ processes


def attempt(scenario: Scenario, out: Path, base: Path | None, kill: Kill | None, log: Path) -> list[int]:
    """Start the command once, and wait; the codes of its ranks. If one is killed the others are, as by a launcher."""
    config = {**scenario.config, "training": {**scenario.config["training"], "output_dir": str(out)}}
    if scenario.main is finetune.main:
        config["model"] = {"path": str(base)}
    path = out.with_name(f"{out.name}.yaml")
    path.write_text(yaml.safe_dump(config))
    argv = ["--config", str(path), *scenario.flags]
    port = free_port()
    ranks = [begin(scenario, argv, out, kill, rank, port, log) for rank in range(scenario.ranks)]
    codes: dict[int, int] = {}
    while len(codes) < len(ranks):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid] != 0:
            for other in ranks:
                if other not in codes:
                    os.kill(other, signal.SIGKILL)
    return [codes[pid] for pid in ranks]


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def begin(
    scenario: Scenario, argv: Sequence[str], out: Path, kill: Kill | None, rank: int, port: int, log: Path
) -> int:
    """Fork the process of a rank; its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        as_rank(scenario, argv, out, kill, rank, port, log)
    return pid


def as_rank(
    scenario: Scenario, argv: Sequence[str], out: Path, kill: Kill | None, rank: int, port: int, log: Path
) -> NoReturn:
    """What a forked process does: run the command as a launcher would start it, with all that it says in a file."""
    try:
        file = os.open(f"{log}-rank-{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(file, 1)
        os.dup2(file, 2)
        size = {"WORLD_SIZE": str(scenario.ranks), "LOCAL_WORLD_SIZE": str(scenario.ranks)}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        with patch.dict(os.environ, {**size, **place} if scenario.ranks > 1 else {}):
            torch.set_num_threads(1)
            Witness(out, kill if kill is not None and kill.rank == rank else None, rank).attach()
            run_to_the_end(lambda: scenario.main(argv))
    finally:  # an error was none of the command's
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(70)


# -------------------------------------------------------------------------------------------------------------- moments


class Witness:
    """Counts what a process does, and kills it at its moment.

    Events are "built", "step N" as it begins, "save N" for what is done in the folder of that checkpoint or to delete
    another one meanwhile, and "end" for what is done in the folder of the run when all steps are behind.

    Args:
        out: The folder of the run.
        kill: When; None for never.
        rank: Of this process.
    """

    def __init__(self, out: Path, kill: Kill | None, rank: int):
        self.out, self.kill = str(out), kill
        self.counts: Counter = Counter()
        self.saving: int | None = None
        self.is_at_end = False
        out.parent.mkdir(parents=True, exist_ok=True)
        self.notes = os.open(notes_of(out, rank), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def attach(self) -> None:
        """From here on; a process cannot be left alone again."""
        sys.addaudithook(self.on_audit)
        around(torch, "save", self.on_torch_save)
        around(Trainer, "training_step", self.on_step)
        around(Trainer, "train", self.on_train)

    def note(self, event: str, path: str | None = None) -> None:
        """Count an event, and die if it is the one.

        Args:
            path: A file of which only a half is left then.
        """
        self.counts[event] += 1
        os.write(self.notes, f"{event}\n".encode())
        if self.kill is not None and (event, self.counts[event]) == (self.kill.event, self.kill.count):
            if path is not None:
                os.truncate(path, os.path.getsize(path) // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    def on_audit(self, event: str, arguments: tuple) -> None:
        """Python tells of each file that is opened, renamed or deleted."""
        if event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir") or not arguments:
            return
        if isinstance(arguments[0], str | os.PathLike) and os.fspath(arguments[0]).startswith(self.out + "/"):
            self.at(os.fspath(arguments[0])[len(self.out) + 1 :])

    def at(self, name: str, path: str | None = None) -> None:
        """Something is done to a file of the run."""
        first = name.partition("/")[0]
        if self.is_at_end:
            if not first.startswith(("checkpoint-", "deleted-")):
                self.note("end", path)
        elif self.saving is not None and first.startswith(("checkpoint-", "deleted-")):
            self.note(f"save {self.saving}", path)

    def on_torch_save(self, real: Callable, content: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        """Written in C++, of which Python tells nothing."""
        real(content, file, *args, **kwargs)
        if isinstance(file, str | os.PathLike) and os.fspath(file).startswith(self.out + "/"):
            self.at(os.fspath(file)[len(self.out) + 1 :], os.fspath(file))

    def on_step(self, real: Callable, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.saving = None
        self.note(f"step {trainer.state.global_step}")
        return real(trainer, *args, **kwargs)

    def on_train(self, real: Callable, trainer: Trainer, *args: Any, **kwargs: Any) -> Any:
        """The keeper of the checkpoints says when it begins one."""
        self.note("built")
        around(trainer.keeper, "begin", self.on_begin)
        output = real(trainer, *args, **kwargs)
        self.is_at_end = True
        self.note("end")
        return output

    def on_begin(self, real: Callable, folder: Path, args: Any) -> None:
        self.saving = int(folder.name.rpartition("-")[2])
        self.note(f"save {self.saving}")
        real(folder, args)


def around(owner: Any, name: str, hook: Callable) -> None:
    """Put a hook in place of a function, which it gets first."""
    real = getattr(owner, name)

    def replaced(*args: Any, **kwargs: Any) -> Any:
        return hook(real, *args, **kwargs)

    setattr(owner, name, replaced)


def notes_of(out: Path, rank: int) -> str:
    """The file of what a rank did last."""
    return str(out.with_name(f"{out.name}-events-{rank}"))


def events_of(out: Path, rank: int) -> Counter:
    """What a rank of a finished run did, and how often."""
    return Counter(Path(notes_of(out, rank)).read_text(encoding="utf-8").splitlines())


if __name__ == "__main__":
    sys.exit(main())
