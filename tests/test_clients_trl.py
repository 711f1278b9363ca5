"""TRL's own trainers, plain, on tiny models: what they learn is what the closed form of their loss says."""

import copy

import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer

from tests.tiny_language_model import one_update, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

TEXTS = ["the cat", "the mat sat on the cat", "a naïve café", "on", "the cat sat on the mat. the mat sat"]
CLOSE = {"atol": 1e-5, "rtol": 1e-4}
RATE = 0.5


def options(folder, **others) -> dict:
    """One update on all rows."""
    settings = {"per_device_train_batch_size": len(TEXTS), **others}
    return one_update(folder, RATE, **settings)


def nll(model, ids: list[int]) -> torch.Tensor:
    """The sum of the losses of a document that is read alone."""
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum")


def learn_alone(model, documents: list[list[int]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss over all tokens that are predicted, and the weights after one update, each document read alone."""
    model = copy.deepcopy(model).train()
    loss = sum(nll(model, ids) for ids in documents) / sum(len(ids) - 1 for ids in documents)
    loss.backward()
    return loss.item(), {name: it.detach() - RATE * it.grad for name, it in model.named_parameters()}


def check_learnt(trainer: Trainer, expected: tuple[float, dict[str, torch.Tensor]]) -> None:
    trainer.train()
    loss, weights = expected
    assert trainer.state.log_history[0]["loss"] == pytest.approx(loss, rel=1e-4)
    for name, weight in trainer.model.named_parameters():
        torch.testing.assert_close(
            weight.detach(), weights[name], **CLOSE, msg=lambda text, name=name: f"{name}: {text}"
        )


def documents_of(tokenizer) -> list[list[int]]:
    return [tokenizer(text + tokenizer.eos_token)["input_ids"] for text in TEXTS]


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"padding_free": True, "max_length": None},
        {"packing": True, "max_length": 32},
        {"packing": True, "padding_free": True, "max_length": 32},
    ],
    ids=["padded", "padding_free", "packed", "packed_padding_free"],
)
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_documents_of_sft_are_learnt_as_if_each_stood_alone(tmp_path, how, backend):
    """Loss and gradient, whatever row a document shares with others."""
    tokenizer, model = tiny_tokenizer(), tiny_model(attn_implementation=backend)
    expected = learn_alone(model, documents_of(tokenizer))
    trainer = SFTTrainer(
        model,
        SFTConfig(**options(tmp_path), gradient_checkpointing=False, **how),
        train_dataset=Dataset.from_dict({"text": TEXTS}),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert ("position_ids" in batch) == bool(how)
    check_learnt(trainer, expected)


@pytest.mark.parametrize("flash", [False, True], ids=["positions", "positions_and_lengths"])
def test_documents_of_a_flattened_batch_are_learnt_as_if_each_stood_alone(tmp_path, flash):
    """transformers' own collator, which says where documents begin by positions, or besides by their lengths."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    documents = documents_of(tokenizer)
    expected = learn_alone(model, documents)
    trainer = Trainer(
        model,
        TrainingArguments(**options(tmp_path)),
        train_dataset=Dataset.from_dict({"input_ids": documents}),
        data_collator=DataCollatorWithFlattening(return_flash_attn_kwargs=flash, return_seq_idx=flash),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["input_ids"].shape[0] == 1 and ("cu_seq_lens_q" in batch) == flash
    check_learnt(trainer, expected)
