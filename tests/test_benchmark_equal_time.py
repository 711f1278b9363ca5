"""What comparisons in equal time share: which runs they take up again, and how these are started."""

import json

import pytest

from benchmarks import equal_time


def key(seed: int, task: str = "cups") -> dict:
    return {"task": task, "objective": "full", "seed": seed, "updates_of_truncated": 1300, "questions": 10}


def test_what_a_file_holds_is_not_run_again(tmp_path):
    """Rows of other keys stay in the file, and are not among those that were asked for."""
    file, started = tmp_path / "there" / "rows.json", []

    def run(key):
        started.append(key)
        return {**key, "updates": 100 + key["seed"]}

    keys = [key(seed) for seed in range(2)]
    equal_time.run_missing([*keys[:1], key(0, "scenes")], file, run)
    found = equal_time.run_missing([*keys, *keys], file, run)
    assert started == [keys[0], key(0, "scenes"), keys[1]]
    assert found == [{**key(0), "updates": 100}, {**key(1), "updates": 101}]
    rows = json.loads(file.read_text())
    assert [row["task"] for row in rows] == ["cups", "scenes", "cups"]
    with pytest.raises(ZeroDivisionError):  # what fails later does not take away what is there
        equal_time.run_missing([key(2)], file, lambda key: 1 / 0)
    assert json.loads(file.read_text()) == rows


def test_a_run_is_a_process_on_one_core_that_says_why_it_failed(tmp_path, monkeypatch):
    """A module that writes its arguments in place of a row."""
    (tmp_path / "echo.py").write_text(
        "import json, os, sys\n"
        "if 'scenes' in sys.argv:\n"
        "    sys.exit('no scenes here')\n"
        "row = {'given': sys.argv[1:-1], 'threads': os.environ['OMP_NUM_THREADS']}\n"
        "open(sys.argv[-1], 'w').write(json.dumps(row))\n"
    )
    monkeypatch.setattr(equal_time, "ROOT", tmp_path)
    given = ["--job", "cups", "full", "2", "--questions", "10", "--output"]
    assert equal_time.run_apart("echo", key(2)) == {"given": given, "threads": "1"}
    with pytest.raises(RuntimeError, match=r"\['scenes', 'full', 0\] ended with 1:\nno scenes here"):
        equal_time.run_apart("echo", key(0, "scenes"))
