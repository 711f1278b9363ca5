"""Learning by reward: what is written at a recorded depth is scored at that depth, and rewards are checked."""

import copy
import functools
import json
import sys
import types

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig

import finetune
from inference.loading import load_model
from model.chat import encode_conversation, prepare_tokenizer
from tests.tiny_language_model import tiny_model, tiny_tokenizer
from trainers import grpo
from trainers.grpo import RolloutArguments, RolloutTrainer
from trainers.user_functions import RewardError, load_reward

CLOSE = {"atol": 1e-4, "rtol": 0}
PROMPTS = ["the cat", "sat on the mat", "a", "the mat. the"]
TOKENIZER = tiny_tokenizer()


@pytest.fixture
def rewards(monkeypatch):
    """A module of reward functions that can be named: `rewards.add(function)` returns its name."""
    module = types.ModuleType("rewards_of_a_test")
    monkeypatch.setitem(sys.modules, module.__name__, module)

    def add(function):
        function.__module__ = module.__name__
        setattr(module, function.__name__, function)
        return f"{module.__name__}:{function.__name__}"

    module.add = add
    return module


def many_a(completions, **kwargs):
    return [text.count("a") / 6 for text in completions]


def build(folder, reward, model=None, adapters=True, prompts=PROMPTS, **overrides):
    settings = {
        "output_dir": str(folder),
        "rewards": [reward],
        "max_steps": 1,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 4,
        "num_generations": 4,
        "max_completion_length": 6,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    rows = Dataset.from_dict({"prompt": prompts, "answer": [prompt[::-1] for prompt in prompts]})
    lora = LoraConfig(r=4, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False)  # B is not zero then
    return RolloutTrainer(
        model=model or tiny_model(),
        args=RolloutArguments(**{**settings, **overrides}),
        train_dataset=rows,
        eval_dataset={"tiny": rows},
        processing_class=TOKENIZER,
        peft_config=lora if adapters else None,
    )


def real_tokens(ids, mask):
    return tuple(ids[mask.bool()].tolist())


class Sampled:
    """Log-probabilities with which `generate` has drawn each token, by the sequence."""

    def __init__(self, model):
        self.generate, self.log_probs = model.generate, {}
        model.generate = self

    def __call__(self, input_ids, attention_mask, **kwargs):
        outputs = self.generate(
            input_ids=input_ids,
            attention_mask=attention_mask,
            **kwargs,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = outputs.sequences[:, input_ids.shape[1] :]
        drawn = torch.stack(outputs.logits, dim=1).log_softmax(-1).gather(-1, new[..., None])[..., 0]
        for prompt, mask, tokens, values in zip(input_ids, attention_mask, new, drawn, strict=True):
            self.log_probs[real_tokens(prompt, mask) + tuple(tokens.tolist())] = values
        return outputs.sequences


@pytest.mark.parametrize("policy", ["last", "first"])
def test_what_was_written_is_scored_with_the_probabilities_it_was_drawn_with(tmp_path, rewards, monkeypatch, policy):
    """Also after TRL has shuffled and split it, and whatever exits, cache and dropout the checkpoint has by itself."""
    model = tiny_model(hidden_dropout=0.2, attention_dropout=0.2)
    model.config.recurrence.exit_criterion, model.config.recurrence.exit_threshold = "latent_difference", 10.0
    model.config.recurrence.cache_policy, model.config.recurrence.num_kept_tokens = policy, 2
    model.generation_config.noise_level = 0.5
    sampled = Sampled(model)
    trainer = build(tmp_path, rewards.add(many_a), model=model, beta=0.1, num_iterations=2, max_steps=2)
    inner = trainer.model.base_model.model
    score, passes = inner.forward, []

    @functools.wraps(score)
    def record(**kwargs):
        outputs = score(**kwargs)
        is_policy = not inner.model.core.layers[0].attention.qkv_proj.disable_adapters
        if kwargs.get("labels") is not None and is_policy and trainer.state.global_step == 0:
            passes.append((kwargs, outputs.log_probs))
        return outputs

    monkeypatch.setattr(inner, "forward", record)
    trainer.train()
    assert len(passes) == 4 + 4  # of the policy before, and of the four micro-batches of the first update
    for kwargs, log_probs in passes:
        for ids, mask, labels, scored in zip(
            kwargs["input_ids"], kwargs["attention_mask"], kwargs["labels"], log_probs, strict=True
        ):
            found = scored[labels[1:] != -100]  # of each token, what the one before says
            torch.testing.assert_close(found, sampled.log_probs[real_tokens(ids, mask)][: len(found)], **CLOSE)
    depths = [depth for kwargs, _ in passes for depth in kwargs["num_steps"].tolist()]
    assert len(depths) == 32 and len(set(depths)) > 2
    assert depths[:16] != depths[16:]  # shuffled


def test_another_depth_has_other_probabilities(tmp_path, rewards):
    """Without which the test above would say nothing."""
    model = tiny_model(num_core_layers=2)
    trainer = build(tmp_path, rewards.add(many_a), model=model)
    ids = torch.randint(3, 300, (4, 9))
    scored = []
    for depths in ([2, 2, 2, 2], [3, 2, 2, 3]):
        with trainer.scoring_at(torch.tensor(depths)), torch.no_grad():
            parts = [trainer.model(input_ids=part, labels=part).logits for part in ids.split(2)] * 2
            again = [trainer.model(input_ids=part, labels=part).logits for part in ids.split(2)]
        assert all(torch.equal(part, other) for part, other in zip(parts, again, strict=False))
        scored.append(torch.cat(again))
    changed = (scored[0] - scored[1]).abs().amax(dim=(1, 2))
    assert changed[[0, 3]].min() > 1e-3 and changed[[1, 2]].max() == 0
    logits = trainer.model(input_ids=ids, num_steps=3).logits
    torch.testing.assert_close(logits[[0, 3]], scored[1][[0, 3]], **CLOSE)


def test_completions_of_a_prompt_share_a_depth_that_ranks_agree_on(tmp_path, rewards, monkeypatch):
    trainer = build(tmp_path, rewards.add(many_a))
    trainer.model.train()
    trainer._position = (0, 0)
    whole = trainer._draw_depths(32).tolist()
    assert all(len(set(whole[start : start + 4])) == 1 for start in range(0, 32, 4))
    assert len(set(whole)) > 2
    ranks = []
    for rank in (0, 1):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", rank)
        ranks += trainer._draw_depths(16).tolist()
    assert ranks == whole
    trainer._position = (1, 0)
    assert trainer._draw_depths(16).tolist() != whole[16:]
    monkeypatch.setattr(grpo, "is_deepspeed_zero3_enabled", lambda: True)
    assert len(set(trainer._draw_depths(32).tolist())) == 1


def test_evaluation_is_greedy_at_the_mean_depth(tmp_path, rewards):
    """Its reward is that of what `generate` writes by itself; the metrics have the name of their source, and the mean
    reward of all has none.
    """
    seen = []

    def collect(prompts, completions, answer, **kwargs):
        seen.extend(zip(prompts, completions, answer, strict=True))
        return [0.25] * len(prompts)

    trainer = build(tmp_path, rewards.add(collect), adapters=False)
    metrics = trainer.evaluate()
    assert metrics["eval_tiny_reward"] == metrics["eval_reward"] == 0.25
    assert metrics["eval_tiny_num_steps"] == 3 and "eval_num_steps" not in metrics
    assert len(seen) == len(PROMPTS)
    for prompt, completion, answer in seen:
        ids = torch.tensor([[1, *TOKENIZER(prompt, add_special_tokens=False)["input_ids"]]])
        written = trainer.model.generate(ids, num_steps=3, do_sample=False, max_new_tokens=6)[0, ids.shape[1] :]
        assert completion == TOKENIZER.decode(written, skip_special_tokens=True)
        assert answer == prompt[::-1]


@pytest.mark.parametrize("cores", [1, 0])
def test_what_is_rewarded_becomes_frequent(tmp_path, rewards, cores):
    """Also of a plain transformer, which has no depth."""
    options = {"max_steps": 12, "learning_rate": 3e-2, "lr_scheduler_type": "constant", "num_generations": 16}
    options |= {"per_device_train_batch_size": 64, "gradient_accumulation_steps": 1, "max_completion_length": 2}
    model = tiny_model(num_core_layers=cores)
    trainer = build(tmp_path, rewards.add(many_a), model=model, adapters=False, **options)
    trainer.train()
    history = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert sum(history[-3:]) > 5 * sum(history[:3])


def test_resumed_equals_uninterrupted(tmp_path, rewards):
    options = {"adapters": False, "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3}
    whole = build(tmp_path / "a", rewards.add(many_a), **options)
    whole.train()
    resumed = build(tmp_path / "b", rewards.add(many_a), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


def test_the_reference_is_the_model_without_its_adapters(tmp_path, rewards):
    trainer = build(tmp_path, rewards.add(many_a), beta=0.1)
    assert list(trainer.model.peft_config) == ["default"]
    assert trainer.ref_model is None


def test_texts_in_messages_are_nothing_but_text(tmp_path, rewards):
    """As in training on conversations, where no text can end a message."""
    tokenizer = copy.deepcopy(TOKENIZER)
    prepare_tokenizer(tokenizer, 320)
    trainer = build(tmp_path, rewards.add(many_a))
    trainer.processing_class = tokenizer
    messages = [{"role": "user", "content": "<|end|> hi"}]
    (ids,), images, fields = trainer._tokenize_prompts([messages])
    assert ids == encode_conversation(tokenizer, messages, add_generation_prompt=True)
    assert tokenizer.eos_token_id not in ids[:-1] and (images, fields) == (None, {})


def tuning(folder, base, reward):
    """Flags of `finetune.py` for a run of two updates."""
    source = {"kind": "generated", "task": "addition", "num_rows": 8, "difficulty": [1, 1]}
    tree = {"trainer": "grpo", "model": {"path": str(base)}, "data": {"train": [source], "validation": [source]}}
    tree["peft"] = {"target_modules": {"core": "all-linear"}}
    tree["training"] = {"rewards": [reward], "num_generations": 2, "max_completion_length": 4, "max_steps": 2}
    tree["training"] |= {"learning_rate": 1e-2, "use_cpu": True, "disable_tqdm": True}
    config = folder / "tuning.yaml"
    config.write_text(yaml.safe_dump(tree))
    return ["--config", str(config), "--training.output_dir", str(folder / "out"), "--allow-code"]


def test_finetune_by_reward(tiny_run, tmp_path, rewards):
    """From a YAML to adapters that change what the base computes."""

    def length(completions, **kwargs):
        return [float(len(text)) for text in completions]

    assert finetune.main(tuning(tmp_path, tiny_run, rewards.add(length))) == 0
    tuned, _ = load_model(tmp_path / "out")
    base, _ = load_model(tiny_run)
    ids = torch.randint(3, 200, (1, 8))
    assert (tuned(ids).logits - base(ids).logits).abs().max() > 1e-6
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert metrics["eval_addition_reward"] >= 0


def test_a_reward_that_fails_in_training_is_one_line(tiny_run, tmp_path, rewards, capsys):
    with pytest.raises(SystemExit) as stopped:
        finetune.main(tuning(tmp_path, tiny_run, rewards.add(raises)))
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert lines == ["error: reward 'rewards_of_a_test:raises' raised KeyError: 'answer'"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--training.per_device_train_batch_size", "64"], "there are 8 prompts, fewer than the 32 of one update"),
        (["--training.max_completion_length", "5000"], "training.max_completion_length is 5000, but with its prompt"),
        (["--training.cast_lm_head_to_fp32", "true"], "unknown key training.cast_lm_head_to_fp32"),
    ],
)
def test_runs_that_could_not_learn_are_one_line(tiny_run, tmp_path, rewards, capsys, flags, words):
    with pytest.raises(SystemExit) as stopped:
        finetune.main([*tuning(tmp_path, tiny_run, rewards.add(many_a)), *flags])
    assert stopped.value.code == 2 and words in capsys.readouterr().err and not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------------------------- rewards


def raises(completions, **kwargs):
    raise KeyError("answer")


def too_few(completions, **kwargs):
    return [1.0] * (len(completions) - 1)


def no_list(completions, **kwargs):
    return 1.0


def endless(completions, **kwargs):
    return [float("inf")] * len(completions)


def words(completions, **kwargs):
    return ["good"] * len(completions)


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (raises, "raised KeyError: 'answer'"),
        (too_few, "returned 15 values for 16 completions"),
        (no_list, "returned 1.0; it must return a list"),
        (endless, "returned inf; each value must be a finite number"),
        (words, "returned 'good'; each value must be"),
    ],
)
def test_rewards_that_fail_are_named(tmp_path, rewards, function, reason):
    name = rewards.add(function)
    with pytest.raises(RewardError, match=reason) as caught:
        build(tmp_path, name).train()
    assert name in str(caught.value)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("exact_answer", "names no function"),
        ("evaluation:", "names no function"),
        ("no_such_module:f", "no_such_module cannot be imported"),
        ("trainers.user_functions:no_such", "has no function 'no_such', only .*load_reward"),
        ("trainers.user_functions:math", "has no function 'math'"),
    ],
)
def test_rewards_that_cannot_be_found(name, reason):
    with pytest.raises(ValueError, match=reason):
        load_reward(name)


def test_none_is_a_reward_that_cannot_be_told(rewards):
    def half(completions, **kwargs):
        return [1, None]

    assert load_reward(rewards.add(half))(prompts=["", ""], completions=["", ""]) == [1, None]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"rewards": []}, "rewards is empty"),
        ({"reward_weights": [1.0, 2.0]}, "reward_weights has 2 numbers for 1 rewards"),
        ({"loss_type": "foo"}, "loss_type is 'foo'; give one of grpo, bnpo"),
        ({"scale_rewards": "sum"}, "scale_rewards is 'sum'; give one of group, batch, none"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level is 'word'"),
        ({"multi_objective_aggregation": "max"}, "multi_objective_aggregation is 'max'"),
        ({"temperature": 0}, "temperature is 0; give a number above 0"),
        ({"max_completion_length": 0}, "max_completion_length is 0; give at least 1"),
        ({"use_vllm": True}, "use_vllm is on, but it knows no recurrent depth"),
        ({"gradient_accumulation_steps": 1, "num_generations": 3}, "divisible by num_generations"),
    ],
)
def test_options_out_of_range(tmp_path, rewards, options, reason):
    with pytest.raises(ValueError, match=reason):
        build(tmp_path, rewards.add(many_a), **options)


def test_completions_of_their_own_depths_are_written_and_scored_under_autocast(tmp_path, rewards):
    """Without adapters, whose layers would make the types of keys and values the same."""
    trainer = build(tmp_path, rewards.add(many_a), adapters=False, bf16=True, learning_rate=1e-2)
    types, before = set(), [weight.detach().clone() for weight in trainer.model.parameters()]
    trainer.model.model.prelude.layers[0].attention.qkv_proj.register_forward_hook(
        lambda module, inputs, output: types.add(output.dtype)
    )
    trainer.train()
    assert types == {torch.bfloat16}
    assert all(weight.isfinite().all() for weight in trainer.model.parameters())
    assert any(not torch.equal(*pair) for pair in zip(before, trainer.model.parameters(), strict=True))
