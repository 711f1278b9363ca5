"""The benchmarks of the scheduler: what they compare is the same, and their tables."""

import pytest
import yaml

from benchmarks import engine, wavefront
from benchmarks.engine import arrivals_of
from tests.test_evaluation_command_media import SOURCES
from tests.test_evaluation_command_writing import SOURCES as DRAWN
from tests.tiny_artist import save_artist
from tests.tiny_reader import save_reader

SIZES = [
    "--hidden-size",
    "32",
    "--intermediate-size",
    "48",
    "--heads",
    "4",
    "--key-value-heads",
    "2",
    "--device",
    "cpu",
]
SIZES += ["--vocab-size", "64", "--core-layers", "1", "--core-steps", "6", "--rounds", "1", "--warmup", "1"]


def cells(table: str) -> list[list[str]]:
    """The rows of all tables in a text, without their heads."""
    lines = [line for line in table.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if "---" not in line]


def test_drafts_hold_as_often_as_is_asked_for(capsys):
    argv = [*SIZES, "--held", "0", "1", "--batch-sizes", "1", "3", "--draft-steps", "2", "--new-tokens", "12"]
    assert wavefront.main(argv) == 0
    header, *rows = cells(capsys.readouterr().out)
    held, ticks = header.index("drafts that hold"), header.index("ticks a token")
    of_waves = [row for row in rows if row[0] == "d = 2"]
    assert [row[held] for row in of_waves] == ["0.00", "0.00", "1.00", "1.00"]
    # 11 tokens of 6 steps; with drafts that hold, each begins 2 steps behind the one before.
    assert [row[ticks] for row in of_waves if row[1] == "1"] == [f"{66 / 12:.2f}", f"{(6 + 10 * 2) / 12:.2f}"]
    assert [row[ticks] for row in rows if row[:2] == ["waves of one", "3"]] == [f"{66 / 12:.2f}"] * 2


def test_texts_of_a_checkpoint_are_the_same_both_ways(tiny_run, capsys):
    assert wavefront.main([str(tiny_run), "--check", "9", "--new-tokens", "6", "--device", "cpu"]) == 0
    _, *rows = cells(capsys.readouterr().out)
    assert [row[:3] for row in rows] == [[name, "9", "0"] for name in ("greedy", "sampled", "exits")]
    assert all(row[4] == "0" and float(row[5]) >= 0 for row in rows)


def test_answers_to_questions_with_media_are_the_same_both_ways(tmp_path, capsys):
    folder = save_reader(tmp_path / "run")
    config = {"data": {"block_size": 256, "train": SOURCES}, "training": {"output_dir": "unused", "seed": 5}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert wavefront.main([str(folder), "--check", "7", "--new-tokens", "5", "--device", "cpu"]) == 0
    _, *rows = cells(capsys.readouterr().out)
    assert [row[:3] for row in rows] == [[name, "7", "0"] for name in ("greedy", "sampled", "exits")]


def test_images_are_drawn_with_drafts_of_latents(tmp_path, capsys):
    """With no tolerance, those of plain decoding."""
    folder = save_artist(tmp_path / "run")
    config = {"data": {"block_size": 256, "train": DRAWN}, "training": {"output_dir": "unused", "seed": 5}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    argv = ["--tolerances", "0", "1e9", "--draft-steps", "1", "--batch-sizes", "2", "--rounds", "1", "--warmup", "1"]
    assert wavefront.main([str(folder), *argv, "--device", "cpu"]) == 0
    _, plain, exact, free = cells(capsys.readouterr().out)
    assert plain[:3] == ["plain", "-", "2"] and exact[:3] == ["d = 1", "0", "2"] and free[4] == "1.00"
    assert float(exact[5]) < 1e-3


def test_a_checkpoint_is_timed(tiny_run, capsys):
    argv = [str(tiny_run), "--batch-sizes", "2", "--new-tokens", "6", "--rounds", "1", "--device", "cpu"]
    assert wavefront.main(argv) == 0
    _, *rows = cells(capsys.readouterr().out)
    assert [row[0] for row in rows] == ["plain", "waves of one", "d = 1", "d = 2", "d = 4", "d = auto"]


@pytest.mark.parametrize("exits", [[], ["--exit-threshold", "0.3"]])
def test_all_ways_to_serve_give_the_same_texts(exits, capsys):
    argv = [*SIZES, *exits, "--requests", "7", "--places", "3", "--new-tokens", "3", "9", "--num-steps", "2", "5"]
    assert engine.main([*argv, "--arrivals", "0", "0.01"]) == 0
    out = capsys.readouterr().out
    _, *rows = [row for row in cells(out) if row[0] != "way"]
    assert "7 requests, all at once" in out and "7 requests, one in 0.01 s" in out
    assert len(rows) == 11 and all(row[-1] == "7" for row in rows)
    in_vain = {row[0]: row[8] for row in rows}
    assert in_vain["engine, depths mixed"] == in_vain["engine, refill"] == "0%"


def test_arrivals_are_a_poisson_process():
    times = arrivals_of(2000, 0.1)
    assert times == sorted(times) and times[-1] == pytest.approx(200, rel=0.1) and times == arrivals_of(2000, 0.1)
