"""Adapters on two ranks."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from tests.test_launch import trained
from tests.tiny_finetuning import write_tuning_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def tuned(folder, base, *flags, processes=2):
    """The losses and adapters of a run; both kinds of them."""
    folder.mkdir(exist_ok=True)
    config = write_tuning_config(folder, base, peft={"dropout": 0.0}, step_lora={"num_steps": 2, "rank": 1})
    found = trained(folder / "out", "--config", config, *flags, processes=processes, script="finetune.py")
    lora, steps = (load_file(folder / "out" / f"{name}.safetensors") for name in ("adapter_model", "step_lora"))
    return found, {**lora, **steps}


@pytest.fixture(scope="module")
def plain(tiny_run, tmp_path_factory):
    """Two ranks without DeepSpeed."""
    return tuned(tmp_path_factory.mktemp("plain"), tiny_run)


@pytest.fixture(scope="module", params=["zero2", "zero3"])
def zero(request, tiny_run, tmp_path_factory):
    """Two ranks with DeepSpeed: the flags, the folder, which is read only, losses and adapters."""
    folder, flags = tmp_path_factory.mktemp(request.param), ("--training.deepspeed", request.param)
    return flags, folder, *tuned(folder, tiny_run, *flags)


def test_zero_on_two_ranks_equals_two_ranks_without_it(zero, plain):
    """Invariant 6; the files of adapters are whole, and are all that is saved."""
    losses, expected = plain
    _, folder, found, weights = zero
    assert found == pytest.approx(losses, abs=1e-4)
    assert not list((folder / "out").glob("model*"))
    assert list((folder / "out/checkpoint-2").glob("global_step2/*optim_states.pt"))  # DeepSpeed was there
    assert weights.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(weights[name], weight, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("zero", ["zero2"], indirect=True)
def test_resuming_on_two_ranks_with_zero2_continues_exactly(zero, tiny_run, tmp_path):
    flags, folder, whole, expected = zero
    shutil.copytree(folder / "out", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "trainer_state.json").unlink()  # with it, the run would be finished
    found, weights = tuned(tmp_path, tiny_run, *flags, "--training.resume_from_checkpoint", "true")
    assert found == whole
    assert all(torch.equal(weights[name], expected[name]) for name in expected)
