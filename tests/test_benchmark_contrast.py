"""The benchmark of contrast: a strength of 0 changes no answer."""

import pytest

import pretrain
from benchmarks import contrast
from tests.test_benchmark_wavefront import cells
from tests.test_pretrain import write_config


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
