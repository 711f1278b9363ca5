"""Old names of options still work, in files and on the command line, with one line that says the new one."""

import json
import re
from pathlib import Path

import pytest

from configs import flatten_keys, load_run_config, read_yaml, renamed, resolve
from configs.finetuning import FinetuningConfig
from inference.arguments import OneLineParser, counted
from model.terminal import say_new_name
from tests.test_config_reference import LINES

LINE = "{} is now called {}; the old name will not be known to the next version\n"


@pytest.fixture(autouse=True)
def nothing_said_yet() -> None:
    say_new_name.cache_clear()


@pytest.fixture
def yaml_file(tmp_path: Path):
    def write(text: str) -> str:
        (tmp_path / "old.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "old.yaml")

    return write


def test_old_keys_of_a_file(yaml_file, capsys) -> None:
    path = yaml_file("model: {recurrence: {exit_every: 3, exit_first_step: 2, mean_steps: 6}}")
    recurrence = load_run_config(path).model.recurrence
    assert (recurrence.exit_check_interval, recurrence.min_steps, recurrence.mean_steps) == (3, 2, 6)
    lines = [("exit_every", "exit_check_interval"), ("exit_first_step", "min_steps")]
    key = "model.recurrence."
    assert capsys.readouterr().err == "".join(LINE.format(f"{path}: {key}{old}", f"{key}{new}") for old, new in lines)
    assert load_run_config(path).resolved["model"]["recurrence"]["exit_check_interval"] == 3
    assert capsys.readouterr().err == ""  # it is said once


@pytest.mark.parametrize(
    ("flags", "key"),
    [
        (["--model.recurrence.exit_every", "3"], "model.recurrence"),
        (["--model.recurrence.exit-every=3"], "model.recurrence"),
        (["--model.recurrence", "{exit_every: 3}"], "model.recurrence"),
        (["--model", "{recurrence: {exit_every: 3}}"], "model.recurrence"),
        (
            ["--model.model_type", "megatransformer", "--model.text_config.recurrence.exit_every", "3"],
            "model.text_config.recurrence",
        ),
    ],
)
def test_old_names_of_flags(flags, key, capsys) -> None:
    group = resolve(flags)["model"]
    assert group.get("text_config", group)["recurrence"]["exit_check_interval"] == 3
    assert capsys.readouterr().err == LINE.format(f"{key}.exit_every", f"{key}.exit_check_interval")


def test_old_keys_in_lists_and_in_files_of_fine_tuning(yaml_file, capsys, monkeypatch) -> None:
    monkeypatch.setattr(renamed, "RENAMED", {"data.train.amount": "num_rows", "peft.r": "rank"})
    train = "data: {train: [{kind: generated, task: addition, amount: 7}]}"
    path = yaml_file(f"model: {{path: there}}\npeft: {{r: 2}}\n{train}")
    run = load_run_config(path)
    assert isinstance(run, FinetuningConfig)
    assert (run.peft.rank, run.data.train[0].num_rows) == (2, 7)
    said = [("peft.r", "peft.rank"), ("data.train.amount", "data.train.num_rows")]
    assert capsys.readouterr().err == "".join(LINE.format(f"{path}: {old}", new) for old, new in said)


def test_both_names_at_once_are_refused(yaml_file) -> None:
    path = yaml_file("model: {recurrence: {exit_every: 3, exit_check_interval: 2}}")
    with pytest.raises(ValueError, match=r"old.yaml: model\.recurrence\.exit_every is an old name of exit_check_int"):
        read_yaml(path)


def test_the_first_rank_speaks(capsys, monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert resolve(["--model.recurrence.exit_every", "3"])["model"]["recurrence"]["exit_check_interval"] == 3
    assert capsys.readouterr().err == ""


def test_old_flags_of_small_commands(capsys) -> None:
    parser = OneLineParser(prog="command", renamed={"--old": "--new"})
    parser.add_argument("--new", type=counted("a number"))
    for argv in (["--old", "3"], ["--old=3"]):
        assert parser.parse_args(argv).new == 3
    assert capsys.readouterr().err == LINE.format("--old", "--new")
    with pytest.raises(SystemExit):
        parser.parse_args(["--old", "0"])
    assert capsys.readouterr().err == "command: error: argument --new: 0 is less than 1: give a number.\n"


def test_each_old_name_is_gone_and_each_new_one_is_an_option() -> None:
    keys = set(flatten_keys(resolve([])))
    for old, new in renamed.RENAMED.items():
        new_key = ".".join([*old.split(".")[:-1], new])
        assert any(f".{new_key}." in f".{key}." for key in keys), new_key
        assert not any(f".{old}." in f".{key}." for key in keys), old


GONE = """
callbacks:
  samples: {prompts: [a], do_sample: false, temperature: 0.8}
  throughput: {enabled: true}
  non_finite: {keep_batches: 64}
"""


def test_options_that_are_gone_may_have_the_value_that_is_left(yaml_file, capsys) -> None:
    run = load_run_config(yaml_file(GONE))
    assert run.resolved == load_run_config(yaml_file("callbacks: {samples: {prompts: [a]}}")).resolved
    flags = ["--callbacks.samples.do-sample", "false", "--callbacks.throughput", "{enabled: true}"]
    assert resolve([*flags, "--callbacks.non_finite.keep_batches=64"]) == resolve([])
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("given", "flags"),
    [
        ({"callbacks": {"samples": {"do_sample": True}}}, ["--callbacks.samples.do_sample", "true"]),
        ({"callbacks": {"throughput": {"enabled": False}}}, ["--callbacks", "{throughput: {enabled: false}}"]),
        ({"callbacks": {"non_finite": {"keep_batches": 8}}}, ["--callbacks.non_finite.keep_batches=8"]),
    ],
)
def test_options_that_are_gone_have_no_other_value(given, flags, yaml_file) -> None:
    ((key, value),) = flatten_keys(given).items()
    path = yaml_file(json.dumps(given))
    message = f"{key} is {value!r}, but this option is gone, and is always {renamed.REMOVED[key]!r}; remove it"
    with pytest.raises(ValueError, match=rf"old.yaml: {re.escape(message)}$"):
        read_yaml(path)
    with pytest.raises(ValueError, match=rf"^{re.escape(key)} is .*, but this option is gone, and is always"):
        resolve(flags)


def test_each_option_that_is_gone_is_none() -> None:
    keys = {name for line in LINES for name in line.names}
    assert "callbacks.samples.prompts" in keys
    for old in renamed.REMOVED:
        assert not any(f".{key}".endswith(f".{old}") for key in keys), old
