"""A run that has come to a stand."""

import threading
from types import SimpleNamespace

import pytest

from tests.test_trainer import build, rows
from trainers.stalls import StallCallback


def test_a_worker_that_hangs_is_said(tmp_path, caplog):
    """The first batch comes when the warning has been given, and not before."""
    trainer = build(tmp_path, max_steps=2, stall_seconds=0.05)
    nothing, data = threading.Event(), rows(8)

    class Slow(list):
        def __getitem__(self, index):
            while not caplog.messages:
                nothing.wait(0.01)
            return super().__getitem__(index)

    trainer.train_dataset = Slow(data)
    trainer.train()
    assert trainer.state.global_step == 2
    (line, *_) = caplog.messages
    assert line.startswith("nothing has happened for ") and "since step 0 the run waits for the next batch" in line


def watches():
    return [thread for thread in threading.enumerate() if thread.name == "stall watch"]


def test_nobody_watches_a_run_that_an_error_has_ended(tmp_path):
    """Also where a second training begins before the first watch has looked whether it is over."""
    trainer = build(tmp_path, max_steps=2, stall_seconds=0.05)

    class Broken(list):
        def __getitem__(self, index):
            seen.extend(watches())
            raise OSError("the disk is gone")

    seen, trainer.train_dataset = [], Broken(rows(8))
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            trainer.train()
    for watch in (first := seen[0], seen[-1]):
        watch.join(timeout=60)
        assert not watch.is_alive()
    assert first is not seen[-1]


def test_what_it_says():
    watch, state = StallCallback(10), SimpleNamespace(global_step=7)
    watch.workers = 2
    watch.on_step_end(None, state, None)
    assert watch.describe(12.3) == (
        "nothing has happened for 12 s: since step 7 the run waits for the next batch, an evaluation or a checkpoint "
        "from 2 workers (training.dataloader_num_workers), one of which may hang; Ctrl-C twice stops it"
    )
    watch.on_step_begin(None, state, None)
    assert "for the end of the step, for which ranks wait for each other; Ctrl-C" in watch.describe(12.3)
