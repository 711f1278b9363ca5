"""Callbacks inside real, tiny training runs on the CPU."""

import logging
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import TrainerCallback

from callbacks import CallbacksConfig, NonFiniteConfig, SamplesConfig, StabilityConfig, add_callbacks
from callbacks.model_size import part_sizes, size_table
from callbacks.throughput import ThroughputCallback, count_steps
from model.depth import sample_depth
from tests.tiny_language_model import tiny_model, tiny_tokenizer
from trainers import RecurrentTrainer, RecurrentTrainingArguments


def rows(count, length=10):
    ids = torch.randint(3, 300, (count, length), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row.clone()} for row in ids]


def build_trainer(folder, model=None, callbacks=None, data=None, **options):
    model = model or tiny_model()
    arguments = RecurrentTrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 4,
            "per_device_train_batch_size": 2,
            "logging_steps": 2,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "logging_nan_inf_filter": False,
            "learning_rate": 1e-2,
            "recurrence_logging_steps": 0,
            **options,
        }
    )
    trainer = RecurrentTrainer(model, arguments, train_dataset=data or rows(16))
    if callbacks is not None:
        add_callbacks(trainer, callbacks, tiny_tokenizer())
    return trainer


def events(folder):
    (path,) = {file.parent for file in Path(folder).rglob("events.out.tfevents.*")}
    accumulator = EventAccumulator(str(path), size_guidance={"tensors": 0, "scalars": 0})
    return accumulator.Reload()


def texts(folder, tag):
    """{step: text} of a TensorBoard text."""
    found = events(folder).Tensors(f"train/{tag}/text_summary")
    return {event.step: event.tensor_proto.string_val[0].decode() for event in found}


def greedy(model, prompt, num_steps, max_new_tokens):
    """The continuation by whole forward passes, without `generate`."""
    tokenizer = tiny_tokenizer()
    ids = [1, *tokenizer(prompt)["input_ids"]]
    length = len(ids)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(model(torch.tensor([ids]), num_steps=num_steps).logits[0, -1].argmax().item())
        if ids[-1] == 2:
            break
    return tokenizer.decode(ids[length:], skip_special_tokens=True)


# Samples


def samples(**options):
    return CallbacksConfig(samples=SamplesConfig(**{"prompts": ["the cat", ""], "num_steps": [1, 5], **options}))


def verbatim(text):
    return "\n".join(line[4:] for line in text.splitlines())


def test_samples_stand_in_tensorboard_at_each_depth_every_few_steps_and_at_the_end(tmp_path):
    """With the weights of that moment; the last step is sampled once."""
    trainer = build_trainer(tmp_path, callbacks=samples(every_steps=2, max_new_tokens=6), max_steps=5)
    trainer.train()
    model = trainer.model
    assert model.training
    model.eval()
    for depth in (1, 5):
        found = texts(tmp_path, f"samples/num_steps_{depth}")
        assert list(found) == [2, 4, 5]
        parts = found[5].split("\n\n---\n\n")
        assert [verbatim(part) for part in parts] == [
            "\n".join(f"{prompt}⟶{greedy(model, prompt, depth, 6)}".splitlines()) for prompt in ("the cat", "")
        ]


def test_samples_at_the_end_of_a_run_that_was_stopped(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = build_trainer(tmp_path, callbacks=samples(every_steps=100, max_new_tokens=2), max_steps=50)
    trainer.add_callback(Stop())
    trainer.train()
    assert list(texts(tmp_path, "samples/num_steps_1")) == [3]


def test_samples_do_not_disturb_the_training(tmp_path):
    """With dropout drawn from the global generator: the same weights to the bit, with samples and without."""

    def train(name, callbacks):
        torch.manual_seed(0)
        trainer = build_trainer(tmp_path / name, callbacks=callbacks)
        trainer.model.lm_head.register_forward_pre_hook(
            lambda module, inputs: (nn.functional.dropout(inputs[0], 0.3, module.training),)
        )
        trainer.train()
        return trainer

    without = train("without", None)
    watched = train("with", samples(every_steps=1, max_new_tokens=3))
    assert [log["loss"] for log in without.state.log_history[:-1]] == [
        log["loss"] for log in watched.state.log_history[:-1]
    ]
    for name, parameter in without.model.state_dict().items():
        assert torch.equal(parameter, watched.model.state_dict()[name]), name


def test_a_plain_model_gives_one_sample(tmp_path, caplog):
    config = samples(every_steps=4, max_new_tokens=3)
    with caplog.at_level(logging.INFO, logger="callbacks.samples"):
        build_trainer(tmp_path, model=tiny_model(num_core_layers=0), callbacks=config).train()
    assert list(texts(tmp_path, "samples")) == [4]
    assert len([record for record in caplog.records if "samples: 'the cat' -> " in record.getMessage()]) == 1


def test_samples_are_not_in_the_history(tmp_path):
    trainer = build_trainer(tmp_path, callbacks=samples(every_steps=2, max_new_tokens=2))
    trainer.train()
    assert not [key for log in trainer.state.log_history for key in log if "num_steps" in key or "⟶" in str(log[key])]


def test_an_empty_prompt_needs_a_begin_token(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = None
    with pytest.raises(ValueError, match=r"samples.prompts has an empty prompt, but the tokenizer has no begin token"):
        add_callbacks(build_trainer(tmp_path), samples(), tokenizer)


# Throughput


def test_counts_are_those_of_the_forward_passes(tmp_path, monkeypatch):
    """Tokens and core steps of each log, against the depths that the trainer drew and the time on the clock."""

    class Watch(TrainerCallback):
        drawn, counted = [], []

        def on_step_end(self, args, state, control, **kwargs):
            self.counted.append((throughput.tokens, throughput.core_steps, throughput.seconds))

    trainer = build_trainer(tmp_path, callbacks=CallbacksConfig(), gradient_accumulation_steps=2)
    throughput = trainer.callback_handler.callbacks[0]
    assert isinstance(throughput, ThroughputCallback)
    watch = Watch()
    trainer.add_callback(watch)
    monkeypatch.setattr(
        "trainers.recurrent.sample_depth", lambda *key: watch.drawn.append(sample_depth(*key)) or watch.drawn[-1]
    )
    trainer.train()

    assert len(watch.drawn) == 8  # 4 steps of 2 micro-batches
    logs = [log for log in trainer.state.log_history if "loss" in log]
    for index, log in enumerate(logs):
        tokens, core_steps, seconds = watch.counted[2 * index + 1]
        assert tokens == 2 * 2 * 2 * 10
        assert core_steps == sum(n + k for n, k in watch.drawn[4 * index : 4 * index + 4])
        assert log["tokens_per_second"] == tokens / seconds
        assert log["core_steps_per_second"] == core_steps / seconds
    scalars = events(tmp_path).Scalars("train/tokens_per_second")
    assert [event.value for event in scalars] == pytest.approx([log["tokens_per_second"] for log in logs])


class SlowPasses(TrainerCallback):
    """Moves a clock: a step takes 1 s before its forward pass and 1 s in it, any other forward pass 100 s."""

    now = 0.0

    def on_train_begin(self, args, state, control, model, **kwargs):
        model.register_forward_hook(self.forward)

    def forward(self, module, inputs, output):
        self.now += 1.0 if module.training else 100.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.now += 1.0


@pytest.fixture
def clock(monkeypatch):
    clock = SlowPasses()
    monkeypatch.setattr("callbacks.throughput.time.perf_counter", lambda: clock.now)
    return clock


def speeds(trainer):
    return [log["tokens_per_second"] for log in trainer.state.log_history if "tokens_per_second" in log]


def test_samples_take_no_time(tmp_path, clock):
    trainer = build_trainer(
        tmp_path, callbacks=samples(every_steps=3, max_new_tokens=1, num_steps=[1]), max_steps=9, logging_steps=3
    )
    trainer.add_callback(clock)
    trainer.train()
    # 3 steps of 2 rows of 10 tokens, in 6 s; after samples the wait for the next step is left out with them.
    assert speeds(trainer) == [60 / 6, 60 / 5, 60 / 5]
    assert clock.now == 9 * 2 + 3 * 200


@pytest.mark.parametrize("every", [1, 3])
def test_probes_take_no_time(tmp_path, clock, every):
    """They come amid a step."""
    trainer = build_trainer(
        tmp_path, callbacks=CallbacksConfig(), max_steps=6, logging_steps=3, recurrence_logging_steps=every
    )
    trainer.add_callback(clock)
    trainer.train()
    assert speeds(trainer) == [60 / 6, 60 / 6]
    assert clock.now == 6 * 2 + 6 // every * 200


def test_all_ranks_together_and_only_training_logs():
    callback = ThroughputCallback()
    callback.tokens, callback.seconds = 100, 2.0
    history = SimpleNamespace(log_history=[{}])
    evaluation, training = {"eval_loss": 1.0}, {"loss": 1.0}
    callback.on_log(SimpleNamespace(world_size=4), history, None, logs=evaluation)
    assert evaluation == {"eval_loss": 1.0}
    callback.on_log(SimpleNamespace(world_size=4), history, None, logs=training)
    assert (
        training == {"loss": 1.0, "tokens_per_second": 200.0} and history.log_history[-1]["tokens_per_second"] == 200.0
    )


def test_steps_of_an_argument():
    config = tiny_model().config
    assert [count_steps(steps, config) for steps in (5, (3, 2), None)] == [5, 5, 3]
    config.num_steps = 7
    assert count_steps(None, config) == 7


# Size of the model


def test_parts_of_the_model_by_hand():
    model = tiny_model(
        tie_word_embeddings=False
    )  # width 32, inner width 48, 4 heads of 8, 2 key/value heads, vocabulary 320
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 4 * 32  # attention, gated feed-forward, four norms
    expected = {
        "embeddings": 320 * 32,
        "prelude": layer,
        "core": layer + 64 * 32,
        "coda": layer,
        "norm": 32,
        "head": 320 * 32,
    }
    parts = part_sizes(model)
    assert {name: part.parameters for name, part in parts.items()} == expected
    assert {name: part.num_bytes for name, part in parts.items()} == {
        name: 4 * count for name, count in expected.items()
    }
    assert {name: part.passes for name, part in parts.items()} == {
        "embeddings": 1, "prelude": 1, "core": 3, "coda": 1, "norm": 2, "head": 1
    }  # fmt: skip


def test_size_table_sums_up_and_marks_what_is_frozen_or_tied():
    model = tiny_model(tie_word_embeddings=True)
    model.model.prelude.requires_grad_(False)
    table = size_table(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert f"| all | {total:,} | {trainable:,} | {4 * total / 1e6:.2f} |" in table
    assert "| head | the embeddings |" in table
    assert table.endswith("3 layers, 5 executed at the mean depth")


def test_size_counts_whole_parameters_under_zero_3():
    """ZeRO-3 leaves an empty tensor and the true size in ds_numel."""
    model = tiny_model()
    before = part_sizes(model)
    for parameter in model.parameters():
        parameter.ds_numel = parameter.numel()
        parameter.data = torch.empty(0)
    assert part_sizes(model) == before


def test_size_is_logged_once_and_stands_in_tensorboard(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="callbacks.model_size"):
        trainer = build_trainer(tmp_path, callbacks=CallbacksConfig())
        trainer.train()
    assert len(caplog.records) == 1 and size_table(trainer.model) in caplog.records[0].getMessage()
    assert texts(tmp_path, "model_size") == {0: size_table(trainer.model)}


# Losses that are not finite


class Poison(nn.Module):
    """A head that gives NaN from a certain forward pass on, or once."""

    def __init__(self, head, first, last=10**9):
        super().__init__()
        self.head, self.first, self.last, self.calls = head, first, last, 0

    @property
    def weight(self):
        return self.head.weight

    def forward(self, hidden):
        self.calls += self.training
        return self.head(hidden) * (math.nan if self.first <= self.calls <= self.last else 1.0)


def poisoned_trainer(folder, action, first, **options):
    model = tiny_model()
    model.lm_head = Poison(model.lm_head, first)
    config = CallbacksConfig(non_finite=NonFiniteConfig(action=action))
    return build_trainer(folder, model=model, callbacks=config, **options)


def test_a_nan_stops_the_run_and_saves_the_offending_batch(tmp_path):
    """The third micro-batch is the first with a NaN, though the log comes after the fourth."""
    trainer = poisoned_trainer(tmp_path, "stop", first=3)
    batches = []
    trainer.model.register_forward_pre_hook(lambda module, args, kwargs: batches.append({**kwargs}), with_kwargs=True)
    with pytest.raises(
        FloatingPointError, match=r"At step 4 the loss is nan, grad_norm is nan. The first batch whose loss"
    ):
        trainer.train()
    saved = torch.load(tmp_path / "non_finite" / "step-4-rank-0.pt", weights_only=True)
    assert torch.equal(saved["inputs"]["input_ids"], batches[2]["input_ids"])
    assert torch.equal(saved["inputs"]["labels"], batches[2]["labels"])
    assert (saved["inputs"]["num_steps"], saved["step"], saved["seed"]) == (batches[2]["num_steps"], 4, 42)
    assert len(batches) == 4


def test_a_nan_only_warns_where_asked(tmp_path, caplog):
    trainer = poisoned_trainer(tmp_path, "warn", first=3)
    with caplog.at_level(logging.WARNING, logger="callbacks.non_finite"):
        trainer.train()
    assert trainer.state.global_step == 4
    assert len(caplog.records) == 1 and "At step 4 the loss is nan" in caplog.records[0].getMessage()


def test_a_poisoned_update_is_skipped_where_asked(tmp_path, caplog):
    """The weights stay as they were before the first bad batch; with "warn" they are lost."""
    weights = {}
    for action in ("skip", "warn"):
        trainer = poisoned_trainer(tmp_path / action, action, first=3, max_steps=4, logging_steps=1)
        with caplog.at_level(logging.WARNING, logger="callbacks.non_finite"):
            trainer.train()
        weights[action] = [parameter.detach().clone() for parameter in trainer.model.parameters()]
    before = poisoned_trainer(tmp_path / "before", "stop", first=99, max_steps=4, logging_steps=1)
    before.add_callback(StopAfter(2))
    before.train()
    for skipped, kept in zip(weights["skip"], before.model.parameters(), strict=True):
        assert torch.equal(skipped, kept)
    assert any(not weight.isfinite().all() for weight in weights["warn"])
    assert "The gradient of step 3 is not finite: its update is skipped." in caplog.text


class StopAfter(TrainerCallback):
    """Ends the training after a number of steps."""

    def __init__(self, steps):
        self.steps = steps

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.steps


def test_a_gradient_norm_alone_is_noticed(tmp_path):
    """A finite loss with an infinite gradient: the last batch is saved, and the message says so."""
    trainer = build_trainer(tmp_path, callbacks=CallbacksConfig(), logging_steps=1)
    trainer.model.lm_head.weight.register_hook(lambda gradient: gradient * math.inf)
    message = r"At step 1 the grad_norm is (nan|inf)\. The last batch \(all kept losses are finite\) on rank 0 is in "
    with pytest.raises(FloatingPointError, match=message):
        trainer.train()
    assert (tmp_path / "non_finite" / "step-1-rank-0.pt").exists()


def test_finite_runs_leave_nothing_behind(tmp_path):
    trainer = build_trainer(tmp_path, callbacks=CallbacksConfig())
    trainer.train()
    assert not (tmp_path / "non_finite").exists()
    assert not trainer.model._forward_hooks and not trainer.model._forward_pre_hooks


def test_a_filter_that_hides_nan_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"set training.logging_nan_inf_filter to false"):
        build_trainer(tmp_path, callbacks=CallbacksConfig(), logging_nan_inf_filter=True)


# Configuration


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: SamplesConfig(every_steps=0), "samples.every_steps is 0, must be at least 1"),
        (lambda: SamplesConfig(max_new_tokens=-1), "samples.max_new_tokens is -1, must be at least 1"),
        (
            lambda: SamplesConfig(num_steps=[4, 0]),
            r"samples.num_steps is \[4, 0\], must hold at least one depth, each at",
        ),
        (lambda: SamplesConfig(num_steps=[]), r"samples.num_steps is \[\], must hold at least one depth"),
        (
            lambda: NonFiniteConfig(action="panic"),
            "non_finite.action is 'panic', must be one of stop, skip, warn, roll_b",
        ),
        (
            lambda: NonFiniteConfig(spike_deviations=0),
            "non_finite.spike_deviations is 0, must be a number above 0; try 10",
        ),
        (lambda: NonFiniteConfig(max_rollbacks=0), "non_finite.max_rollbacks is 0, must be at least 1"),
        (lambda: StabilityConfig(action="panic"), "stability.action is 'panic', must be one of warn, save, stop"),
        (lambda: StabilityConfig(core_steps=-1), "stability.core_steps is -1, must be at least 0"),
        (lambda: StabilityConfig(update_alarm=-0.1), "stability.update_alarm is -0.1, must be a number of at least 0"),
    ],
)
def test_values_out_of_range_are_errors(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_no_samples_are_written_by_default(tmp_path):
    trainer = build_trainer(tmp_path)
    before = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    add_callbacks(trainer, CallbacksConfig(), tiny_tokenizer())
    after = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    watching = ["ModelSizeCallback", "PicturesCallback", "NonFiniteCallback"]
    assert after == ["ThroughputCallback", "StabilityCallback", *before, *watching]
