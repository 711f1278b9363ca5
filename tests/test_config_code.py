"""Code that a configuration file names runs only where the command line allows it."""

import re
import sys
from pathlib import Path

import pytest
import torch
import yaml

import finetune
import pretrain
from configs import load_config, load_run_config
from configs.finetuning import FinetuningConfig
from tests.test_pretrain import write_config

MODULE = """
from pathlib import Path

import torch

Path({mark!r}).touch()


def build(groups, args, model):
    return torch.optim.SGD(groups, lr=args.learning_rate)
"""


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that is written when code_of_others is imported."""
    (tmp_path / "code").mkdir()
    (tmp_path / "code/code_of_others.py").write_text(MODULE.format(mark=str(tmp_path / "it was run")))
    monkeypatch.syspath_prepend(str(tmp_path / "code"))
    monkeypatch.delitem(sys.modules, "code_of_others", raising=False)
    return tmp_path / "it was run"


@pytest.fixture
def optimizer_run(tmp_path) -> list[str]:
    """Flags of a run whose file names an optimizer of others."""
    path = write_config(tmp_path, training={"optimizer": "code_of_others:build"})
    return ["--config", str(path), "--training.output_dir", str(tmp_path / "out")]


def reward_run(folder: Path, *names: str) -> list[str]:
    """Flags of a run whose file names rewards."""
    training = {"rewards": list(names), "output_dir": str(folder / "out"), "use_cpu": True}
    path = folder / "tuning.yaml"
    path.write_text(yaml.safe_dump({"trainer": "grpo", "model": {"path": "some/run"}, "training": training}))
    return ["--config", str(path)]


def refused(main, argv, capsys) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    err = capsys.readouterr().err
    assert re.fullmatch(r"error: [^\n]+\n", err), err
    return err


@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--allow-code", "false"], ["--training.seed", "3"]])
def test_an_optimizer_of_others_in_a_file_is_refused(optimizer_run, mark, tmp_path, capsys, flags):
    line = refused(pretrain.main, [*optimizer_run, *flags], capsys)
    for part in ("run.yaml: training.optimizer: 'code_of_others:build'", "--allow-code"):
        assert part in line
    assert not mark.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", [["code_of_others:build"], ["evaluation.rewards:exact_answer", "os.path:exists"]])
def test_rewards_of_others_in_a_file_are_refused(mark, tmp_path, capsys, names):
    line = refused(finetune.main, reward_run(tmp_path, *names), capsys)
    for part in (f"tuning.yaml: training.rewards: {names[-1]!r}", "--allow-code"):
        assert part in line
    assert not mark.exists() and not (tmp_path / "out").exists()


def test_rewards_of_this_project_need_no_flag(tmp_path):
    names = ["evaluation.rewards:exact_answer", "evaluation.rewards:close_answer"]
    assert load_config(reward_run(tmp_path, *names), FinetuningConfig).training.rewards == names


@pytest.mark.parametrize("flag", ["--allow-code", "--allow_code=true"])
def test_what_is_allowed_trains_and_allows_nothing_further(optimizer_run, mark, tmp_path, capsys, flag):
    """The file that such a run leaves behind is refused like the one it came from, and evaluated without its code."""
    assert pretrain.main([*optimizer_run, "--training.max_steps", "1", flag]) == 0
    assert mark.exists()
    mark.unlink()
    for left in (tmp_path / "out").rglob("config.yaml"):
        assert "allow_code" not in left.read_text()
        argv = ["--config", str(left), "--training.output_dir", str(tmp_path / "again")]
        assert "training.optimizer: 'code_of_others:build'" in refused(pretrain.main, argv, capsys)
        assert load_run_config(left).resolved["training"]["optimizer"] == "code_of_others:build"
        assert load_config([*argv, flag]).training.optimizer == "code_of_others:build"
    states = torch.load(next((tmp_path / "out").glob("*/optimizer.pt")), weights_only=True)
    assert "momentum" in states["param_groups"][0]


def test_the_command_line_needs_no_flag(optimizer_run, tmp_path):
    """It replaces what a file names, too."""
    named = ["--training.optimizer", "elsewhere:build"]
    assert load_config([*optimizer_run, *named]).training.optimizer == "elsewhere:build"
    assert load_config([*optimizer_run, "--training.optimizer", "null"]).training.optimizer is None
    rewards = ["--training.rewards", "[elsewhere:one]"]
    assert load_config([*reward_run(tmp_path, "a:b"), *rewards], FinetuningConfig).training.rewards == ["elsewhere:one"]


def test_a_file_cannot_allow_its_own_code(optimizer_run, tmp_path, capsys):
    (tmp_path / "more.yaml").write_text("allow_code: true\n")
    line = refused(load_config, [*optimizer_run, "--config", str(tmp_path / "more.yaml")], capsys)
    assert "more.yaml: allow_code: a file cannot allow its own code; give --allow-code instead" in line
