"""The benchmark of optimizers: which runs it takes up, and that it goes on where it stopped."""

import json

import pytest

from benchmarks import optimizers


def begin(monkeypatch, folder, part, *flags):
    """What a call trains; the loss of a run is least near a rate of 2e-2."""
    seen = []

    def run(job, args):
        seen.append(job)
        found = {"seconds": 2.0, "cpu_seconds": 3.0, "machine": "a chip"}
        return found | {"loss": abs(job.get("learning_rate", 0) - 2e-2), "memorized": 50, "grokked": None}

    plan, _, report = optimizers.PARTS[part]
    monkeypatch.setitem(optimizers.PARTS, part, (plan, run, report))
    assert optimizers.main([part, "--rows", str(folder), *flags]) == 0
    return seen


def test_sweep_then_the_best_three_with_all_seeds(tmp_path, monkeypatch, capsys):
    flags = ["--configs", "plain_lm", "--max-steps", "100"]
    seen = begin(monkeypatch, tmp_path, "language", *flags)
    assert {(job["optimizer"], job["updates"]) for job in seen} == {("adamw", 100), ("muon", 80), ("adamuon", 80)}
    muon = [(job["learning_rate"], job["seed"]) for job in seen if job["optimizer"] == "muon"]
    assert muon[:5] == [(5e-3, 0), (2.5e-3, 0), (1e-2, 0), (2e-2, 0), (4e-2, 0)]  # on to where it is worse again
    assert muon[5:] == [(2e-2, 1), (2e-2, 2), (1e-2, 1), (1e-2, 2), (5e-3, 1), (5e-3, 2)]
    adamw = [job["learning_rate"] for job in seen if job["optimizer"] == "adamw"]
    assert (
        adamw[:6] == [3e-3, 1.5e-3, 6e-3, 1.2e-2, 2.4e-2, 4.8e-2]
        and adamw[6:] == [2.4e-2] * 2 + [1.2e-2] * 2 + [6e-3] * 2
    )
    assert "| plain_lm | muon | 0.02 | 80 | 3 | 0.0000 ± 0.0000 | 3 |" in capsys.readouterr().out
    assert begin(monkeypatch, tmp_path, "language", *flags) == []


def test_it_goes_on_where_it_stopped(tmp_path, monkeypatch):
    everything = begin(monkeypatch, tmp_path / "whole", "grokking", "--seeds", "0")
    assert len(everything) == len(optimizers.WIDTHS) * len(optimizers.WEIGHT_DECAYS) * len(optimizers.FILTERS)
    assert begin(monkeypatch, tmp_path, "grokking", "--seeds", "0", "--minutes", "-1") == []
    path = tmp_path / "whole/grokking.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(rows[:3]))
    assert begin(monkeypatch, tmp_path / "whole", "grokking", "--seeds", "0") == everything[3:]
    assert json.loads(path.read_text()) == rows


def test_grokking_learns_additions(tmp_path, monkeypatch, capsys):
    """Modulo 3, where nothing is hard: what was trained on is right soon; a filter is another run."""
    monkeypatch.setattr(optimizers, "MODULUS", 3)
    monkeypatch.setattr(optimizers, "WIDTHS", (16,))
    monkeypatch.setattr(optimizers, "WEIGHT_DECAYS", (1.0,))
    monkeypatch.setattr(optimizers, "FILTERS", {name: optimizers.FILTERS[name] for name in ("none", "ema 0.98")})
    inputs, targets = optimizers.all_pairs()
    assert inputs[5].tolist() == [1, 2, 3] and targets.tolist() == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    flags = ["--rows", str(tmp_path), "--seeds", "0", "--max-steps", "100"]
    optimizers.main(["grokking", *flags])
    rows = json.loads((tmp_path / "grokking.json").read_text())
    assert [row["filter"] for row in rows] == ["none", "ema 0.98"]
    assert all(row["memorized"] <= 100 and row["seconds"] > 0 for row in rows)
    assert (tmp_path / "grokking.md").read_text() in capsys.readouterr().out


@pytest.mark.slow
def test_language_trains_and_evaluates(tmp_path, monkeypatch):
    """Two updates of the real thing."""
    monkeypatch.setattr(optimizers, "RATES", {"adamuon": (1e-2,)})
    monkeypatch.setattr(optimizers, "rates_around_the_best", lambda rates, losses: rates)
    flags = ["--configs", "plain_lm", "--seeds", "0", "--max-steps", "3", "--runs", str(tmp_path / "runs")]
    optimizers.main(["language", "--rows", str(tmp_path), *flags])
    (row,) = json.loads((tmp_path / "language.json").read_text())
    (path,) = tmp_path.glob("runs/*/trainer_state.json")
    (trained,) = [entry["train_loss"] for entry in json.loads(path.read_text())["log_history"] if "train_loss" in entry]
    assert row["loss"] == pytest.approx(trained, abs=0.2)  # two updates of a warm-up change little
    assert row["updates"] == 2 and row["seconds"] < row["cpu_seconds"] * 20
