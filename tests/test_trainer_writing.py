"""Training on pictures and sound that are written: runs that have to be the same are the same."""

import math

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import EarlyStoppingCallback, TrainerCallback, set_seed

from dataset_loading import Collator, DataConfig, SourceConfig, build_datasets
from evaluation.depth import depth_table
from evaluation.metrics import trainer_metrics
from model import MegaTransformerForConditionalGeneration
from tests.test_trainer import Interrupt, losses
from tests.tiny_artist import CODES, artist_config, artist_processor
from trainers import RecurrentTrainer, RecurrentTrainingArguments, find_resume_point
from trainers.losses import flow_seeds

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


def build(folder, dataset, model, eval_dataset=None, **options) -> RecurrentTrainer:
    settings = {"output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 0.1}
    settings |= {"logging_steps": 1, "recurrence_logging_steps": 0, "save_strategy": "no", "report_to": "none"}
    args = RecurrentTrainingArguments(**{**settings, "disable_tqdm": True, "use_cpu": True, **options})
    set_seed(0)
    return RecurrentTrainer(
        model=model.train(),
        args=args,
        train_dataset=dataset,
        eval_dataset=eval_dataset,
        data_collator=Collator(artist_processor()),
        **trainer_metrics(artist_processor().tokenizer, model.config),
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
    loss, (logits, of_latents), labels = trainer.prediction_step(model.eval(), batch, prediction_loss_only=False)
    assert not of_latents.any()
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


# ------------------------------------------------------------------------------------------------------- evaluation


def ruin_flow_head(model) -> None:
    """What it draws is noise from now on, whatever it says."""
    with torch.no_grad():
        model.model.writers["image"].head.out_proj.weight.normal_(std=50.0)


def own_figures(model, rows) -> dict[str, float]:
    """The losses of all rows together: one forward pass, and the loss of tokens of its logits."""
    batch = {name: it for name, it in Collator(artist_processor())(rows).items() if name != "modality_ids"}
    with torch.no_grad():
        output = model.eval()(**batch)
    tokens = cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100)
    latents = {f"flow_loss_{name}": losses.mean().item() for name, (losses, _) in output.target_losses.items()}
    return {"loss": output.loss.item(), "perplexity": tokens.exp().item(), **latents}


@pytest.mark.parametrize("batch_size", [1, 4, 7])
def test_evaluation_is_the_loss_of_the_model_whatever_the_batches(tmp_path, data, batch_size):
    """Rows of unequal numbers of latents, some of them none; weights of 1 and 20."""
    model, rows = model_of(), [data[index] for index in range(7)]
    model.model.writers["image"].config.loss_weight = 20.0
    expected = own_figures(model, rows)
    found = build(tmp_path, data, model, per_device_eval_batch_size=batch_size).evaluate(rows)
    assert {name: found[f"eval_{name}"] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert set(expected) == {"loss", "perplexity", "flow_loss_image", "flow_loss_audio"}
    of_latents = 20 * expected["flow_loss_image"] + expected["flow_loss_audio"]
    assert found["eval_loss"] - of_latents == pytest.approx(math.log(expected["perplexity"]), rel=1e-4)


def test_evaluation_sees_a_ruined_flow_head(tmp_path, data):
    """Texts are as likely as before."""
    rows, found = [data[index] for index in range(4)], []
    for _ in range(2):
        model = model_of()
        if found:
            ruin_flow_head(model)
        found.append(build(tmp_path, data, model).evaluate(rows))
    assert found[1]["eval_perplexity"] == found[0]["eval_perplexity"]
    assert found[1]["eval_loss"] > found[0]["eval_loss"] + 100


def test_rows_without_latents_are_evaluated_as_texts_are(tmp_path, data):
    """No key more, and the loss is that of the tokens."""
    rows = [row for row in (data[index] for index in range(16)) if set(row["media"]) <= {"image"}][:3]
    found = build(tmp_path, data, model_of()).evaluate(rows)
    assert rows and not [name for name in found if "flow" in name]
    assert math.exp(found["eval_loss"]) == pytest.approx(found["eval_perplexity"], rel=1e-12)


def test_the_table_of_depths_has_the_losses_of_latents(tmp_path, data):
    model, rows = model_of(), [data[index] for index in range(5)]
    expected = own_figures(model, rows)
    texts = {"both": rows, "again": rows[:2]}
    (row,) = depth_table(model, [3], texts, {}, Collator(artist_processor()), batch_size=2)
    assert {name: row.sources["both"][name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert row.loss == pytest.approx(own_figures(model, [*rows, *rows[:2]])["loss"], rel=1e-4)
    assert row.perplexity == pytest.approx(own_figures(model, [*rows, *rows[:2]])["perplexity"], rel=1e-4)


class RuinAfter(TrainerCallback):
    """Ruins the flow head after some steps."""

    def __init__(self, model, step: int):
        self.model, self.step = model, step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            ruin_flow_head(self.model)


def test_the_best_model_is_chosen_by_all_losses_of_all_sources(tmp_path, data):
    """The first source has no latents, and only becomes better."""
    rows = [data[index] for index in range(16)]
    sources = {
        "read": [row for row in rows if "written_image" not in row["media"]][:2],
        "drawn": [row for row in rows if "written_image" in row["media"]][:2],
    }
    settings = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 1, "save_steps": 1, "max_steps": 6}
    model = model_of()
    trainer = build(tmp_path, data, model, sources, load_best_model_at_end=True, learning_rate=1e-3, **settings)
    trainer.args.choose_best_metric(sources, ("loss",))
    trainer.add_callback(RuinAfter(model, 3))
    trainer.add_callback(EarlyStoppingCallback(2))
    trainer.train()
    logged = {}
    for entry in trainer.state.log_history:
        logged.setdefault(entry["step"], {}).update(entry)
    for step in range(1, 5):
        losses = [logged[step][f"eval_{source}_loss"] for source in sources]
        assert logged[step]["eval_loss"] == pytest.approx(sum(losses) / 2)
    assert logged[4]["eval_read_loss"] < logged[2]["eval_read_loss"]
    assert trainer.state.best_global_step == 2 and trainer.state.best_metric == logged[2]["eval_loss"]
    assert trainer.state.global_step == 4  # two evaluations without a better one
    weights = load_file(tmp_path / "checkpoint-2" / "model.safetensors")["model.writers.image.head.out_proj.weight"]
    assert torch.equal(model.model.writers["image"].head.out_proj.weight, weights)
