"""The commands of `pretrain.py` that train a little, or not at all, and leave no checkpoint: see `MODES`."""

import json
import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from transformers import Trainer

from callbacks import StabilityError
from callbacks.non_finite import NonFiniteCallback
from inference.devices import choose_threads, device_report
from inference.output import whole_file, write_result
from trainers.debugging import NotLearningError, overfit_one_batch
from trainers.learning_rate_finder import NothingFoundError, RangeTestCallback
from trainers.locks import RunLock
from trainers.profiling import ProfilingCallback
from trainers.signals import watch_launcher

from .pretraining import build_pretraining, describe_run
from .running import leaving
from .runs import RunConfig, check_output_dir, one_line_errors

logger = logging.getLogger(__name__)


def run_mode(run: RunConfig) -> int:
    """Do what the mode of a run says, and write what it finds to standard output.

    Raises:
        SystemExit: the input is bad, or what is looked for is found to be wrong; the code is 2, after one line.
    """
    if run.mode == "dry_run":
        return finish_mode(describe_run(run))
    logger.info("%s", device_report())
    with leaving(RunLock(run.training.output_dir)):
        watch_launcher()
        with one_line_errors():
            run.training.check_launcher()
            check_output_dir(run)
            check_schedule(run)
            trainer = build_pretraining(run)
        choose_threads(trainer.model)
        with one_line_errors((FloatingPointError, StabilityError, NothingFoundError, NotLearningError)):
            return finish_mode(TOOLS[run.mode](trainer))


def finish_mode(result: str) -> int:
    """Write a result, on the first rank."""
    if os.environ.get("RANK", "0") == "0":
        write_result(f"{result.rstrip()}\n")
    return 0


def check_schedule(run: RunConfig) -> None:
    """Raises ValueError for a range test where DeepSpeed's file has a schedule, whose rates would not be constant."""
    if run.mode == "find_lr" and run.training.deepspeed and "scheduler" in run.training.hf_deepspeed_config.config:
        raise ValueError(
            "--find-lr needs the learning rates to itself, but the file of training.deepspeed describes a scheduler; "
            "take it out, and name it as training.lr_scheduler_type"
        )


def find_learning_rate(trainer: Trainer) -> str:
    """Write learning_rates.json and learning_rates.png into the output folder; the suggestion.

    Raises:
        NothingFoundError: no rate makes the loss fall.
    """
    args, callback = trainer.args, RangeTestCallback()
    trainer.remove_callback(NonFiniteCallback)  # the test is to go on until there is no loss any more
    trainer.callback_handler.callbacks.insert(0, callback)
    trainer.train()
    found = callback.result(rates_of(trainer))
    folder, values = Path(args.output_dir), found.as_dict()
    if trainer.is_world_process_zero():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / "learning_rates.json") as path:
            path.write_text(f"{json.dumps(values, indent=1)}\n", encoding="utf-8")
        with whole_file(folder / "learning_rates.png") as path:
            found.figure().savefig(path)
    return f"{found.summary()}: {folder / 'learning_rates.png'}"


def rates_of(trainer: Trainer) -> dict[str, float]:
    """The learning rates of a run, by option."""
    args = trainer.args
    rates = {"learning_rate": args.learning_rate, "muon_learning_rate": args.muon_learning_rate}
    for number, group in enumerate(args.parameter_groups):
        rates[f"parameter_groups[{number}].learning_rate"] = group.learning_rate
    return {name: rate for name, rate in rates.items() if rate is not None}


def profile_steps(trainer: Trainer) -> str:
    """Write a trace into the output folder; the table of costs, and where the trace is.

    Raises:
        NothingFoundError: the data end before the steps that are traced.
    """
    callback = ProfilingCallback(Path(trainer.args.output_dir))
    trainer.add_callback(callback)
    trainer.train()
    if trainer.state.global_step < trainer.state.max_steps:
        raise NothingFoundError(
            f"data.train: it ended after {trainer.state.global_step} steps of the {trainer.state.max_steps} that are "
            "needed; give more rows"
        )
    return f"{callback.table}\n\nTrace, for chrome://tracing or https://ui.perfetto.dev: {callback.path}"


TOOLS: Mapping[str, Callable[[Trainer], str]] = {
    "find_lr": find_learning_rate,
    "profile": profile_steps,
    "debug": overfit_one_batch,
}
"""What each mode does with the trainer of a run; it returns what the command writes."""
