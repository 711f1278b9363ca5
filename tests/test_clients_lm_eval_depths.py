"""`python -m evaluation.lm_eval`: several depths, and exits, of tiny models over tasks made here."""

import json
import math
import re
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml

from evaluation.answers import AnswerGenerator
from evaluation.efficiency import Setting, efficiency_table
from evaluation.intervals import ratio_interval, wilson_interval
from evaluation.lm_eval import main
from tests.tiny_language_model import save_checkpoint, tiny_model, tiny_tokenizer
from tests.tiny_seq2seq import tiny_seq2seq

QUESTIONS = [
    {"question": "the cat sat on the", "choices": ["mat", "cat", "naïve café"], "answer": 0},
    {"question": "a naïve", "choices": ["café", "the mat sat on the cat", "on"], "answer": 0},
    {"question": "on", "choices": ["mat.", "the mat", "cat"], "answer": 1},
]
NEW_TOKENS = 6
TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    },
    "continuations": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["<|end|>"], "max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    },
    "likelihoods": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{question}}",
        "doc_to_target": " {{choices[1]}}",
        "metric_list": [{"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False}],
    },
    "texts": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{question}} {{choices[1]}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
}
EXITS = {"exit_criterion": "latent_difference", "exit_threshold": 0.5}
"""Of the models here, whose tokens then differ in steps."""


def save_tasks(folder: Path) -> Path:
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(rows)}}, "test_split": "test"}
    (folder / "tasks").mkdir()
    for name, task in TASKS.items():
        (folder / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **task, **data}))
    return folder / "tasks"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


def log_likelihoods(context: str, continuation: str, **depth) -> list[float]:
    """Of the tokens of a continuation that the model is given at once, behind the begin token."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    before, whole = (
        [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]] for text in (context, context + continuation)
    )
    with torch.no_grad():
        scores = model(torch.tensor([whole]), **depth).logits[0].log_softmax(-1)
    return [scores[place - 1, whole[place]].item() for place in range(len(before), len(whole))]


def run(checkpoint: Path, folder: Path, *options: str) -> dict:
    """The JSON that the command writes of all tasks."""
    output = folder / "found.json"
    names = ["--include_path", str(save_tasks(folder)), "--tasks", *TASKS]
    argv = ["--model", "recurrent", "--model_args", f"pretrained={checkpoint}", *names, "--output", str(output)]
    assert main([*argv, *options]) == 0
    return json.loads(output.read_text())


def bits_of(task: dict) -> float:
    return task["metrics"]["bits_per_byte"]["value"]


@pytest.mark.slow
def test_each_depth_has_the_likelihoods_of_the_model(tmp_path, checkpoint, capsys, monkeypatch):
    """Of multiple choice, of continuations, and of whole texts; requests are built once for all depths."""
    from lm_eval.api.task import ConfigurableTask

    built, build = [], ConfigurableTask.build_all_requests
    monkeypatch.setattr(
        ConfigurableTask, "build_all_requests", lambda self, **options: (built.append(self), build(self, **options))[1]
    )
    rows = run(checkpoint, tmp_path, "--num-steps", "6", "1", "3")["rows"]
    assert len(built) == len(set(built)) == len(TASKS) and [row["num_steps"] for row in rows] == [1, 3, 6]
    assert capsys.readouterr().out.startswith((tmp_path / "found.md").read_text())
    for row in rows:
        depth, tasks = {"num_steps": row["num_steps"]}, row["tasks"]
        right, likely, whole = [], [], 0.0
        for it in QUESTIONS:
            sums = [sum(log_likelihoods(it["question"], f" {choice}", **depth)) for choice in it["choices"]]
            right.append(sums.index(max(sums)) == it["answer"])
            likely.append(sums[1])
            whole += sum(log_likelihoods("", f"{it['question']} {it['choices'][1]}", **depth))
        perplexity = tasks["likelihoods"]["metrics"]["perplexity"]
        size = sum(len(f"{it['question']} {it['choices'][1]}".encode()) for it in QUESTIONS)
        assert tasks["choices"]["metrics"]["acc"]["value"] == pytest.approx(sum(right) / 3)
        assert tasks["choices"]["metrics"]["acc"]["interval"] == pytest.approx(wilson_interval(sum(right), 3))
        assert math.log(perplexity["value"]) == pytest.approx(-sum(likely) / 3, abs=1e-4)
        ends = [-end for end in reversed(ratio_interval(likely))]
        assert [math.log(end) for end in perplexity["interval"]] == pytest.approx(ends, abs=1e-4)
        assert bits_of(tasks["texts"]) * math.log(2) * size == pytest.approx(-whole, abs=1e-4)
        assert all(task["mean_steps"] == row["num_steps"] and task["seconds"] > 0 for task in tasks.values())
    assert len({bits_of(row["tasks"]["texts"]) for row in rows}) == 3


@pytest.mark.slow
def test_single_requests_have_the_likelihoods_of_the_model_with_exits_too(checkpoint):
    """Alone, by the model class: contexts that are empty, or end in spaces, and texts longer than the model's window,
    which are scored as by `hf`; exits that no value reaches change nothing.
    """
    import lm_eval.models.huggingface as hf
    from lm_eval.api.instance import Instance

    from evaluation.harness import RecurrentLM

    texts = [
        ("the cat", " sat on"),
        ("", "a naïve café"),
        ("on  ", "the mat"),
        ("the cat " * 100, "sat on the mat"),
        ("a", "!"),
    ]
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in texts]
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("the cat sat.", "naïve 日本語 " * 40)]
    usual = {"pretrained": str(checkpoint), "device": "cpu", "batch_size": 2}
    reference = hf.HFLM(**usual, add_bos_token=True)
    reference.model.config.num_steps = 5
    plain, never = (
        RecurrentLM(**usual, num_steps=5),
        RecurrentLM(**usual, num_steps=5, exit_criterion="latent_difference", exit_threshold=1e-9),
    )
    expected = reference.loglikelihood(requests)
    for number in (0, 1, 4):
        assert expected[number][0] == pytest.approx(sum(log_likelihoods(*texts[number], num_steps=5)), abs=1e-4)
    reference.add_bos_token = False
    for lm in (plain, never):
        found = lm.loglikelihood(requests)
        assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-4)
        assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
        assert lm.loglikelihood_rolling(rolling) == pytest.approx(reference.loglikelihood_rolling(rolling), abs=1e-4)
        assert lm.mean_steps == 5 and lm.add_bos_token


@pytest.mark.slow
def test_exits_have_the_likelihoods_and_steps_of_the_evaluation(tmp_path, checkpoint):
    """Of `python -m evaluation --efficiency`, whose answers are the continuations of the task."""
    options = ["--num-steps", "1", "8", "--exit-criterion", "latent_difference", "--exit-threshold", "0.5", "0.8"]
    found = run(checkpoint, tmp_path, *options)["rows"]
    tokenizer, model = tiny_tokenizer(), tiny_model()
    examples = []
    for it in QUESTIONS:
        texts = it["question"], f"{it['question']} {it['choices'][1]}"
        before, whole = ([tokenizer.bos_token_id, *tokenizer(text)["input_ids"]] for text in texts)
        examples.append({"input_ids": whole, "labels": [-100] * len(before) + whole[len(before) :]})
    settings = [Setting(1), Setting(8), *(Setting(8, "latent_difference", value) for value in (0.5, 0.8))]
    table = efficiency_table(model, settings, {"likelihoods": examples}, AnswerGenerator(tokenizer))
    points = {(it.num_steps, it.threshold): it for it in table.points}
    assert len(points) == len(found) == 4
    for row in found:
        task, point = row["tasks"]["likelihoods"], points[row["num_steps"], row["threshold"]]
        nats = math.log(task["metrics"]["perplexity"]["value"]) * len(QUESTIONS)
        assert nats == pytest.approx(point.loss * table.num_tokens, abs=1e-4)
        assert task["mean_steps"] == pytest.approx(point.mean_steps)
    steps = [row["tasks"]["likelihoods"]["mean_steps"] for row in found]
    assert 1 < steps[3] < steps[2] < steps[1] == 8


@pytest.mark.slow
def test_generated_texts_and_their_steps_are_those_of_the_model(tmp_path, checkpoint, monkeypatch):
    """The right answers are here what the model says at 8 steps."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    prompts = [torch.tensor([[1, *tokenizer(it["question"])["input_ids"]]]) for it in QUESTIONS]

    def said(ids: torch.Tensor, **depth) -> tuple[str, list[int]]:
        output = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, return_dict_in_generate=True, **depth)
        text = tokenizer.decode(output.sequences[0, ids.shape[1] :], skip_special_tokens=True)
        return text, output.exit_steps[0].tolist()

    answers = [said(ids, num_steps=8)[0] for ids in prompts]
    rows = [{**it, "choices": [text, "on"]} for it, text in zip(QUESTIONS, answers, strict=True)]
    monkeypatch.setitem(globals(), "QUESTIONS", rows)
    options = ["--num-steps", "1", "8", "--exit-criterion", "latent_difference", "--exit-threshold", "0.8"]
    found = [row["tasks"]["continuations"] for row in run(checkpoint, tmp_path, *options)["rows"]]
    exits = {"exit_criterion": "latent_difference", "exit_threshold": 0.8, "exit_in_prefill": True}
    for task, depth in zip(found, ({"num_steps": 1}, {"num_steps": 8}, {"num_steps": 8, **exits}), strict=True):
        ours = [said(ids, **depth) for ids in prompts]
        steps = [number for _, numbers in ours for number in numbers if number]
        assert task["mean_steps"] == pytest.approx(sum(steps) / len(steps))
        right = [text == answer for (text, _), answer in zip(ours, answers, strict=True)]
        assert task["metrics"]["exact_match"]["value"] == pytest.approx(sum(right) / 3)
    values = [task["metrics"]["exact_match"]["value"] for task in found]
    assert values[1] == 1 and values[0] < 1 and found[2]["mean_steps"] < 8


@pytest.mark.slow
def test_a_decoder_behind_an_encoder(tmp_path):
    """Its model, by the command, at two depths and with exits that no value reaches, and with some that are."""
    source = tiny_seq2seq(scale=1.5, vocab_size=320)
    source.save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    options = ["--num-steps", "1", "6", "--exit-criterion", "latent_difference", "--exit-threshold", "1e-9", "0.5"]
    rows = run(tmp_path, tmp_path, *options)["rows"]
    for row in rows[:3]:
        nats = 0.0
        for it in QUESTIONS:
            ids = torch.tensor([[1, *tokenizer(it["question"])["input_ids"]]])
            target = torch.tensor([tokenizer(f" {it['choices'][1]}")["input_ids"]])
            nats += source(ids, labels=target, num_steps=row["num_steps"]).loss.item() * target.shape[1]
        perplexity = row["tasks"]["likelihoods"]["metrics"]["perplexity"]["value"]
        assert math.log(perplexity) * 3 == pytest.approx(nats, abs=1e-4)
    steps = [row["tasks"]["likelihoods"]["mean_steps"] for row in rows]
    assert steps[:3] == [1, 6, 6] and 1 < steps[3] < 6


@pytest.mark.slow
def test_models_whose_depth_cannot_vary_are_run_once(tmp_path, capsys):
    plain = save_checkpoint(tmp_path / "plain", num_core_layers=0)
    (row,) = run(plain, tmp_path, "--num-steps", "1", "4")["rows"]
    assert row["num_steps"] is None and all(task["mean_steps"] is None for task in row["tasks"].values())
    options = ["--model-args", f"pretrained={plain}", "--tasks", str(tmp_path / "tasks" / "texts.yaml")]
    assert "exit_criterion is 'cosine', but the depth of this model cannot vary" in refused(
        capsys, *options, "--exit-criterion", "cosine"
    )


@pytest.mark.slow
def test_arguments_of_the_model_and_of_tasks_are_read(tmp_path, checkpoint):
    """A depth by the model's arguments, without the begin token; one example, after two others."""
    output, task = tmp_path / "here" / "found.json", save_tasks(tmp_path) / "texts.yaml"
    argv = ["--tasks", str(task), "--limit", "1", "--num_fewshot", "2", "--batch_size", "1", "--output", str(output)]
    assert main(["--model_args", f"pretrained={checkpoint},mean_steps=5,add_bos_token=False", *argv]) == 0
    found = json.loads(output.read_text())
    (row,) = found["rows"]
    assert row["num_steps"] == 5 and found["model_args"]["mean_steps"] == 5 and found["limit"] == 1
    text = f"{QUESTIONS[0]['question']} {QUESTIONS[0]['choices'][1]}"
    nats = -sum(log_likelihoods("", text, num_steps=5))
    assert row["tasks"]["texts"]["num_examples"] == 1
    assert bits_of(row["tasks"]["texts"]) == pytest.approx(nats / math.log(2) / len(text.encode()), abs=1e-4)


@pytest.mark.slow
def test_the_model_class_stands_alone(checkpoint):
    """In `lm_eval.simple_evaluate`, where it is known by its name."""
    from lm_eval.api.registry import get_model

    from evaluation import harness

    arguments = f"pretrained={checkpoint},exit_criterion=cosine,num_steps=4"
    lm = get_model("recurrent").create_from_arg_string(arguments, {"device": "cpu"})
    assert type(lm) is harness.RecurrentLM and lm.setting == Setting(4, "cosine", 1e-3)
    assert get_model("recurrent")(pretrained=str(checkpoint), device="cpu").setting == Setting(3)
    for given in ({"exit_criterion": "soon"}, {"exit_criterion": "cosine", "exit_threshold": 3.0}):
        with pytest.raises(ValueError, match="exit_"):
            harness.RecurrentLM(pretrained=str(checkpoint), device="cpu", **given)


@pytest.mark.slow
def test_intervals_are_of_what_is_a_mean():
    from lm_eval.api.metrics import bits_per_byte, mean, median, perplexity

    from evaluation.harness import metric_interval

    values, sizes = [-3.0, -5.0, -2.5, -8.0], [4, 5, 3, 9]
    low, high = ratio_interval(values)
    assert metric_interval(values, mean) == (low, high)
    assert metric_interval(values, perplexity) == pytest.approx((math.exp(-high), math.exp(-low)))
    low, high = ratio_interval(values, sizes)
    pairs = list(zip(values, sizes, strict=True))
    assert metric_interval(pairs, bits_per_byte) == pytest.approx((-high / math.log(2), -low / math.log(2)))
    assert metric_interval([1.0, 0.0, 1.0], mean) == wilson_interval(2, 3)
    assert metric_interval(values, median) is None


def refused(capsys, *options: str) -> str:
    """The one line on standard error of a command that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit, match="2"):
        main(list(options))
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("evaluation.lm_eval: error: ")
    return error


def test_thresholds_need_a_criterion(capsys):
    options = ["--model-args", "pretrained=x", "--tasks", "y", "--exit-threshold", "1"]
    assert "--exit-threshold has no effect without --exit-criterion" in refused(capsys, *options)


def test_that_the_harness_is_not_installed_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "evaluation.harness", raising=False)
    error = refused(capsys, "--model-args", "pretrained=x", "--tasks", "y")
    assert "lm-eval is not installed (import of lm_eval halted; None in sys.modules): run `make extra`." in error


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"--model_args": "dtype=float32"}, "give pretrained=FOLDER in it"),
        ({"--model_args": "pretrained=none"}, "none"),
        ({"--model_args": "pretrained={checkpoint},colour=red"}, "lm-eval cannot load the model: TypeError.*'colour'"),
        ({"--model_args": "pretrained={checkpoint},mean_steps=0"}, "RecurrenceConfig.mean_steps: "),
        ({"--tasks": "none.yaml"}, "the tasks cannot be read by lm-eval: "),
        ({"--tasks": "{tasks}/broken.yaml"}, "the tasks cannot be read by lm-eval: "),
        ({"--tasks": "{tasks}/long.yaml"}, "task 'long' cannot be scored by lm-eval: .*maximum sequence length"),
        ({"--output": "found.txt"}, "--output is found.txt, .*: end it in .json"),
        ({"--exit-criterion": "cosine", "--exit-threshold": "3"}, "exit_threshold of cosine must be above 0"),
        ({"--exit-criterion": "probe"}, "probe"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path, checkpoint, capsys, monkeypatch, options, said):
    from lm_eval.tasks import TaskManager

    if options.get("--tasks") == "none.yaml":  # the harness's own tasks are thousands of files
        monkeypatch.setattr("evaluation.harness.TaskManager", partial(TaskManager, include_defaults=False))
    tasks = save_tasks(tmp_path)
    (tasks / "broken.yaml").write_text("task: broken\noutput_type: guess\n")
    long = yaml.safe_load((tasks / "continuations.yaml").read_text())
    long["generation_kwargs"]["max_gen_toks"] = 128
    (tasks / "long.yaml").write_text(yaml.safe_dump({**long, "task": "long"}))
    usual = {
        "--model_args": "pretrained={checkpoint}",
        "--tasks": "{tasks}/texts.yaml",
        "--output": f"{tmp_path}/a.json",
    }
    parts = [part.format(checkpoint=checkpoint, tasks=tasks) for pair in (usual | options).items() for part in pair]
    assert re.search(said, refused(capsys, *parts))
    assert not (tmp_path / "a.json").exists()
