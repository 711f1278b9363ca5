"""The script that compares what runs compute before and after a change of the code."""

import json
from pathlib import Path

import pytest
import yaml

from benchmarks import same_results
from benchmarks.same_results import RUNS, differences

ROOT = Path(__file__).parents[1]
KEPT = Path(__file__).parent / "fixtures" / "same_results.json"
FOR_GPUS = {"any_to_any_base", "recurrent_lm_100m", "recurrent_lm_3b", "recurrent_vlm_base", "recurrent_vlm_zero3"}
FOR_GPUS |= {"tinystories"}
OF_OTHERS = {"finetune_retrofit"}  # goes on with a checkpoint of another project


def test_every_run_for_a_cpu_is_in_it():
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} - FOR_GPUS - OF_OTHERS == set(RUNS)
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    assert set(kept) == set(RUNS)
    assert all(len(run["losses"]) == same_results.STEPS for run in kept.values())


def test_differences_are_named():
    before = {"losses": ["1.0", "2.0"], "evaluation": {"depth.json": "ab"}, "text": "so"}
    assert list(differences(before, before, "run")) == []
    after = {"losses": ["1.0", "2.5"], "evaluation": {"depth.json": "ab", "media.json": "cd"}, "text": "so"}
    assert list(differences(before, after, "run")) == [
        "run.losses: ['1.0', '2.0'] before, ['1.0', '2.5'] now",
        "run.evaluation.media.json: None before, cd now",
    ]


def test_what_the_clock_says_is_left_out():
    content = {"rows": [{"loss": 1.5, "milliseconds_per_token": 3.1}], "checkpoint": "/tmp/x/runs/a"}
    assert same_results.without_times(content, "/tmp/x") == {"rows": [{"loss": 1.5}], "checkpoint": "/runs/a"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["recurrent_lm", "any_to_any"])
def test_losses_are_those_of_the_kept_file(name, tmp_path):
    """To rounding, which differs from processor to processor; the script itself compares all bits."""
    same_results.write_media(tmp_path)
    found = same_results.result_of(name, tmp_path)
    kept = json.loads(KEPT.read_text(encoding="utf-8"))[name]
    assert [float(loss) for loss in found["losses"]] == pytest.approx(
        [float(loss) for loss in kept["losses"]], rel=1e-3
    )
    config = yaml.safe_load((tmp_path / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    assert config["training"]["max_steps"] == same_results.STEPS
