"""Label smoothing: labels of causal models are shifted once, those of sequence-to-sequence models not at all."""

import pytest
import torch
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments

import finetune
from dataset_loading import Seq2SeqCollator
from tests.test_objectives import batch_of, model_for, trained_loss
from tests.test_trainer import build
from tests.test_trainer import rows as causal_rows
from tests.tiny import BEGIN, PAD, tiny_ids
from tests.tiny_finetuning import write_tuning_config
from tests.tiny_seq2seq import tiny_seq2seq
from trainers.objectives import ObjectiveOptions

SMOOTHING = 0.2


def smoothed(logits: torch.Tensor, targets: torch.Tensor, num_items: int) -> float:
    """Targets that have 0.8 of their own token and 0.2 spread over all; position i predicts target i."""
    spread = torch.full_like(logits, SMOOTHING / logits.shape[-1])
    spread.scatter_add_(-1, targets.clamp(min=0)[..., None], torch.full_like(spread, 1 - SMOOTHING))
    losses = -(spread * logits.log_softmax(-1)).sum(-1)
    return losses[targets != -100].sum().item() / num_items


def seq2seq_batch() -> dict[str, torch.Tensor]:
    """Targets of three and two tokens."""
    labels = torch.tensor([[9, 2, 7], [6, 4, -100]])
    read = torch.tensor([[BEGIN, 9, 2], [BEGIN, 6, PAD]])
    return {"input_ids": tiny_ids(2, 4), "decoder_input_ids": read, "labels": labels}


def seq2seq_model():
    fixed = {"mean_steps": 2, "backprop_steps": 2, "step_distribution": "fixed", "state_init": "zero"}
    return tiny_seq2seq(encoder={"recurrence": fixed}, decoder={"recurrence": fixed}).train()


def test_labels_of_sources_with_targets_are_not_shifted(tmp_path):
    """The trainer's loss of a micro-batch, divided by the labels of a window, 20; evaluation does not smooth."""
    model, batch = seq2seq_model(), seq2seq_batch()
    found, _ = trained_loss(tmp_path, model, ObjectiveOptions(), batch, label_smoothing_factor=SMOOTHING)
    logits = model(**batch).logits
    assert found == pytest.approx(smoothed(logits, batch["labels"], 20), rel=1e-5)
    again = model(**batch, label_smoothing=SMOOTHING)
    assert again.loss.item() == pytest.approx(smoothed(logits, batch["labels"], 5), rel=1e-5)
    trainer = build(tmp_path, model=model.eval(), label_smoothing_factor=SMOOTHING)
    plain = -logits.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None]).squeeze(-1)
    expected = plain[batch["labels"] != -100].mean().item()
    assert trainer.compute_loss(model, batch).item() == pytest.approx(expected, rel=1e-5)


def test_labels_of_causal_models_are_shifted_once(tmp_path):
    model, batch = model_for("truncated", recurrence={"state_init": "zero"}), batch_of()
    found, _ = trained_loss(tmp_path, model, ObjectiveOptions(), label_smoothing_factor=SMOOTHING)
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], num_steps=(2, 2)).logits
    assert found == pytest.approx(smoothed(logits[:, :-1], batch["labels"][:, 1:], 20), rel=1e-5)


def test_losses_of_objectives_are_smoothed_after_each_step(tmp_path):
    model, batch = model_for("every_step", recurrence={"state_init": "zero"}), batch_of()
    options = ObjectiveOptions("every_step", exponent=0.0)
    found, _ = trained_loss(tmp_path, model, options, label_smoothing_factor=SMOOTHING)
    given = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    logits = [model(**given, num_steps=(2, steps)).logits for steps in (1, 2)]
    parts = [smoothed(each[:, :-1], batch["labels"][:, 1:], 20) for each in logits]
    assert found == pytest.approx(sum(parts) / 2, rel=1e-5)


def test_the_trainer_of_transformers_smooths_as_ours(tmp_path):
    """It takes the labels from the batch, and has the logits; the depth is the mean, and fixed."""
    model, batch = seq2seq_model(), seq2seq_batch()
    args = Seq2SeqTrainingArguments(str(tmp_path), label_smoothing_factor=SMOOTHING, use_cpu=True, report_to="none")
    trainer = Seq2SeqTrainer(model=model, args=args, data_collator=Seq2SeqCollator, train_dataset=causal_rows(4))
    expected = smoothed(model(**batch).logits, batch["labels"], 5)
    found = trainer.compute_loss(model, dict(batch), num_items_in_batch=torch.tensor(5))
    assert found.item() == pytest.approx(expected, rel=1e-5)


def test_other_trainers_refuse_it(tiny_run, tmp_path, capsys):
    config = write_tuning_config(tmp_path, tiny_run, training={"label_smoothing_factor": 0.1})
    with pytest.raises(SystemExit) as error:
        finetune.main(["--config", str(config), "--training.output_dir", str(tmp_path / "out")])
    message = "training.label_smoothing_factor is 0.1, but only trainer: pretrain smooths labels; leave it out"
    assert error.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
