"""YAML that would run for minutes, fill the memory, or mean something else than it says."""

import json
import os
import time
from functools import partial

import pytest
import yaml

from configs import load_config, load_run_config, read_yaml, strict_yaml
from configs.finetuning import FinetuningConfig

NINES = "".join(f"k{n}: &k{n} [{', '.join([f'*k{n - 1}'] * 9)}]\n" for n in range(1, 12))
BOMB = f"k0: &k0 [x, x, x]\n{NINES}model: *k11\n"
MERGES = "k0: &k0 {x: 1}\n" + "".join(f"k{n}: &k{n} {{<<: [*k{n - 1}, *k{n - 1}]}}\n" for n in range(1, 40))
REFUSED = {
    BOMB: "20000 values",
    MERGES: "20000 values",
    "a: [" + "1, " * 30_000 + "]": "20000 values",
    "a: " + "[" * 100_000: "32 lists and mappings",
    "- " * 100_000: "32 lists and mappings",
    "a: {" + "b: {" * 40 + "}" * 41: "32 lists and mappings",
    "&a [*a]": "an alias stands within what it stands for",
    "a: !!python/object/apply:os.system [ls]": "'python/object/apply:os.system' are not read",
    "a: !!binary aGk=": "'binary' are not read",
    "a: !!set {b}": "'set' are not read",
    "a: !!timestamp 2026-01-01": "'timestamp' are not read",
    "a: !!omap [b: 1]": "'omap' are not read",
    "a: !own 1": "could not determine a constructor for the tag '!own'",
    "a: !!int x": "the type that its tag names",
    "a: !!bool maybe": "the type that its tag names",
    "a: !!float x": "the type that its tag names",
    "a: 9223372036854775808": "more than 64 bits",
    "a: " + "9" * 5000: "more than 64 bits",
    "a: 1" + ":30" * 2000: "more than 64 bits",
    "a: 1\nb: 2\na: 3": "line 3: key 'a' is there twice",
    "? [a]\n: 1": "a key is a list",
    "a: 1\n---\nb: 2": "single document",
    'a: "\\ud800"': "half a character",
    "a: \x07": "not allowed",
}


@pytest.mark.parametrize("text", REFUSED, ids=lambda text: text[:16])
def test_what_no_configuration_needs_is_refused_at_once(text):
    before = time.process_time()
    with pytest.raises(yaml.YAMLError) as caught:
        strict_yaml.parse_yaml(text)
    assert REFUSED[text] in " ".join(str(caught.value).split())
    assert time.process_time() - before < 5


def test_what_a_configuration_has_is_read():
    text = "a: &a {x: 1, y: [1e-4, .5, true, null, no, 2026-01-01]}\nb: {<<: *a, y: !!str 5}\nc: *a\n"
    text += "d: -9223372036854775808"
    base = {"x": 1, "y": [1e-4, 0.5, True, None, "no", "2026-01-01"]}
    assert strict_yaml.parse_yaml(text) == {"a": base, "b": {"x": 1, "y": "5"}, "c": base, "d": -(2**63)}
    nested = "[" * strict_yaml.MAX_LEVELS + "]" * strict_yaml.MAX_LEVELS
    assert json.dumps(strict_yaml.parse_yaml(nested)) == nested[:-1].replace("][", "]")[:31] + "[]" + "]" * 31


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("model: {}\n".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        ("model: {}\n".encode("utf-16-be"), "not allowed"),
        (b"model: \xff\n", "not UTF-8 (invalid start byte at byte 7)"),
        (b"#" * (2**19 + 1), "longer than 512 KiB"),
        (b"\x00" * 100, "not allowed"),
        (b"", "expected sections"),
    ],
)
def test_files_that_hold_no_configuration(tmp_path, content, reason):
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ValueError) as caught:
        read_yaml(path)
    assert str(path) in str(caught.value) and reason in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_the_first_key(tmp_path):
    (tmp_path / "run.yaml").write_bytes("trainer: pretrain\n".encode("utf-8-sig"))
    assert read_yaml(tmp_path / "run.yaml") == {"trainer": "pretrain"}


def test_a_file_without_an_end_is_read_as_far_as_its_bound():
    with pytest.raises(ValueError, match="/dev/zero is longer than 512 KiB"):
        read_yaml("/dev/zero")


def test_a_pipe_that_nobody_writes_into_is_empty(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    with pytest.raises(ValueError, match=r"run\.yaml: expected sections"):
        read_yaml(tmp_path / "run.yaml")


BOMB_IN_A_LINE = "[&a [x,x,x,x,x,x,x,x,x,x], &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a], " + ", ".join(
    f"&{this} [{','.join([f'*{before}'] * 10)}]" for before, this in zip("bcdefgh", "cdefghi", strict=True)
)


@pytest.mark.parametrize("load", [load_config, partial(load_config, kind=FinetuningConfig)])
@pytest.mark.parametrize(
    ("argv", "reason"),
    [
        (["--data.train", BOMB_IN_A_LINE + "]"], "--data.train: line 1: there are more than 20000 values"),
        (["--data.train", "[" * 50_000], "--data.train: line 1: there are more than 32 lists"),
        (["--data.train", "[{kind: generated, task: addition, num_rows: 9" + "9" * 30 + "}]"], "more than 64 bits"),
        (["--training.seed=" + "9" * 5000], "--training.seed: line 1: 9999"),
        (["--training.lr_scheduler_kwargs", "!!set {a}"], "'set' are not read"),
        (["--training.lr_scheduler_kwargs", "{a: 1, a: 2}"], "key 'a' is there twice"),
        (["--data.train", "\udcff"], "--data.train: the value is not UTF-8"),
    ],
)
def test_values_on_the_command_line_are_refused_in_one_line(load, argv, reason, capsys):
    with pytest.raises(SystemExit) as caught:
        load(argv)
    (line,) = capsys.readouterr().err.splitlines()
    assert caught.value.code == 2 and reason in line and len(line) < 2000


def test_more_generated_rows_than_memory_holds_are_refused(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("data: {train: [{kind: generated, task: addition, num_rows: 100000001}]}\n")
    with pytest.raises(ValueError, match=r"num_rows is 100000001, more than memory holds; give at most 100000000"):
        load_run_config(path)


def test_numbers_that_are_not_finite_are_refused_within_mappings_too(capsys):
    with pytest.raises(SystemExit):
        load_config(["--training.lr_scheduler_kwargs", "{num_cycles: .nan}"])
    assert "training.lr_scheduler_kwargs: {'num_cycles': nan} is not finite" in capsys.readouterr().err
