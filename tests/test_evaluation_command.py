"""The command line that measures what depth buys."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from configs.runs import split_overrides
from dataset_loading import Collator, DataConfig, SourceConfig, build_datasets, build_examples
from evaluation.__main__ import main
from evaluation.compare import main as compare
from evaluation.report import build_report
from tests.processes import run_python
from tests.tiny_language_model import save_checkpoint, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
CONFIG = {
    "data": {
        "block_size": 64,
        "train": [
            {"kind": "generated", "task": "chained_lookup", "num_rows": 150, "difficulty": [1, 2]},
            {"kind": "generated", "task": "addition", "num_rows": 100},
        ],
    },
    "training": {"output_dir": "unused", "seed": 5},
}


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run as pretrain.py leaves it: config.yaml, and checkpoints beside it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    save_checkpoint(folder / "checkpoint-20")
    (folder / "checkpoint-30").mkdir()
    return folder


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory):
    folder = save_checkpoint(tmp_path_factory.mktemp("plain"), num_core_layers=0)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    return folder


def run(capsys, *argv):
    assert main([str(argument) for argument in argv]) == 0
    return capsys.readouterr()


def of_rows() -> list[tuple[str, int]]:
    """The number of validation rows that were scored, by source, as the run's configuration has them."""
    sources = [SourceConfig(**source) for source in CONFIG["data"]["train"]]
    found = build_datasets(DataConfig(train=sources, block_size=64), tiny_tokenizer(), seed=5).validation
    return [(name, min(6, len(rows))) for name, rows in found.items()]


def test_the_plain_call_needs_no_data_flags(run_folder, capsys):
    """Newest complete checkpoint, the run's own validation split, the figures by hand."""
    found = run(capsys, run_folder, "--num-steps", 4, 1, 4, "--limit", 6)
    assert "checkpoint-30 is passed over: it has no config.json" in found.err
    content = json.loads((run_folder / "evaluation" / "depth.json").read_text())
    assert content["checkpoint"] == str(run_folder / "checkpoint-20") and content["limit"] == 6
    assert [row["num_steps"] for row in content["rows"]] == [1, 4]
    assert found.out.startswith((run_folder / "evaluation" / "depth.md").read_text())
    assert (run_folder / "evaluation" / "depth.png").stat().st_size > 10_000
    assert compare([str(run_folder), str(run_folder), "--num-steps", "1", "4"]) == 0
    compared = [line.split("|")[1:5] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [" ".join(map(str.strip, cells)) for cells in compared] == [
        *(f"{source} row 1 and 4 {rows}" for source, rows in of_rows()),
        *(f"{source} question 1 and 4 6" for source in ("chained_lookup", "addition")),
    ]

    model, tokenizer = tiny_model(), tiny_tokenizer()
    sources = [SourceConfig(**source) for source in CONFIG["data"]["train"]]
    data = DataConfig(train=sources, block_size=64)
    packed = build_datasets(data, tokenizer, seed=5).validation["chained_lookup"]
    nll = tokens = 0
    for index in range(min(6, len(packed))):
        batch = Collator(tokenizer)([packed[index]])
        with torch.no_grad():
            loss = model(**batch, num_steps=4).loss.item()
        scored = (batch["labels"][:, 1:] != -100).sum().item()
        nll, tokens = nll + loss * scored, tokens + scored
    row = content["rows"][1]
    assert row["sources"]["chained_lookup"]["loss"] == pytest.approx(nll / tokens, rel=1e-4)
    assert set(row["exact_match"]) == {"chained_lookup", "addition"}
    exact = row["exact_match"]["chained_lookup"]
    examples = build_examples(sources[0], data, tokenizer, 6, seed=5)
    assert exact["num_examples"] == len(examples) == 6
    assert set(exact["by_difficulty"]) == {str(example["difficulty"]) for example in examples}


def test_validation_sources_replace_the_split(run_folder, tmp_path, capsys):
    """A data file and a flag on top; a checkpoint folder finds config.yaml beside it."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 30)
    (tmp_path / "data.yaml").write_text(
        yaml.safe_dump({"data": {"validation": [{"kind": "files", "name": "cats", "paths": ["text.txt"]}]}})
    )
    run(
        capsys, run_folder / "checkpoint-20", "--num-steps", 2, "--config", tmp_path / "data.yaml",
        "--data.block_size=32", "--output", tmp_path / "out",
    )  # fmt: skip
    content = json.loads((tmp_path / "out" / "depth.json").read_text())
    assert content["data"]["block_size"] == 32
    (row,) = content["rows"]
    assert list(row["sources"]) == ["cats"] and row["exact_match"] == {}
    assert row["bits_per_byte"] == row["sources"]["cats"]["bits_per_byte"]


def test_a_plain_model_is_evaluated_once_and_says_so(plain_folder, tmp_path, capsys):
    found = run(capsys, plain_folder, "--num-steps", 1, 2, 8, "--limit", 2, "--output", tmp_path)
    assert "has no core (num_core_layers is 0), so its depth cannot vary: evaluated once" in found.err
    content = json.loads((tmp_path / "depth.json").read_text())
    assert [row["num_steps"] for row in content["rows"]] == [None]
    assert "| no core |" in found.out


def test_efficiency_at_depths_and_thresholds(run_folder, tmp_path, capsys):
    """All answers of the questions; the report of the run has the same figures."""
    run_copy = shutil.copytree(run_folder, tmp_path / "run", ignore=shutil.ignore_patterns("evaluation"))
    argv = ["--num-steps", 1, 2, "--limit", 1, "--no-texts", "--efficiency"]
    exits = ["--exit-criterion", "latent_difference", "--exit-threshold", 9, 1e-9]
    found = run(capsys, run_copy, *argv, *exits)
    content = json.loads((run_copy / "evaluation" / "efficiency.json").read_text())
    points = sorted((it["num_steps"], it["criterion"], it["threshold"], it["mean_steps"]) for it in content["points"])
    assert points == [
        (1, "fixed depth", None, 1.0),
        (2, "fixed depth", None, 2.0),
        (2, "latent_difference", 1e-9, 2.0),
        (2, "latent_difference", 9.0, 1.0),
    ]
    assert content["num_examples"] == 2  # one of each source
    by_steps = {it["mean_steps"]: it["loss"] for it in content["points"]}
    assert len({round(it["loss"], 5) for it in content["points"]}) == len(by_steps) == 2  # an exit is fewer steps
    assert (run_copy / "evaluation" / "efficiency.md").read_text() in found.out
    sections = {it.title: it.parts for it in build_report(run_copy).sections}
    assert f"{by_steps[1.0]:.4f} (" in " ".join(cell for line in sections["Efficiency"][0].body for cell in line)
    assert [line[0] for line in sections["Depth"][0].body] == ["1", "2"]


def test_efficiency_of_texts_without_answers(plain_folder, tmp_path, capsys):
    """A row of 64 tokens, of which the first is the prompt. Of a plain model there is one point, and no slope."""
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 30)
    data = {"data": {"validation": [{"kind": "files", "paths": ["text.txt"]}]}}
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    options = ("--config", tmp_path / "data.yaml", "--limit", 1, "--efficiency", "--output", tmp_path / "out")
    run(capsys, plain_folder, *options)
    content = json.loads((tmp_path / "out" / "efficiency.json").read_text())
    (point,) = content["points"]
    assert (point["num_steps"], point["exact"], point["mean_steps"]) == (None, None, None)
    assert content["num_tokens"] == 63 and content["slopes"] == [] and point["on_front"] == ["loss"]


def test_overrides_are_told_apart():
    argv = [
        "run",
        "--num-steps",
        "1",
        "2",
        "--data.x",
        "3",
        "--config=a.yaml",
        "--limit",
        "4",
        "--config",
        "b",
        "--data.y=5",
    ]
    assert split_overrides(argv) == (
        ["run", "--num-steps", "1", "2", "--limit", "4"],
        ["--data.x", "3", "--config=a.yaml", "--config", "b", "--data.y=5"],
    )


BAD_ARGUMENTS = [
    (
        ["--num-steps", "0"],
        "argument --num-steps: 0 is less than 1: give the number of times the core is applied, 1 or more",
    ),
    (["--num-steps", "4", "-1"], "argument --num-steps: -1 is less than 1"),
    (["--num-steps", "many"], "argument --num-steps: 'many' is not a whole number"),
    (["--num-steps"], "argument --num-steps: expected at least one argument"),
    (["--batch-size", "0"], "argument --batch-size: 0 is less than 1: give the number of rows in a forward pass"),
    (["--limit", "0"], "argument --limit: 0 is less than 1: give the number of rows per source, 1 or more, or leave"),
    (["--num-step", "4"], "unknown argument '--num-step': did you mean --num-steps?"),
    (["--batchsize=4"], "unknown argument '--batchsize': did you mean --batch-size?"),
    (["--model.hidden_size", "4"], "unknown argument '--model.hidden_size': see --help"),
    (["--data.blok_size", "4"], "data.blok_size"),
    (["--data.block_size", "1"], "block_size is 1; give at least 2"),
    (["--data.block_size"], "--data.block_size: the value is missing"),
    (["--config", "nowhere.yaml"], "nowhere.yaml: No such file"),
    (["--device", "toaster"], "Device 'toaster' does not work here"),
]


@pytest.mark.parametrize(("argv", "message"), BAD_ARGUMENTS, ids=[" ".join(argv) for argv, _ in BAD_ARGUMENTS])
def test_bad_arguments_are_one_line(plain_folder, tmp_path, capsys, argv, message):
    """Names value, reason and fix; exit code 2; nothing is written."""
    check_error(capsys, [str(plain_folder), "--output", str(tmp_path / "out"), *argv], message)
    assert not (tmp_path / "out").exists()


def check_error(capsys, argv, message):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    found = capsys.readouterr()
    assert stop.value.code == 2 and found.out == ""
    assert found.err.startswith("evaluation: error: ") and found.err.count("\n") == 1
    assert message in found.err


def test_bad_folders_are_one_line(plain_folder, tmp_path, capsys):
    check_error(capsys, [str(tmp_path / "nowhere")], f"{tmp_path / 'nowhere'} does not exist: give the folder of a run")
    (tmp_path / "empty").mkdir()
    check_error(capsys, [str(tmp_path / "empty")], "holds no complete model (it has no config.json)")
    lonely = shutil.copytree(plain_folder, tmp_path / "a" / "lonely")
    (lonely / "config.yaml").unlink()
    check_error(
        capsys, [str(lonely)], f"Neither {lonely} nor its parent folder has the config.yaml of a run: name the data"
    )


def test_a_folder_that_cannot_be_written_is_refused_before_the_evaluation(run_folder, tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("evaluation.__main__.depth_table", None)
    for output, reason in ((tmp_path / "file", "Not a directory"), (tmp_path / "file" / "below", "Not a directory")):
        argv = [str(run_folder / "checkpoint-20"), "--limit", "2", "--output", str(output)]
        check_error(capsys, argv, f"{output} cannot be written ({reason}): name another folder with --output")


def test_a_table_that_cannot_be_written_is_shown_all_the_same(plain_folder, tmp_path, capsys, monkeypatch):
    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("evaluation.__main__.save_depth_table", fail)
    with pytest.raises(SystemExit) as stop:
        main([str(plain_folder), "--limit", "2", "--output", str(tmp_path / "out")])
    found = capsys.readouterr()
    assert stop.value.code == 2 and "| no core |" in found.out
    assert f"evaluation: error: {tmp_path / 'out'} cannot be written: No space left on device" in found.err
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_without_a_run_takes_its_data_from_a_file(plain_folder, tmp_path, capsys):
    lonely = shutil.copytree(plain_folder, tmp_path / "a" / "lonely")
    config = (lonely / "config.yaml").rename(tmp_path / "data.yaml")
    for argv in (["--config", str(config)], [f"--config={config}"]):
        found = run(capsys, lonely, "--limit", 2, *argv, "--data.block_size", 32)
        assert "| no core |" in found.out


@pytest.mark.slow
def test_the_command_from_another_folder(run_folder, tmp_path):
    """A process of its own, with a relative path."""
    command = ("-m", "evaluation", os.path.relpath(run_folder, tmp_path), "--num-steps")
    options = {"cwd": tmp_path, "environment": {**os.environ, "PYTHONPATH": str(ROOT)}}
    result = run_python(*command, "1", "2", "--limit", "4", "--output", "out", **options)
    assert result.returncode == 0, result.stderr
    assert "| steps |" in result.stdout and (tmp_path / "out" / "depth.png").exists()
    result = run_python(*command, "0", **options)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and "--num-steps: 0 is less than 1" in result.stderr
