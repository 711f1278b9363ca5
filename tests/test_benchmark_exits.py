"""The benchmark of exits: what it calls agreement, and that it prints its tables."""

import json

import pytest
import torch

from benchmarks import exits
from model import ExitOptions, RecurrentCache
from tests.tiny import tiny_ids, tiny_model


def test_agreement_of_the_full_cache_is_whole_and_that_of_others_is_that_of_a_loop():
    """Two texts of different length; against each text by itself, token by token."""
    model, ids = tiny_model(scale=2.0), tiny_ids(2, 8)
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[0, :4] = -100  # a prompt that is not trained on
    batches = [{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    whole = exits.agreement(model, batches, 5, ExitOptions(), {"policy": "full"})
    entries = 2 * 16 * (2 + 2 * 5)  # keys and values of 2 heads of 8, at the steps of 1 + 2 + 1 layers
    assert whole == {"agreement": 1.0, "divergence": pytest.approx(0, abs=1e-6), "steps": 5.0, "bytes": 4 * entries}

    options = ExitOptions("cosine", 0.1)
    ours = exits.agreement(model, batches, 5, options, {"policy": "last"})
    same, divergence, steps = [], [], []
    for row, length in ((0, 8), (1, 5)):
        text, cache = ids[row : row + 1, :length], RecurrentCache(model.config, "last")
        with torch.no_grad():
            full = model(text, num_steps=5).logits[0].double().softmax(-1)
            for i in range(length):
                out = model(text[:, i : i + 1], cache=cache, num_steps=5, exits=options if i else None)
                p = out.logits[0, -1].double().softmax(-1)
                if i and i + 1 < length and labels[row, i + 1] != -100:
                    same.append(bool(p.argmax() == full[i].argmax()))
                    divergence.append(float((full[i] * (full[i] / p).log()).sum()))
                    steps.append(int(out.exit_steps[0]))
    assert ours["agreement"] == pytest.approx(sum(same) / len(same))
    assert ours["divergence"] == pytest.approx(sum(divergence) / len(divergence), rel=1e-3)
    assert ours["steps"] == pytest.approx(sum(steps) / len(steps))
    assert ours["agreement"] < 1 and ours["steps"] < 5


def test_tables(tiny_run, tmp_path, capsys):
    output = tmp_path / "out.json"
    sizes = ["--limit", "8", "--new-tokens", "6", "--rounds", "1", "--warmup", "1", "--device", "cpu"]
    argv = [str(tiny_run), *sizes, "--thresholds", "0.5", "1e-9", "--agreement", "0", "--output", str(output)]
    assert exits.main([*argv, "--num-steps", "3"]) == 0
    out = capsys.readouterr().out
    assert out.count("\n| ---") == 4
    found = json.loads(output.read_text())
    assert found["policies"]["full"]["agreement"] == 1
    assert found["thresholds"]["1e-09"]["agreement"] == 1 and found["thresholds"]["1e-09"]["steps"] == 3
    assert found["thresholds"]["0.5"]["steps"] < 3
    assert found["timing"]["8"]["exits"] > 0 and len(found["timing"]["8"]["ms_per_step"]) == 8


def test_bad_input_is_one_line(tmp_path, capsys):
    for argv, message in (
        ([str(tmp_path)], str(tmp_path)),
        ([str(tmp_path), "--threshold", "1"], "did you mean --thresholds"),
    ):
        with pytest.raises(SystemExit) as caught:
            exits.main(argv)
        captured = capsys.readouterr()
        assert caught.value.code == 2 and message in captured.err and captured.err.count("\n") == 1
