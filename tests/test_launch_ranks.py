"""FSDP2 and ZeRO on two ranks and one: the same numbers, and checkpoints that other numbers of ranks go on from."""

import io
import json
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from transformers import AutoModelForCausalLM

from tests.processes import ROOT, run_ranks
from tests.tiny import tiny_ids
from trainers.checkpoints import OPTIMIZER_FOLDER, not_finite, unreadable
from trainers.regrouping import to_universal
from trainers.sharding import METADATA_NAME, read_metadata

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# Trains, with 4 rows in an update however many ranks there are, up to a step of which it leaves a checkpoint; without
# DeepSpeed, whose files have them, also Adam's moments of all weights.
SCRIPT = """
import json, os, sys
import torch
from inference.shutdown import end_process
from tests.test_trainer import Interrupt, build
from tests.tiny import tiny_model
from trainers import find_resume_point

folder, stop, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
trainer = build(
    folder,
    seed=1,
    model=tiny_model(recurrence={"step_distribution": "fixed"}),
    per_device_train_batch_size=4 // int(os.environ["WORLD_SIZE"]),
    max_steps=9,
    weight_decay=0.1,
    resume_from_checkpoint="true",
    **options,
)
trainer.add_callback(Interrupt(stop))
trainer.train(find_resume_point(trainer.args))
trainer.save_model()
moments = {}
for name, parameter in {} if trainer.is_deepspeed_enabled else dict(trainer.model.named_parameters()).items():
    for key in ("exp_avg", "exp_avg_sq"):
        moment = trainer.optimizer.state[parameter][key]
        moments[f"{name}.{key}"] = moment.full_tensor() if trainer.is_fsdp_enabled else moment
if trainer.state.is_world_process_zero:
    torch.save(moments, folder + "/moments.pt")
    print("FOUND", json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
end_process(0)
"""


def train(folder, ranks, stop=9, **options):
    """The losses of a run up to a step, from its newest checkpoint on."""
    processes = run_ranks("-c", SCRIPT, folder, stop, json.dumps(options), count=ranks)
    assert [process.returncode for process in processes] == [0] * ranks, processes[0].stderr[-3000:]
    line = next(line for line in processes[0].stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


def cut(folder, **options):
    """The losses of three steps of two ranks, three of one, and three of two."""
    for stop, ranks in ((3, 2), (6, 1)):
        train(folder, ranks, stop, **options)
    return train(folder, 2, **options)


def check_moments(found, folder):
    """Adam's moments are those of a run of one rank, but for the rounding of float32."""
    expected = torch.load(folder / "moments.pt", weights_only=True)
    assert found.keys() == expected.keys() and len(expected) > 40
    for name, moment in expected.items():
        torch.testing.assert_close(found[name], moment, atol=1e-5, rtol=1e-3, msg=name)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Nine steps of one process that knows nothing of sharding: losses, folder."""
    folder = tmp_path_factory.mktemp("one")
    return train(folder, 1), folder


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    """Two ranks with FSDP, one, two again: losses, folder."""
    folder = tmp_path_factory.mktemp("sharded")
    return cut(folder, fsdp=True), folder


def test_two_ranks_of_fsdp_then_one_then_two_equal_one(one, sharded):
    """Invariant 6, and checkpoints of which another number of ranks gets its part."""
    assert len(one[0]) == 9 and sharded[0] == pytest.approx(one[0], abs=1e-4)
    check_moments(torch.load(sharded[1] / "moments.pt", weights_only=True), one[1])


def test_two_ranks_of_zero_then_one_then_two_equal_one(one, tmp_path):
    """The states are brought into a form for all numbers of ranks on the way, of which nothing is left."""
    losses = cut(tmp_path, deepspeed=str(ROOT / "configs/deepspeed/zero2.json"))
    assert losses == pytest.approx(one[0], abs=1e-4)
    assert not [*tmp_path.glob("*/universal"), *tmp_path.glob("*/latest_universal")]
    last = tmp_path / "checkpoint-9"
    to_universal(last)
    expected = torch.load(one[1] / "moments.pt", weights_only=True)
    found = {}
    for name, moment in expected.items():
        weight, _, key = name.rpartition(".")
        saved = torch.load(last / "universal" / "zero" / weight / f"{key}.pt", weights_only=True)
        found[name] = (saved["param"] if isinstance(saved, dict) else saved).reshape(moment.shape)
    check_moments(found, one[1])


@pytest.mark.parametrize(
    ("stage", "optim", "reason"),
    [("zero3", "adamw_torch", "would be lost under ZeRO-3"), ("zero1", "sgd", "converts Adam's states alone")],
)
def test_states_that_cannot_be_divided_anew_are_one_error(tmp_path, stage, optim, reason):
    """Before anything is trained, and with nothing left behind."""
    options = {"deepspeed": str(ROOT / f"configs/deepspeed/{stage}.json"), "optim": optim}
    train(tmp_path, 2, 3, **options)
    (process,) = run_ranks("-c", SCRIPT, tmp_path, 6, json.dumps(options), count=1)
    line = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 1 and "is of 2 ranks, and cannot be divided among 1: " in line and reason in line
    assert not [*tmp_path.glob("*/universal"), *tmp_path.glob("*/latest_universal")]


def test_whole_weights_are_saved_as_ever(one, sharded):
    """Names, values, code and architecture are those of a run without sharding."""
    folder = sharded[1]
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


def test_files_of_ranks_that_would_run_code_or_are_damaged_are_told(sharded, tmp_path):
    """The index is a pickle, and so are values beside tensors; torch would load both without a question."""
    checkpoint = sharded[1] / "checkpoint-6"
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
