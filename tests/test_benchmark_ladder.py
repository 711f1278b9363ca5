"""The ladder: equal parameters, budgets, resuming, the fit of a power law."""

import json

import pytest

from benchmarks import equal_time, ladder
from tests.test_pretrain import write_config

LADDER = """
config: {config}
source: addition
updates: 4
sizes: [16, 24]
seeds: [0]
flags: {{model.recurrence.mean_steps: 2, model.recurrence.backprop_steps: 2}}
"""


FIGURES = {"parameters": 1600, "updates": 4, "operations": 2e12, "cpu_seconds": 1.5, "loss": 2.0}


def row(size, seed, loss):
    figures = {**FIGURES, "parameters": 100 * size, "loss": loss}
    return {"size": size, "arm": "recurrent", "budget": "updates", "seed": seed, **figures}


@pytest.fixture(scope="module")
def read(tmp_path_factory):
    """A ladder of a tiny run, and its task."""
    folder = tmp_path_factory.mktemp("ladder")
    (folder / "ladder.yaml").write_text(LADDER.format(config=write_config(folder, training={"logging_steps": 1000})))
    found = ladder.read_ladder(folder / "ladder.yaml")
    return found, found.task(), folder / "ladder.yaml"


def test_twins_have_as_many_parameters_and_the_untied_one_a_core_for_each_step(read):
    found, task, _ = read
    sizes, executed = {}, {}
    for arm in ladder.ARMS:
        run = equal_time.config_of(task, ladder.flags_of(task, found.sizes[1], arm))
        sizes[arm], executed[arm] = ladder.parameters(run), run.model.mean_executed_layers
    assert all(abs(size / sizes["recurrent"] - 1) < 0.03 for size in sizes.values())
    assert executed["plain"] < executed["recurrent"] == executed["untied"]


def test_the_recurrent_model_runs_once_a_seed_and_twins_once_a_budget(read):
    places = ladder.places(read[0])
    assert len(places) == len(set(places)) == 2 * (1 + 2 * 3)


def test_as_many_operations_are_as_many(read):
    found, task, _ = read
    own, reference = (ladder.flags_of(task, found.sizes[0], arm) for arm in ("plain", "recurrent"))
    few = ladder.measure(task, reference, reference, "updates", 0)
    many = ladder.measure(task, own, reference, "operations", 0)
    assert few["updates"] == 4 < many["updates"]
    assert many["operations"] == pytest.approx(few["operations"], rel=0.5 / many["updates"])
    assert few["loss"] > 0 and few["cpu_seconds"] > 0


def test_rows_that_are_there_are_not_run_again(read, tmp_path, monkeypatch, capsys):
    made = []
    monkeypatch.setattr(
        ladder, "forked", lambda run, *args: made.append(args) or FIGURES | {"parameters": 100 * args[1][1]}
    )
    monkeypatch.setattr(ladder, "datasets_of", lambda *args: None)
    command = [str(read[2]), "--output", str(tmp_path / "rows.json"), "--plot", str(tmp_path / "ladder.png")]
    assert ladder.main(command) == 0 and len(made) == 14
    rows = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps(rows[:-1]))
    assert ladder.main(command) == 0 and len(made) == 15
    assert "| recurrent | 16 | 1 | 2.0000 | 1600 | 4 | 2.00 | 1.5 |" in capsys.readouterr().out
    assert (tmp_path / "ladder.png").read_bytes()[:4] == b"\x89PNG"


def test_the_exponent_of_a_power_law_is_found():
    rows = [row(size, seed, (8 + seed) * size**-0.3) for size in (16, 24, 64) for seed in (0, 1)]
    found, interval = ladder.fit(rows)
    assert found == pytest.approx(-0.3) and interval.low < -0.3 < interval.high < -0.2
    exact, narrow = ladder.fit([one for one in rows if one["seed"] == 0])
    assert (exact, *narrow) == pytest.approx((-0.3, -0.3, -0.3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("updates: 4", "updates: many"), "updates has to be a whole number"),
        (("seeds: [0]", "seeds: 0"), "sizes and seeds lists"),
        (("source: addition\n", ""), "has to have the keys config, source, updates, sizes, seeds, flags"),
        (("flags: {", "flags: [{"), "cannot be read"),
        (("mean_steps: 2", "mean_steps: 40"), "take larger sizes, or fewer steps"),
    ],
)
def test_a_ladder_that_is_none_is_one_line(change, message, read, tmp_path, capsys):
    (tmp_path / "bad.yaml").write_text(read[2].read_text().replace(*change))
    with pytest.raises(SystemExit, match="2"):
        ladder.main([str(tmp_path / "bad.yaml"), "--output", str(tmp_path / "rows.json")])
    assert message in capsys.readouterr().err and not (tmp_path / "rows.json").exists()
