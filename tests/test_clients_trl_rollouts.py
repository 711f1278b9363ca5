"""TRL's GRPO whose completions are written by transformers' continuous batching, on a model of one depth."""

import copy

import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

from tests.tiny_language_model import one_update, tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

PROMPTS = ["the cat", "the mat sat on the", "on"]
RATE = 0.5
PAGES = {"num_blocks": 32, "page_size": 16, "max_batch_tokens": 64}


def trainer_of(folder, model, reward) -> GRPOTrainer:
    return GRPOTrainer(
        model,
        reward,
        GRPOConfig(
            **one_update(folder, RATE, per_device_train_batch_size=6),
            gradient_checkpointing=False,
            num_generations=2,
            max_completion_length=5,
            loss_type="grpo",
            beta=0.0,
            use_transformers_continuous_batching=True,
            transformers_continuous_batching_config=PAGES,
        ),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tiny_tokenizer(),
    )


def test_rollouts_by_continuous_batching(tmp_path):
    """The gradient is that of the advantages times the log-probabilities of what was written, at the one depth."""
    model = tiny_model(num_steps=4, num_executed_layers=6, recurrence={"mean_steps": 4, "backprop_steps": 4})
    rollouts = []

    def reward(prompts, completions, completion_ids, **kwargs) -> list[float]:
        rewards = [float(sum(ids) % 7) for ids in completion_ids]
        rollouts.extend(zip(prompts, completion_ids, rewards, strict=True))
        return rewards

    by_hand = copy.deepcopy(model).train()
    trainer_of(tmp_path, model, reward).train()
    assert len(rollouts) == 6 and any(it[2] != rollouts[0][2] for it in rollouts)
    loss = 0.0
    for number, (prompt, completion, value) in enumerate(rollouts):
        group = torch.tensor([it[2] for it in rollouts[number // 2 * 2 :][:2]])
        advantage = (value - group.mean()) / (group.std() + 1e-4)
        ids = torch.tensor([tiny_tokenizer()(prompt)["input_ids"] + list(completion)])
        logits = by_hand(ids, num_steps=4).logits[0, :-1]
        written = logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)[-len(completion) :]
        loss = loss - advantage * written.mean() / 6
    loss.backward()
    for (name, weight), before in zip(model.named_parameters(), by_hand.parameters(), strict=True):
        expected = before.detach() - RATE * before.grad
        torch.testing.assert_close(weight.detach(), expected, atol=1e-5, rtol=1e-4, msg=lambda t, n=name: f"{n}: {t}")


def test_a_model_of_many_depths_says_why_not(tmp_path):
    with pytest.raises(ValueError, match=r"python convert.py serve"):
        trainer_of(tmp_path, tiny_model(), lambda completions, **kwargs: [0.0] * len(completions)).train()
