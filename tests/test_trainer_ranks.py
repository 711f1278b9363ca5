"""Two ranks equal one: weights of modalities, groups of parameters, orders of rows, under each stage of ZeRO."""

import json

import pytest

from tests.processes import ROOT, run_ranks

SCRIPT = """
import json, sys
from inference.shutdown import end_process
from tests.test_trainer import Interrupt, build
from tests.test_trainer_modalities import NAMES, WEIGHTS, mixed_rows
from tests.tiny import tiny_model
from trainers import ParameterGroup, find_resume_point

folder, cut, resume = sys.argv[1], int(sys.argv[2]), sys.argv[3] == "resume"


class Rows(list):
    lengths = [index % 5 for index in range(16)]


trainer = build(
    folder,
    seed=1,
    model=tiny_model(recurrence={"step_distribution": "fixed"}),
    dataset=Rows(mixed_rows(16)),
    modality_weights=WEIGHTS,
    freeze=["model.prelude.*"],
    parameter_groups=[ParameterGroup("model.coda.*", lr_factor=0.5, freeze_steps=3)],
    max_steps=10,
    resume_from_checkpoint="true" if resume else None,
    **json.loads(sys.argv[4]),
)
if cut:
    trainer.add_callback(Interrupt(cut))
trainer.train(resume_from_checkpoint=find_resume_point(trainer.args))
if trainer.state.is_world_process_zero:
    print("FOUND", json.dumps([entry for entry in trainer.state.log_history if "loss" in entry]))
end_process(0)
"""

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


EVALUATION = """
import json, sys
from evaluation.metrics import compute_metrics, token_nll
from inference.shutdown import end_process
from tests.test_trainer import build, rows

trainer = build(sys.argv[1], per_device_eval_batch_size=int(sys.argv[2]), dataloader_drop_last=True)
trainer.preprocess_logits_for_metrics, trainer.compute_metrics = token_nll, compute_metrics
found = trainer.evaluate(rows(11))["eval_loss"], int(trainer.predict(rows(11)).predictions[:, 1].sum())
if trainer.state.is_world_process_zero:
    print("FOUND", json.dumps(found))
end_process(0)
"""

EVALUATION_OF_LATENTS = """
import json, sys
from dataset_loading import DataConfig, build_datasets
from inference.shutdown import end_process
from tests.test_trainer_writing import SOURCES, build, model_of
from tests.tiny_artist import artist_processor

config = DataConfig(train=SOURCES, block_size=160, packing=False)
rows = build_datasets(config, artist_processor(), seed=3).train
sources = {"some": [rows[index] for index in range(7)], "others": [rows[index] for index in range(7, 10)]}
trainer = build(sys.argv[1], rows, model_of(), sources, per_device_eval_batch_size=int(sys.argv[2]))
found = {name: it for name, it in trainer.evaluate().items() if "loss" in name}
if trainer.state.is_world_process_zero:
    print("FOUND", json.dumps(found))
end_process(0)
"""


def run(folder, ranks, cut=0, resume=False, **options):
    """The logs of a run of `ranks` processes."""
    return launch(ranks, SCRIPT, str(folder), str(cut), "resume" if resume else "", json.dumps(options))


def launch(ranks, script, *arguments):
    """What a script finds in `ranks` processes."""
    processes = run_ranks("-c", script, *arguments, count=ranks)
    assert [process.returncode for process in processes] == [0] * ranks, processes[0].stderr[-3000:]
    line = next(line for line in processes[0].stdout.splitlines() if line.startswith("FOUND "))
    return json.loads(line.removeprefix("FOUND "))


def check_equal(entries, expected, tolerance):
    """Losses, tokens and shares of each log."""
    names = [name for name in expected[0] if name.startswith(("loss", "tokens_", "weight_share_"))]
    assert len(names) == 10 and len(entries) == len(expected) == 10
    for ours, theirs in zip(entries, expected, strict=True):
        assert {name: ours.get(name) for name in names} == pytest.approx(
            {name: theirs.get(name) for name in names}, abs=tolerance
        )


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Ten steps, two and a half epochs, of one process."""
    folder = tmp_path_factory.mktemp("one")
    return run(folder, 1, per_device_train_batch_size=4, train_sampling_strategy="group_by_length")


@pytest.mark.parametrize("stage", [None, "zero2", "zero3"])
def test_two_ranks_equal_one(tmp_path, one, stage):
    """Invariant 6, with modalities, groups and rows grouped by length."""
    options = {"deepspeed": str(ROOT / f"configs/deepspeed/{stage}.json")} if stage else {}
    found = run(tmp_path, 2, per_device_train_batch_size=2, train_sampling_strategy="group_by_length", **options)
    check_equal(found, one, tolerance=1e-4)


def test_two_ranks_resumed_within_their_second_epoch_go_on_with_its_order(tmp_path):
    options = {"per_device_train_batch_size": 2}
    whole = run(tmp_path / "whole", 2, **options)
    run(tmp_path / "cut", 2, cut=6, **options)
    check_equal(run(tmp_path / "cut", 2, resume=True, **options), whole, tolerance=0)


def test_two_ranks_evaluate_each_row_once_whatever_training_drops(tmp_path):
    """11 rows, of which each rank takes 3 at a time; 11 labels a row are scored, in every fourth 3."""
    one, two = (launch(ranks, EVALUATION, str(tmp_path), size) for ranks, size in ((1, "4"), (2, "3")))
    assert one[1] == two[1] == 8 * 11 + 3 * 3
    assert two[0] == pytest.approx(one[0], abs=1e-6)


def test_two_ranks_evaluate_latents_as_one_does(tmp_path):
    """Rows that are padded to other lengths, of which one rank has images where the other has none or sound."""
    one, two = (launch(ranks, EVALUATION_OF_LATENTS, str(tmp_path), size) for ranks, size in ((1, "7"), (2, "2")))
    assert two == pytest.approx(one, rel=1e-5)
    assert {"eval_loss", "eval_some_flow_loss_image", "eval_some_flow_loss_audio", "eval_others_loss"} <= set(one)
