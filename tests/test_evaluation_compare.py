"""Two evaluations of the same examples: differences by hand, and what is refused."""

import json
import re

import pytest

from evaluation.compare import main
from evaluation.intervals import difference_interval, ratio_interval, sign_test

TOKENS = [10, 20, 30, 40]
NATS = {1: [20.0, 30.0, 60.0, 80.0], 8: [10.0, 31.0, 45.0, 60.0]}
RIGHT = {1: [False, False, True, False, True], 8: [True, True, False, True, True]}


def write_run(folder, depths=(1, 8), tokens=TOKENS, shift=0.0, has_core=True):
    (folder / "evaluation").mkdir(parents=True)
    lines = []
    for depth in depths:
        steps = depth if has_core else None
        for row, (nats, count) in enumerate(zip(NATS[depth], tokens, strict=True)):
            lines.append({"num_steps": steps, "source": "tales", "row": row, "nats": nats + shift, "tokens": count})
        for number, is_right in enumerate(RIGHT[depth]):
            lines.append({"num_steps": steps, "source": "sums", "question": number, "is_right": is_right})
    (folder / "evaluation/depth_examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]


def test_differences_are_those_of_the_same_examples(tmp_path, capsys):
    run = write_run(tmp_path / "a")
    assert main([run, run, "--num-steps", "1", "8"]) == 0
    tales, sums = cells(capsys.readouterr().out)
    low, high = ratio_interval([-10.0, 1.0, -15.0, -20.0], TOKENS)
    change = f"-0.4400 ({low:+.4f} to {high:+.4f})"
    assert tales == ["tales", "row", "1 and 8", "4", "1.9000", "1.4600", change, "1", "3", f"{sign_test(1, 3):.2g}"]
    low, high = difference_interval(3, 1, 5)
    change = f"+40.0 ({100 * low:+.1f} to {100 * high:+.1f})"
    assert sums == ["sums", "question", "1 and 8", "5", "40.0", "80.0", change, "1", "3", f"{sign_test(1, 3):.2g}"]


def test_all_depths_that_both_have_are_compared(tmp_path, capsys):
    first, second = write_run(tmp_path / "a"), write_run(tmp_path / "b", depths=(8,), shift=1.0)
    assert main([first, second]) == 0
    tales, sums = cells(capsys.readouterr().out)
    assert (tales[2], tales[6].split()[0], tales[7:]) == ("8", "+0.0400", ["4", "0", "0.12"])
    assert (sums[2], sums[6].split()[0], sums[9]) == ("8", "+0.0", "1")


def test_a_model_without_a_core_is_compared_at_each_depth_of_the_other(tmp_path, capsys):
    first, plain = write_run(tmp_path / "a"), write_run(tmp_path / "b", depths=(8,), has_core=False)
    assert main([first, plain]) == 0
    found = cells(capsys.readouterr().out)
    assert [line[2] for line in found] == ["1 and no core"] * 2 + ["8 and no core"] * 2
    assert main([first, plain, "--num-steps", "1"]) == 0
    assert cells(capsys.readouterr().out) == found[:2]
    assert (found[0][5], found[2][6].split()[0]) == ("1.4600", "+0.0000")


@pytest.mark.parametrize(
    ("second", "options", "said"),
    [
        ({}, ["--num-steps", "2"], "was not evaluated at 2 core steps, but at 1, 8: name one"),
        ({}, ["--num-steps", "1", "8", "8"], "--num-steps has 3 numbers"),
        ({"tokens": [10, 20, 30, 41]}, [], "the tokens of an example of 'tales' differ between the two"),
        (None, [], "run python -m evaluation"),
    ],
)
def test_what_cannot_be_compared_is_one_line(tmp_path, capsys, second, options, said):
    other = str(tmp_path / "b") if second is None else write_run(tmp_path / "b", **second)
    with pytest.raises(SystemExit, match="2"):
        main([write_run(tmp_path / "a"), other, *options])
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_runs_of_other_depths_and_damaged_files_are_one_line(tmp_path, capsys):
    first, second = write_run(tmp_path / "a", depths=(1,)), write_run(tmp_path / "b", depths=(8,))
    with pytest.raises(SystemExit, match="2"):
        main([first, second])
    assert re.search(r"no number of core steps is common, with \S+a at 1 and \S+b at 8:", capsys.readouterr().err)
    (tmp_path / "b/evaluation/depth_examples.jsonl").write_text('{"num_steps": 1}\n')
    with pytest.raises(SystemExit, match="2"):
        main([first, second])
    assert "Line 1 of" in capsys.readouterr().err
