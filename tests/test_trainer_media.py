"""Training on generated pictures, sounds and stories: runs that have to be the same are the same."""

import pytest
import torch
from transformers import set_seed

from dataset_loading import Collator, DataConfig, SourceConfig, build_datasets
from tests.test_trainer import Interrupt, losses
from tests.tiny_processor import tiny_processor
from tests.tiny_reader import tiny_reader
from trainers import ModalityWeights, RecurrentTrainer, RecurrentTrainingArguments, find_resume_point

NAMES = ("text", "image", "audio")
SOURCES = [
    SourceConfig("generated", task="scenes", num_rows=20, difficulty=(1, 2)),
    SourceConfig("generated", task="melodies", num_rows=20, difficulty=(1, 2)),
    SourceConfig("generated", task="stories", num_rows=20, difficulty=(1, 1)),
]
POSITIONS = pytest.mark.parametrize("position", ["rope", "alibi"])
PACKING = pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])


@pytest.fixture(scope="module")
def data():
    """Rows of one length, and rows that batches pad."""
    validation = [SourceConfig("generated", task="scenes", num_rows=2)]
    return {
        packing: build_datasets(
            DataConfig(train=SOURCES, validation=validation, block_size=160, packing=packing), tiny_processor(), seed=3
        ).train
        for packing in (False, True)
    }


def build(folder, dataset, model, **options) -> RecurrentTrainer:
    args = RecurrentTrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "recurrence_logging_steps": 0,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "modality_weights": ModalityWeights(image=2.0, audio=0.5),
            **options,
        }
    )
    set_seed(0)
    return RecurrentTrainer(
        model=model.train(),
        args=args,
        train_dataset=dataset,
        data_collator=Collator(tiny_processor()),
    )


def figures(trainer) -> list[dict[str, float]]:
    """What each step logs of its losses, all modalities among them."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {f"{kind}_{name}" for kind in ("loss", "tokens") for name in NAMES} <= set().union(*entries)
    return [{k: v for k, v in entry.items() if k.startswith(("loss", "tokens", "weight"))} for entry in entries]


def fixed(position, **options):
    """A model whose depth is not drawn by micro-batch."""
    recurrence = {"mean_steps": 3, "backprop_steps": 2, "step_distribution": "fixed"}
    return tiny_reader(scale=1.0, position_embedding=position, recurrence=recurrence, **options)


def is_trained(model, start) -> bool:
    """Whether every parameter has moved, those of the encoders too."""
    pairs = zip(model.parameters(), start.parameters(), strict=True)
    return all((after.detach() - before).abs().max() > 1e-4 for after, before in pairs)


@POSITIONS
@PACKING
def test_accumulation_equals_one_large_batch(tmp_path, data, position, packing):
    """Invariant 6: 4 x 1 rows = 2 x 2 = 1 x 4, though micro-batches have media of other kinds, or none, and are padded
    to other lengths.
    """
    runs = []
    for rows in (4, 2, 1):
        model = fixed(position)
        trainer = build(
            tmp_path,
            data[packing],
            model,
            per_device_train_batch_size=rows,
            gradient_accumulation_steps=4 // rows,
            optim="sgd",  # adam would make much of little
            learning_rate=0.3,
        )
        trainer.train()
        runs.append((figures(trainer), list(model.parameters())))
        assert is_trained(model, fixed(position))
    for entries, parameters in runs[1:]:
        for ours, whole in zip(entries, runs[0][0], strict=True):
            assert ours == pytest.approx(whole, rel=1e-4)
        for ours, whole in zip(parameters, runs[0][1], strict=True):
            torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-3)


@POSITIONS
@PACKING
def test_resumed_equals_uninterrupted_bitwise(tmp_path, data, position, packing):
    """Invariant 6, with depths that are drawn, accumulation and dropout: six steps = three, a checkpoint, new objects,
    three more.
    """
    options = {"position_embedding": position, "attention_dropout": 0.1, "hidden_dropout": 0.1, "scale": 1.0}
    settings = {"max_steps": 6, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    whole = build(tmp_path / "whole", data[packing], tiny_reader(**options), **settings)
    whole.train()
    first = build(tmp_path / "cut", data[packing], tiny_reader(**options), **settings)
    first.add_callback(Interrupt(3))
    first.train()
    second = build(
        tmp_path / "cut", data[packing], tiny_reader(seed=5, **options), resume_from_checkpoint="true", **settings
    )
    torch.manual_seed(123)
    second.train(resume_from_checkpoint=find_resume_point(second.args))
    assert len(losses(whole)) == 6 and losses(whole)[5] != losses(whole)[2]
    assert figures(second) == figures(whole)
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@POSITIONS
def test_activation_checkpointing_changes_nothing(tmp_path, data, position):
    """Invariant 6: what is computed again in the encoders, the prelude, each step and the coda is the same, with
    dropout.
    """
    runs = []
    for is_on in (False, True):
        model = tiny_reader(scale=1.0, position_embedding=position, hidden_dropout=0.1)
        calls = []
        for reader in model.model.readers.values():
            reader.encoder.layers.layers[0].register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        trainer = build(tmp_path, data[False], model, activation_checkpointing=is_on, max_steps=3)
        trainer.train()
        runs.append((figures(trainer), [parameter.detach() for parameter in model.parameters()], len(calls)))
    assert runs[0][0] == runs[1][0]
    assert all(map(torch.equal, runs[0][1], runs[1][1]))
    assert runs[1][2] == 2 * runs[0][2] == 12


def test_a_batch_without_media_keeps_the_encoders_as_they_are(tmp_path, data):
    """They run on something, for the sake of other ranks, and learn nothing from it."""
    stories = [row for row in (data[False][index] for index in range(len(data[False]))) if not row.get("media")]
    model = fixed("rope")
    trainer = build(tmp_path, stories[:8], model, max_steps=2)
    trainer.train()
    for (name, after), before in zip(model.named_parameters(), fixed("rope").parameters(), strict=True):
        assert torch.equal(after, before) == ("readers" in name), name
