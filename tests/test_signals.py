"""SIGTERM and Ctrl-C: where a run ends, and with which code."""

import logging
import multiprocessing
import os
import signal
import subprocess
import sys

import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import TrainerCallback

from inference.shutdown import run_to_the_end
from tests.test_trainer import build, losses, resume_point
from trainers import signals
from trainers.resuming import damage
from trainers.signals import StopCallback, StopRequest, launchers, sheltered, wait_for_the_end_of

CODES = {signal.SIGTERM: 143, signal.SIGINT: 130}


def send(number):
    """To this process, whose handler runs before the call returns."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", CODES)
def test_outside_of_training_a_signal_ends_at_once(number, capfd):
    before = signal.getsignal(number)
    with pytest.raises(SystemExit) as left, StopRequest():
        send(number)
        raise AssertionError("it went on")
    assert left.value.code == CODES[number] and signal.getsignal(number) == before
    assert capfd.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("number", CODES)
def test_what_is_deferred_comes_to_its_end(number, capfd):
    done = []
    with pytest.raises(SystemExit) as left, StopRequest() as request:
        with request.deferred():
            send(number)
            send(signal.SIGTERM)  # of the launcher, which means the same
            done.append("to its end")
        raise AssertionError("it went on")
    assert left.value.code == CODES[number] and done == ["to its end"]
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"{signal.Signals(number).name}: the run ends behind the step")


def test_without_a_signal_nothing_happens():
    with StopRequest() as request, request.deferred():
        pass
    assert request.number is None


def signal_that_another_rank_had_first():
    """Ranks agree on a signal behind each step, and the launcher's end reaches them one after the other."""
    with StopRequest() as request, request.deferred():
        request.number = signal.SIGTERM
        send(signal.SIGTERM)
        os._exit(7)


def second_signal():
    with StopRequest() as request, request.deferred():
        send(signal.SIGTERM)
        request.received -= 2 * signals.SAME_WISH
        send(signal.SIGTERM)
        os._exit(7)


def signal_in_a_child():
    with StopRequest() as request, request.deferred():
        child = os.fork()
        if child == 0:
            send(signal.SIGTERM)
            os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143
    os._exit(3)


@pytest.mark.parametrize(
    "program, code", [(second_signal, 143), (signal_in_a_child, 3), (signal_that_another_rank_had_first, 7)]
)
def test_in_a_process_of_its_own(program, code):
    """A second signal, later than those that mean the same, does not wait; children that were forked do not either. The
    first of this process waits, though it was known.
    """
    process = multiprocessing.get_context("fork").Process(target=program)
    process.start()
    process.join()
    assert process.exitcode == code


# ------------------------------------------------------------------------------------------------------------ training


class Send(TrainerCallback):
    """Sends a signal at an event of a step."""

    def __init__(self, event, step, number=signal.SIGTERM):
        self.step, self.number = step, number
        setattr(self, event, self.act)

    def act(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            self.step = None
            send(self.number)


def stopped(folder, callback, **settings):
    """The trainer of a run that a signal ended, and its code."""
    trainer = build(folder, **settings)
    trainer.add_callback(callback)
    with pytest.raises(SystemExit) as left, StopRequest() as request:
        trainer.stop = StopCallback(request)
        with request.deferred():
            trainer.train()
    return trainer, left.value.code


SETTINGS = {"max_steps": 5, "save_strategy": "steps", "save_steps": 4, "eval_strategy": "steps", "eval_steps": 3}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Losses and weights of the run that no signal ended."""
    trainer = build(tmp_path_factory.mktemp("whole"), **SETTINGS)
    trainer.train()
    return losses(trainer), trainer.model.state_dict()


# Event, steps behind it, step of the checkpoint: signals within a step are seen at its end.
MOMENTS = {
    "before the first step": ("on_train_begin", 0, 1),
    "a step begins": ("on_step_begin", 1, 2),
    "before the update": ("on_pre_optimizer_step", 1, 2),
    "a step ends": ("on_step_end", 2, 2),
    "logging": ("on_log", 2, 3),
    "evaluation": ("on_prediction_step", 3, 3),
    "a checkpoint is whole": ("on_save", 4, 4),
    "the last step": ("on_step_end", 5, 5),
}


@pytest.mark.parametrize(
    "event, step, saved, number",
    [(*moment, number) for moment, number in zip(MOMENTS.values(), [*CODES, signal.SIGTERM] * 3, strict=False)],
    ids=MOMENTS,
)
def test_a_run_ends_with_a_checkpoint(uninterrupted, tmp_path, caplog, event, step, saved, number):
    """With the code of the signal, without what comes at the end of a run; going on repeats the uninterrupted run."""
    with caplog.at_level(logging.WARNING, logger="trainers.signals"):
        trainer, code = stopped(tmp_path, Send(event, step, number), **SETTINGS)
    assert code == CODES[number] and trainer.state.global_step == saved
    newest = tmp_path / f"checkpoint-{saved}"
    assert damage(newest) is None and "train_runtime" not in str(trainer.state.log_history)
    (line,) = [record.getMessage() for record in caplog.records if record.name == "trainers.signals"]
    assert line.startswith(f"stopped by {signal.Signals(number).name} behind step {saved}: saved in {newest};")
    assert resume_point("true", tmp_path) == str(newest)
    second = build(tmp_path, **SETTINGS)
    second.train(resume_from_checkpoint=str(newest))
    losses_of_whole, weights = uninterrupted
    assert losses(second) == losses_of_whole
    assert all(torch.equal(weight, weights[name]) for name, weight in second.model.state_dict().items())


def test_a_signal_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """It comes to its end."""
    real = torch.save

    def save(content, path, *args, **kwargs):
        real(content, path, *args, **kwargs)
        if str(path).endswith("checkpoint-2/optimizer.pt"):
            send(signal.SIGTERM)

    monkeypatch.setattr(torch, "save", save)
    trainer, code = stopped(tmp_path, TrainerCallback(), max_steps=4, save_strategy="steps", save_steps=2)
    assert code == 143 and trainer.state.global_step == 2
    assert damage(tmp_path / "checkpoint-2") is None


def test_where_nothing_is_saved_by_itself_and_epochs_end(tmp_path):
    """A signal is a reason to save, and not to evaluate."""
    settings = {"max_steps": -1, "num_train_epochs": 2, "save_strategy": "no", "eval_strategy": "epoch"}
    trainer, code = stopped(tmp_path, Send("on_step_end", 8), **settings)  # the last step of the first epoch
    assert code == 143 and damage(tmp_path / "checkpoint-8") is None
    assert not any("eval_loss" in entry for entry in trainer.state.log_history)


# ------------------------------------------------------------------------------------------------ workers and launchers


class Signalled(Dataset):
    """Rows whose reading sends SIGTERM and SIGINT to the process that reads."""

    def __len__(self):
        return 3

    def __getitem__(self, index):
        for number in CODES:
            send(number)
        return index


def test_workers_leave_signals_to_the_process_that_they_work_for():
    assert [int(row) for row in sheltered(DataLoader(Signalled(), num_workers=1))] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        list(DataLoader(Signalled(), num_workers=1))


def test_workers_are_initialised_as_before():
    started = []
    loader = DataLoader(Signalled(), num_workers=1, worker_init_fn=started.append)
    old = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    sheltered(loader).worker_init_fn(5)
    assert started == [5] and set(CODES) <= signal.pthread_sigmask(signal.SIG_SETMASK, old)


def test_the_end_of_a_launcher_is_a_signal(monkeypatch):
    """Two looks at parents: the second finds that one of them has changed."""
    parents = iter([10, 20, 10, 1])
    monkeypatch.setattr(signals, "parent_of", lambda process: next(parents))
    monkeypatch.setattr(signals.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit) as left, StopRequest():
        wait_for_the_end_of({"self": 10, 10: 20})
    assert left.value.code == 143 and next(parents, None) is None


@pytest.mark.parametrize(
    "commands, expected",
    [
        ({7: "python -u -m deepspeed.launcher.launch --x", 8: "python /bin/deepspeed pretrain.py"}, {"self": 7, 7: 8}),
        ({7: "python -u -m deepspeed.launcher.launch --x", 8: "bash"}, {"self": 7}),
        ({7: "python /bin/torchrun pretrain.py", 8: "bash"}, {"self": 7}),
    ],
)
def test_who_belongs_to_the_launcher(monkeypatch, commands, expected):
    monkeypatch.setattr(signals.os, "getppid", lambda: 7)
    monkeypatch.setattr(signals, "parent_of", {"self": 7, 7: 8}.get)
    monkeypatch.setattr(signals, "command_of", commands.get)
    assert launchers() == expected


def test_parents_as_the_system_knows_them():
    assert signals.parent_of("self") == os.getppid() and signals.parent_of(2**22 + 1) == 0
    assert "pytest" in signals.command_of(os.getpid()) and signals.command_of(2**22 + 1) == ""


# ------------------------------------------------------------------------------------------------------------- commands


def leave(code):
    def main():
        raise SystemExit(code)

    run_to_the_end(main)


@pytest.mark.parametrize("code, expected", [(0, 0), (2, 2), (143, 143), (None, 0), ("a text", 1)])
def test_codes_of_commands_that_leave(code, expected):
    process = multiprocessing.get_context("fork").Process(target=leave, args=(code,))
    process.start()
    process.join()
    assert process.exitcode == expected


def test_ctrl_c_in_a_command_is_one_line():
    """Against Python without it: a traceback."""
    program = "import inference.shutdown, sys\nif {}: sys.excepthook = inference.shutdown.say_errors\n{}"
    raises = "print('text'); raise KeyboardInterrupt"
    ours, pythons = (
        subprocess.run([sys.executable, "-c", program.format(ours, raises)], capture_output=True, text=True)
        for ours in (True, False)
    )
    assert (ours.returncode, ours.stdout, ours.stderr) == (130, "text\n", "stopped by Ctrl-C\n")
    assert "Traceback" in pythons.stderr
    other = subprocess.run(
        [sys.executable, "-c", program.format(True, "raise KeyError(3)")], capture_output=True, text=True
    )
    assert other.returncode == 1 and "KeyError: 3" in other.stderr
