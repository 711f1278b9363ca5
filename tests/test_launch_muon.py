"""Muon on two ranks, under DDP and, by DeepSpeed's own, under ZeRO-1 to -3. As a module, this is one rank."""

import json
import os
import sys
from pathlib import Path

import pytest
import torch
from accelerate.test_utils.testing import AccelerateTestCase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from inference.shutdown import end_process
from tests.processes import ROOT, run_ranks
from tests.test_trainer import Interrupt, build, losses
from tests.tiny import tiny_model
from trainers import ParameterGroup, find_resume_point

STAGES = (None, 1, 2, 3)


def rank(folder):
    """Six steps at each stage, and at the last as three and three; rank 0 leaves the losses in losses.json."""
    found = {}
    for stage in STAGES:
        options = {
            "max_steps": 6,
            "weight_decay": 0.1,
            "muon_learning_rate": 0.02,
            "max_grad_norm": 0.0,
            "parameter_groups": [ParameterGroup("model.core.*", lr_factor=0.5)],
            "deepspeed": None if stage is None else str(ROOT / f"configs/deepspeed/zero{stage}.json"),
        }
        found[f"zero{stage}"] = trained(build(folder / f"zero{stage}", **options))
        if stage in (2, 3):
            first = build(folder / f"cut{stage}", **options)
            first.add_callback(Interrupt(3))
            trained(first)
            options |= {"model": tiny_model(seed=5), "resume_from_checkpoint": "true"}
            found[f"cut{stage}"] = trained(build(folder / f"cut{stage}", **options))
    if os.environ["RANK"] == "0":
        (folder / "losses.json").write_text(json.dumps(found))


def trained(trainer):
    """Its losses, without compiling DeepSpeed's Muon; what a process knows of accelerate and DeepSpeed is forgotten."""
    with torch.compiler.set_stance("force_eager"):
        trainer.train(resume_from_checkpoint=find_resume_point(trainer.args))
    AccelerateTestCase().tearDown()
    unset_hf_deepspeed_config()
    return losses(trainer)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_muon_is_the_same_under_ddp_and_zero(tmp_path):
    """Rates, sizes of updates, weight decay and groups mean the same, and a run goes on."""
    ranks = run_ranks("-m", "tests.test_launch_muon", tmp_path, count=2)
    assert [rank.returncode for rank in ranks] == [0, 0], ranks[0].stderr[-4000:]
    found = json.loads((tmp_path / "losses.json").read_text())
    expected = found.pop("zeroNone")
    assert len(found) == 5 and expected[-1] < expected[0] - 0.3
    for name, values in found.items():
        assert values == pytest.approx(expected, abs=2e-3), name
    for stage in (2, 3):
        assert found[f"cut{stage}"] == pytest.approx(found[f"zero{stage}"], abs=1e-5)


if __name__ == "__main__":
    rank(Path(sys.argv[1]))
    end_process(0)
