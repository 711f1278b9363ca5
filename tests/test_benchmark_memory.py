"""The benchmark of memory: that it sees what is kept, and that its caches are as large as it says."""

import pytest

from benchmarks import memory, timing


def test_a_cache_has_the_size_that_was_asked_for():
    cache = memory.fill_cache(memory.build_model(), 4)
    assert 4 * timing.MIB <= cache.num_bytes < 8 * timing.MIB


def test_what_is_kept_is_seen_and_what_is_dropped_is_not():
    """Of 64 MiB in ten parts, with the memory of the process, in which nothing else happens."""
    kept = []
    row = memory.measure("kept", 10, lambda: kept.append(bytearray(b"x") * (6 * timing.MIB)))
    assert float(row[-1]) - float(row[2]) >= 0.8 * 9 * 6
    kept.clear()
    row = memory.measure("dropped", 10, lambda: bytearray(b"x") * (6 * timing.MIB))
    assert abs(float(row[-1]) - float(row[2])) < 6
    assert row[:2] == ["dropped", "10"] and len(row) == len(memory.HEADER)


@pytest.mark.slow
def test_the_table_has_a_row_of_each(capsys):
    assert memory.main(["--caches", "2", "--cache-mib", "1", "--steps", "2", "--generations", "4"]) == 0
    header, _, *rows = capsys.readouterr().out.strip().splitlines()
    assert header.count("|") == len(memory.HEADER) + 1
    assert [row.split(" | ")[1] for row in rows] == ["2", "2", "4"]
