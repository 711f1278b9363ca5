"""The benchmark of contrast: intervals, and that a strength of 0 changes no answer."""

import pytest

import pretrain
from benchmarks import contrast
from tests.test_benchmark_wavefront import cells
from tests.test_pretrain import write_config


@pytest.mark.parametrize(("right", "count"), [(0, 20), (7, 20), (96, 100), (500, 500)])
def test_intervals_are_wilsons(right, count):
    """Their ends are the shares from which what was seen is as far as 1.96 deviations that these shares have."""
    share = right / count
    low, high = contrast.wilson(right, count)
    for end in (low, high):
        assert (share - end) ** 2 == pytest.approx(1.96**2 * end * (1 - end) / count, abs=1e-6)
    assert low - 1e-9 <= share <= high + 1e-9 and high - low > 1 / count


def test_tables_of_a_run(tmp_path, capsys):
    """A strength of next to nothing, without a mask of unlikely tokens in its way, changes no answer."""
    data = {"validation": [{"kind": "generated", "task": "addition", "num_rows": 12, "difficulty": [1, 1]}]}
    data["validation"][0]["loss_on"] = "answer"
    config = write_config(tmp_path, data=data)
    assert pretrain.main(["--config", str(config), "--training.output_dir", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    argv = [str(tmp_path / "out"), "--num-steps", "2", "3", "--contrast-steps", "2", "--strengths", "1e-9", "1"]
    assert contrast.main([*argv, "--device", "cpu", "--limit", "10"]) == 0
    out = capsys.readouterr().out
    header, plain, least, _ = cells(out)
    assert header == ["strength", "step", "2 steps", "3 steps"] and out.startswith("addition, 10 questions")
    assert least[3] == plain[3] and least[2] == "-"
    with pytest.raises(SystemExit):
        contrast.main([*argv, "--sources", "stories"])
    assert "no validation source 'stories'; it has addition" in capsys.readouterr().err
