"""Loss and exact answers against the operations that were executed: counted ones equal those by hand."""

import json
from dataclasses import asdict

import numpy as np
import pytest
import torch

from evaluation.answers import AnswerGenerator
from evaluation.efficiency import (
    FIXED,
    EfficiencyRunner,
    Setting,
    Work,
    as_examples,
    combine_works,
    efficiency_markdown,
    efficiency_table,
    exit_settings,
)
from evaluation.results import save_efficiency
from tests.tiny_language_model import tiny_model, tiny_tokenizer

PROMPT, ANSWER = 5, 4
HIDDEN, INNER, WORDS = 32, 48, 320
# Of `tiny_model`: 4 heads of 8, 2 for keys and values, a gated feed-forward; prelude and coda of a layer each.
LAYER = 2 * (HIDDEN * (HIDDEN + 2 * 16) + HIDDEN * HIDDEN + 3 * HIDDEN * INNER)
INJECTION, HEAD = 2 * 2 * HIDDEN * HIDDEN, 2 * HIDDEN * WORDS
IMAGE = {"input_ids": [1, 2, 3], "media": {}}
LENGTHS = ((PROMPT, ANSWER), (PROMPT, ANSWER), (PROMPT, ANSWER), (3, 2))


@pytest.fixture(scope="module")
def examples():
    generator, rows = torch.Generator().manual_seed(0), []
    for prompt, answer in LENGTHS:
        ids = torch.randint(3, 300, (prompt + answer,), generator=generator).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return rows


def measured(model, settings, examples, **options):
    return efficiency_table(model, settings, {"source": examples}, AnswerGenerator(tiny_tokenizer()), **options)


def operations(steps: list[int], prompt: int) -> int:
    """Operations of a row, by hand: the prompt at once, then token by token, each of so many core steps."""
    total = 0
    for number, taken in enumerate(steps):
        tokens, seen = (prompt, prompt) if number == 0 else (1, prompt + number)
        of_layer = tokens * LAYER + 4 * tokens * seen * HIDDEN
        total += (2 + taken) * of_layer + taken * tokens * INJECTION + HEAD
    return total


def test_counted_operations_are_those_by_hand(examples):
    """With eager attention all products are executed as they are written."""
    model = tiny_model(attn_implementation="eager")
    table = measured(model, [Setting(1), Setting(4)], examples, batch_size=2)
    read = sum(prompt + answer - 1 for prompt, answer in LENGTHS)
    for point, steps in zip(table.points, (1, 4), strict=True):
        by_hand = sum(operations([steps] * answer, prompt) for prompt, answer in LENGTHS)
        assert point.flops_per_token == by_hand / read
        assert point.mean_steps == steps and point.milliseconds_per_token > 0
    assert (table.num_examples, table.num_tokens) == (4, 14)


def test_fused_attention_is_counted_and_what_is_computed_once_is_counted_once(examples):
    """Torch alone passes over the fused operator of CPUs. Of a single token, what the embedding adds to the injection
    is computed once for all steps.
    """
    table = measured(tiny_model(), [Setting(3)], examples)
    saved = sum((3 - 1) * (answer - 1) * 2 * HIDDEN * HIDDEN for _, answer in LENGTHS)
    by_hand = sum(operations([3] * answer, prompt) for prompt, answer in LENGTHS) - saved
    assert table.points[0].flops_per_token * sum(a + b - 1 for a, b in LENGTHS) == by_hand


def test_rows_that_have_exited_add_nothing(examples):
    """Each token has its own number of steps, which `generate` of the row alone says."""
    model = tiny_model(attn_implementation="eager")
    setting = Setting(6, "latent_difference", 0.33)
    runner = EfficiencyRunner(model, AnswerGenerator(tiny_tokenizer()), examples, 4)
    with torch.no_grad():
        steps = [runner.say([row], setting)[1].exit_steps[0].tolist() for row in examples]
    assert len({tuple(it) for it in steps[:3]}) > 1  # rows of one batch that differ
    (point,) = measured(model, [setting], examples).points
    by_hand = sum(operations(taken, prompt) for taken, (prompt, _) in zip(steps, LENGTHS, strict=True))
    assert point.flops_per_token * sum(a + b - 1 for a, b in LENGTHS) == pytest.approx(by_hand, rel=1e-12)
    flat = [step for taken in steps for step in taken]
    assert point.mean_steps == sum(flat) / len(flat) < 6


def test_loss_and_exact_answers_are_those_of_whole_rows(examples):
    """One example is changed to say what the model would say, and so is right."""
    model = tiny_model()
    ids = model.generate(
        torch.tensor([examples[0]["input_ids"][:PROMPT]]), num_steps=2, max_new_tokens=2, do_sample=False
    )
    own = {"input_ids": ids[0].tolist(), "labels": [-100] * PROMPT + ids[0, PROMPT:].tolist()}
    (point,) = measured(model, [Setting(2)], [own, *examples[1:]]).points
    nats = tokens = 0
    for row in [own, *examples[1:]]:
        batch = {name: torch.tensor([values]) for name, values in row.items()}
        count = sum(label != -100 for label in row["labels"])
        with torch.no_grad():
            nats, tokens = nats + count * model(**batch, num_steps=2).loss.item(), tokens + count
    assert point.loss == pytest.approx(nats / tokens, rel=1e-5)
    assert point.exact == 0.25 and point.on_front == ["loss", "exact"]


def work(nats: list[float], right: list[int], flops: int) -> Work:
    scores = np.stack([nats, np.full(len(nats), 2.0), right], axis=1)
    return Work(scores, flops, 0.5, 10, [1, 2])


def test_fronts_and_slopes():
    """The loss falls by a half, and the share grows by an eighth, with each doubling, in each example alike."""
    base = np.linspace(1, 3, 8)
    settings = [Setting(1), Setting(2), Setting(4), Setting(4, "cosine", 0.1), Setting(4, "cosine", 0.2)]
    works = [
        work(base + 4, [1, 0, 0, 0, 0, 0, 0, 0], 1000),
        work(base + 3, [1, 1, 0, 0, 0, 0, 0, 0], 2000),
        work(base + 2, [1, 1, 1, 0, 0, 0, 0, 0], 4000),
        work(base + 4, [1, 1, 0, 0, 0, 0, 0, 0], 3000),
        work(base + 4, [1, 0, 0, 0, 0, 0, 0, 0], 2500),
    ]
    table = combine_works(settings, works)
    assert [point.flops_per_token for point in table.points] == [100, 200, 250, 300, 400]
    both = ["loss", "exact"]
    assert [point.on_front for point in table.points] == [both, both, [], [], both]
    assert table.points[0].milliseconds_per_token == 50 and table.points[0].loss == pytest.approx(3)
    of_loss, of_exact = table.slopes  # exits span too little
    assert (of_loss.criterion, of_loss.measure) == (FIXED, "loss")
    assert (of_loss.value, *of_loss.interval) == pytest.approx((-0.5, -0.5, -0.5))
    assert of_exact.value == pytest.approx(0.125)
    assert of_exact.interval.low < 0.125 < of_exact.interval.high
    output = efficiency_markdown(table)
    assert "-0.5000 (-0.5000 to -0.5000)" in output and "+12.5 (" in output
    assert "|  cosine 0.1 |" in output and "| num_steps 4 |" in output


def test_files(tmp_path):
    table = combine_works(
        [Setting(1), Setting(2)], [work([1, 2], [0, 1], 10), work([1, 1], [1, 1], 20)], has_answers=False
    )
    assert table.points[0].exact is None and [slope.measure for slope in table.slopes] == ["loss"]
    paths = save_efficiency(table, tmp_path, {"limit": 3})
    assert [path.name for path in paths] == ["efficiency.json", "efficiency.md", "efficiency.png"]
    content = json.loads(paths[0].read_text())
    assert content == json.loads(json.dumps({"limit": 3, **asdict(table)}))
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def test_thresholds_around_that_of_the_criterion():
    assert [it.threshold for it in exit_settings(4, "kl_divergence", None)] == pytest.approx([5e-5, 5e-4, 5e-3, 5e-2])
    assert exit_settings(4, "cosine", [0.5, 0.1, 0.5]) == [Setting(4, "cosine", 0.1), Setting(4, "cosine", 0.5)]


def test_texts_become_examples():
    found = as_examples({"texts": [{"input_ids": list(range(100))}, {"input_ids": [5]}, {"input_ids": [1, 2]}, IMAGE]})
    long, short = found["texts"]
    assert short == {"input_ids": [1, 2], "labels": [-100, 2]}
    assert long["input_ids"] == list(range(65)) and long["labels"] == [-100, *range(1, 65)]
    with pytest.raises(ValueError, match="--efficiency needs questions whose answers are texts"):
        as_examples({"drawn": [IMAGE]})
