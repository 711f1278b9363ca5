"""Learning from preferences: what pairs are made of, and the loss at one depth for policy and reference."""

import json
import logging
import math
import random

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig

import finetune
from configs import load_config
from configs.finetuning import FinetuningConfig, build_finetuning
from dataset_loading.configuration import DataConfig, SourceConfig
from dataset_loading.preferences import build_pairs, build_prompts, spoiled
from dataset_loading.tasks.registry import get_task
from inference.loading import load_model
from model.depth import sample_depth
from model.recurrence import draw_training_states
from model.step_lora import StepLora
from tests.tiny_finetuning import write_tuning_config
from tests.tiny_language_model import tiny_model, tiny_tokenizer
from trainers.dpo import PreferenceArguments, PreferenceTrainer

TOKENIZER = tiny_tokenizer()
ADDITION = {"kind": "generated", "task": "addition", "num_rows": 30, "difficulty": [1, 2]}


def random_pairs(count=8, same=False):
    """Rows of random tokens of different lengths; with `same`, nothing is better than anything."""
    rng = random.Random(0)
    draw = lambda low, high: [rng.randrange(3, 300) for _ in range(rng.randrange(low, high))]  # noqa: E731
    rows = [
        {"prompt_ids": [1, *draw(2, 6)], "chosen_ids": draw(1, 5), "rejected_ids": draw(1, 5)} for _ in range(count)
    ]
    return Dataset.from_list([row | {"rejected_ids": row["chosen_ids"]} if same else row for row in rows])


def build(folder, pairs, adapters=True, model=None, **overrides):
    settings = {
        "output_dir": str(folder),
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "logging_steps": 1,
        "recurrence_logging_steps": 0,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    lora = LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False)  # B is not zero then
    return PreferenceTrainer(
        model=model or tiny_model(),
        ref_model=None if adapters else tiny_model(seed=1),
        args=PreferenceArguments(**{**settings, **overrides}),
        train_dataset=pairs,
        eval_dataset={"tiny": pairs},
        processing_class=TOKENIZER,
        peft_config=lora if adapters else None,
    )


# --------------------------------------------------------------------------------------------------------- the trainer


@torch.no_grad()
def log_probs_by_hand(model, row, name, depth, state):
    """Sum of those of the tokens of an answer, from logits of the row alone."""
    ids = torch.tensor([row["prompt_ids"] + row[name]])
    logits = model(ids, num_steps=sum(depth), initial_state=state[None, : ids.shape[1]]).logits.log_softmax(-1)
    start = len(row["prompt_ids"])
    return sum(logits[0, place - 1, ids[0, place]].item() for place in range(start, ids.shape[1]))


@pytest.mark.parametrize("adapters", [True, False])
def test_the_loss_is_that_of_the_paper_at_one_depth(tmp_path, adapters):
    """-log sigmoid(beta (log-ratio of the chosen - log-ratio of the rejected)), each row alone and without padding."""
    pairs = random_pairs()
    trainer = build(tmp_path, pairs, adapters=adapters, beta=0.3)
    batch = trainer.data_collator([pairs[number] for number in range(4)])
    trainer.model.train()
    trainer._position = (0, 0)
    loss = trainer.compute_loss(trainer.model, batch)
    depth = trainer.last_num_steps
    assert depth == sample_depth(trainer.text_config.recurrence, 42, 0, 0)
    states = draw_training_states(trainer.text_config, batch["input_ids"].shape[1], trainer._keys(4))

    trainer.model.eval()
    by_hand = []
    for row, state in zip(pairs.select(range(4)), states, strict=True):
        ratios = []
        for name in ("chosen_ids", "rejected_ids"):
            policy = log_probs_by_hand(trainer.model, row, name, depth, state)
            if adapters:
                with trainer.model.disable_adapter():
                    reference = log_probs_by_hand(trainer.model, row, name, depth, state)
            else:
                reference = log_probs_by_hand(trainer.ref_model, row, name, depth, state)
            ratios.append(policy - reference)
        by_hand.append(math.log1p(math.exp(-0.3 * (ratios[0] - ratios[1]))))
    assert abs(sum(by_hand) / 4 - math.log(2)) > 1e-3
    assert loss.item() == pytest.approx(sum(by_hand) / 4, abs=1e-5)


@pytest.mark.parametrize("dropout", [{}, {"hidden_dropout": 0.3}, {"attention_dropout": 0.3}])
def test_the_same_answer_twice_says_nothing(tmp_path, dropout):
    """The two have the same depth and the same initial state, and no dropout."""
    trainer = build(tmp_path, random_pairs(same=True), model=tiny_model(**dropout), max_steps=2)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses == pytest.approx([math.log(2)] * 2, abs=1e-6)
    assert trainer.evaluate()["eval_tiny_loss"] == pytest.approx(math.log(2), abs=1e-6)


def test_pairs_are_learned_and_depth_is_watched(tmp_path):
    trainer = build(tmp_path, random_pairs(), max_steps=20, learning_rate=2e-2, recurrence_logging_steps=10)
    before = trainer.evaluate()
    trainer.train()
    after = trainer.evaluate()
    assert after["eval_tiny_loss"] < before["eval_tiny_loss"]
    assert after["eval_tiny_rewards/accuracies"] == 1
    probed = [entry for entry in trainer.state.log_history if "loss_at_1_step" in entry]
    assert len(probed) == 2 and "state_change_03" in probed[0]


def test_the_reference_is_the_model_without_its_adapters(tmp_path):
    trainer = build(tmp_path, random_pairs())
    assert list(trainer.model.peft_config) == ["default"]


def test_the_reference_has_no_deltas_of_steps_either(tiny_run, tmp_path):
    """PEFT's switch for its adapters is that of ours: without them, the model is the base to the last bit."""
    sections = {"data": {"train": [ADDITION], "validation": [ADDITION]}, "step_lora": {"num_steps": 3}}
    training = {"max_steps": 2, "learning_rate": 0.1, "save_strategy": "no"}
    config = write_tuning_config(tmp_path, tiny_run, trainer="dpo", training=training, **sections)
    trainer = build_finetuning(
        load_config(["--config", str(config), "--training.output_dir", str(tmp_path / "out")], FinetuningConfig)
    )
    trainer.train()
    ids, (base, _) = torch.randint(3, 200, (2, 7)), load_model(tiny_run)
    model = trainer.model.eval()
    with torch.no_grad():
        expected = base(ids, num_steps=4).logits
        assert (model(input_ids=ids, num_steps=4).logits - expected).abs().max() > 1e-3
        with model.disable_adapter():
            assert torch.equal(model(input_ids=ids, num_steps=4).logits, expected)
    (steps,) = [part for part in trainer.beside if isinstance(part, StepLora)]
    assert all(deltas.up.abs().max() > 0 for deltas in steps.deltas.values())  # they have learned, and were off


def test_pairs_without_room_for_an_answer_are_left_out(tmp_path, caplog):
    pairs = random_pairs()
    lengths = [len(ids) for ids in pairs["prompt_ids"]]
    with caplog.at_level(logging.WARNING, logger="trainers.dpo"):
        trainer = build(tmp_path, pairs, max_length=max(lengths))
    too_long = lengths.count(max(lengths))
    assert 0 < too_long < len(trainer.train_dataset) + too_long == len(pairs)
    assert f"{too_long} of 8 pairs of train are left out" in caplog.text
    with pytest.raises(ValueError, match="all 8 pairs of train have prompts of 2 tokens and more"):
        build(tmp_path, pairs, max_length=2)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"precompute_ref_log_probs": True}, "precompute_ref_log_probs is True, but the reference has to run"),
        ({"beta": 0}, "beta is 0; give a number above 0"),
        ({"max_length": 0}, "max_length is 0; give at least 2"),
        ({"loss_type": ["sigmoid", "foo"]}, "loss_type is 'foo'; give one of sigmoid, sigmoid_norm, hinge"),
        ({"f_divergence_type": "forward_kl", "loss_type": ["apo_zero"]}, "f_divergence_type"),
    ],
)
def test_options_out_of_range(tmp_path, options, reason):
    with pytest.raises(ValueError, match=reason):
        build(tmp_path, random_pairs(), **options)


def test_finetune_by_preference(tiny_run, tmp_path):
    """From a YAML to weights, without adapters: the reference is a copy of the base."""
    sections = {"data": {"train": [ADDITION], "validation": [ADDITION]}, "peft": None}
    config = write_tuning_config(tmp_path, tiny_run, trainer="dpo", training={"max_steps": 2}, **sections)
    assert finetune.main(["--config", str(config), "--training.output_dir", str(tmp_path / "out")]) == 0
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert 0 < metrics["eval_addition_loss"] < 2
    assert load_model(tmp_path / "out")[0].config.model_type == "megatransformer_text"


# ------------------------------------------------------------------------------------------------------------ the data


def text(ids):
    return TOKENIZER.decode(ids, skip_special_tokens=False)


def data(train, validation=()):
    return DataConfig(
        train=[SourceConfig(**source) for source in train], validation=[SourceConfig(**source) for source in validation]
    )


def test_generated_pairs_are_a_right_and_a_wrong_answer():
    train, validation = build_pairs(data([ADDITION], [ADDITION]), TOKENIZER)
    task = get_task("addition")
    assert len(train) == len(validation["addition"]) == 30
    for row in train:
        prompt = text(row["prompt_ids"]).removeprefix("<|begin|>")
        chosen, rejected = (text(row[name]).removesuffix("<|end|>") for name in ("chosen_ids", "rejected_ids"))
        assert chosen[0] == rejected[0] == " "  # the separator
        assert task.check(prompt, chosen[1:]) and not task.check(prompt, rejected[1:])
        assert sum(one != other for one, other in zip(chosen, rejected, strict=True)) == 1
    again, _ = build_pairs(data([ADDITION], [ADDITION]), TOKENIZER)
    assert list(again) == list(train)


def test_one_sign_is_spoiled():
    rng = random.Random(0)
    assert {spoiled("7", rng) for _ in range(200)} == set("012345689")
    assert spoiled("?!", rng) == ""
    assert spoiled("a", rng).isalpha()


def test_pairs_of_files(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"q": f"question {n}", "good": "yes", "bad": "no"} for n in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "files", "paths": [str(path)], "prompt_column": "q", "answer_column": "good"}
    train, _ = build_pairs(data([source | {"rejected_column": "bad"}], [ADDITION]), TOKENIZER)
    assert sorted(map(text, train["prompt_ids"])) == [f"<|begin|>question {n}" for n in range(4)]
    assert (text(train[0]["chosen_ids"]), text(train[0]["rejected_ids"])) == (" yes<|end|>", " no<|end|>")
    with pytest.raises(ValueError, match="'pairs' has no worse answers to learn from; set rejected_column"):
        build_pairs(data([source], [ADDITION]), TOKENIZER)
    with pytest.raises(ValueError, match="rejected_column is 'good', which is a column of something else"):
        SourceConfig(**source, rejected_column="good")


def test_pairs_of_conversations(tmp_path):
    """Two columns of whole conversations, as preference data of the hub have them; of a pair that is half there,
    nothing is left.
    """
    path = tmp_path / "chats.jsonl"
    ask = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "the cat"}]
    rows = [
        {
            side: [*ask, {"role": "assistant", "content": word}]
            for side, word in (("chosen", "sat"), ("rejected", "mat"))
        }
        for _ in range(3)
    ]
    rows[1]["rejected"] = []
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"kind": "chat", "paths": [str(path)], "messages_column": "chosen", "rejected_column": "rejected"}
    train, _ = build_pairs(data([source], [ADDITION]), TOKENIZER)
    assert len(train) == 2
    for row in train:
        assert text(row["prompt_ids"]) == "<|begin|><|system|>Be kind.<|user|>the cat<|assistant|>"
        assert (text(row["chosen_ids"]), text(row["rejected_ids"])) == ("sat<|end|>", "mat<|end|>")


def test_prompts_have_what_rewards_want_to_know(tmp_path):
    train, validation = build_prompts(data([ADDITION | {"weight": 3}, ADDITION | {"name": "other"}], [ADDITION]))
    assert validation["addition"].column_names == ["prompt", "answer", "source", "difficulty"]
    task = get_task("addition")
    assert all(task.check(row["prompt"], row["answer"]) for row in train)
    shares = [train["source"].count(name) / len(train) for name in ("addition", "other")]
    assert shares[0] == pytest.approx(0.75, abs=0.1) and shares[1] > 0


def test_prompts_of_conversations():
    train, _ = build_prompts(data([ADDITION | {"prompt": "Add: {prompt}"}], [ADDITION | {"prompt": "Add: {prompt}"}]))
    assert [message["role"] for message in train[0]["prompt"]] == ["user"]
    question = train[0]["prompt"][0]["content"].removeprefix("Add: ")
    assert get_task("addition").check(question, train[0]["answer"])


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        ([{"kind": "generated", "task": "scenes", "num_rows": 4}], "'scenes' has media"),
        ([ADDITION, ADDITION | {"name": "b", "prompt": "Add: {prompt}"}], "mixes prompts of text with conversations"),
        ([{"kind": "files", "paths": ["a.txt"]}], "'a' has no answers; set prompt_column"),
    ],
)
def test_sources_that_do_not_fit(train, reason):
    with pytest.raises(ValueError, match=reason):
        build_prompts(data(train, [ADDITION | {"name": "held_out"}] if len(train) > 1 else ()))
