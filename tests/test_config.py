"""From YAML files and flags to configuration classes, and what is said about those that are wrong."""

import json
import math
import os
import re
import socket
import subprocess
import sys
import typing
from functools import partial
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import configs
from configs import RunConfig, load_config, load_run_config, loader, one_line_errors, runs
from configs.finetuning import FinetuningConfig
from configs.reference import classes_of_run
from inference import logs
from model import MegaTransformerTextConfig, RecurrenceConfig, versions
from tests.processes import run_python
from trainers import RecurrentTrainingArguments, arguments

ROOT = Path(__file__).parent.parent
ON_CPU = ["--training.use_cpu", "true", "--training.report_to", "none"]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test runs in an empty folder, as a process that no launcher started."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return folder


@pytest.fixture
def yaml_file(tmp_path: Path):
    """Writes a YAML file outside the current folder and returns its path."""

    def write(text: str, name: str = "run.yaml") -> str:
        (tmp_path / name).write_text(text, encoding="utf-8")
        return str(tmp_path / name)

    return write


@pytest.fixture
def refused(capsys: pytest.CaptureFixture, empty_folder: Path):
    """Loads what must be refused: exit code 2, one line on stderr (returned), nothing printed, nothing written."""

    def load(*argv: str) -> str:
        with pytest.raises(SystemExit) as error:
            load_config(argv)
        assert error.value.code == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert list(empty_folder.iterdir()) == []
        assert re.fullmatch(r"error: [^\n]+\n", err), err
        return err

    return load


def load(*argv: str) -> RunConfig:
    return load_config([*argv, *ON_CPU])


# ------------------------------------------------------------ bad input

BAD_FLAGS = {
    "unknown key": ("--training.learning_rat 1", "training.learning_rat", "'1'", "did you mean learning_rate?"),
    "unknown nested key": ("--model.recurrence.mean_step 4", "model.recurrence.mean_step", "did you mean mean_steps?"),
    "unknown section": ("--modle.hidden_size 4", "modle", "did you mean model?"),
    "abbreviated config": ("--conf a.yaml", "conf", "a.yaml", "did you mean config?"),
    "unknown key in a value": ("--model.recurrence {mean_step:4}", "model.recurrence", "mean_step"),
    "unknown key in a list": ("--data.train [{kind:files,pathz:[a]}]", "data.train[0].pathz", "did you mean path"),
    "stray word": ("fast", "'fast'"),
    "missing value": ("--training.max_steps", "--training.max_steps", "value is missing"),
    "missing file": ("--config nowhere.yaml", "nowhere.yaml", "No such file"),
    "folder for a file": ("--config .", "--config .", "Is a directory"),
    "file for a section": ("--data data.yaml", "data: expected keys", "'data.yaml'"),
    "word for int": ("--training.max_steps many", "training.max_steps", "expected int", "many"),
    "float for int": ("--training.max_steps 2.5", "training.max_steps", "expected int", "2.5"),
    "bool for int": ("--model.hidden_size true", "model.hidden_size", "expected int", "True"),
    "word for float": ("--training.learning_rate fast", "training.learning_rate", "expected float", "fast"),
    "word for optional int": ("--model.num_key_value_heads all", "model.num_key_value_heads", "int, null", "all"),
    "word for bool": ("--model.qk_norm maybe", "model.qk_norm", "expected bool", "maybe"),
    "word for list": ("--callbacks.samples.prompts Once", "callbacks.samples.prompts", "expected list", "Once"),
    "choice": ("--model.norm batchnorm", "model.norm", "'batchnorm'", "known: rmsnorm, layernorm"),
    "nested choice": (
        "--model.recurrence.injection cat",
        "model.recurrence.injection",
        "'cat'",
        "known: concat, add, gate",
    ),
    "position name": ("--model.position_embedding alibbi", "position_embedding", "'alibbi'", "did you mean alibi?"),
    "choice in a list": (
        "--data.train [{kind:filez,paths:[a]}]",
        "data.train",
        "kind",
        "'filez'",
        "did you mean files?",
    ),
    "trainer": ("--trainer pretrian", "trainer", "'pretrian'", "known: pretrain"),
    "model type": ("--model.model_type llama", "model.model_type", "'llama'", "known: megatransformer_text"),
    "schedule": (
        "--training.lr_scheduler_type cosinus",
        "training.lr_scheduler_type",
        "'cosinus'",
        "did you mean cosine?",
    ),
    "optimizer": ("--training.optim adamm_torch", "training.optim", "'adamm_torch'", "did you mean adamw_torch?"),
    "log level": ("--log-level loud", "log_level", "'loud'", "known: debug, info, warning, error"),
    "range": ("--model.hidden_size -8", "model.hidden_size", "-8", "1"),
    "nested range": ("--model.recurrence.mean_steps 0", "model.recurrence.mean_steps", "got 0"),
    "range in data": ("--data.validation_fraction 1.5", "data", "validation_fraction is 1.5", "between 0 and 1"),
    "range in callbacks": ("--callbacks.samples.every_steps 0", "callbacks.samples", "every_steps is 0", "at least 1"),
    "range in training": ("--training.token_correlation_alarm 3", "training", "token_correlation_alarm", "3"),
    "range in a list": ("--data.train [{kind:files,paths:[a],weight:-1}]", "data.train[0]", "weight is -1", "positive"),
    "heads": ("--model.num_attention_heads 3", "model", "hidden_size (512)", "num_attention_heads (3)"),
    "key heads": ("--model.num_key_value_heads 3", "model", "num_attention_heads (8)", "num_key_value_heads (3)"),
    "odd rope": ("--model.head_dim 5", "model", "rope", "head_dim (5)"),
    "no layer": ("--model {num_prelude_layers:0,num_core_layers:0,num_coda_layers:0}", "model", "all 0"),
    "table": (
        "--model {position_embedding:learned,max_position_embeddings:32}",
        "data.block_size: 256",
        "32 positions",
        "raise",
    ),
    "deepspeed": (
        "--training.deepspeed zero9",
        "training.deepspeed",
        "zero9",
        "zero0, zero1, zero2, zero3, zero3_offload",
    ),
    "key that a library refuses": ("--training.accelerator_config {bogus:1}", "training: ", "'bogus'"),
    "file that a library misses": ("--training.accelerator_config no.json", "training: ", "No such file", "no.json"),
    "repetition in a value": ("--model {norm:rmsnorm,norm:layernorm}", "model", "norm"),
}


@pytest.mark.parametrize(("flags", "fragments"), [(flags, rest) for flags, *rest in BAD_FLAGS.values()], ids=BAD_FLAGS)
def test_bad_flags_are_one_line_that_names_key_value_and_fix(refused, flags: str, fragments: list[str]) -> None:
    """The issue's bad input, as far as configuration can know of it."""
    flag, *value = flags.split(" ")
    message = refused(flag, *(part.replace(":", ": ") for part in value))
    for fragment in fragments:
        assert fragment in message
    assert "Traceback" not in message and "__main__" not in message


BAD_FILES = {
    "unknown key": ("training: {bogus: 1}", "training.bogus", "(1)"),
    "unknown section": ("trainig: {max_steps: 1}", "trainig", "did you mean training?"),
    "unknown key, two levels deep": (
        "model: {recurrence: {mean_step: 4}}",
        "model.recurrence.mean_step",
        "(4)",
        "mean_steps",
    ),
    "unknown key, two levels deep, callbacks": (
        "callbacks: {samples: {prompt: []}}",
        "callbacks.samples.prompt",
        "prompts",
    ),
    "unknown key in a list": (
        "data: {train: [{kind: files, paths: [a]}, {kid: hub}]}",
        "data.train[1].kid",
        "'hub'",
        "kind",
    ),
    "another config": ("config: other.yaml", "config", "other.yaml"),
    "section that is a word": ("training: fast", "training", "'fast'"),
    "section that is a number": ("model: {recurrence: 3}", "model.recurrence", "got 3"),
    "section left empty": ("training:\nmodel: {}", "training", "got None"),
    "list that is none": ("data: {train: {kind: files}}", "data.train", "expected a list"),
    "type": ("training: {max_steps: [1]}", "training.max_steps", "expected int"),
    "string for bool": ("training: {bf16: 1}", "training.bf16", "expected bool", "1"),
    "number for string": ("training: {output_dir: 12}", "training.output_dir", "str", "12"),
    "null for int": ("training: {max_steps: null}", "training.max_steps", "null", "leave the line out"),
    "not a number": ("training: {learning_rate: .nan}", "training.learning_rate", "expected float"),
    "empty file": ("", "expected sections"),
    "list": ("- model", "expected sections"),
    "syntax": ("model: {norm: [", "not valid YAML", "line 1"),
    "key twice": ("training: {seed: 1}\nmodel: {}\ntraining: {seed: 2}", "line 3", "'training'", "twice"),
    "nested key twice": (
        "model:\n  recurrence:\n    mean_steps: 1\n    mean_steps: 2",
        "line 4",
        "'mean_steps'",
        "twice",
    ),
    "range": ("model: {recurrence: {step_sigma: -1.0}}", "model.recurrence.step_sigma", "-1.0"),
    "unreadable bytes": ("model: {norm: \udcff}", "not UTF-8"),
}


@pytest.mark.parametrize(("text", "fragments"), [(text, rest) for text, *rest in BAD_FILES.values()], ids=BAD_FILES)
def test_bad_files_are_one_line_that_names_file_or_key(
    refused, tmp_path: Path, text: str, fragments: list[str]
) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    message = refused("--config", str(path))
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize(
    "build",
    [
        lambda: RecurrenceConfig(mean_step=4),
        lambda: MegaTransformerTextConfig(recurrence={"mean_step": 4}),
    ],
)
def test_the_same_typo_through_the_python_interface(build) -> None:
    """Nested keys are checked without YAML as well; those of a file are left out with a warning."""
    with pytest.raises(ValueError, match="mean_step"):
        build()


def test_no_option_can_be_abbreviated(refused) -> None:
    """E3: every option without its last letter is unknown, unless that is another option."""
    parser = loader.build_parser(RunConfig.layout([]))
    options = {
        flag for action in parser._actions for flag in action.option_strings if flag.count(".") and flag[-1] != "+"
    }
    options -= {flag for flag in options if flag.endswith(".help")}
    assert {"--training.learning_rate", "--model.recurrence.mean_steps", "--callbacks.samples.prompts"} <= options
    for option in sorted({option[:-1] for option in options} - options):
        assert option[2:] in refused(f"{option}=1")


def test_a_file_executes_nothing(refused, yaml_file, empty_folder: Path) -> None:
    for tag in ("python/object/apply:os.mkdir", "python/object/new:os.mkdir"):
        path = yaml_file(f"training: {{seed: !!{tag} ['{empty_folder}/made']}}")
        assert "not valid YAML" in refused("--config", path)


def test_nothing_touches_a_device_before_all_is_checked(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self) -> None:
        raise AssertionError("training arguments were built")

    monkeypatch.setattr(RecurrentTrainingArguments, "__post_init__", fail)
    refused("--callbacks.samples.every_steps", "0", "--training.output_dir", "made")
    refused("--training.lr_scheduler_type", "cosinus", "--training.output_dir", "made")


def test_the_first_rank_of_a_machine_speaks_first(refused, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher ends all ranks with the first one that leaves: another one says its error after the time in which
    that happens.
    """
    waits: list[float] = []
    monkeypatch.setattr(runs.time, "sleep", waits.append)
    said = refused("--model.norm", "batchnorm")
    assert not waits
    monkeypatch.setenv("LOCAL_RANK", "1")

    def silent(seconds: float) -> None:
        assert capsys.readouterr().err == ""
        waits.append(seconds)

    monkeypatch.setattr(runs.time, "sleep", silent)
    assert refused("--model.norm", "batchnorm") == said
    assert waits == [30]


def test_a_message_of_another_form_is_passed_on() -> None:
    assert loader.describe_error("something else went wrong", {}) == "something else went wrong"


# ------------------------------------------------------------ values and order


def test_later_files_and_flags_override_earlier_ones(yaml_file) -> None:
    first = yaml_file(
        "training: {seed: 1, max_steps: 10, learning_rate: 1e-4}\nmodel: {recurrence: {mean_steps: 2}}", "1.yaml"
    )
    second = yaml_file("training: {seed: 2}\nmodel: {recurrence: {backprop_steps: 3}}", "2.yaml")
    run = load("--training.max_steps", "5", "--config", first, "--config", second, "--model.recurrence.mean_steps=9")
    assert (run.training.seed, run.training.max_steps, run.training.learning_rate) == (2, 10, 1e-4)
    assert (run.model.recurrence.mean_steps, run.model.recurrence.backprop_steps) == (9, 3)
    assert load("--config", second, "--config", first).training.seed == 1
    assert load("--config", first, "--training.seed", "7").training.seed == 7
    two = yaml_file("data: {train: [{kind: files, paths: [a], weight: 2}, {kind: files, paths: [b]}]}")
    (source,) = load("--config", two, "--data.train", "[{kind: hub, path: x/y}]").data.train
    assert (source.kind, source.path, source.paths, source.weight) == ("hub", "x/y", [], 1.0)  # lists are not merged


def test_values_mean_what_they_say(yaml_file) -> None:
    """Floats without a point, an int for a float, null, words that YAML 1.1 takes for booleans or times."""
    run = load(
        "--config",
        yaml_file(
            "training: {learning_rate: 1e-4, max_grad_norm: 2, eval_strategy: no, save_total_limit: null, "
            "run_name: 2026-01-01T10:00:00, lr_scheduler_kwargs: {min_lr: 2e-5}}\n"
            "model: {attn_logit_softcapping: 50, num_key_value_heads: null}\n"
        ),
    )
    assert run.training.learning_rate == 1e-4 and run.training.lr_scheduler_kwargs == {"min_lr": 2e-5}
    assert run.training.max_grad_norm == 2.0 and isinstance(run.training.max_grad_norm, float)
    assert run.training.eval_strategy == "no" and run.training.save_total_limit is None
    assert run.training.run_name == "2026-01-01T10:00:00"
    assert run.model.attn_logit_softcapping == 50.0
    assert (
        load(
            "--config", yaml_file("training: {save_total_limit: 3}"), "--training.save_total_limit", "null"
        ).training.save_total_limit
        is None
    )


def test_a_part_that_is_null_is_not_there(yaml_file, tmp_path) -> None:
    """As a resolved file writes it; a later file can bring the part back, or take it away."""
    deaf = yaml_file("model: {model_type: megatransformer, vision_config: {hidden_size: 32}, audio_config: null}")
    run = load("--config", deaf)
    assert run.model.audio_config is None and run.model.vision_config.hidden_size == 32
    run.save(tmp_path / "resolved.yaml")
    again = load("--config", tmp_path / "resolved.yaml")
    assert again.resolved == run.resolved and again.model.audio_config is None
    hearing = yaml_file("model: {audio_config: {hidden_size: 16}, vision_config: null}", "hearing.yaml")
    run = load("--config", deaf, "--config", hearing)
    assert run.model.vision_config is None and run.model.audio_config.hidden_size == 16


@pytest.mark.parametrize("flags", [["--local_rank=1"], ["--local-rank=1"], ["--local_rank", "1"]])
def test_the_launchers_local_rank_is_ignored(flags: list[str]) -> None:
    """DeepSpeed puts it before the user's flags; LOCAL_RANK of the environment rules."""
    assert load(*flags, "--training.seed", "3") == load("--training.seed", "3")


def test_model_type_is_read_first_wherever_it_stands(yaml_file, refused) -> None:
    good, bad = (
        yaml_file("model: {model_type: megatransformer_text}", "good.yaml"),
        yaml_file("model: {model_type: gpt}", "bad.yaml"),
    )
    assert type(load("--config", bad, "--config", good).model) is MegaTransformerTextConfig
    assert "'gpt'" in refused("--config", good, "--config", bad)
    assert "'gpt'" in refused("--model", "{model_type: gpt, hidden_size: 8}")


# ------------------------------------------------------------ resolved YAML

EVERYTHING = """
trainer: pretrain
log_level: warning
model:
  hidden_size: 64
  num_key_value_heads: 4
  recurrence: {mean_steps: 3, state_init: zero}
tokenizer: {vocab_size: 300}
data:
  train:
    - {kind: files, paths: [texts/*.txt, /absolute/b.jsonl], weight: 2}
    - {kind: generated, task: addition, difficulty: [1, 3], loss_on: answer}
  block_size: 64
callbacks:
  samples: {prompts: ["a: b", "--x", "no", "1", "1e5", "2026-01-01", "null", "ünï\\n\\"q\\"", "#"], num_steps: [1]}
training: {learning_rate: 1e-5, max_steps: 7, lr_scheduler_type: cosine, output_dir: out, torch_compile: true}
"""


def test_the_resolved_file_alone_repeats_the_run(yaml_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was chosen is stored, not what was derived from it; from any folder the same classes come out."""
    run = load("--config", yaml_file(EVERYTHING), "--training.seed", "5", "--tokenizer.split_digits", "true")
    run.save(tmp_path / "run" / "config.yaml")
    monkeypatch.chdir("/")
    assert load_config(["--config", str(tmp_path / "run" / "config.yaml")]) == run
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    assert stored["training"]["torch_compile"] is True  # the class turns it off, to compile the units
    assert stored["model"]["head_dim"] is None and run.model.head_dim == 8
    assert stored["model"]["model_type"] == "megatransformer_text"
    assert stored["data"]["train"][0]["paths"] == [str(tmp_path / "texts/*.txt"), "/absolute/b.jsonl"]
    assert run.callbacks.samples.prompts[4:7] == ["1e5", "2026-01-01", "null"]
    assert run.training.seed == 5 and run.training.output_dir == "out"


def test_every_option_is_in_the_resolved_file() -> None:
    """Defaults too, so that a later default does not change an old run."""
    run = load()
    for name, section in (("model", run.model), ("data", run.data), ("training", run.training)):
        assert set(run.resolved[name]) - {"model_type"} == set(loader.option_types(type(section)))
    assert set(run.resolved["model"]["recurrence"]) == set(loader.option_types(RecurrenceConfig))


def test_secrets_are_no_option(refused) -> None:
    assert "training.hub_token" in refused("--training.hub_token", "hf_x")


def test_a_save_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    load("--training.seed", "1").save(path)
    before = path.read_text()

    def full(self: Path, text: str, **kwargs) -> None:
        with open(self, "w") as file:
            file.write(text[: len(text) // 2])
        raise OSError("No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(Path, "write_text", full)
        load("--training.seed", "2").save(path)
    assert path.read_text() == before


def test_a_run_is_read_without_its_training_arguments(yaml_file, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run from a machine with other devices, or with a DeepSpeed file that is not here, can be evaluated."""
    path = yaml_file("training: {deepspeed: /elsewhere/zero2.json, bf16: true}\nmodel: {hidden_size: 64}")
    run = load_run_config(path, ["--data.block_size", "32"])
    assert run.training is None and run.data.block_size == 32 and run.model.hidden_size == 64
    with pytest.raises(ValueError, match=r"data\.block_siz .*did you mean block_size"):
        load_run_config(path, ["--data.block_siz", "32"])


# ------------------------------------------------------------ paths


def test_paths_are_relative_to_the_file_that_names_them(yaml_file, tmp_path: Path, empty_folder: Path) -> None:
    """In flags they are relative to the current folder; names that are no path here stay names."""
    (tmp_path / "words").mkdir()
    (tmp_path / "set").mkdir()
    (tmp_path / "my.json").write_text(json.dumps({"train_micro_batch_size_per_gpu": "auto"}))
    sources = "[{kind: files, paths: [a.txt, ../b*.txt]}, {kind: hub, path: set}, {kind: hub, path: org/name}]"
    path = yaml_file(
        f"data: {{train: {sources}}}\ntokenizer: {{path: words}}\ntraining: {{output_dir: out, deepspeed: my.json}}"
    )
    resolved = configs.resolve(["--config", path])
    files, folder, name = resolved["data"]["train"]
    assert files["paths"] == [str(tmp_path / "a.txt"), str(tmp_path.parent / "b*.txt")]
    assert (folder["path"], name["path"]) == (str(tmp_path / "set"), "org/name")
    assert resolved["tokenizer"]["path"] == str(tmp_path / "words")
    assert resolved["training"]["deepspeed"] == str(tmp_path / "my.json")
    assert resolved["training"]["output_dir"] == "out"
    resolved = configs.resolve(
        ["--config", path, "--data.train", "[{kind: files, paths: [a.txt]}]", "--tokenizer.path", "gpt2"]
    )
    assert resolved["data"]["train"][0]["paths"] == [str(empty_folder / "a.txt")]
    assert resolved["tokenizer"]["path"] == "gpt2"


def test_a_pretrained_encoder_is_named_relative_to_the_file_too(yaml_file, tmp_path: Path, empty_folder: Path) -> None:
    (tmp_path.parent / "eyes").mkdir()
    (empty_folder / "ears").mkdir()
    media = "model_type: megatransformer, vision_config: {backbone: ../eyes}, audio_config: {backbone: org/ears}"
    resolved = configs.resolve(["--config", yaml_file(f"model: {{{media}}}")])["model"]
    assert resolved["vision_config"]["backbone"] == str(tmp_path.parent / "eyes")
    assert resolved["audio_config"]["backbone"] == "org/ears"
    flags = ["--config", yaml_file(f"model: {{{media}}}"), "--model.audio_config.backbone", "ears"]
    assert configs.resolve(flags)["model"]["audio_config"]["backbone"] == str(empty_folder / "ears")


@pytest.mark.parametrize("name", ["zero2", "zero2.json", str(ROOT / "configs/deepspeed/zero2.json")])
def test_deepspeed_files_are_found_by_name_from_anywhere(name: str) -> None:
    assert runs.find_deepspeed(name) == str(ROOT / "configs/deepspeed/zero2.json")


def test_a_missing_deepspeed_file_is_named(refused, yaml_file) -> None:
    message = refused("--config", yaml_file("training: {deepspeed: nets/zero2.json}"))
    assert "nets/zero2.json" in message and "zero3_offload" in message


def test_the_folder_of_another_model_is_refused(tmp_path: Path) -> None:
    output = ["--training.output_dir", str(tmp_path / "run")]
    run = load(*output, "--model.hidden_size", "64")
    runs.check_output_dir(run)
    run.save(tmp_path / "run" / "config.yaml")
    runs.check_output_dir(load(*output, "--model.hidden_size", "64", "--training.max_steps", "3"))
    for flags, key in (
        (["--model.hidden_size", "32"], "model.hidden_size is 64 there and 32 here"),
        (
            ["--model.hidden_size", "64", "--model.recurrence.injection", "add"],
            "model.recurrence.injection is 'concat' there",
        ),
        (["--model.hidden_size", "64", "--tokenizer.vocab_size", "999"], "tokenizer.vocab_size is 1024 there"),
    ):
        with pytest.raises(ValueError, match=re.escape(key)) as error:
            runs.check_output_dir(load(*output, *flags))
        assert str(tmp_path / "run") in str(error.value) and "choose another output_dir" in str(error.value)


def test_a_younger_option_does_not_make_another_model(tmp_path: Path) -> None:
    """A run folder from before an option was there has its default."""
    output = ["--training.output_dir", str(tmp_path)]
    run = load(*output)
    run.save(tmp_path / "config.yaml")
    before = yaml.safe_load((tmp_path / "config.yaml").read_text())
    del before["model"]["recurrence"]["injection"], before["model"]["qk_norm"], before["tokenizer"]["split_digits"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(before))
    runs.check_output_dir(run)
    with pytest.raises(ValueError, match=r"model\.recurrence\.injection is 'concat' there and 'add' here"):
        runs.check_output_dir(load(*output, "--model.recurrence.injection", "add"))


def test_an_output_folder_that_cannot_be_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in (str(tmp_path / "file"), str(tmp_path / "file" / "below"), ""):
        with pytest.raises(ValueError, match=f"{name}' is no folder that can be written; choose another"):
            runs.check_output_dir(load("--training.output_dir", name))


@pytest.mark.parametrize(("text", "reason"), [("{", "is not valid JSON"), ("[]", "holds a list, not an object")])
def test_a_damaged_deepspeed_file_is_named(refused, tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "mine.json").write_text(text)
    assert f"mine.json {reason}" in refused("--training.deepspeed", str(tmp_path / "mine.json"))


def test_errors_of_files_are_one_line_and_errors_of_ours_are_not(capsys) -> None:
    with pytest.raises(SystemExit) as stopped, one_line_errors():
        raise PermissionError(13, "Permission denied", "/data")
    assert stopped.value.code == 2
    assert capsys.readouterr().err == "error: [Errno 13] Permission denied: '/data'\n"
    with pytest.raises(KeyError), one_line_errors():
        raise KeyError("a mistake in the code")


# ------------------------------------------------------------ what is shipped


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_every_config_loads(path: Path) -> None:
    load_it = partial(load_config, kind=FinetuningConfig) if path.stem.startswith("finetune") else load_config
    run = load_it(["--config", str(path), *ON_CPU])
    assert run.training.output_dir == f"runs/{path.stem}" and run.training.max_steps > 0 and run.data.train


def test_the_plain_twin_differs_in_the_core_alone() -> None:
    """The same unique layers and the same of everything else, but for names and depths."""
    recurrent, plain = (
        configs.flatten_keys(configs.resolve(["--config", str(ROOT / f"configs/{name}_lm.yaml")]))
        for name in ("recurrent", "plain")
    )
    different = {key for key in recurrent if recurrent[key] != plain[key] and not key.startswith("model.recurrence.")}
    layers = {f"model.num_{part}_layers" for part in ("prelude", "core", "coda")}
    assert different <= layers | {"training.output_dir", "callbacks.samples.num_steps"}
    assert sum(recurrent[key] for key in layers) == sum(plain[key] for key in layers)
    assert plain["model.num_core_layers"] == 0 < recurrent["model.num_core_layers"]


@pytest.mark.parametrize("stage", [0, 1, 2, 3, "3_offload"])
def test_deepspeed_files_leave_to_the_yaml_what_it_says(stage: int | str) -> None:
    content = json.loads((ROOT / f"configs/deepspeed/zero{stage}.json").read_text())
    zero = content["zero_optimization"]
    assert zero["stage"] == int(str(stage)[0])
    assert ("offload_param" in zero, "offload_optimizer" in zero) == ((stage == "3_offload"),) * 2
    assert zero.get("stage3_gather_16bit_weights_on_model_save", False) == (zero["stage"] == 3)
    batch = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    assert all(content[key] == "auto" for key in batch)
    assert content["bf16"] == content["fp16"] == {"enabled": "auto"}
    assert "optimizer" not in content and "scheduler" not in content  # those of `training:` rule


def test_help_shows_the_docstrings(capsys) -> None:
    with pytest.raises(SystemExit) as end:
        load_config(["--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Mean number of core steps in training" in shown
    assert "Tokens in a row." in shown
    assert "Optimizer steps between samples" in shown


def test_each_option_of_ours_has_a_docstring() -> None:
    inherited = {f"training.{name}" for name in RecurrentTrainingArguments.__mro__[1].__dataclass_fields__}
    own = {f"training.{name}" for name in RecurrentTrainingArguments.__annotations__}
    for action in loader.build_parser(RunConfig.layout([]))._actions:
        if "." in action.dest and not action.dest.endswith(".help") and action.dest not in inherited - own:
            assert action.help and not action.help.startswith("(type"), action.dest


def test_print_config_prints_what_can_be_read_again(capsys, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        load_config(["--model.hidden_size", "64", "--training.learning_rate", "3e-4", "--print_config"])
    assert end.value.code == 0
    (tmp_path / "printed.yaml").write_text(capsys.readouterr().out)
    expected = configs.resolve(["--model.hidden_size", "64", "--training.learning_rate", "3e-4"])
    assert configs.resolve(["--config", str(tmp_path / "printed.yaml")]) == expected


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_launcher_reports_one_line_and_the_scripts_exit_code(empty_folder: Path) -> None:
    """Two ranks, one message, exit code 2, nothing written; the launcher puts --local_rank before the flags."""
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_accelerators", "2", str(ROOT / "pretrain.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [*command, "--training.learning_rat", "1"], cwd=empty_folder, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert result.stderr.count("unknown key training.learning_rat ('1'); did you mean learning_rate?") == 1
    assert len([line for line in result.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert "Traceback" not in result.stderr
    assert list(empty_folder.iterdir()) == []


# ------------------------------------------------------------ help, versions, completion, the launcher


@pytest.fixture
def ended(capsys: pytest.CaptureFixture):
    """Loads what answers and ends with exit code 0; returns what it printed."""

    def load(*argv: str, loader=load_config) -> str:
        with pytest.raises(SystemExit) as end:
            loader(argv)
        assert end.value.code == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return load


def test_help_of_a_section_has_its_options_and_no_others(ended, yaml_file) -> None:
    """Every option of the whole help that begins with the section's key, and nothing else; the class is the model's."""
    path = yaml_file("model: {model_type: megatransformer, vision_config: {}}")
    for given, section in (
        ((), "training"),
        ((), "model"),
        ((), "model.recurrence"),
        ((), "callbacks.samples"),
        (("--config", path), "model.vision_config"),
    ):
        whole, part = (
            set(re.findall(r"^  (--[\w.]+)", ended(*given, flag), flags=re.MULTILINE))
            for flag in ("--help", f"--{section}.help")
        )
        assert part == {flag for flag in whole if f"{flag}.".startswith(f"--{section}.")} - {"--model.model_type"}
        assert len(part) > 3
    tuned = ended("--trainer", "dpo", "--training.help", loader=partial(load_config, kind=FinetuningConfig))
    assert "--training.beta " in tuned and "--data." not in tuned


def test_help_of_no_section_names_the_nearest(refused) -> None:
    message = refused("--model.recurence.help")
    assert "--model.recurence.help: there is no such section; did you mean model.recurrence?" in message


def test_the_version_is_that_of_checkout_and_libraries(ended) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for load in (load_config, partial(load_config, kind=FinetuningConfig)):
        words = ended("--version", loader=load).split()
        assert words[0] == "MegaTransformer" and words[-4:-2] == ["torch", f"{torch.__version__},"]
        assert words[-2:] == ["transformers", transformers.__version__]
        found = words[1].removesuffix(",").removesuffix("+")
        assert words[1:4] == ["of", "unknown", "commit,"] if not commit else commit.startswith(found)


def test_the_version_outside_of_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "__file__", "/nowhere/versions.py")
    assert versions.commit() == "of unknown commit"
    monkeypatch.setenv("PATH", "")
    assert versions.commit() == "of unknown commit"


def test_the_schema_of_a_file_is_printed_for_editors(ended) -> None:
    """jsonargparse's; a shell's needs shtab, and comes the same way."""
    loader.build_parser.cache_clear()
    schema = json.loads(ended("--print_completion", "jsonschema"))
    loader.build_parser.cache_clear()  # printing leaves a parser that parses nothing
    assert {"model", "training", "data"} <= set(schema["properties"])


@pytest.mark.slow
def test_bash_completes_options_behind_the_launcher() -> None:
    """As docs/training.md has it, in a real shell."""
    script = run_python("pretrain.py", "--print_completion", "shtab-bash")
    assert script.returncode == 0, script.stderr
    for word, expected in (("--training.lear", ["--training.learning_rate"]), ("--model.qk_n", ["--model.qk_norm"])):
        line = f"deepspeed pretrain.py {word}"
        ask = f"COMP_WORDS=({line}) COMP_CWORD=2 COMP_LINE='{line}' COMP_POINT={len(line)}"
        ask += f"; _shtab_pretrain_py deepspeed {word} pretrain.py; echo ${{COMPREPLY[@]}}"
        shell = subprocess.run(["bash", "-c", f"{script.stdout}\n{ask}"], capture_output=True, text=True)
        assert shell.stdout.split() == expected, shell.stderr


@pytest.mark.parametrize(
    ("flags", "is_dry"),
    [
        (["--dry-run"], True),
        (["--dry_run"], True),
        (["--dry_run", "true"], True),
        (["--dry-run=true"], True),
        (["--dry-run", "--training.seed", "3"], True),
        (["--dry-run", "false"], False),
        (["--dry_run=false"], False),
        ([], False),
    ],
)
def test_a_dry_run_with_and_without_a_value(flags: list[str], is_dry: bool) -> None:
    run = load(*flags)
    assert run.mode == ("dry_run" if is_dry else None)
    assert ("dry_run" in run.resolved) is is_dry


def test_a_dry_run_is_dry_or_not(refused) -> None:
    assert "dry_run: expected bool, got maybe" in refused("--dry_run=maybe")
    assert "unexpected argument 'maybe'" in refused("--dry_run", "maybe")


@pytest.mark.parametrize(
    ("report_to", "fragments"),
    [
        ("foo", ("training.report_to: 'foo' is unknown", "tensorboard")),
        ("[tensorboard, foo]", ("training.report_to: 'foo' is unknown",)),
        ("[none, tensorboard]", ("training.report_to: 'none'",)),
        ("dvclive", ("training.report_to: 'dvclive' needs a package that is not installed",)),
    ],
)
def test_metrics_go_where_there_is_something(refused, monkeypatch, report_to: str, fragments: tuple[str]) -> None:
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", lambda: ["tensorboard"])
    message = refused("--training.report_to", report_to)
    for fragment in fragments:
        assert fragment in message


def test_a_plan_reports_to_what_is_installed_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arguments, "get_available_reporting_integrations", list)
    assert load_config(["--dry-run", "--training.report_to", "wandb"]).training.report_to == ["wandb"]
    for report_to in ("all", "none"):
        run = load_config(["--training.use_cpu", "true", "--training.report_to", report_to])
        assert ("tensorboard" in run.training.report_to) is (report_to == "all")


@pytest.mark.parametrize("name", ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"])
def test_a_rank_that_is_no_number_is_one_line(monkeypatch, capsys, name: str) -> None:
    """Before libraries are imported that read it."""
    logs.check_launcher_numbers()
    monkeypatch.setenv(name, "x")
    with pytest.raises(SystemExit) as end:
        logs.check_launcher_numbers()
    assert end.value.code == 2
    assert re.fullmatch(f"error: {name} is 'x' in the environment, [^\n]*unset it, [^\n]*\n", capsys.readouterr().err)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["pretrain.py", "finetune.py", "-m evaluation", "-m inference.generate"])
def test_a_rank_that_is_no_number_ends_a_command(script: str) -> None:
    command = [sys.executable, *script.split(), "--help"]
    ended = subprocess.run(command, cwd=ROOT, env={**os.environ, "LOCAL_RANK": "x"}, capture_output=True, text=True)
    assert ended.returncode == 2
    assert re.fullmatch("error: LOCAL_RANK is 'x' [^\n]*\n", ended.stderr)


@pytest.mark.slow
@pytest.mark.parametrize("deepspeed", [[], ["--training.deepspeed", "zero0"]])
def test_a_port_in_use_is_one_line(yaml_file, deepspeed: list[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = str(other.getsockname()[1])
        ranks = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = ["pretrain.py", "--config", "configs/recurrent_lm.yaml", *deepspeed]
        ended = run_python(*command, environment={**os.environ, **ranks, **address})
    assert ended.returncode == 2
    lines = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and f"MASTER_PORT: {port} is in use" in lines[0] and "--master_port" in lines[0]
    assert "Traceback" not in ended.stderr


# ------------------------------------------------------------ numbers that are none


def float_options() -> dict[str, type]:
    """Each key of a run that takes a number with a point, and the class it stands in; of lists the class alone."""
    found = {}
    for cls, keys in classes_of_run().items():
        for name, hint in loader.option_types(cls).items():
            if float in (hint, *typing.get_args(hint)) and typing.get_origin(hint) is not list:
                found[f"{keys[0]}.{name}"] = cls
    return found


NEEDED = {"SourceConfig": {"kind": "files", "paths": ["a"]}, "ParameterGroup": {"pattern": "*"}}
NEEDED |= {"RolloutArguments": {"rewards": ["evaluation.rewards:exact_answer"]}}


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_no_class_takes_a_number_that_is_none(value: float) -> None:
    """Whatever the range of an option, if it has one."""
    assert len(float_options()) > 100
    for key, cls in float_options().items():
        name = key.rpartition(".")[2]
        with pytest.raises(ValueError, match=rf"{name}.*({value}|{str(value).lstrip('-')})"):
            cls(**NEEDED.get(cls.__name__, {}), **{name: value})


@pytest.mark.parametrize("text", [".inf", "-.inf", ".nan"])
@pytest.mark.parametrize(
    "key", ["training.learning_rate", "training.depth_gap_alarm", "model.rope_theta", "model.recurrence.exit_threshold"]
)
def test_flag_and_file_refuse_the_same_numbers(refused, yaml_file, key: str, text: str) -> None:
    *outer, name = key.split(".")
    nested = f"{name}: {text}"
    for section in reversed(outer):
        nested = f"{section}: {{{nested}}}"
    for given in ((f"--{key}", text), (f"--{key}={text}",), ("--config", yaml_file(nested))):
        message = refused(*given)
        assert key in message and text.lstrip("-.") in message.lower()


def test_numbers_in_lists_are_checked(refused) -> None:
    message = refused("--data.augmentation.audio.speed", "[.inf, 1.0]")
    assert "data.augmentation.audio.speed: [inf, 1.0] is not finite" in message
