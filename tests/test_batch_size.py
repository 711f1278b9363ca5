"""The search for a micro-batch that fits, against runs that were given the right one. Memory runs out where a test says
so.
"""

import functools
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import default_data_collator

import pretrain
from model import MegaTransformerForCausalLM
from model.depth import sample_depth
from tests.test_pretrain import TINY_RUN, losses, write_config
from tests.test_trainer import build, rows
from tests.tiny import tiny_model
from trainers import RecurrentTrainingArguments
from trainers.batch_size import fit_batch_size, longest_rows

FIXED = {"recurrence": {"mean_steps": 3, "backprop_steps": 2, "step_distribution": "fixed"}}


@pytest.fixture
def memory(monkeypatch):
    """A model that runs out of memory in training with more rows than `rows`, in the backward pass; `calls` are the
    sizes, depths and weights that were tried.
    """
    found, forward = SimpleNamespace(rows=2, calls=[]), MegaTransformerForCausalLM.forward

    @functools.wraps(forward)
    def limited(self, input_ids=None, **kwargs):
        output = forward(self, input_ids, **kwargs)
        if self.training:
            found.calls.append((len(input_ids), kwargs["num_steps"], kwargs.get("initial_state")))
            if len(input_ids) > found.rows:
                output.loss.register_hook(run_out)
        return output

    def run_out(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")

    monkeypatch.setattr(MegaTransformerForCausalLM, "forward", limited)
    return found


def trained(folder, **training):
    """The losses and weights of a run of three updates at a fixed depth."""
    training = {
        **TINY_RUN["training"],
        "max_steps": 3,
        "save_strategy": "no",
        "recurrence_logging_steps": 0,
        **training,
    }
    sections = {"model": FIXED, "callbacks": {"samples": {}}, "training": training}
    folder.mkdir()
    assert pretrain.main(["--config", str(write_config(folder, **sections)), "--training.output_dir", str(folder)]) == 0
    return losses(folder), load_file(folder / "model.safetensors")


def test_a_halved_batch_gives_the_same_run(tmp_path, memory):
    """Losses to 1e-6, as accumulation of 4 x 1 and 1 x 4 rows; the first tries leave no trace in weights or random
    numbers.
    """
    found, weights = trained(tmp_path / "found", per_device_train_batch_size=8, auto_find_batch_size=True)
    tries, steps = memory.calls[:3], memory.calls[3:]
    assert [count for count, *_ in tries] == [8, 4, 2] and {count for count, *_ in steps} == {2}
    assert len(steps) == 3 * 4
    memory.rows = 8
    whole, expected = trained(tmp_path / "whole", per_device_train_batch_size=8)
    assert {count for count, *_ in memory.calls[3 + 12 :]} == {8}
    assert found == pytest.approx(whole, rel=1e-6)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-5, rtol=1e-4)


def test_with_room_nothing_changes(tmp_path, memory):
    """Bitwise."""
    memory.rows = 8
    found, weights = trained(tmp_path / "found", per_device_train_batch_size=8, auto_find_batch_size=True)
    whole, expected = trained(tmp_path / "whole", per_device_train_batch_size=8)
    assert found == whole and all(torch.equal(weights[name], expected[name]) for name in expected)


def fitted(model, dataset, **options):
    args = RecurrentTrainingArguments(
        **{"output_dir": "unused", "auto_find_batch_size": True, "use_cpu": True, "report_to": "none", **options}
    )
    fit_batch_size(args, model, dataset, default_data_collator)
    return args


@pytest.mark.parametrize(("most", "expected"), [(12, 12), (11, 6), (5, 4), (1, 1)])
def test_sizes_divide_the_batch(memory, most, expected):
    memory.rows = most
    args = fitted(tiny_model(), rows(16), per_device_train_batch_size=12, gradient_accumulation_steps=3)
    assert args.per_device_train_batch_size == expected
    assert args.per_device_train_batch_size * args.gradient_accumulation_steps == 36
    assert args.auto_find_batch_size is False


def test_what_is_tried_is_the_most_that_can_come(memory):
    """The deepest draw, the longest rows; what is frozen costs nothing; weights and generator are as they were."""
    model, state = tiny_model(hidden_dropout=0.1), torch.random.get_rng_state()
    before = [weight.detach().clone() for weight in model.parameters()]
    fitted(model, rows(16), per_device_train_batch_size=2, seed=3, freeze=["model.prelude.*"])
    draws = [sample_depth(model.config.recurrence, 3, step, 0)[1] for step in range(20_000)]
    assert memory.calls == [(2, (1, max(draws)), None)]
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(map(torch.equal, before, model.parameters()))
    assert all(weight.grad is None for weight in model.parameters())
    assert not any(weight.requires_grad for weight in model.model.prelude.parameters())


def test_the_longest_rows_are_taken():
    class Known(list):
        lengths = [3, 9, 1, 9, 5]

    assert longest_rows(Known("abcde"), 3) == ["d", "b", "e"]
    assert longest_rows(iter("abcde"), 2) == ["a", "b"]


def test_other_errors_are_not_taken_for_memory(monkeypatch):
    def broken(self, *args, **kwargs):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    monkeypatch.setattr(MegaTransformerForCausalLM, "forward", broken)
    with pytest.raises(RuntimeError, match="shapes"):
        fitted(tiny_model(), rows(4))


def test_a_run_that_goes_on_keeps_what_was_found(tmp_path, memory):
    """On a machine with more memory too: the depths of its micro-batches are drawn one by one."""
    flags = {"per_device_train_batch_size": 8, "auto_find_batch_size": True, "save_strategy": "steps", "save_steps": 2}
    folder = tmp_path / "run"
    trained(folder, **flags)
    whole = losses(folder)
    (folder / "trainer_state.json").unlink()
    memory.rows, memory.calls = 8, []
    (folder / "checkpoint-3/model.safetensors").write_bytes(b"")
    again = ["--config", str(folder / "config.yaml"), "--training.resume_from_checkpoint", "true"]
    assert pretrain.main(again) == 0
    assert losses(folder) == whole and [count for count, *_ in memory.calls] == [2] * 4


def test_what_is_refused(tmp_path, memory, capsys):
    memory.rows = 0
    config = write_config(tmp_path, training={"output_dir": str(tmp_path / "out"), "auto_find_batch_size": True})
    with pytest.raises(SystemExit) as stop:
        pretrain.main(["--config", str(config)])
    assert stop.value.code == 2 and not (tmp_path / "out").exists()
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: training.auto_find_batch_size: not one row fits into the memory of cpu; make data.")
    for options in ({"deepspeed": "zero2.json"}, {"fsdp": "full_shard"}, {"max_tokens_per_batch": 64}):
        with pytest.raises(
            ValueError, match=f"auto_find_batch_size is true, but with {next(iter(options))} the memory"
        ):
            RecurrentTrainingArguments(output_dir="unused", auto_find_batch_size=True, use_cpu=True, **options)
    with pytest.raises(ValueError, match="auto_find_batch_size is true, but only trainer: pretrain looks for a size"):
        build(tmp_path / "out", auto_find_batch_size=True)
