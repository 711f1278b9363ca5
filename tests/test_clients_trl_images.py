"""TRL's own trainers, plain, on a tiny model that reads images: what they learn is what the closed form of their loss
says for each conversation with its own picture.
"""

import copy

import pytest
import torch
from datasets import Dataset
from torch.nn import functional
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from tests.tiny_language_model import one_update
from tests.tiny_processor import picture, tiny_processor
from tests.tiny_reader import tiny_reader

pytestmark = pytest.mark.slow

QUESTIONS = ["what is it?", "and this", "how many are there?"]
ANSWERS = ["a cat", "noise, and nothing else", "two"]
SIZES = [(32, 16), (16, 16), (24, 40)]
RATE = 0.1
CLOSE = {"atol": 1e-5, "rtol": 1e-4}


def options(folder, **others) -> dict:
    """One update."""
    return one_update(folder, RATE, **others)


def pictures() -> list:
    return [picture(*size, seed=number) for number, size in enumerate(SIZES)]


def log_probabilities(model, ids: torch.Tensor, images: list) -> torch.Tensor:
    """(tokens - 1,): of each token of a conversation that is read alone, given those before it."""
    pixels = tiny_processor()(images=images, return_tensors="pt")
    logits = model(ids[None], **pixels).logits[0, :-1]
    return functional.log_softmax(logits.float(), dim=-1).gather(1, ids[1:, None])[:, 0]


def updated(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    """Weights after one step of gradient descent."""
    loss.backward()
    return {name: it.detach() - RATE * it.grad for name, it in model.named_parameters() if it.grad is not None}


def check_weights(model, expected: dict[str, torch.Tensor]) -> None:
    """All weights are compared but those that read sound, which have no gradient here."""
    weights = dict(model.named_parameters())
    assert all("audio" in name for name in weights.keys() - expected.keys())
    for name, weight in expected.items():
        found = weights[name].detach()
        torch.testing.assert_close(found, weight, **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


def conversation(question: str, answer: str) -> list[dict]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("form", ["messages", "assistant_only", "prompt_completion"])
def test_sft_with_images(tmp_path, form):
    """A column of pictures beside texts that do not mention them, as TRL's documentation has it."""
    model, processor = tiny_reader(scale=1.0), tiny_processor()
    by_hand = copy.deepcopy(model).train()  # before TRL wraps it
    rows = [conversation(*pair) for pair in zip(QUESTIONS, ANSWERS, strict=True)]
    columns = {"messages": rows}
    if form == "prompt_completion":
        columns = {"prompt": [row[:1] for row in rows], "completion": [row[1:] for row in rows]}
    trainer = SFTTrainer(
        model,
        SFTConfig(
            **options(tmp_path, per_device_train_batch_size=len(rows)),
            gradient_checkpointing=False,
            max_length=None if form == "assistant_only" else 1024,  # TRL's default, which cuts nothing here
            assistant_only_loss=form == "assistant_only",
        ),
        train_dataset=Dataset.from_dict({"images": [[image] for image in pictures()], **columns}),
        processing_class=processor,
    )
    total, count = 0.0, 0
    for row, image in zip(rows, pictures(), strict=True):
        content = [{"type": "image", "image": image}, {"type": "text", "text": row[0]["content"]}]
        encoded = processor.encode_chat([{"role": "user", "content": content}, row[1]])
        learnt = torch.ones(len(encoded["input_ids"]) - 1, dtype=torch.bool)
        if form != "messages":
            learnt = encoded["answer_mask"][1:]
        total = total - log_probabilities(by_hand, encoded["input_ids"], [image])[learnt].sum()
        count += int(learnt.sum())
    expected = updated(by_hand, total / count)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(float(total) / count, rel=1e-4)
    check_weights(model, expected)


def test_an_image_that_would_be_cut_is_refused(tmp_path):
    trainer = SFTTrainer(
        tiny_reader(),
        SFTConfig(**options(tmp_path, per_device_train_batch_size=1), max_length=8),
        train_dataset=Dataset.from_dict({"images": [pictures()[:1]], "messages": [conversation("what?", "noise")]}),
        processing_class=tiny_processor(),
    )
    with pytest.raises(ValueError, match="truncation to 8 would cut media of type 'image'"):
        trainer.train()


def test_grpo_with_images(tmp_path):
    """The gradient is that of the advantages times the log-probabilities of what was written about each picture."""
    model, processor = tiny_reader(scale=1.0), tiny_processor()
    by_hand, rollouts = copy.deepcopy(model).train(), []  # a copy from before TRL wraps it

    def reward(prompts, completions, completion_ids, images, **kwargs) -> list[float]:
        rewards = [float(sum(ids) % 7) for ids in completion_ids]
        rollouts.extend(zip(prompts, completion_ids, images, rewards, strict=True))
        return rewards

    trainer = GRPOTrainer(
        model,
        reward,
        GRPOConfig(
            **options(tmp_path, per_device_train_batch_size=6),
            gradient_checkpointing=False,
            num_generations=2,
            max_completion_length=5,
            loss_type="grpo",
            beta=0.0,
        ),
        train_dataset=Dataset.from_dict(
            {
                "prompt": [[{"role": "user", "content": question}] for question in QUESTIONS],
                "images": [[image] for image in pictures()],
            }
        ),
        processing_class=processor,
    )
    trainer.train()

    assert len(rollouts) == 6
    loss = 0.0
    for number, (prompt, completion, images, value) in enumerate(rollouts):
        group = torch.tensor([it[3] for it in rollouts[number // 2 * 2 :][:2]])
        advantage = (value - group.mean()) / (group.std() + 1e-4)
        encoded = processor.encode_chat(prompt, add_generation_prompt=True)
        ids = torch.cat((encoded["input_ids"], torch.tensor(completion)))
        loss = loss - advantage * log_probabilities(by_hand, ids, images)[-len(completion) :].mean() / 6
    assert any(it[3] != rollouts[0][3] for it in rollouts)
    check_weights(model, updated(by_hand, loss))
