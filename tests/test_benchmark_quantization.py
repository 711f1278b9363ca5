"""The benchmark of weights in fewer bits: losses against a loop, memory against its formula, and its tables."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from benchmarks import quantization
from tests.rounding import rounded_to_4_bits
from tests.test_quantization import load, save_run, tiny_base
from tests.tiny import tiny_ids
from tests.tiny_language_model import tiny_tokenizer

MATRICES = 4 * (64 * 128 + 64 * 64 + 64 * 256 + 128 * 64)
"""Weights in the layers of `tiny_base`: queries, keys and values, output, gate and up, down; four blocks."""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tiny_base().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_losses_are_those_of_a_loop_over_tokens():
    model, whole = tiny_base(seed=1), tiny_base()
    ids = tiny_ids(2, 6)
    labels = ids.clone()
    labels[0, :3] = -100
    batches = [{"input_ids": row[None], "labels": mark[None]} for row, mark in zip(ids, labels, strict=True)]
    ours = quantization.losses(model, whole, batches, [3])[3]
    loss, divergence, same = [], [], []
    for row, mark in zip(ids, labels, strict=True):
        with torch.no_grad():
            p, q = (each(row[None], num_steps=3).logits[0].double().softmax(-1) for each in (whole, model))
        for i in range(5):
            if mark[i + 1] != -100:
                loss.append(-q[i, mark[i + 1]].log().item())
                divergence.append((p[i] * (p[i] / q[i]).log()).sum().item())
                same.append(bool(p[i].argmax() == q[i].argmax()))
    assert ours["loss"] == pytest.approx(sum(loss) / len(loss))
    assert ours["divergence"] == pytest.approx(sum(divergence) / len(divergence), rel=1e-4)
    assert ours["agreement"] == pytest.approx(sum(same) / len(same))


@pytest.mark.parametrize(
    ("part", "changed"),
    [
        ("injection", {"model.core.injection.proj.weight"}),
        ("heads", {"lm_head.weight"}),
        ("embeddings", {"model.embed_tokens.weight"}),
    ],
)
def test_a_part_alone_is_rounded(part, changed):
    """Scales of 8 bits, so only nearly the formula; head and embedding are one matrix in the checkpoint."""
    pattern = (quantization.PARTS | quantization.OTHERS)[part]
    before = dict(tiny_base().named_parameters(remove_duplicate=False))
    after = dict(quantization.round_part(tiny_base(), pattern).named_parameters(remove_duplicate=False))
    assert {name for name in after if not torch.equal(after[name], before[name])} == changed
    for name in changed:
        rounded = rounded_to_4_bits(before[name].detach())
        assert (after[name] - rounded).norm() < 0.2 * (rounded - before[name]).norm()


def test_norms_alone_are_rounded():
    before = dict(tiny_base().named_parameters(remove_duplicate=False))
    rounded = quantization.round_part(tiny_base(), quantization.OTHERS["norms"])
    after = dict(rounded.named_parameters(remove_duplicate=False))
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if "norm" in name}


def test_memory_is_that_of_its_formula(checkpoint):
    """Four bits, and 32 for each 64 weights; eight bits, and 32 for each row; beside tables of a few hundred bytes."""
    rows, layers = 4 * (128 + 64 + 256 + 64), 16
    four, eight = (quantization.weight_bytes(load(checkpoint, bits)) for bits in ("4bit", "8bit"))
    assert four["in_16_bits"] == eight["in_16_bits"] == 2 * MATRICES
    assert 0 <= four["quantized"] - (MATRICES // 2 + 4 * MATRICES // 64) < 300 * layers
    assert 0 <= eight["quantized"] - (MATRICES + 4 * rows) < 10 * layers
    rest = 4 * (320 * 64 + 64 * 128 + 17 * 64)  # embedding, injection, norms, in float32
    assert four["total"] - four["quantized"] == eight["total"] - eight["quantized"] == rest


@pytest.mark.slow
def test_in_4_bits_the_layers_of_the_100m_shape_take_less_than_a_third(tmp_path):
    """The vocabulary is no part of what is quantised."""
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({"model": {"vocab_size": 512}}))
    config = Path(__file__).parents[1] / "configs/recurrent_lm_100m.yaml"
    found = quantization.memory_of_config(config, torch.device("cpu"), ["--config", str(path)])
    assert found["4 bits"]["in_16_bits"] == 2 * 8 * (768 * 3 * 768 + 768 * 768 + 768 * 2 * 2304 + 2304 * 768)
    assert found["4 bits"]["quantized"] <= 0.30 * found["4 bits"]["in_16_bits"]
    assert found["8 bits"]["quantized"] <= 0.51 * found["8 bits"]["in_16_bits"]


def test_tables(tiny_run, tmp_path, capsys):
    output = tmp_path / "out.json"
    folder = save_run(tmp_path / "run", tiny_run)
    argv = [str(folder), "--num-steps", "1", "3", "--limit", "4", "--device", "cpu", "--output", str(output)]
    assert quantization.main(argv) == 0
    assert capsys.readouterr().out.count("\n| ---") == 3
    found = json.loads(output.read_text())
    assert found["bits"]["as trained"]["1"]["divergence"] == pytest.approx(0, abs=1e-9)
    assert 0 < found["bits"]["8 bits"]["3"]["divergence"] < found["bits"]["4 bits"]["3"]["divergence"]


def test_bad_input_is_one_line(tmp_path, capsys):
    for argv, message in (
        ([str(tmp_path)], str(tmp_path)),
        ([], "give a checkpoint, or --config"),
        (["--config", str(tmp_path / "absent.yaml")], "absent.yaml"),
    ):
        with pytest.raises(SystemExit) as caught:
            quantization.main(argv)
        captured = capsys.readouterr()
        assert caught.value.code == 2 and message in captured.err and captured.err.count("\n") == 1
