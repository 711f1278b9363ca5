"""The notebook of docs/ runs from top to bottom, and what it shows is what the model does."""

import json
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import pytest
import torch

from tests.tiny_reader import save_reader

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tour.ipynb"


@pytest.mark.slow
def test_the_tour(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TOUR_RUN", str(save_reader(tmp_path)))
    monkeypatch.chdir(NOTEBOOK.parents[1])
    mpl.use("Agg")
    shown = {}
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), shown)
    said = capsys.readouterr().out
    model, inputs, processor = (shown[name] for name in ("model", "inputs", "processor"))
    for depth in shown["depths"]:
        out = model.generate(**inputs, num_steps=depth, max_new_tokens=24, do_sample=False)
        answer = processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert shown["answers"][depth] == answer and f"{depth} steps: {answer}" in said
    assert len(set(shown["answers"].values())) > 1
    assert len(shown["states"]) == 8 and len(shown["sizes"]) == 7
    exited = model.generate(
        **inputs,
        max_new_tokens=24,
        do_sample=False,
        num_steps=16,
        exit_criterion="kl_divergence",
        exit_threshold=1e-3,
        return_dict_in_generate=True,
    )
    assert torch.equal(shown["steps"], exited.exit_steps[0])
    moved = [(new - old).norm() / new.norm() for old, new in pairwise(states_by_depth(model, inputs, 8))]
    assert shown["sizes"] == pytest.approx([it.item() for it in moved], abs=1e-5)
    for depth, (text, _) in enumerate(shown["lens"], start=1):
        first = model.generate(**inputs, num_steps=depth, max_new_tokens=1, do_sample=False)[0, -1:]
        assert text == processor.decode(first)


def states_by_depth(model, inputs, most):
    """The last state of runs of 1, 2, ... steps."""
    last = {}
    for depth in range(1, most + 1):
        handle = model.base_model.register_step_hook(depth, lambda state, depth=depth: last.update({depth: state}))
        with torch.inference_mode():
            model(**inputs, num_steps=depth)
        handle.remove()
    return list(last.values())
