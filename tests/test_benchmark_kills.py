"""The benchmark of kills: what is planned, and that a process knows its moment."""

import multiprocessing
import os
from collections import Counter

import pytest
import torch

from benchmarks import kill_resume
from benchmarks.kill_resume import AFTER, BEFORE, SAVE, Kill, Witness, events_of


def test_forty_kills_are_spread_as_they_should_be():
    """Of three commands, one of two ranks, of which the second does less."""
    first, second = (
        {"save 2": 90, "save 4": 91, "save 6": 95, "end": 50},
        {"save 2": 5, "save 4": 5, "save 6": 5, "end": 1},
    )
    plans = [
        list(kill_resume.plan(number, [Counter(events) for events in ranks]))
        for number, ranks in zip(kill_resume.shared(40, 3), ([first], [first, second], [first]), strict=True)
    ]
    kinds = Counter(kill.kind for plan in plans for kill in plan)
    assert sum(kinds.values()) == 40 and kinds[BEFORE] >= 5 and kinds[SAVE] >= 10 and kinds[AFTER] >= 5
    for ranks, plan in zip(([first], [first, second], [first]), plans, strict=True):
        for kill in plan:
            if kill.kind in (SAVE, AFTER):
                assert 1 <= kill.count <= ranks[kill.rank][kill.event]
        steps = [int(kill.event.split()[1]) for kill in plan if kill.event.startswith(("save", "step"))]
        assert steps == sorted(steps)  # a run does not come back to where it was


def die_at(out, kill, number):
    """Writes files of a save with a witness looking on, in a process of its own."""
    witness = Witness(out, kill, 0)
    witness.saving = 2
    witness.attach()
    for index in range(number):
        torch.save(torch.ones(1000), out / "checkpoint-2" / f"{index}.pt")
    os._exit(5)


@pytest.mark.parametrize("count, left", [(2, 2), (9, 3)])
def test_a_process_dies_at_its_moment_with_half_a_file(tmp_path, count, left):
    out = tmp_path / "out"
    (out / "checkpoint-2").mkdir(parents=True)
    kill = Kill(SAVE, "save 2", count)
    process = multiprocessing.get_context("fork").Process(target=die_at, args=(out, kill, 3))
    process.start()
    process.join()
    sizes = [path.stat().st_size for path in sorted((out / "checkpoint-2").iterdir())]
    assert process.exitcode == (-9 if left == 2 else 5) and len(sizes) == left
    assert events_of(out, 0) == {"save 2": left}
    if left == 2:
        assert sizes[1] == sizes[0] // 2
