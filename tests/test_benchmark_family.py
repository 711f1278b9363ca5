"""The benchmark of the family of blocks: equal parameters, its arithmetic, and a run of a second."""

import pytest

from benchmarks import equal_time, family
from tests.test_pretrain import write_config

# The models of one of the tasks that have the same, and of the other.
PAIRS = [(task, name) for task in ("cups", family.SEQ2SEQ) for name in family.CONTESTANTS[task]]


def row(variant: str = family.REFERENCE, seed: int = 0, **others) -> dict:
    found = {"mean_steps": 4, "score": {"4": 0.8 + seed / 10, "8": 0.5}, "parameters": 1000, "updates": 60}
    job = {"task": "cups", "variant": variant, "seed": seed, "updates_of_reference": 500, "questions": 10}
    return {**job, **found, "cpu_seconds": 5.5, **others}


def test_all_variants_have_about_as_many_parameters():
    """Counted from the shapes of the weights; one that has not is named."""
    family.check_parameters(PAIRS)
    sizes = {task: family.parameters(task, family.REFERENCE) for task in family.TASKS}
    assert all(abs(family.parameters(*pair) / sizes[pair[0]] - 1) <= 0.03 for pair in PAIRS)


def test_all_but_one_execute_eight_layers_of_two():
    """At the mean depth."""
    for name, variant in family.VARIANTS.items():
        run = equal_time.config_of(family.TASKS["cups"], equal_time.as_flags("model", variant.options))
        assert run.model.num_unique_layers == 2
        assert run.model.mean_executed_layers == (2 if name == "plain" else 8), name


def test_more_parameters_are_refused(monkeypatch):
    wider = family.Variant({"intermediate_size": 1000})
    monkeypatch.setitem(family.CONTESTANTS["cups"], "wider", wider)
    with pytest.raises(ValueError, match=r"wider has \d+ parameters in cups, and reference has \d+; bring them within"):
        family.check_parameters([("cups", "wider")])


def test_the_report_has_means_and_intervals_over_seeds(tmp_path):
    """Scores of 80, 90 and 100: 90, and 4.303 times 10 / sqrt(3) beside it; a plain model has one depth."""
    plain = row("plain", mean_steps=None, score={"plain": 0.3})
    rows = [row(seed=seed) for seed in range(3)] + [plain]
    text = family.report(rows)
    assert "| reference | 3 | 90.0 ± 24.8 | 50.0 ± 0.0 | 1000.0 ± 0.0 | 60.0 ± 0.0 | 5.5 ± 0.0 |" in text
    assert "| plain | 1 | 30.0 | - | 1000.0 | 60.0 | 5.5 |" in text
    assert text.startswith("cups, the time of 500 updates of the reference")
    family.plot(rows, tmp_path / "scores.png")
    assert (tmp_path / "scores.png").stat().st_size > 5000


def test_a_run_trains_for_the_time_of_the_reference_and_answers(tmp_path, monkeypatch):
    config = write_config(tmp_path, training={"logging_steps": 1000})
    monkeypatch.setitem(family.TASKS, "tiny", equal_time.Task(config, "addition", updates=12, levels=(1,)))
    variants = {"reference": family.Variant({}), "plain": family.Variant({"num_core_layers": 0})}
    monkeypatch.setitem(family.CONTESTANTS, "tiny", variants)
    monkeypatch.setattr(equal_time, "PILOT", 4)
    found = family.measure("tiny", "plain", 0, questions=6)
    assert found["updates"] > 12 and found["mean_steps"] is None and list(found["score"]) == ["plain"]
    own = family.measure("tiny", "reference", 0, questions=6)
    assert own["updates"] == 12 and list(own["score"]) == [3, 6] and own["parameters"] > found["parameters"]
