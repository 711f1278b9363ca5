"""Training on pictures and sound that are written: runs that have to be the same are the same."""

import pytest
import torch
from transformers import set_seed

from dataset_loading import Collator, DataConfig, SourceConfig, build_datasets
from model import MegaTransformerForConditionalGeneration
from tests.test_trainer import Interrupt, losses
from tests.tiny_artist import CODES, artist_config, artist_processor
from trainers import RecurrentTrainer, RecurrentTrainingArguments, find_resume_point
from trainers.modalities import flow_seeds

SOURCES = [
    SourceConfig("generated", task="drawings", num_rows=16, direction="text -> image"),
    SourceConfig("generated", task="tunes", num_rows=16, direction="text -> audio", difficulty=(1, 2)),
    SourceConfig("generated", task="drawings", name="captions", num_rows=16, direction="image -> text"),
]


@pytest.fixture(scope="module")
def data():
    config = DataConfig(train=SOURCES, validation=SOURCES[:1], block_size=160, packing=False, cfg_dropout=0.3)
    return build_datasets(config, artist_processor(), seed=3).train


def model_of(seed: int = 0, **options) -> MegaTransformerForConditionalGeneration:
    """Its depth is not drawn by micro-batch."""
    config = artist_config(**options)
    config.text_config.recurrence.step_distribution = "fixed"
    torch.manual_seed(seed)
    return MegaTransformerForConditionalGeneration(config)


def build(folder, dataset, model, **options) -> RecurrentTrainer:
    settings = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.1}
    settings |= {"logging_steps": 1, "recurrence_logging_steps": 0, "save_strategy": "no", "report_to": "none"}
    args = RecurrentTrainingArguments(**{**settings, "disable_tqdm": True, "use_cpu": True, **options})
    set_seed(0)
    return RecurrentTrainer(
        model=model.train(),
        args=args,
        train_dataset=dataset,
        data_collator=Collator(artist_processor()),
    )


def figures(trainer) -> list[dict[str, float]]:
    """What each step logs of its losses."""
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert {"flow_loss_image", "flow_loss_audio"} <= set().union(*entries)
    return [{k: v for k, v in entry.items() if "loss" in k} for entry in entries]


def test_accumulation_equals_one_large_batch(tmp_path, data):
    """4 x 1 rows = 1 x 4: losses of latents are means over the window, and noise belongs to the row."""
    runs = []
    for rows in (4, 1):
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4 // rows, "optim": "sgd"}
        trainer = build(tmp_path, data, model_of(), **options)
        trainer.train()
        runs.append((figures(trainer), list(trainer.model.parameters())))
    for ours, whole in zip(runs[1][0], runs[0][0], strict=True):
        assert ours == pytest.approx(whole, rel=1e-4)
    for ours, whole in zip(runs[1][1], runs[0][1], strict=True):
        torch.testing.assert_close(ours, whole, atol=1e-5, rtol=1e-3)
    pairs = zip(runs[0][1], model_of().parameters(), strict=True)
    assert sum(not torch.equal(after, before) for after, before in pairs) > 80


def test_resumed_equals_uninterrupted_bitwise(tmp_path, data):
    settings = {"max_steps": 6, "learning_rate": 1e-3, "ema_decay": 0.9}
    whole = build(tmp_path / "whole", data, model_of(), **settings)
    whole.train()
    first = build(tmp_path / "cut", data, model_of(), **settings)
    first.add_callback(Interrupt(3))
    first.train()
    second = build(tmp_path / "cut", data, model_of(seed=5), resume_from_checkpoint="true", **settings)
    torch.manual_seed(123)
    second.train(resume_from_checkpoint=find_resume_point(second.args))
    assert losses(whole)[5] != losses(whole)[2] and figures(second) == figures(whole)
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_codes_are_what_logits_are_compared_with(tmp_path):
    """Evaluation reads the loss from logits and labels: it is the loss that the model itself gives."""
    config = DataConfig(train=SOURCES[:1], block_size=160, packing=False)
    processor = artist_processor(CODES)
    rows = build_datasets(config, processor, seed=3).train
    model = model_of(image=CODES)
    trainer = build(tmp_path, rows, model)
    batch = Collator(processor)([rows[0], rows[1]])
    loss, logits, labels = trainer.prediction_step(model.eval(), batch, prediction_loss_only=False)
    codes = model.model.writers["image"].codec.encode_ids(batch["image_targets"]) + model.config.image_code_offset
    assert torch.equal(labels[batch["labels"] == model.config.written_image_token_id], codes.flatten())
    targets = labels[:, 1:].flatten()
    found = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets, ignore_index=-100)
    torch.testing.assert_close(found, loss, atol=1e-5, rtol=1e-5)


def test_seeds_belong_to_keys():
    keys = [(0, 1, 2), (0, 1, 3), (0, 2, 2), (1, 1, 2)]
    seeds = flow_seeds(keys)
    assert len(set(seeds.tolist())) == 4 and seeds.min() >= 0
    assert flow_seeds(keys[2:]).tolist() == seeds[2:].tolist()
