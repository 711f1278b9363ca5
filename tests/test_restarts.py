"""The same command again and again, as a scheduler gives it: what was killed goes on by itself, and no two runs mix."""

import json
import logging
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pretrain
from tests.test_output import full_disk
from tests.test_pretrain import content, losses, refused, run, write_config  # noqa: F401  a fixture
from trainers.locks import LOCK_NAME, RunLock

AGAIN = ("--training.resume_from_checkpoint", "true")


def command(config, folder, *flags):
    return ["--config", str(config), "--training.output_dir", str(folder), *map(str, flags)]


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def check_same_end(folder, whole):
    """The folder of a run and that of one that was not interrupted: their files, weights, losses and evaluation."""
    ours, theirs = weights(folder), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses(folder) == losses(whole)
    found, expected = (json.loads((Path(place) / "eval_results.json").read_text()) for place in (folder, whole))
    timed = {name for name in expected if "runtime" in name or "per_second" in name}
    assert {name: found[name] for name in found.keys() - timed} == {
        name: expected[name] for name in expected.keys() - timed
    }
    names = [{path.name for path in Path(place).iterdir() if path.is_file()} for place in (folder, whole)]
    assert names[0] == names[1]


def without_end(whole, folder):
    """A copy as a kill after the last step leaves it: checkpoints, the configuration, nothing of the end."""
    shutil.copytree(whole, folder, ignore=shutil.ignore_patterns("runs"))
    for path in folder.iterdir():
        if path.is_file() and path.name != "config.yaml":
            path.unlink()
    return folder


# ----------------------------------------------------------------------------------------------------- before and after


def test_before_the_first_checkpoint_the_run_begins_anew(run, tmp_path, caplog):  # noqa: F811
    """In no folder, and in one with what a killed save has left."""
    whole, config = run
    (tmp_path / "out" / "checkpoint-3").mkdir(parents=True)
    shutil.copy(whole / "checkpoint-3" / "model.safetensors", tmp_path / "out" / "checkpoint-3")
    shutil.copy(whole / "config.yaml", tmp_path / "out")
    for folder in (tmp_path / "out", tmp_path / "none"):
        assert pretrain.main(command(config, folder, *AGAIN)) == 0
        assert f"{folder} holds no whole checkpoint to go on from: the run begins anew" in caplog.text
        check_same_end(folder, whole)


def test_after_the_last_step_the_rest_is_done(run, tmp_path, caplog):  # noqa: F811
    """No step is taken, the samples of the end are written, and all files are there."""
    whole, config = run
    out = without_end(whole, tmp_path / "out")
    with caplog.at_level(logging.INFO):
        assert pretrain.main(command(config, out, *AGAIN)) == 0
    assert "checkpoint-6 is of step 6, the last: only what comes after it is left to do" in caplog.text
    assert caplog.text.count("step 6, samples/num_steps_3") == 1
    check_same_end(out, whole)
    assert weights(out / "checkpoint-6").keys() == weights(whole / "checkpoint-6").keys()


@pytest.mark.parametrize("lost", ["trainer_state.json", "model.safetensors"])
def test_an_end_that_was_cut_off_is_done_again(run, tmp_path, lost):  # noqa: F811
    whole, config = run
    out = shutil.copytree(whole, tmp_path / "out")
    (out / lost).unlink()
    assert pretrain.main(command(config, out, *AGAIN)) == 0
    check_same_end(out, whole)


def test_the_rest_has_the_best_model(tmp_path):
    """Whose checkpoint is not the last."""
    training = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    config = write_config(tmp_path, training={**training, "learning_rate": 0.5, "lr_scheduler_type": "constant"})
    whole = tmp_path / "whole"
    assert pretrain.main(command(config, whole)) == 0
    best = Path(json.loads((whole / "trainer_state.json").read_text())["best_model_checkpoint"])
    assert best.name != "checkpoint-6"
    (tmp_path / "moved").mkdir()
    shutil.move(whole, tmp_path / "moved" / "whole")
    shutil.copytree(tmp_path / "moved" / "whole", whole)  # where its state says that the best one is
    for path in whole.iterdir():
        if path.is_file() and path.name != "config.yaml":
            path.unlink()
    assert pretrain.main(command(config, whole, *AGAIN)) == 0
    check_same_end(whole, tmp_path / "moved" / "whole")


@pytest.mark.parametrize("flags", [(), ("--training.logging_steps", "3", "--training.max_steps", "5")])
def test_a_finished_run_says_so_and_stays_as_it_is(run, tmp_path, caplog, flags):  # noqa: F811
    whole, config = run
    out = shutil.copytree(whole, tmp_path / "out")
    if flags:
        shutil.rmtree(out / "checkpoint-6")
    before = content(out)
    with caplog.at_level(logging.INFO):
        assert pretrain.main(command(config, out, *AGAIN, *flags)) == 0
    assert f"{out} holds the finished run: nothing is left to do" in caplog.text
    assert content(out) == before


def test_a_run_that_is_finished_by_its_epochs_says_so(tmp_path, caplog):
    """Where nothing but the weights was saved too; more epochs are more to do."""
    rows = [{"kind": "generated", "task": "stories", "num_rows": 20}]
    training = {"max_steps": -1, "num_train_epochs": 1, "save_strategy": "no"}
    config = write_config(tmp_path, data={"train": rows, "validation": rows}, training=training)
    out = tmp_path / "out"
    assert pretrain.main(command(config, out, *AGAIN)) == 0
    before = content(out)
    with caplog.at_level(logging.INFO):
        assert pretrain.main(command(config, out, *AGAIN)) == 0
    assert "holds the finished run: nothing is left to do" in caplog.text and content(out) == before
    steps = len(losses(out))
    assert pretrain.main(command(config, out, *AGAIN, "--training.num_train_epochs", "2")) == 0
    assert len(losses(out)) == 2 * steps


def test_a_disk_that_is_full_is_one_line(run, tmp_path, capsys):  # noqa: F811
    """Within a checkpoint, of which nothing is left."""
    whole, config = run
    out = without_end(whole, tmp_path / "out")
    shutil.rmtree(out / "checkpoint-6")
    with full_disk((whole / "model.safetensors").stat().st_size // 2):
        line = refused(capsys, *command(config, out, *AGAIN))
    assert line.startswith(f"error: {out / 'checkpoint-6'} cannot be written (")
    assert not list(out.glob("*checkpoint-6*"))


def test_more_steps_after_the_end_go_on(run, tmp_path):  # noqa: F811
    whole, config = run
    out = shutil.copytree(whole, tmp_path / "out")
    assert pretrain.main(command(config, out, *AGAIN, "--training.max_steps", "8")) == 0
    assert len(losses(out)) == 8 and losses(out)[:6] == losses(whole)


# -------------------------------------------------------------------------------------------------------- another's run


@pytest.mark.parametrize("place", ["finished", "cut"])
def test_another_run_is_not_gone_on_with(run, tmp_path, capsys, place):  # noqa: F811
    """Data, seed and rate, whether something is left to do or not; nothing is written."""
    whole, config = run
    out = shutil.copytree(whole, tmp_path / "out") if place == "finished" else without_end(whole, tmp_path / "out")
    before = content(out)
    for flags, words in (
        (("--training.seed", "7"), "training.seed is 42 there and 7 here"),
        (("--data.train", "[{kind: generated, task: stories, num_rows: 60}]"), "data.train is ["),
        (("--training.learning_rate", "1e-4"), "training.learning_rate is 0.003 there and 0.0001 here"),
    ):
        line = refused(capsys, *command(config, out, *AGAIN, *flags))
        assert "checkpoint-6 has other options: " in line and words in line
    assert content(out) == before


def test_a_new_run_does_not_mix_with_the_checkpoints_of_another(run, tmp_path, capsys):  # noqa: F811
    whole, config = run
    out = shutil.copytree(whole, tmp_path / "out")
    before = content(out)
    line = refused(capsys, *command(config, out))
    assert "holds checkpoint-" in line and "of an earlier run; go on with it by --training.resume_from" in line
    assert content(out) == before


def test_a_finished_run_without_checkpoints_is_replaced_and_said_to_be(run, tmp_path, caplog, monkeypatch):  # noqa: F811
    """Killed within the new run, the folder must not say that it is finished."""
    whole, config = run
    out = shutil.copytree(whole, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))

    def kill(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trainers.RecurrentTrainer.training_step", kill)
    with pytest.raises(KeyboardInterrupt):
        pretrain.main(command(config, out))
    assert "out holds a finished run, which this one replaces" in caplog.text
    assert not (out / "trainer_state.json").exists()
    monkeypatch.undo()
    (out / "model.safetensors").write_bytes(b"old")
    assert pretrain.main(command(config, out, *AGAIN)) == 0
    assert all(torch.equal(weight, weights(whole)[name]) for name, weight in weights(out).items())


def test_options_of_an_old_checkpoint_are_known_by_its_optimizer(run, tmp_path, capsys):  # noqa: F811
    """Without a record of them anywhere: one line, when the state is loaded."""
    whole, config = run
    old = shutil.copytree(whole / "checkpoint-3", tmp_path / "old")
    for name in ("config.yaml", "manifest.json"):
        (old / name).unlink()
    flags = ["--training.resume_from_checkpoint", old, "--training.learning_rate", "1e-4"]
    line = refused(capsys, *command(config, tmp_path / "out", *flags))
    assert "the optimizer there has lr 0.003, and here 0.0001; give the same, or add" in line
    assert pretrain.main(command(config, tmp_path / "out", *flags[:2])) == 0
    assert losses(tmp_path / "out") == losses(whole)


# ------------------------------------------------------------------------------------------------------------ one lock

HOLDER = """
import os, sys, time
from trainers.locks import RunLock
lock = RunLock(sys.argv[1])
lock.take()
if os.fork() == 0:  # as the workers of a DataLoader, which outlive a kill
    time.sleep(60)
    os._exit(0)
print("taken", flush=True)
time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process, and a child of it, that hold the lock of `tmp_path/out`."""
    root = Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "out")],
        cwd=root, stdout=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stdout.readline() == "taken\n"
    yield process
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def test_two_runs_at_once_are_one_too_many(run, tmp_path, capsys, holder):  # noqa: F811
    """The second is refused with who the first is, whether it goes on or begins; a kill of the first ends that."""
    _, config = run
    for flags in ((), AGAIN):
        line = refused(capsys, *command(config, tmp_path / "out", *flags))
        assert f"is in use by process {holder.pid} on '{socket.gethostname()}'; wait for that run, stop it, or" in line
    holder.kill()
    holder.wait()
    lock = RunLock(tmp_path / "out")
    lock.take()  # though the child is alive
    assert json.loads((tmp_path / "out" / LOCK_NAME).read_text()) == {"pid": os.getpid(), "host": socket.gethostname()}
    lock.release()
    assert not (tmp_path / "out" / LOCK_NAME).exists()


def take_in_a_child(folder, connection):
    try:
        RunLock(folder).take()
        connection.send("taken")
    except ValueError as error:
        connection.send(str(error))


def test_a_lock_is_given_back(tmp_path):
    """By release, and not by a look of the same process; a folder that is not there is not made for a look."""
    lock = RunLock(tmp_path / "out")
    lock.take(may_make_folder=False)
    assert not (tmp_path / "out").exists()
    lock.take()
    lock.take()
    for expected in ("is in use by process", "taken"):
        here, there = multiprocessing.Pipe()
        child = multiprocessing.get_context("fork").Process(target=take_in_a_child, args=(tmp_path / "out", there))
        child.start()
        assert expected in here.recv()
        child.join()
        lock.release()


def test_without_locks_a_warning_says_so(tmp_path, monkeypatch, caplog):
    def fail(*args):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.lockf", fail)
    lock = RunLock(tmp_path)
    lock.take()
    assert (
        "cannot be locked ([Errno 95] Operation not supported): another run there would not be noticed" in caplog.text
    )
    lock.release()
    assert not list(tmp_path.iterdir())
