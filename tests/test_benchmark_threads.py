"""The benchmark of threads: that steps run with the threads they are named after, beside a core that is busy."""

import os
import re
from pathlib import Path

import pytest
import torch

from benchmarks import threads


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_step_runs_with_its_threads():
    seen = [threads.with_threads(lambda: seen.append(torch.get_num_threads()), number) for number in (2, 1)]
    for run in seen[:2]:
        run()
    assert seen[2:] == [2, 1]


def test_a_core_is_busy_as_long_as_it_is_measured(monkeypatch):
    """The process uses its core's time, on the last core alone, and is gone afterwards."""
    started = []
    popen = threads.subprocess.Popen
    monkeypatch.setattr(threads.subprocess, "Popen", lambda *args: started.append(popen(*args)) or started[-1])
    with threads.busy_core(True):
        (process,) = started
        while os.sched_getaffinity(process.pid) != {max(os.sched_getaffinity(0))}:
            assert process.poll() is None
        stat = Path(f"/proc/{process.pid}/stat")
        while int(stat.read_text().split()[13]) < 10:  # hundredths of a second of computing
            assert process.poll() is None
    assert process.returncode != 0
    with threads.busy_core(False):
        assert len(started) == 1


def test_the_table_has_a_line_for_each_number_of_threads(capsys):
    argv = [
        "--widths",
        "32",
        "64",
        "--threads",
        "1",
        "2",
        "--batch-size",
        "1",
        "--sequence-length",
        "8",
        "--rounds",
        "1",
        "--warmup",
        "1",
    ]
    assert threads.main(argv) == 0
    lines = re.findall(r"^\| (\d+) \| ([\d.]+) \| (\d) \| [\d.]+ \| ([\d.]+) ", capsys.readouterr().out, re.MULTILINE)
    assert [(width, number) for width, _, number, _ in lines] == [("32", "1"), ("32", "2"), ("64", "1"), ("64", "2")]
    assert [ratio for _, _, number, ratio in lines if number == "1"] == ["1.000", "1.000"]
