"""Damaged inputs of all kinds: each is read or refused, none crashes; and that the fuzzer sees what does."""

import os
import signal
import time
from pathlib import Path
from random import Random

import pytest

from benchmarks import fuzz
from benchmarks.fuzz_mutations import STRUCTURAL, TEXT_SUFFIXES, mutate
from benchmarks.fuzz_samples import Sample


def refuse(folder: Path) -> None:
    raise FileNotFoundError(f"{folder} lacks it")


def fail(folder: Path) -> None:
    raise KeyError((folder / "a.json").read_text())


def allocate(folder: Path) -> None:
    held = bytearray(2**21)
    for _ in range(2**10):
        held += bytes(2**21)


READERS = {
    "accepted": lambda folder: None,
    "refused": refuse,
    "exit 2": lambda folder: os._exit(fuzz.REFUSED),
    "exception": fail,
    "SIGKILL": lambda folder: os.kill(os.getpid(), signal.SIGKILL),
    "time": lambda folder: signal.pause(),
    "memory": allocate,
}


@pytest.mark.parametrize("what", READERS)
def test_what_comes_of_an_input_is_seen(tmp_path, monkeypatch, what):
    """By its process alone: an exit, an exception, a signal, a wait without end, memory. It leaves nothing behind."""
    monkeypatch.setattr(fuzz, "MOST_SECONDS", 1.0 if what == "time" else 60.0)
    sample = Sample("yaml", what, {"a.json": b"{}"}, ("a.json",), READERS[what])
    start = time.perf_counter()
    ((tried, outcome),) = fuzz.try_inputs([fuzz.Input(3, sample, "a.json", b"damage")], tmp_path, workers=2)
    assert tried.number == 3 and outcome.verdict == ("refused" if what == "exit 2" else what)
    assert outcome.is_crash == (what not in ("accepted", "refused", "exit 2"))
    assert outcome.seconds <= time.perf_counter() - start
    assert (outcome.extra_bytes > fuzz.MOST_BYTES) == (what == "memory")
    if what == "exception":
        assert "KeyError: 'damage'" in outcome.report
    if what == "refused":
        assert outcome.report == f"FileNotFoundError: {tmp_path / '3'} lacks it"
    assert list(tmp_path.iterdir()) == []


def test_an_input_is_drawn_by_seed_and_number_alone():
    content = b'{"a": [1, 2, {"b": null}], "c": "text"}'
    files = {"a.json": content, "b.txt": content}
    samples = [Sample(kind, kind, files, tuple(files), refuse) for kind in ("yaml", "tar")]

    def drawn(number, seed, kinds=("yaml", "tar")):
        return [
            (tried.sample.kind, tried.name, tried.content) for tried in fuzz.draw_inputs(samples, number, seed, kinds)
        ]

    assert drawn(40, 0)[:20] == drawn(20, 0) != drawn(20, 1)
    assert {kind for kind, _, _ in drawn(40, 0)} == {"yaml", "tar"} and {kind for kind, *_ in drawn(9, 0, ["tar"])} == {
        "tar"
    }
    assert sum(damaged != content for *_, damaged in drawn(40, 0)) > 30


@pytest.mark.parametrize("suffix", sorted({*STRUCTURAL, *TEXT_SUFFIXES, ".wav"}))
def test_anything_can_be_damaged(suffix):
    """Also what was damaged before, or never was of the format."""
    rng = Random(0)
    for content in (b"", b"\0", b"[[[", b'{"a": {"b": [1, 2.5, null]}}', rng.randbytes(999)):
        for _ in range(15):
            damaged = mutate(content, suffix, rng)
            assert isinstance(damaged, bytes) and len(damaged) < 2**26


def test_a_crashing_input_is_kept_and_read_again(tmp_path):
    sample = Sample("tar", "indexed", {"0.tar": b"whole"}, ("0.tar",), fail)
    outcome = fuzz.Outcome("exception", "KeyError: '\ud800'", 0.1, 0)
    for number, content in enumerate((b"\xff\0", "pipe")):
        tried = fuzz.Input(number, sample, "0.tar", content)
        fuzz.keep(tmp_path, 7, tried, outcome)
        assert fuzz.read_kept(tmp_path / f"tar-7-{number}", [sample]) == tried
    tried.write(tmp_path / "again")
    assert (tmp_path / "again" / "0.tar").is_fifo()


def test_the_table_counts_by_kind():
    samples = [Sample(kind, "a", {}, (), refuse) for kind in ("media", "tar")]
    outcomes = [
        (samples[0], fuzz.Outcome("accepted", "", 0.25, 2**20)),
        (samples[0], fuzz.Outcome("refused", "", 1.5, 2**21)),
        (samples[1], fuzz.Outcome("SIGABRT", "", 0.5, 0)),
    ]
    tried = [(fuzz.Input(number, sample, "a", b""), outcome) for number, (sample, outcome) in enumerate(outcomes)]
    assert fuzz.table(tried).splitlines()[2:] == [
        "| media | 2 | 1 | 1 | 0 | 1.5 | 2 |",
        "| tar | 1 | 0 | 0 | 1 | 0.5 | 0 |",
        "| all | 3 | 1 | 1 | 1 | 1.5 | 2 |",
    ]


@pytest.mark.slow
def test_no_damaged_input_crashes(capfd):
    """The first of another seed than that of the figures in the docs."""
    assert fuzz.main(["--inputs", "200", "--seed", "20"]) == 0, capfd.readouterr().err
    assert capfd.readouterr().out.splitlines()[-1].startswith("| all | 200 |")
