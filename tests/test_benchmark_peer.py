"""The benchmark of very many experts: that its two parts are the layer's, and that its table has a line for each."""

import re

import pytest
import torch

from benchmarks import peer, timing


@pytest.fixture(autouse=True)
def same_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_parts_that_are_timed_make_up_the_layer(monkeypatch, capsys):
    """From 16 to 100 experts, each fourfold until the last; what is timed gives what each layer gives."""
    seen = {}

    def interleave(passes, rounds, warmup, device):
        seen.update({name: run() for name, run in passes.items()})
        return {name: [0.001 * rounds] for name in passes}

    monkeypatch.setattr(timing, "interleave", interleave)
    sizes = ["--least-experts", "16", "--most-experts", "100", "--hidden-size", "8", "--heads", "2", "--top-k", "3"]
    assert peer.main([*sizes, "--key-dim", "4", "--tokens", "5", "--rounds", "2", "--threads", "1"]) == 0
    lines = re.findall(r"^\| (\d+) \| (\d+) \| ([\d,]+) \| ([\d.]+) \| ([\d.]+) \|", capsys.readouterr().out, re.M)
    weights = [2 * 8 * n * n + 2 * n * 2 + 8 * 2 * 4 + 2 * 4 for n in (4, 8, 10)]
    assert [line[:2] for line in lines] == [("16", "4"), ("64", "8"), ("100", "10")]
    assert [int(line[2].replace(",", "")) for line in lines] == weights
    assert {value for line in lines for value in line[3:]} == {"400.0"}  # 2 ms for 5 tokens
    args = peer.build_parser().parse_args([*sizes, "--key-dim", "4"])
    for experts in (16, 64, 100):
        scores, found = seen[experts, "search"]
        assert scores.shape == found.shape == (1, 5, 2, 3) and found.max() < experts
        assert seen[experts, "experts"].shape == (1, 5, 8)
        layer = peer.build_layer(args, experts)
        hidden = torch.ones(1, 1, 8)
        with torch.no_grad():
            assert torch.equal(layer.apply_experts(hidden, *layer.retrieve(hidden)), layer(hidden))


@pytest.mark.parametrize("sizes", [["--least-experts", "20"], ["--least-experts", "16", "--top-k", "5"]])
def test_sizes_that_make_no_layer_are_one_line(capsys, sizes):
    with pytest.raises(SystemExit) as stopped:
        peer.main(sizes)
    assert stopped.value.code == 2
    assert "peer_" in capsys.readouterr().err
