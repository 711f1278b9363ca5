"""The benchmark of yardsticks: equal parameters, its scores by hand, and runs of a second."""

import json
import sys
import types
from argparse import Namespace
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import equal_time, yardsticks
from benchmarks.equal_time import Task, as_flags, config_of
from configs.pretraining import without_weights
from dataset_loading import DataConfig, SourceConfig, build_examples
from evaluation.intervals import wilson_interval
from tests.test_pretrain import write_config
from tests.tiny_language_model import tiny_model, tiny_tokenizer

TEXTS = (Path(__file__), Path(yardsticks.__file__))
ALL = [yardsticks.characters(*TEXTS), yardsticks.word_problems(), yardsticks.gym("gcd", Path("/questions"))]


@pytest.mark.parametrize("yardstick", ALL, ids=lambda it: it.task.source)
def test_twins_have_the_parameters_or_the_executed_layers_of_the_recurrent_model(yardstick):
    runs = {name: config_of(yardstick.task, as_flags("model", options)) for name, options in yardstick.models.items()}
    sizes = {name: without_weights(run).num_parameters() for name, run in runs.items()}
    assert abs(sizes["plain"] / sizes["recurrent"] - 1) < 0.01
    if "untied" in runs:
        assert runs["untied"].model.mean_executed_layers == runs["recurrent"].model.mean_executed_layers
        assert sizes["untied"] > 3 * sizes["recurrent"]
    if yardstick.task.source == "text":
        assert 0.75e6 < sizes["plain"] < 0.85e6 and runs["plain"].data.block_size == 64


def test_the_models_are_those_that_may_be_chosen():
    assert {name for yardstick in ALL for name in yardstick.models} == set(yardsticks.MODELS)


def run_with(yardstick, config: Path, monkeypatch, **options) -> dict:
    """The row of a tiny run of its second model, with the data and the score of a yardstick."""
    monkeypatch.setattr(equal_time, "PILOT", 4)
    tiny = yardsticks.Yardstick(
        Task(config, yardstick.task.source, updates=3, flags=tuple(options.pop("flags", ()))),
        {"recurrent": {}, "plain": {"num_core_layers": 0}},
        yardstick.score,
    )
    return tiny, yardsticks.measure({"tiny": tiny}, "tiny", options.get("model", "recurrent"), 0, 8)


def test_characters_are_scored_over_the_whole_text(tmp_path, monkeypatch):
    """Nats of all tokens by their number, at the mean depth and at twice that."""
    for name, count in (("train", 900), ("validation", 200)):
        (tmp_path / f"{name}.txt").write_text("the cat sat on the mat. " * (count // 24))
    sources = [
        (f"--data.{name}", yardsticks.sources(kind="files", paths=[str(tmp_path / f"{name}.txt")], name="text"))
        for name in ("train", "validation")
    ]
    config, flags = write_config(tmp_path, training={"logging_steps": 1000}), [it for pair in sources for it in pair]
    tiny, row = run_with(ALL[0], config, monkeypatch, flags=flags)
    assert list(row["scores"]) == [3, 6] and row["updates"] == 3 and row["task"] == "tiny"
    trainer, _ = equal_time.train(tiny.task, [], 0, 3, str(tmp_path / "again"))
    nats = tokens = 0
    for item in trainer.eval_dataset["text"]:
        with torch.no_grad():
            logs = (
                trainer.model.eval()(item["input_ids"][None], position_ids=item["position_ids"][None], num_steps=3)
                .logits[0]
                .log_softmax(-1)
            )
        for at in range(1, len(item["labels"])):
            if item["labels"][at] != -100:
                nats, tokens = nats - logs[at - 1, item["labels"][at]].item(), tokens + 1
    assert row["scores"][3]["score"] == pytest.approx(nats / tokens, rel=1e-4)
    low, high = row["scores"][3]["interval"]
    assert low < nats / tokens < high


def test_a_plain_model_has_as_long_and_one_depth(tmp_path, monkeypatch):
    """Of word problems, in a run of a second."""
    monkeypatch.setattr(yardsticks, "LONGEST", 6)
    data = {"kind": "generated", "task": "a5_prefixes", "loss_on": "tags", "num_rows": 60}
    flags = ["--data.train", yardsticks.sources(**data, difficulty=[1, 4])]
    flags += ["--data.validation", yardsticks.sources(**data, difficulty=[6, 6])]
    config = write_config(tmp_path, training={"logging_steps": 1000})
    _, row = run_with(ALL[1], config, monkeypatch, flags=flags, model="plain")
    assert list(row["scores"]) == ["plain"] and row["mean_steps"] is None and row["updates"] >= 3
    assert len(row["scores"]["plain"]["by_length"]) == 6


def test_products_are_scored_by_their_elements(monkeypatch):
    """The accuracy at each element over all questions: of 70, question n has the first n % 7 of six right."""
    monkeypatch.setattr(yardsticks, "LONGEST", 6)
    model, tokenizer = tiny_model(), tiny_tokenizer(260)
    source = SourceConfig("generated", task="a5_prefixes", num_rows=70, difficulty=[6, 6], loss_on="tags")
    rows = build_examples(source, DataConfig(), tokenizer)
    for number, row in enumerate(rows):
        with torch.no_grad():
            said = model(torch.tensor([row["input_ids"]]), num_steps=2).logits[0, 1:7].argmax(-1).tolist()
        row["labels"][2:] = [token if at < number % 7 else 3 for at, token in enumerate(said)]
        assert 3 not in said
    monkeypatch.setattr(yardsticks, "questions_of", lambda trainer, task, questions: rows)
    trainer = types.SimpleNamespace(model=model, processing_class=tokenizer)
    found = yardsticks.accuracy_by_length(trainer, ALL[1].task, 70, 2)
    assert found["by_length"] == pytest.approx([100 * (6 - at) / 7 for at in range(6)])
    assert found["score"] == pytest.approx(100 / 7)
    low, high = wilson_interval(10, 70)
    assert found["interval"] == pytest.approx((100 * low, 100 * high))


def test_questions_of_the_package_are_in_one_part_alone(tmp_path, monkeypatch):
    """Each once; without the package, or with too few questions, one line says so."""

    def create(name, size, seed):
        return [{"question": f"{name} {number // 2}", "answer": str(number // 2)} for number in range(size)]

    monkeypatch.setitem(sys.modules, "reasoning_gym", types.SimpleNamespace(create_dataset=create))
    monkeypatch.setattr(yardsticks, "DRAWN", 12)
    monkeypatch.setattr(yardsticks, "HELD_OUT", 2)
    yardsticks.write_questions("gcd", tmp_path)
    lines = {part: (tmp_path / f"gcd_{part}.jsonl").read_text().splitlines() for part in ("train", "validation")}
    found = {part: [json.loads(line)["answer"] for line in rows] for part, rows in lines.items()}
    assert found == {"train": ["2", "3", "4", "5"], "validation": ["0", "1"]}
    monkeypatch.setattr(yardsticks, "HELD_OUT", 4)
    with pytest.raises(ValueError, match="gcd has 6 different questions, too few to hold 4 out; leave it out"):
        yardsticks.write_questions("gcd", tmp_path)
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(ValueError, match="gcd is a task of reasoning-gym: pip install reasoning-gym"):
        yardsticks.write_questions("gcd", tmp_path)


def test_a_text_that_is_missing_is_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        yardsticks.main(["--output", str(tmp_path / "rows.json"), "--tasks", "characters", "--train-text", "none.txt"])
    assert "none.txt is no text: give --train-text and --validation-text, or choose" in capsys.readouterr().err
    options = Namespace(train_text=TEXTS[0], validation_text=TEXTS[1], folder=tmp_path)
    assert yardsticks.yardstick_of("characters", options).task.source == "text"


def row_of(task: str, model: str, seed: int, scores: dict, mean_steps: int | None = 4) -> dict:
    costs = {"parameters": 1000, "updates": 60, "cpu_seconds": 5.5, "mean_steps": mean_steps, "scores": scores}
    return {"task": task, "model": model, "seed": seed, "updates_of_reference": 500, "questions": 10, **costs}


def test_the_report_has_scores_with_their_intervals():
    """Losses to four places; accuracies by length; a dash where a model has no other depth."""
    score = partial(dict, interval=[1.8, 2.0])
    rows = [row_of("characters", "plain", seed, {"plain": score(score=1.9 + seed / 10)}, None) for seed in (0, 1)]
    rows += [row_of("characters", "recurrent", 0, {4: score(score=1.85), 8: score(score=1.86)})]
    by_length = [100.0] * 5 + [50.0] * 25
    rows += [row_of("a5", "recurrent", 0, {4: score(score=50.0, by_length=by_length)})]
    text = yardsticks.report(rows)
    assert "| plain | 2 | 1.9500 ± 0.6353 | 0.1000 ± 0.0000 | - | 1000.0 ± 0.0 | 60.0 ± 0.0 | 5.5 ± 0.0 |" in text
    assert "| recurrent | 1 | 1.8500 | 0.1000 | 1.8600 | 1000.0 | 60.0 | 5.5 |" in text
    assert "characters: nats per character, in the time of 500 updates of the first model" in text
    assert "| recurrent | 1 | 100.0 | 50.0 | 50.0 | 50.0 | 1000.0 | 60.0 | 5.5 |" in text
