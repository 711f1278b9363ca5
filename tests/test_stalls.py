"""A run that has come to a stand."""

import threading
from types import SimpleNamespace

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
