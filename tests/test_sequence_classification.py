"""A text model that gives each row a class or a number, compared with the base model and a matrix by hand."""

import pytest
import torch
from datasets import Dataset
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline
from trl import RewardConfig, RewardTrainer

from model import MegaTransformerForSequenceClassification
from tests.tiny import PAD, tiny_classifier, tiny_ids, tiny_model
from tests.tiny_language_model import save_checkpoint, tiny_tokenizer


def by_hand(model, rows, num_steps):
    """The head on the last hidden state of each row, alone and without padding."""
    last = [model.model(row[None], num_steps=num_steps).last_hidden_state[0, -1] for row in rows]
    return torch.stack(last) @ model.score.weight.T


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_the_last_token_that_is_no_padding_is_judged(side):
    model, rows = tiny_classifier(), [tiny_ids(6), tiny_ids(3, seed=1), tiny_ids(1, seed=2)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD, padding_side=side)
    for num_steps in (2, 5):
        logits = model(padded, attention_mask=(padded != PAD).long(), num_steps=num_steps).logits
        torch.testing.assert_close(logits, by_hand(model, rows, num_steps))
    assert not torch.allclose(by_hand(model, rows, 2), by_hand(model, rows, 5))


def test_losses():
    ids, classes, numbers = tiny_ids(4, 5), torch.tensor([2, 0, 1, 1]), torch.tensor([0.5, -1.0, 2.0, 0.0])
    model = tiny_classifier()
    outputs = model(ids, labels=classes)
    torch.testing.assert_close(outputs.loss, F.cross_entropy(outputs.logits, classes))
    outputs.loss.backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.parameters())
    outputs = tiny_classifier(num_labels=1)(ids, labels=numbers)
    torch.testing.assert_close(outputs.loss, (outputs.logits[:, 0] - numbers).square().mean())


def test_the_head_begins_as_the_table_says():
    torch.manual_seed(0)
    weight = tiny_classifier(num_labels=500).score.weight
    std = (2 / (5 * 32)) ** 0.5
    assert abs(weight.std().item() / std - 1) < 0.03 and weight.abs().max() <= 3 * std


def test_it_grows_out_of_a_language_model_and_loads_again(tmp_path):
    causal = tiny_model(scale=2.0)
    causal.save_pretrained(tmp_path / "causal")
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "causal", num_labels=3, num_steps=2, output_loading_info=True
    )
    assert type(model) is MegaTransformerForSequenceClassification and model.config.num_steps == 2
    assert (set(info["missing_keys"]), set(info["unexpected_keys"])) == ({"score.weight"}, set())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in causal.model.named_parameters("model"))
    model.save_pretrained(tmp_path / "classifier")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier")
    assert again.config.num_labels == 3 and torch.equal(again.score.weight, model.score.weight)


@torch.no_grad()
def test_pipeline():
    tokenizer = tiny_tokenizer()
    model = tiny_classifier(vocab_size=len(tokenizer), pad_token_id=tokenizer.pad_token_id)
    texts = ["a b", "b a b a b"]
    found = pipeline("text-classification", model=model, tokenizer=tokenizer)(texts, top_k=None, batch_size=2)
    for text, scores in zip(texts, found, strict=True):
        expected = by_hand(model, [tokenizer(text, return_tensors="pt").input_ids[0]], None)[0].softmax(0)
        for score in scores:
            label = model.config.label2id[score["label"]]
            assert score["score"] == pytest.approx(expected[label].item(), abs=1e-5)


@pytest.mark.slow
def test_reward_trainer_learns_which_answer_is_preferred(tmp_path):
    """TRL's own trainer, from the folder of a language model to a folder that judges."""
    save_checkpoint(tmp_path / "run")
    rows = [{"chosen": f"the cat {word}", "rejected": f"the mat {word}"} for word in ("sat", "naïve", "on", "a")]
    options = {"learning_rate": 1e-2, "max_steps": 10, "per_device_train_batch_size": 4, "report_to": "none"}
    trainer = RewardTrainer(
        str(tmp_path / "run"),
        RewardConfig(str(tmp_path / "reward"), bf16=False, use_cpu=True, save_strategy="no", seed=0, **options),
        train_dataset=Dataset.from_list(rows),
    )
    trainer.train()
    trainer.save_model()
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "reward")
    judge = pipeline("text-classification", model=model, tokenizer=tokenizer, function_to_apply="none")
    for row in rows:
        chosen, rejected = (found["score"] for found in judge([row["chosen"], row["rejected"]]))
        assert chosen > rejected + 1
