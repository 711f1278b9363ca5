"""Runs that go on with DeepSpeed, on two ranks: other rates, more steps, the end made up for."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import run_ranks
from tests.test_launch import refused, trained
from tests.test_pretrain import content, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

AGAIN = ("--training.resume_from_checkpoint", "true")
OWN_OPTIMIZER = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 1},
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto", "torch_adam": True},
    },
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {
            "warmup_min_lr": 0,
            "warmup_max_lr": "auto",
            "warmup_num_steps": "auto",
            "warmup_type": "linear",
            "total_num_steps": "auto",
        },
    },
}


def rates(folder):
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["learning_rate"] for entry in history if "learning_rate" in entry}


def rate(step, steps, peak, warmup):
    """That of an update, counted from 1, of a schedule that is linear up and down to 0."""
    before = step - 1
    return peak * (before / warmup if before < warmup else (steps - before) / (steps - warmup))


@pytest.mark.parametrize("kind", ["zero2", "zero3", "described in the file"])
def test_more_steps_and_other_rates(tmp_path, kind):
    """Six steps of a linear schedule down to 0, then eight of one from another peak: the rates of the closed form.
    DeepSpeed's own schedule takes two steps up, or more.
    """
    (tmp_path / "mine.json").write_text(json.dumps(OWN_OPTIMIZER))
    file, warmup = (kind, 0) if kind.startswith("zero") else (tmp_path / "mine.json", 2)
    config, out = write_config(tmp_path), tmp_path / "out"
    flags = ("--config", config, "--training.deepspeed", file, "--callbacks.samples.prompts", "[]")
    flags += ("--training.weight_decay", "0.1")  # of all but norms and biases, whose group has 0 there and here
    trained(out, *flags)
    assert rates(out) == pytest.approx({step: rate(step, 6, 3e-3, warmup) for step in range(1, 7)})
    more = (*flags, *AGAIN, "--training.max_steps", 8)
    trained(shutil.copytree(out, tmp_path / "longer"), *more)
    expected = {step: rate(step, 8, 3e-3, warmup) for step in (7, 8)}
    assert {step: rates(tmp_path / "longer")[step] for step in (7, 8)} == pytest.approx(expected)
    changed = (*more, "--training.learning_rate", "1e-4", "--training.weight_decay", "0.5")
    assert "training.learning_rate is 0.003 there and 0.0001" in refused(out, *changed)
    trained(out, *changed, "--training.allow_changes", "true")
    expected = {step: rate(step, 8, 1e-4, warmup) for step in (7, 8)}
    assert {step: rates(out)[step] for step in (7, 8)} == pytest.approx(expected)
    moved = [
        (load_file(folder / "model.safetensors")[name] - weight).abs().max().item()
        for folder in (tmp_path / "longer", out)
        for name, weight in load_file(out / "checkpoint-6" / "model.safetensors").items()
        if name.endswith("norm.weight")
    ]
    half = len(moved) // 2
    assert max(moved[half:]) < max(moved[:half]) / 10  # a thirtieth of the rates


def test_the_same_command_on_two_ranks_begins_ends_and_stays(tmp_path):
    """All ranks do what the first one finds."""
    config, out = write_config(tmp_path), tmp_path / "out"
    flags = ("--config", config, "--training.deepspeed", "zero2", *AGAIN)
    whole = trained(out, *flags)
    kept = shutil.copytree(out, tmp_path / "kept")
    for path in out.iterdir():
        if path.is_file() and path.name != "config.yaml":
            path.unlink()
    assert trained(out, *flags) == whole
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (out, kept))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    before = content(out)
    ranks = run_ranks("pretrain.py", *flags, "--training.output_dir", out, count=2)
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert "holds the finished run: nothing is left to do" in "".join(rank.stderr + rank.stdout for rank in ranks)
    assert content(out) == before
