"""FSDP2 on two ranks of a CPU: the same numbers as one rank, checkpoints that other numbers of ranks go on from."""

import io
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import AutoModelForCausalLM

from tests.processes import run_ranks
from tests.tiny import tiny_ids
from trainers.checkpoints import OPTIMIZER_FOLDER, not_finite, unreadable
from trainers.sharding import METADATA_NAME, read_metadata

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Trains, with 4 rows in an update however many ranks there are, and leaves Adam's moments of all weights in a file.
SCRIPT = """
import json, os, sys
import torch
from inference.shutdown import end_process
from tests.test_trainer import Interrupt, build
from tests.tiny import tiny_model
from trainers import find_resume_point

folder, stop, moments, options = sys.argv[1], int(sys.argv[2]), sys.argv[3], json.loads(sys.argv[4])
trainer = build(
    folder,
    seed=1,
    model=tiny_model(recurrence={"step_distribution": "fixed"}, **options.pop("model", {})),
    per_device_train_batch_size=4 // int(os.environ["WORLD_SIZE"]),
    max_steps=9,
    resume_from_checkpoint="true",
    **options,
)
if stop:
    trainer.add_callback(Interrupt(stop))
trainer.train(find_resume_point(trainer.args))


def whole(parameter, name):
    if trainer.is_deepspeed_enabled:
        from deepspeed.utils import safe_get_full_optimizer_state
        return safe_get_full_optimizer_state(parameter, name)
    state = trainer.optimizer.state[parameter][name]
    return state.full_tensor() if trainer.is_fsdp_enabled else state


names = {name: parameter for name, parameter in trainer.model.named_parameters()}
found = {f"{name}.{key}": whole(it, key).clone() for key in ("exp_avg", "exp_avg_sq") for name, it in names.items()}
trainer.save_model()
if trainer.state.is_world_process_zero:
    torch.save(found, moments)
    print("FOUND", json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
end_process(0)
"""


def train(folder, ranks, stop=0, **options):
    """The losses of a run, from its newest checkpoint on, and Adam's moments at its end."""
    moments = folder / f"moments_{stop}.pt"
    processes = run_ranks("-c", SCRIPT, folder, stop, moments, json.dumps(options), count=ranks)
    assert [process.returncode for process in processes] == [0] * ranks, processes[0].stderr[-3000:]
    line = next(line for line in processes[0].stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND ")), torch.load(moments, weights_only=True)


def check_alike(found, expected):
    """Losses to 1e-4, moments to float32's rounding over the steps."""
    (losses, moments), (whole, of_whole) = found, expected
    assert len(whole) == 9 and losses == pytest.approx(whole, abs=1e-4)
    assert moments.keys() == of_whole.keys() and len(moments) > 40
    for name, moment in of_whole.items():
        torch.testing.assert_close(moments[name], moment, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Nine steps of one process that knows nothing of sharding."""
    folder = tmp_path_factory.mktemp("one")
    return train(folder, 1), folder


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Three steps of two ranks with FSDP, three of one, three of two."""
    folder = tmp_path_factory.mktemp("two")
    for stop, ranks in ((3, 2), (6, 1)):
        train(folder, ranks, stop=stop, fsdp=True)
    return train(folder, 2, fsdp=True), folder


def test_two_ranks_then_one_then_two_equal_one(one, two):
    """Invariant 6, and checkpoints of which another number of ranks gets its part."""
    check_alike(two[0], one[0])


def test_whole_weights_are_saved_as_ever(one, two):
    """Names, values, code and architecture are those of a run without sharding."""
    folder = two[1]
    ours, theirs = (load_file(place / "model.safetensors") for place in (folder, one[1]))
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, atol=1e-4, rtol=1e-3)
    for name in ("checkpoint-3", "checkpoint-6", "."):
        place = folder / name
        assert {path.name for path in place.glob("*.py")} == {path.name for path in one[1].glob("*.py")}
        assert json.loads((place / "config.json").read_text()) == json.loads((one[1] / "config.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model(tiny_ids(1, 5)).logits.isfinite().all()


class Hostile:
    def __reduce__(self):
        return (print, ("run",))


def test_files_of_ranks_that_would_run_code_or_are_damaged_are_told(two, tmp_path):
    """The index is a pickle, and so are values beside tensors; torch would load both without a question."""
    checkpoint = two[1] / "checkpoint-6"
    assert unreadable(checkpoint) is None and not_finite(checkpoint) is None
    place = shutil.copytree(checkpoint, tmp_path / "checkpoint-6") / OPTIMIZER_FOLDER
    metadata = read_metadata(place)
    index, entry = next(
        (index, entry) for index, entry in metadata.storage_data.items() if index.fqn.endswith("exp_avg")
    )
    content = bytearray((place / entry.relative_path).read_bytes())
    for value, found in ((float("nan"), "has states that are not finite"), (Hostile(), "holds more than tensors")):
        saved = io.BytesIO()
        torch.save(torch.full((8, 32), value) if isinstance(value, float) else value, saved)
        entry.offset, entry.length = len(content), len(saved.getvalue())
        content += saved.getvalue()
        (place / entry.relative_path).write_bytes(content)
        if not isinstance(value, float):
            metadata.state_dict_metadata[index.fqn] = BytesStorageMetadata()
        (place / METADATA_NAME).write_bytes(pickle.dumps(metadata))
        reason = (not_finite if isinstance(value, float) else unreadable)(place.parent)
        assert found in reason and OPTIMIZER_FOLDER in reason
    for index_file, found in ((pickle.dumps(Hostile()), "holds builtins.print; such a file may run"), (b"", "damaged")):
        (place / METADATA_NAME).write_bytes(index_file)
        assert found in unreadable(place.parent)
