"""`pretrain.py --find-lr`, `--profile` and `--debug` on two ranks, with DeepSpeed and without."""

import json

import numpy as np
import pytest

from tests.processes import run_ranks
from tests.test_pretrain import write_config
from trainers.learning_rate_finder import LEAST_FACTOR, MOST_FACTOR, NUM_STEPS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.mark.parametrize(
    ("mode", "stage", "files"),
    [
        ("find-lr", "zero2", ["learning_rates.json", "learning_rates.png"]),
        ("profile", None, ["profile", "profile/trace.json"]),
        ("debug", None, []),
    ],
)
def test_a_mode_on_two_ranks(tmp_path, mode, stage, files):
    """The first rank alone writes; with DeepSpeed the rates grow as without."""
    out = tmp_path / "out"
    model = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    training = {"output_dir": str(out), "learning_rate": 1e-2, "deepspeed": stage}
    config = write_config(tmp_path, training=training, model=model, data={"block_size": 16})
    processes = run_ranks("pretrain.py", "--config", config, f"--{mode}", count=2)
    assert [process.returncode for process in processes] == [0, 0], processes[0].stderr[-3000:]
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == files
    first, other = (process.stdout for process in processes)
    expected = {"find-lr": "learning_rate 0", "profile": "| core | ", "debug": "the loss of 8 rows went from "}[mode]
    assert expected in first and expected not in other
    if mode == "find-lr":
        rates = json.loads((out / "learning_rates.json").read_text())["learning_rate"]
        assert rates == pytest.approx(np.geomspace(1e-2 * LEAST_FACTOR, 1e-2 * MOST_FACTOR, NUM_STEPS)[: len(rates)])
        assert len(rates) > 50
