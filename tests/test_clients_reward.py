"""TRL's own RewardTrainer, from the folder of a language model; and the folder of what it has made."""

import copy

import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import AutoModelForSequenceClassification, pipeline
from trl import RewardConfig, RewardTrainer

from tests.tiny_language_model import save_checkpoint, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

CHOSEN = ["the cat sat on the mat.", "a naïve café", "on the mat"]
REJECTED = ["the cat", "café café", "the mat. the mat. the mat"]
RATE = 0.5


def score(model, text: str) -> torch.Tensor:
    """Of a text that is read alone, by the state behind its end token."""
    tokenizer = tiny_tokenizer()
    hidden = model.model(torch.tensor([tokenizer(text + tokenizer.eos_token)["input_ids"]])).last_hidden_state
    return (hidden[0, -1] * model.score.weight[0]).sum()


def test_rewards_learn_the_preferences(tmp_path):
    """One update, against the gradient of -log sigmoid(chosen - rejected) by hand; then many, and a pipeline."""
    folder = save_checkpoint(tmp_path / "base")

    def trainer(steps: int, rate: float) -> RewardTrainer:
        settings = RewardConfig(
            output_dir=str(tmp_path / "out"),
            max_steps=steps,
            per_device_train_batch_size=len(CHOSEN),
            learning_rate=rate,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            optim="sgd",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            model_init_kwargs={"trust_remote_code": True, "dtype": "float32"},
        )
        rows = Dataset.from_dict({"chosen": CHOSEN, "rejected": REJECTED})
        return RewardTrainer(str(folder), settings, train_dataset=rows, processing_class=tiny_tokenizer())

    one = trainer(1, RATE)
    for name, weight in tiny_model().model.named_parameters():  # the head alone is new
        assert torch.equal(one.model.model.get_parameter(name), weight)
    by_hand = copy.deepcopy(one.model).train()
    margins = [score(by_hand, good) - score(by_hand, bad) for good, bad in zip(CHOSEN, REJECTED, strict=True)]
    loss = -functional.logsigmoid(torch.stack(margins)).mean()
    loss.backward()
    one.train()
    assert one.state.log_history[0]["loss"] == pytest.approx(loss.item(), rel=1e-4)
    for name, weight in by_hand.named_parameters():
        torch.testing.assert_close(
            one.model.get_parameter(name).detach(), weight.detach() - RATE * weight.grad, atol=1e-5, rtol=1e-4
        )

    many = trainer(30, 2.0)
    many.train()
    assert many.state.log_history[-2]["accuracy"] == 1.0
    many.save_model(tmp_path / "reward")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward")
    classify = pipeline("text-classification", model=again, tokenizer=tiny_tokenizer(), function_to_apply="none")
    texts = [text + "<|end|>" for text in CHOSEN + REJECTED]
    scores = [record["score"] for record in classify(texts, batch_size=4)]
    expected = [score(many.model.eval(), text).item() for text in CHOSEN + REJECTED]
    assert scores == pytest.approx(expected, abs=1e-4)
    assert all(good > bad for good, bad in zip(scores[:3], scores[3:], strict=True))
