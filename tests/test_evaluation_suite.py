"""A suite of tasks and its one number: scores by hand, intervals, and what is refused."""

import json
import re
import sys

import numpy as np
import pytest
import torch
import yaml

from dataset_loading import DataConfig, SourceConfig, build_examples
from evaluation.intervals import difference_interval, wilson_interval
from evaluation.suite import DEFAULT_TASKS, main, read_suite
from evaluation.suite_scores import TaskScores, suite_content, suite_markdown
from tests.tiny_language_model import save_checkpoint, tiny_model, tiny_tokenizer

QUESTIONS = [
    {"prompt": "the cat sat on the", "choices": ["mat", "cat", "naïve café"], "answer": 0},
    {"prompt": "a naïve", "choices": ["café", "the mat sat on the cat"], "answer": 1},
    {"prompt": "on", "choices": ["mat.", "the mat", "cat"], "answer": 1},
    {"prompt": "sat", "choices": ["on the", "a", "😀"], "answer": 2},
]
SUMS = {"kind": "generated", "task": "addition", "num_rows": 40, "difficulty": [1, 1]}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def write_suite(folder, *tasks) -> str:
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (folder / "suite.yaml").write_text(yaml.safe_dump({"suite": {"tasks": list(tasks)}}))
    return str(folder / "suite.yaml")


def chosen(question: dict, separator: str, depth: int) -> int:
    """The choice whose tokens have the highest mean log-probability, one choice after the other."""
    tokenizer, model, scores = tiny_tokenizer(), tiny_model(), []
    for choice in question["choices"]:
        before = [tokenizer.bos_token_id, *tokenizer(question["prompt"])["input_ids"]]
        ids = [*before, *tokenizer(separator + choice)["input_ids"]]
        with torch.no_grad():
            logs = model(torch.tensor([ids]), num_steps=depth).logits[0].log_softmax(-1)
        scores.append(np.mean([logs[place - 1, ids[place]].item() for place in range(len(before), len(ids))]))
    return int(np.argmax(scores))


def test_a_model_is_scored_by_answers_and_by_choices(tmp_path, checkpoint, capsys):
    """At two depths, by the command: each example as by hand, and files of what is printed."""
    choices = {"kind": "choices", "path": "questions.jsonl", "separator": "-"}
    path = write_suite(tmp_path, {"kind": "answers", "source": SUMS, "name": "sums", "chance": 0.1}, choices)
    output = tmp_path / "out"
    argv = [str(checkpoint), "--tasks", path, "--num-steps", "4", "1", "--limit", "6", "--output", str(output)]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    content = json.loads((output / "suite.json").read_text())
    assert printed.startswith((output / "suite.md").read_text()) and content["limit"] == 6
    lines = [json.loads(line) for line in (output / "suite_examples.jsonl").read_text().splitlines()]
    rows = {row["num_steps"]: row for row in content["rows"]}
    examples = build_examples(SourceConfig(**SUMS), DataConfig(), tiny_tokenizer(), 6)
    for depth in (1, 4):
        right = [chosen(question, "-", depth) == question["answer"] for question in QUESTIONS]
        found = [it["score"] for it in lines if (it["task"], it["num_steps"]) == ("questions", depth)]
        assert found == right
        task = rows[depth]["tasks"]["questions"]
        chance = (3 * 1 / 3 + 1 / 2) / 4
        assert task["chance"] == pytest.approx(chance) and task["uncentred"] == np.mean(right)
        assert task["score"] == pytest.approx((np.mean(right) - chance) / (1 - chance))
        sums = [it["score"] for it in lines if (it["task"], it["num_steps"]) == ("sums", depth)]
        assert sums == [is_greedy(example, depth) for example in examples]
        assert rows[depth]["tasks"]["sums"]["score"] == pytest.approx((np.mean(sums) - 0.1) / 0.9)
        both = [rows[depth]["tasks"][name]["score"] for name in ("sums", "questions")]
        assert rows[depth]["score"] == pytest.approx(np.mean(both))
    assert {it["score"] for it in lines if it["task"] == "questions"} == {0, 1}
    (change,) = content["differences"]
    assert change["num_steps"] == [1, 4] and change["score"] == pytest.approx(rows[4]["score"] - rows[1]["score"])


def is_greedy(example: dict, depth: int) -> float:
    """Whether greedy decoding writes an answer and its end."""
    prompt, answer = example["prompt_ids"], example["input_ids"][len(example["prompt_ids"]) :]
    ids = tiny_model().generate(
        torch.tensor([prompt]), num_steps=depth, do_sample=False, max_new_tokens=len(answer), eos_token_id=None
    )
    return float(ids[0, len(prompt) :].tolist() == answer)


def suite_of(tasks: dict[str, tuple[float, dict[int, list[float]]]]) -> dict:
    depths = next(iter(tasks.values()))[1]
    return suite_content(
        {
            depth: {
                name: TaskScores(np.array(scores[depth], float), chance, number)
                for number, (name, (chance, scores)) in enumerate(tasks.items())
            }
            for depth in depths
        }
    )


def test_scores_are_centred_and_have_intervals():
    """The mean's is that of the normal approximation, whose variance is that of the tasks by their number squared."""
    draw = np.random.default_rng(0)
    first, second = draw.random(400) < 0.3, draw.random(250) < 0.8
    grades = draw.random(300)
    tasks = {"few": (0.2, {2: first}), "many": (0.5, {2: second}), "grades": (0.0, {2: grades})}
    (row,) = suite_of(tasks)["rows"]
    scores = [(first.mean() - 0.2) / 0.8, (second.mean() - 0.5) / 0.5, grades.mean()]
    assert [task["score"] for task in row["tasks"].values()] == pytest.approx(scores)
    assert row["score"] == pytest.approx(np.mean(scores))
    variances = [first.var() / 400 / 0.8**2, second.var() / 250 / 0.5**2, grades.var() / 300]
    half = 1.96 * np.sqrt(sum(variances)) / 3
    assert row["interval"] == pytest.approx((row["score"] - half, row["score"] + half), abs=0.1 * half)
    low, high = wilson_interval(int(first.sum()), 400)
    assert row["tasks"]["few"]["interval"] == pytest.approx(((low - 0.2) / 0.8, (high - 0.2) / 0.8))
    half = 1.96 * np.sqrt(variances[2])
    assert row["tasks"]["grades"]["interval"] == pytest.approx((scores[2] - half, scores[2] + half), abs=0.1 * half)


def test_depths_are_compared_on_the_same_examples():
    """What is gained, by task and in the mean, is known better than the two figures are."""
    draw = np.random.default_rng(1)
    before = draw.random(300) < 0.5
    after = before | (draw.random(300) < 0.1)
    grades = draw.random(200)
    content = suite_of({"right": (0.25, {1: before, 8: after}), "grades": (0.0, {1: grades, 8: grades + 0.1})})
    (change,) = content["differences"]
    gained = int((after & ~before).sum())
    low, high = difference_interval(gained, 0, 300)
    assert change["num_steps"] == [1, 8]
    assert change["tasks"]["right"]["interval"] == pytest.approx((low / 0.75, high / 0.75))
    assert change["tasks"]["right"]["score"] == pytest.approx(gained / 300 / 0.75)
    assert change["tasks"]["grades"]["interval"] == pytest.approx((0.1, 0.1))
    assert change["score"] == pytest.approx((gained / 300 / 0.75 + 0.1) / 2)
    half = 1.96 * np.sqrt((after ^ before).var() / 300) / 0.75 / 2
    assert change["interval"] == pytest.approx((change["score"] - half, change["score"] + half), abs=0.15 * half)


def test_tasks_of_one_size_are_drawn_apart():
    """Else the errors of tasks would add up in the mean."""
    right = np.random.default_rng(0).random(200) < 0.5
    (one,), (four,) = (suite_of({str(it): (0.0, {1: right}) for it in range(count)})["rows"] for count in (1, 4))
    widths = [np.diff(row["interval"])[0] for row in (one, four)]
    assert widths[1] == pytest.approx(widths[0] / 2, rel=0.1)


def test_the_table_is_in_per_cent():
    content = suite_of({"a": (0.5, {1: [0.0, 1.0], 8: [1.0, 1.0]})})
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in suite_markdown(content).splitlines()]
    table = [cells for cells in lines if cells]
    assert table[0] == ["steps", "suite", "a"] and [cells[0] for cells in table] == [
        *("steps", "----:", "1", "8"), *("steps", "-----:", "1 to 8"),
    ]  # fmt: skip
    low, high = wilson_interval(1, 2)
    assert table[2][2] == f"0.0 ({100 * (2 * low - 1):.1f} to {100 * (2 * high - 1):.1f})"
    assert table[6][2].startswith("+100.0 (")


def test_a_model_without_a_core_has_one_score(tmp_path, capsys):
    folder = save_checkpoint(tmp_path / "plain", num_core_layers=0)
    path = write_suite(tmp_path, {"kind": "choices", "path": "questions.jsonl"})
    assert main([str(folder), "--tasks", path, "--num-steps", "1", "4"]) == 0
    found = capsys.readouterr()
    assert "has no core" in found.err and "no core" in found.out and "Gained" not in found.out
    (row,) = json.loads((folder / "evaluation" / "suite.json").read_text())["rows"]
    assert row["num_steps"] is None


def test_the_shipped_suite_is_read():
    tasks = read_suite(DEFAULT_TASKS)
    assert {"addition", "cups", "stories"} <= {task.label for task in tasks}
    assert {task.kind for task in tasks} == {"answers"} and all(task.source.has_answers for task in tasks)


CHOICES = {"kind": "choices", "path": "questions.jsonl"}


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([{**CHOICES, "chance": 1.0}], "suite.tasks[0]: chance is 1.0; give at least 0 and less than 1"),
        ([{"kind": "choices"}], "suite.tasks[0]: a task of kind choices needs path; give it"),
        ([{"kind": "guess"}], "'guess' is unknown; known: answers, choices, lm_eval"),
        ([{**CHOICES, "chances": 0.1}], "unknown key suite.tasks[0].chances (0.1); did you mean chance?"),
        ([CHOICES, CHOICES], "suite.tasks: two tasks are called 'questions'; give each a name"),
        ([], "suite.tasks: there is no task; give some"),
        ([{**CHOICES, "path": "none.jsonl"}], "none.jsonl"),
        ([{**CHOICES, "path": "suite.yaml"}], "suite.yaml line 1 is no question with choices"),
        ([{"kind": "answers", "source": {"kind": "files", "paths": ["a.txt"]}}], "source 'a' has no answers in memory"),
        ([{"kind": "answers", "source": {**SUMS, "difficulty": [300, 300]}}], "has an example of "),
    ],
)
def test_what_is_wrong_with_a_suite_is_one_line(tmp_path, checkpoint, capsys, tasks, said):
    with pytest.raises(SystemExit, match="2"):
        main([str(checkpoint), "--tasks", write_suite(tmp_path, *tasks)])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"prompt": "a", "choices": ["b"], "answer": 0}, "at least two choices"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": 2}, "answer is 2, not the number of one of 2 choices"),
        ({"prompt": "a", "choices": ["b", "c"]}, "KeyError('answer')"),
    ],
)
def test_lines_that_are_no_questions_are_named(tmp_path, checkpoint, capsys, line, said):
    path = write_suite(tmp_path, CHOICES)
    (tmp_path / "questions.jsonl").write_text(json.dumps(QUESTIONS[0]) + "\n" + json.dumps(line) + "\n")
    with pytest.raises(SystemExit, match="2"):
        main([str(checkpoint), "--tasks", path])
    error = capsys.readouterr().err
    assert said in error and "questions.jsonl line 2 is no question with choices" in error and error.count("\n") == 1


def test_tasks_of_the_harness_are_refused_where_it_is_not_installed(tmp_path, checkpoint, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.models.huggingface", None)
    path = write_suite(tmp_path, {"kind": "lm_eval", "path": "task.yaml"})
    with pytest.raises(SystemExit, match="2"):
        main([str(checkpoint), "--tasks", path])
    assert re.search("task 'task' is of kind lm_eval, and lm-eval is not installed: .*\n$", capsys.readouterr().err)


@pytest.mark.slow
def test_tasks_of_the_harness_are_scored(tmp_path, checkpoint, capsys):
    """Its sum of log-likelihoods at each depth, behind the begin token, as by hand; and a metric that there is not."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    task = {
        "task": "told",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
    }
    (tmp_path / "told.yaml").write_text(yaml.safe_dump(task))
    entry = {"kind": "lm_eval", "path": "told.yaml", "chance": 0.4}
    argv = [str(checkpoint), "--num-steps", "1", "5", "--output", str(tmp_path / "out"), "--tasks"]
    assert main([*argv, write_suite(tmp_path, entry)]) == 0
    content = json.loads((tmp_path / "out" / "suite.json").read_text())
    tokenizer, model = tiny_tokenizer(), tiny_model()
    for row in content["rows"]:
        right = []
        for question in QUESTIONS:
            sums = []
            for choice in question["choices"]:
                texts = question["prompt"], f"{question['prompt']} {choice}"
                before, whole = ([1, *tokenizer(text)["input_ids"]] for text in texts)
                with torch.no_grad():
                    logs = model(torch.tensor([whole]), num_steps=row["num_steps"]).logits[0].log_softmax(-1)
                sums.append(sum(logs[at - 1, whole[at]].item() for at in range(len(before), len(whole))))
            right.append(sums.index(max(sums)) == question["answer"])
        assert row["tasks"]["told"]["uncentred"] == np.mean(right)
        assert row["score"] == pytest.approx((np.mean(right) - 0.4) / 0.6)
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main([*argv, write_suite(tmp_path, {**entry, "metric": "f2"})])
    assert "task 'told' cannot be scored by lm-eval: KeyError('f2')" in capsys.readouterr().err
