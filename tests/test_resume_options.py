"""Which options a run may change when it goes on: all others are refused by name, before anything is built."""

import logging
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

import configs
from configs import load_config, loader
from configs.finetuning import FINETUNERS, FinetuningConfig
from configs.resuming import CHANGEABLE, FREE, check_options, config_text, find_start
from tests.test_pretrain import write_config
from tests.test_trainer import save_whole
from tests.tiny_finetuning import write_tuning_config

SOURCES = {
    "task": "{kind: generated, task: reversal, num_rows: 200, difficulty: [1, 2], weight: 2}",
    "num_rows": "{kind: generated, task: addition, num_rows: 201, difficulty: [1, 2], weight: 2}",
    "weight": "{kind: generated, task: addition, num_rows: 200, difficulty: [1, 2], weight: 3}",
}
SECOND = "{kind: generated, task: stories, num_rows: 50}"
# Flags, and the key that has to be named.
REFUSED = {
    "training.seed": ["--training.seed", "43"],
    "training.data_seed": ["--training.data_seed", "7"],
    "training.per_device_train_batch_size": ["--training.per_device_train_batch_size", "5"],
    "training.gradient_accumulation_steps": ["--training.gradient_accumulation_steps", "2"],
    "training.optim": ["--training.optim", "sgd"],
    "training.max_grad_norm": ["--training.max_grad_norm", "2"],
    "training.muon_learning_rate": ["--training.muon_learning_rate", "0.01"],
    "training.ema_decay": ["--training.ema_decay", "0.9"],
    "training.freeze": ["--training.freeze", "[model.coda.*]"],
    "training.parameter_groups": ["--training.parameter_groups", "[{pattern: model.coda.*, lr_factor: 0.5}]"],
    "training.modality_weights.image": ["--training.modality_weights.image", "0.5"],
    "training.lr_scheduler_type": [
        "--training.lr_scheduler_type",
        "reduce_lr_on_plateau",
        "--training.eval_strategy",
        "epoch",
    ],
    "training.load_best_model_at_end": [
        "--training.load_best_model_at_end",
        "true",
        "--training.eval_strategy",
        "steps",
    ],
    "data.train[0].task": ["--data.train", f"[{SOURCES['task']}, {SECOND}]"],
    "data.train[0].num_rows": ["--data.train", f"[{SOURCES['num_rows']}, {SECOND}]"],
    "data.train[0].weight": ["--data.train", f"[{SOURCES['weight']}, {SECOND}]"],
    "data.train": ["--data.train", f"[{SECOND}]"],
    "data.validation[0].num_rows": ["--data.validation", "[{kind: generated, task: addition, num_rows: 9}]"],
    "data.block_size": ["--data.block_size", "40"],
    "data.packing": ["--data.packing", "false"],
    "model.hidden_size": ["--model.hidden_size", "64"],
    "model.recurrence.mean_steps": ["--model.recurrence.mean_steps", "4"],
    "tokenizer.split_digits": ["--tokenizer.split_digits", "true"],
}
ALLOWED = {
    "training.learning_rate": ["--training.learning_rate", "1e-4"],
    "training.weight_decay": ["--training.weight_decay", "0.1"],
    "training.adam_beta2": ["--training.adam_beta2", "0.95"],
    "training.lr_scheduler_type": ["--training.lr_scheduler_type", "cosine"],
    "training.lr_scheduler_kwargs": ["--training.lr_scheduler_kwargs", "{num_cycles: 2}"],
    "training.warmup_steps": ["--training.warmup_steps", "3"],
}
UNCHANGED = [
    *(
        "--training.max_steps",
        "60",
        "--training.logging_steps",
        "5",
        "--training.save_steps",
        "7",
        "--log_level",
        "debug",
    ),
    *("--training.eval_strategy", "steps", "--training.eval_steps", "2", "--training.report_to", "none"),
    *("--training.dataloader_num_workers", "1", "--training.run_name", "again", "--training.output_dir", "elsewhere"),
    *(
        "--callbacks.samples.prompts",
        "[a, b]",
        "--callbacks.non_finite.action",
        "skip",
        "--training.disable_tqdm",
        "false",
    ),
    *("--training.recurrence_logging_steps", "0", "--data.max_invalid_rows", "3", "--training.save_total_limit", "2"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder with a YAML and a checkpoint, which is as far as it is looked at here, of that YAML's run."""
    folder = tmp_path_factory.mktemp("base")
    run = load_config(["--config", str(write_config(folder))])
    save_whole(folder / "checkpoint-5", 5)
    (folder / "checkpoint-5" / "config.yaml").write_text(config_text(run))
    return folder


def load(base, *flags):
    return load_config(["--config", str(base / "run.yaml"), *flags])


@pytest.mark.parametrize("key", REFUSED)
def test_other_options_are_refused_by_name(base, key):
    for leave in ([], ["--training.allow_changes", "true"]):
        with pytest.raises(ValueError, match="checkpoint-5 has other options: ") as error:
            check_options(load(base, *REFUSED[key], *leave), base / "checkpoint-5")
        assert f"{key} is " in str(error.value) and "begin anew in another output_dir" in str(error.value)


@pytest.mark.parametrize("key", ALLOWED)
def test_options_of_the_optimizer_need_leave(base, key, caplog):
    with pytest.raises(ValueError, match=r"add --training\.allow_changes true") as error:
        check_options(load(base, *ALLOWED[key]), base / "checkpoint-5")
    assert f"{key} is " in str(error.value)
    with caplog.at_level(logging.INFO):
        check_options(load(base, *ALLOWED[key], "--training.allow_changes", "true"), base / "checkpoint-5")
    (line,) = [record.getMessage() for record in caplog.records if " -> " in record.getMessage()]
    assert line.startswith(f"{key}: ") and line.endswith(", from here on")


def test_what_changes_no_number_may_change(base, caplog):
    check_options(load(base, *UNCHANGED), base / "checkpoint-5")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_several_differences_are_one_line(base):
    flags = [flag for key in ("training.seed", "training.max_grad_norm", "data.block_size") for flag in REFUSED[key]]
    with pytest.raises(ValueError) as error:
        check_options(
            load(base, *flags, *ALLOWED["training.learning_rate"], "--model.qk_norm", "true"), base / "checkpoint-5"
        )
    assert "model.qk_norm is False there and True here; " in str(error.value) and "; and 1 more; give" in str(
        error.value
    )
    assert "\n" not in str(error.value) and "learning_rate" not in str(error.value)


def test_every_pattern_is_of_an_option():
    """A misspelt one would leave nothing free."""
    classes = {f"training.{name}" for _, cls in FINETUNERS.values() for name in loader.option_types(cls)}
    keys = classes | set(configs.flatten_keys(configs.resolve([]))) | {"training.parameter_groups[0].learning_rate"}
    keys |= {f"training.parameter_groups[0].{name}" for name in ("lr_factor", "weight_decay", "freeze_steps")}
    assert all(FREE.values())  # the reasons
    for pattern in (*FREE, *CHANGEABLE):
        assert pattern.startswith("training.deepspeed.") or any(fnmatchcase(key, pattern) for key in keys), pattern
    both = {
        key
        for key in keys
        if any(fnmatchcase(key, it) for it in FREE) and any(fnmatchcase(key, it) for it in CHANGEABLE)
    }
    assert both == set()


def test_values_of_groups_may_change_and_their_patterns_may_not(tmp_path):
    base = tmp_path
    groups = "--training.parameter_groups", "[{{pattern: model.{}.*, lr_factor: {}, weight_decay: {}}}]"
    run = load_config(["--config", str(write_config(base)), groups[0], groups[1].format("coda", 0.5, 0)])
    save_whole(base / "checkpoint-5", 5)
    (base / "checkpoint-5" / "config.yaml").write_text(config_text(run))
    leave = ["--training.allow_changes", "true"]
    check_options(load(base, groups[0], groups[1].format("coda", 0.25, 0.1), *leave), base / "checkpoint-5")
    with pytest.raises(ValueError, match=r"training\.parameter_groups\[0\]\.pattern is 'model\.coda\.\*' there and"):
        check_options(load(base, groups[0], groups[1].format("core", 0.5, 0), *leave), base / "checkpoint-5")


@pytest.mark.parametrize("trainer", ["continued", "sft", "dpo", "grpo"])  # an exit probe has no adapters
def test_options_of_fine_tuning(tmp_path, trainer):
    """Those that belong to one trainer alone too; a base that has moved is compared when its adapter is loaded."""
    config = write_tuning_config(tmp_path, tmp_path / "base", trainer=trainer)
    flags = ["--config", str(config)]
    if trainer == "grpo":
        tree = configs.read_yaml(config)
        del tree["training"]["recurrence_logging_steps"]
        config.write_text(configs.to_yaml(tree))
        flags += ["--training.rewards", "[evaluation.rewards:exact_answer]", "--training.num_generations", "4"]
    run = load_config(flags, FinetuningConfig)
    save_whole(tmp_path / "checkpoint-2", 2)
    (tmp_path / "checkpoint-2" / "config.yaml").write_text(config_text(run))
    moved = load_config([*flags, "--model.path", str(tmp_path / "moved")], FinetuningConfig)
    check_options(moved, tmp_path / "checkpoint-2")
    own = {"continued": "ema_decay 0.5", "sft": "loss_type dft", "dpo": "beta 0.7", "grpo": "temperature 0.7"}[trainer]
    name, value = own.split()
    for changed, key in (([f"--training.{name}", value], f"training.{name}"), (["--peft.rank", "3"], "peft.rank")):
        with pytest.raises(ValueError, match=f"has other options: {key} is"):
            check_options(load_config([*flags, *changed], FinetuningConfig), tmp_path / "checkpoint-2")
    config.write_text(configs.to_yaml({**configs.read_yaml(config), "peft": None}))
    (tmp_path / "checkpoint-2" / "config.yaml").write_text(config_text(load_config(flags, FinetuningConfig)))
    with pytest.raises(ValueError, match=r"has other options: model\.path is"):
        check_options(load_config([*flags, "--model.path", "moved"], FinetuningConfig), tmp_path / "checkpoint-2")


def test_a_run_of_another_kind(base, tmp_path):
    run = load_config(["--config", str(write_tuning_config(tmp_path, tmp_path / "base"))], FinetuningConfig)
    with pytest.raises(ValueError, match="has other options: trainer is 'pretrain' there and 'sft' here"):
        check_options(run, base / "checkpoint-5")


# ------------------------------------------------------------------------------------------- checkpoints of older code


def old(folder: Path, base: Path) -> Path:
    """A checkpoint without a record of its options, in the folder of its run."""
    run = load(base)
    save_whole(folder / "checkpoint-5", 5)
    run.save(folder / "config.yaml")
    return folder / "checkpoint-5"


def test_the_file_of_the_run_stands_for_that_of_an_old_checkpoint(base, tmp_path, caplog):
    checkpoint = old(tmp_path, base)
    check_options(load(base), checkpoint)
    assert f"checkpoint-5 has no config.yaml; its options are taken to be those of {tmp_path}" in caplog.text
    with pytest.raises(ValueError, match=r"training\.seed is 42 there and 43 here"):
        check_options(load(base, "--training.seed", "43"), checkpoint)


def test_where_nothing_is_known_a_warning_says_so(base, tmp_path, caplog):
    checkpoint = old(tmp_path, base)
    (tmp_path / "config.yaml").unlink()
    check_options(load(base, "--training.seed", "43"), checkpoint)
    assert "has no config.yaml: whether its run had the same data, seed and options is not known" in caplog.text


def test_younger_options_have_their_defaults_in_an_older_file(base, tmp_path):
    """Those of sources too, which are items of a list."""
    checkpoint = old(tmp_path, base)
    tree = configs.read_yaml(tmp_path / "config.yaml")
    del tree["training"]["allow_changes"], tree["training"]["ema_decay"], tree["data"]["cfg_dropout"]
    for source in tree["data"]["train"]:
        del source["augment"], source["role"]
    (tmp_path / "config.yaml").write_text(configs.to_yaml(tree))
    check_options(load(base), checkpoint)


def test_options_that_are_gone_do_not_hinder_the_comparison(base, tmp_path):
    checkpoint = old(tmp_path, base)
    tree = configs.read_yaml(tmp_path / "config.yaml")
    tree["training"]["gone"] = 3
    (tmp_path / "config.yaml").write_text(configs.to_yaml(tree))
    with pytest.raises(ValueError, match=r"has other options: training\.gone is 3 there and None here"):
        check_options(load(base), checkpoint)


# ------------------------------------------------------------------------------------------------ DeepSpeed and ranks


def test_what_the_file_of_deepspeed_says_is_compared(base, tmp_path):
    """Not its name: another content under the same name is another run, and the same under another name is not."""
    run, content = load(base), '{"zero_optimization": {"stage": 1}, "steps_per_print": 10}'
    (tmp_path / "mine.json").write_text(content)

    def of(name):
        training = {**run.resolved["training"], "deepspeed": str(tmp_path / name)}
        return replace(run, resolved={**run.resolved, "training": training})

    save_whole(tmp_path / "checkpoint-5", 5)
    (tmp_path / "checkpoint-5" / "config.yaml").write_text(config_text(of("mine.json")))
    (tmp_path / "other.json").write_text(content.replace("10", "20"))
    check_options(of("other.json"), tmp_path / "checkpoint-5")
    (tmp_path / "mine.json").write_text(content.replace("1}", "2}"))
    with pytest.raises(ValueError, match=r"training\.deepspeed\.zero_optimization\.stage is 1 there and 2 here"):
        check_options(of("mine.json"), tmp_path / "checkpoint-5")
    with pytest.raises(ValueError, match=r"training\.deepspeed is \{'zero_optimization'.* there and None here"):
        check_options(run, tmp_path / "checkpoint-5")


def test_another_number_of_ranks_needs_leave(base, tmp_path, caplog):
    checkpoint = old(tmp_path, base)
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    (checkpoint / "rng_state_1.pth").write_bytes((checkpoint / "rng_state_0.pth").read_bytes())
    flags = ["--training.output_dir", str(tmp_path), "--training.resume_from_checkpoint", "true"]
    with pytest.raises(ValueError, match="checkpoint-5 is of 2 ranks, and this run has 1; start as many, or add"):
        find_start(load(base, *flags))
    with caplog.at_level(logging.INFO):
        start = find_start(load(base, *flags, "--training.allow_changes", "true"))
    assert start.checkpoint == str(checkpoint) and "ranks: 2 -> 1, from here on" in caplog.text


def test_another_number_of_ranks_needs_none_where_an_update_has_as_many_rows(base, tmp_path, caplog):
    """Two ranks of 4 rows are one of 8, or one of 4 that are accumulated twice; nothing else may differ."""
    checkpoint = old(tmp_path, base)
    (checkpoint / "config.yaml").write_text((base / "checkpoint-5" / "config.yaml").read_text())
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    (checkpoint / "rng_state_1.pth").write_bytes((checkpoint / "rng_state_0.pth").read_bytes())
    flags = ["--training.output_dir", str(tmp_path), "--training.resume_from_checkpoint", "true"]
    rows = load(base).training.per_device_train_batch_size
    for same in (
        ["--training.per_device_train_batch_size", str(2 * rows)],
        REFUSED["training.gradient_accumulation_steps"],
    ):
        caplog.clear()
        with caplog.at_level(logging.INFO):
            assert find_start(load(base, *flags, *same)).checkpoint == str(checkpoint)
        assert "ranks: 2 -> 1, from here on" in caplog.text
        with pytest.raises(ValueError, match=r"has other options: training\.seed is 42 there and 43 here"):
            find_start(load(base, *flags, *same, *REFUSED["training.seed"]))


def test_another_number_of_ranks_needs_the_same_batches_where_they_are_made_by_tokens(base, tmp_path):
    """Two ranks are one that accumulates two, and not one of at most twice as many rows, whose batches are others."""
    checkpoint = old(tmp_path, base)
    tokens = ["--training.max_tokens_per_batch", "80"]
    (checkpoint / "config.yaml").write_text(config_text(load(base, *tokens)))
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    (checkpoint / "rng_state_1.pth").write_bytes((checkpoint / "rng_state_0.pth").read_bytes())
    flags = ["--training.output_dir", str(tmp_path), "--training.resume_from_checkpoint", "true", *tokens]
    rows = load(base).training.per_device_train_batch_size
    accumulated = find_start(load(base, *flags, *REFUSED["training.gradient_accumulation_steps"]))
    assert accumulated.checkpoint == str(checkpoint)
    with pytest.raises(ValueError, match="checkpoint-5 is of 2 ranks, and this run has 1; start as many, or add"):
        find_start(load(base, *flags, "--training.per_device_train_batch_size", str(2 * rows)))
