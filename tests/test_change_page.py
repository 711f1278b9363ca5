"""docs/change.md: its recipes apply to the code as it is, and all of them together train, evaluate and generate."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.tiny_media_run import TINY_MEDIA_RUN

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/change.md").read_text(encoding="utf-8")
ROOMS = ("model", "dataset_loading", "trainers", "callbacks", "configs", "evaluation", "inference")
RECIPES = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL))
DIGITS = {"kind": "generated", "task": "parity", "num_rows": 40, "difficulty": [3, 6]}


def steps_of(recipe: str) -> list[tuple[str, str, str]]:
    """(file, language, content) of each block that changes a file; the last file named above a block is its own."""
    steps, file = [], ""
    pattern = r"^`([\w/]+\.py)`:\n|^```(python|diff)\n(.*?)^```"
    for name, language, content in re.findall(pattern, RECIPES[recipe], flags=re.MULTILINE | re.DOTALL):
        file = name or file
        steps += [(file, language, content)] if language else []
    return steps


def apply(recipe: str, root: Path) -> set[str]:
    """Does what a recipe says to the files below a folder; the names of those files."""
    for file, language, content in steps_of(recipe):
        path = root / file
        if language == "python":
            assert not path.exists(), file
            path.write_text(content, encoding="utf-8")
            continue
        lines, code = content.splitlines(), path.read_text(encoding="utf-8")
        assert {line[:1] for line in lines} <= {"+", "-", " ", ""}, content
        before, after = ("\n".join(line[1:] for line in lines if line[:1] != sign) for sign in "+-")
        assert f"\n{code}".count(f"\n{before}\n") == 1, f"{file} has no longer, or several times:\n{before}"
        path.write_text(f"\n{code}".replace(f"\n{before}\n", f"\n{after}\n")[1:], encoding="utf-8")
    return {file for file, _, _ in steps_of(recipe)}


def copy_of_the_project(folder: Path) -> Path:
    for room in ROOMS:
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pretrain.py", folder)
    return folder


def test_there_are_eight_recipes_and_the_table_counts_their_files():
    counted = dict(re.findall(r"^\| \[([^\]]+)\]\(#[\w-]+\) \| (\d) \|", PAGE, flags=re.MULTILINE))
    assert len(RECIPES) == 8
    assert {name: len({file for file, _, _ in steps_of(name)}) for name in RECIPES} == {
        name: int(count) for name, count in counted.items()
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_test_to_copy_is_there(recipe):
    (path, name) = re.search(
        r"^Test to copy: `(tests/\w+\.py)::(\w+)`\.$", RECIPES[recipe], flags=re.MULTILINE
    ).groups()
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_applies_to_the_code_as_it_is(recipe, tmp_path):
    for file, _, _ in steps_of(recipe):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / file).exists():
            shutil.copy(ROOT / file, tmp_path / file)
    for file in apply(recipe, tmp_path):
        code = (tmp_path / file).read_text(encoding="utf-8")
        ast.parse(code)
        assert max(map(len, code.splitlines())) <= 120


def write_data(folder: Path) -> None:
    """Lines of a log, one without a text, and series that rise or fall."""
    (folder / "series").mkdir(parents=True)
    (folder / "day.log").write_text("".join(f"12:{minute:02} all is well\n" for minute in range(40)) + "13:00\n")
    rows = []
    for number in range(12):
        word, rise = ("up", 1.0) if number % 2 else ("down", -1.0)
        values = rise * np.arange(3 + number % 3)
        np.save(folder / "series" / f"{number}.npy", np.stack([values, values**2], axis=1))
        rows.append(json.dumps({"file_name": f"{number}.npy", "text": word}))
    (folder / "series" / "metadata.jsonl").write_text("\n".join(rows))


def write_run(folder: Path) -> Path:
    """A run that uses everything; of the optimizer and the callback the command line has the flags."""
    model = {
        key: value for key, value in TINY_MEDIA_RUN["model"].items() if key not in ("vision_config", "audio_config")
    }
    recurrence = {**model["text_config"]["recurrence"], "injection": "sum"}
    series = {"kind": "folder", "path": str(folder / "series"), "media_columns": {"file_name": "series"}}
    run = {
        "model": {
            **model,
            "text_config": {**model["text_config"], "recurrence": recurrence},
            "modality_configs": {"series": {"columns": 2, "width": 16}},
        },
        "tokenizer": TINY_MEDIA_RUN["tokenizer"],
        "data": {
            "block_size": 96,
            "packing": False,
            "train": [
                {"name": "series", **series, "prompt": "Up or down?"},
                {"name": "logs", "kind": "files", "paths": [str(folder / "*.log")]},
                DIGITS,
            ],
            "validation": [DIGITS],
        },
        "training": {
            **TINY_MEDIA_RUN["training"],
            "output_dir": str(folder / "out"),
            "max_steps": 4,
            "eval_strategy": "steps",
            "eval_steps": 4,
            "modality_weights": {},
        },
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return folder / "run.yaml"


def run_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process


@pytest.mark.slow
def test_all_recipes_together_train_evaluate_and_generate(tmp_path):
    copy = copy_of_the_project(tmp_path / "project")
    for recipe in RECIPES:
        apply(recipe, copy)
    write_data(tmp_path)
    flags = ["--training.optimizer", "sign_sgd:build", "--callbacks.weight_norm.enabled", "true"]
    trained = run_in(copy, "pretrain.py", "--config", str(write_run(tmp_path)), *flags)
    assert "nothing but a time" in trained.stderr  # of the data source

    out = tmp_path / "out"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert len(losses) == 4 and np.isfinite(losses).all()
    (found,) = [entry for entry in history if "eval_parity_bits_per_token" in entry]  # of the metric, and of the task
    assert found["eval_parity_bits_per_token"] == pytest.approx(found["eval_parity_loss"] / np.log(2))
    weights = load_file(out / "model.safetensors")
    assert weights["model.core.injection.proj.weight"].shape == (32, 32)  # of the injection
    assert weights["model.readers.series.encoder.proj.weight"].shape == (16, 2)  # of the modality
    events = EventAccumulator(str(next((out / "runs").glob("*")))).Reload()
    assert len(events.Scalars("train/weight_norm")) == 4  # of the callback

    arguments = ["--series", str(tmp_path / "series/0.npy"), "--num-steps", "6", "--max-new-tokens", "4", "--greedy"]
    run_in(copy, "-m", "inference.generate", str(out), *arguments, "--exit-criterion", "margin")
