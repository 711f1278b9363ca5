"""Tables of what depth buys."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from evaluation.depth import DepthRow, ExactMatch, answers_right, depth_table
from evaluation.intervals import ratio_interval
from evaluation.metrics import token_byte_lengths
from evaluation.results import example_lines, save_depth_table
from evaluation.tables import markdown_table
from tests.tiny_language_model import tiny_model, tiny_tokenizer


def collate(rows):
    """Right padding, as the project's collator does it."""
    longest = max(len(row["input_ids"]) for row in rows)
    pad = lambda values, fill: list(values) + [fill] * (longest - len(values))  # noqa: E731
    return {
        "input_ids": torch.tensor([pad(row["input_ids"], 0) for row in rows]),
        "labels": torch.tensor([pad(row["labels"], -100) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in rows]),
    }


def random_ids(*shape, seed=0):
    return torch.randint(3, 300, shape, generator=torch.Generator().manual_seed(seed)).tolist()


def examples_answered_greedily(model, num_steps):
    """Prompts of several lengths with answers as `generate` writes them, every second one spoilt at its last token."""
    examples = []
    for index in range(6):
        prompt = random_ids(3 + index, seed=index)
        output = model.generate(
            torch.tensor([prompt]),
            num_steps=num_steps,
            max_new_tokens=4,
            do_sample=False,
            eos_token_id=2,
            pad_token_id=0,
        )
        answer = output[0, len(prompt) :].tolist()
        if index % 2:
            answer[-1] = 5 if answer[-1] != 5 else 6
        examples.append(
            {
                "input_ids": prompt + answer,
                "labels": [-100] * len(prompt) + answer,
                "prompt": prompt,
                "answer": answer,
                "difficulty": 1 + index // 3,
            }
        )
    return examples


def test_exact_match_is_that_of_greedy_decoding():
    """Teacher-forced argmax against `generate` itself, in padded batches, at two depths."""
    model = tiny_model()
    examples = examples_answered_greedily(model, num_steps=2)
    texts = {"text": [{"input_ids": ids, "labels": ids} for ids in random_ids(2, 8)]}
    rows = depth_table(model, [2, 5], texts, {"lookup": examples}, collate, batch_size=4)
    for row in rows:
        right = []
        for example in examples:
            output = model.generate(
                torch.tensor([example["prompt"]]),
                num_steps=row.num_steps,
                max_new_tokens=4,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=0,
            )
            right.append(output[0, len(example["prompt"]) :].tolist() == example["answer"])
        found = row.exact_match["lookup"]
        assert found.total == sum(right) / 6 and found.num_examples == 6
        assert found.by_difficulty == {1: sum(right[:3]) / 3, 2: sum(right[3:]) / 3}
    assert rows[0].exact_match["lookup"].total == 0.5
    assert rows[0].exact_match["lookup"].by_difficulty == {1: 2 / 3, 2: 1 / 3}


def test_answers_right_needs_every_labelled_position():
    labels = torch.tensor([[9, 1, 2, 3], [9, -100, 2, 3], [9, -100, 2, -100]])
    logits = torch.nn.functional.one_hot(torch.tensor([[1, 2, 0, 0]] * 3), 10).float()  # predicts 1, 2, 0
    assert answers_right(logits, labels).tolist() == [False, False, True]


def test_loss_of_each_source_and_of_all_together():
    """Sources of different size: the total weighs tokens, and equals the loss over all rows at once."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    a, b = random_ids(5, 12), random_ids(2, 6, seed=9)
    texts = {name: [{"input_ids": ids, "labels": ids} for ids in rows] for name, rows in (("a", a), ("b", b))}
    model.train()
    row = depth_table(model, [4], texts, {}, collate, token_byte_lengths(tokenizer), batch_size=2)[0]
    assert model.training
    model.eval()

    def nll(rows):
        with torch.no_grad():
            logits = model(torch.tensor(rows), num_steps=4).logits.log_softmax(-1)
        return -sum(logits[r, t - 1, ids[t]].item() for r, ids in enumerate(rows) for t in range(1, len(ids)))

    num_bytes = sum(token_byte_lengths(tokenizer)[torch.tensor(ids[1:])].sum().item() for ids in a + b)
    assert row.sources["a"]["loss"] == pytest.approx(nll(a) / 55, rel=1e-5)
    assert row.sources["b"]["loss"] == pytest.approx(nll(b) / 10, rel=1e-5)
    assert row.loss == pytest.approx((nll(a) + nll(b)) / 65, rel=1e-5)
    assert row.perplexity == pytest.approx(math.exp(row.loss))
    assert row.bits_per_byte == pytest.approx((nll(a) + nll(b)) / math.log(2) / num_bytes, rel=1e-5)
    by_row = [nll([ids]) for ids in a + b]
    low, high = ratio_interval(by_row, [len(ids) - 1 for ids in a + b])
    assert row.intervals["loss"] == pytest.approx((low, high), rel=1e-5)
    assert row.intervals["perplexity"] == pytest.approx((math.exp(low), math.exp(high)), rel=1e-5)
    assert row.source_intervals["b"]["loss"] == pytest.approx(ratio_interval(by_row[5:], [5, 5]), rel=1e-5)
    lines = list(example_lines(row))
    assert [(line["source"], line["row"], line["tokens"]) for line in lines] == [
        *(("a", number, 11) for number in range(5)),
        *(("b", number, 5) for number in range(2)),
    ]
    assert [line["nats"] for line in lines] == pytest.approx(by_row, rel=1e-5)
    assert sum(line["bytes"] for line in lines) == num_bytes
    assert row.milliseconds_per_token > 0


def test_depth_changes_the_loss_and_more_steps_take_longer():
    model = tiny_model()
    texts = {"text": [{"input_ids": ids, "labels": ids} for ids in random_ids(8, 32)]}
    rows = depth_table(model, [1, 64], texts, {}, collate, batch_size=8)
    assert rows[0].loss != rows[1].loss
    assert rows[1].milliseconds_per_token > 3 * rows[0].milliseconds_per_token
    assert rows[0].bits_per_byte is None


def test_time_is_that_of_the_forward_passes(monkeypatch):
    """On a clock that only the model moves, 1.5 s a pass: 3 passes for 5 rows of 8; one before them is not timed."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("evaluation.depth.time.perf_counter", lambda: clock.now)
    model = tiny_model()

    def forward(module, inputs):
        clock.now += 1.5

    model.register_forward_pre_hook(forward)
    texts = {"text": [{"input_ids": ids, "labels": ids} for ids in random_ids(5, 8)]}
    (row,) = depth_table(model, [2], texts, {}, collate, batch_size=2)
    assert row.milliseconds_per_token == 1000 * 3 * 1.5 / 40
    assert clock.now == 4 * 1.5


def test_a_model_without_a_core_is_evaluated_without_a_depth():
    texts = {"text": [{"input_ids": ids, "labels": ids} for ids in random_ids(2, 8)]}
    (row,) = depth_table(tiny_model(num_core_layers=0), [None], texts, {}, collate)
    assert row.num_steps is None
    assert "no core" in markdown_table([row])


@pytest.mark.parametrize(
    ("texts", "examples", "message"),
    [
        ({}, {}, "0 validation sources: name at least one under data.validation"),
        ({"empty": []}, {}, "Validation source 'empty' has 0 rows"),
        ({"a": [{"labels": [1]}]}, {"sums": []}, "Validation source 'sums' has 0 rows"),
        ({"a": [{"labels": [1]}]}, {"sums": [{"labels": [-100]}]}, "Row 0 of 'sums' has no labelled answer token"),
    ],
)
def test_missing_rows_and_answers_are_errors(texts, examples, message):
    """Counts in the message."""
    with pytest.raises(ValueError, match=message):
        depth_table(tiny_model(), [1], texts, examples, collate)


def known_rows():
    def match(total, one, two):
        return ExactMatch(total, 8, {1: one, 2: two})

    return [
        DepthRow(1, 2.5, 12.18, 1.25, 0.5, {"text": {"loss": 2.5}}, {"lookup": match(0.25, 0.5, 0.0)}),
        DepthRow(16, 1.5, 4.48, 0.75, 3.0, {"text": {"loss": 1.5}}, {"lookup": match(1.0, 1.0, 1.0)}),
    ]


def test_markdown_table_has_the_figures():
    assert markdown_table(known_rows()) == (
        "| steps |   loss | perplexity | bits per byte | exact lookup | ms per token |\n"
        "| ----: | -----: | ---------: | ------------: | -----------: | -----------: |\n"
        "|     1 | 2.5000 |     12.180 |        1.2500 |       25.0 % |       0.5000 |\n"
        "|    16 | 1.5000 |      4.480 |        0.7500 |      100.0 % |       3.0000 |\n"
        "\nExact match of lookup by difficulty:\n\n"
        "| steps |       1 |       2 |\n"
        "| ----: | ------: | ------: |\n"
        "|     1 |  50.0 % |   0.0 % |\n"
        "|    16 | 100.0 % | 100.0 % |\n"
    )


def test_saved_files_hold_table_and_picture(tmp_path):
    rows = known_rows()
    paths = save_depth_table(rows, tmp_path / "evaluation", {"checkpoint": "runs/x"})
    assert [path.name for path in paths] == ["depth.json", "depth.md", "depth.png"]
    content = json.loads(paths[0].read_text())
    assert content["checkpoint"] == "runs/x"
    assert [row["num_steps"] for row in content["rows"]] == [1, 16]
    assert content["rows"][0]["exact_match"]["lookup"]["by_difficulty"] == {"1": 0.5, "2": 0.0}
    assert paths[1].read_text() == markdown_table(rows)
    from PIL import Image

    with Image.open(paths[2]) as picture:
        assert picture.size == (1560, 480)
        assert len(picture.convert("L").getcolors()) > 50  # lines and letters, not an empty sheet
