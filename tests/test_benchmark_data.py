"""The benchmark of the loader: every kind of source gives rows, and what the table says is what was measured."""

from unittest.mock import Mock

import pytest
import torch
import yaml

from benchmarks import data
from trainers.muon import Muon

MODEL = {
    "model_type": "megatransformer",
    "text_config": {
        "vocab_size": 268,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_prelude_layers": 0,
        "num_core_layers": 1,
        "num_coda_layers": 0,
        "recurrence": {"mean_steps": 2, "backprop_steps": 1},
    },
    "vision_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 16,
    },
    "audio_config": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "sampling_rate": 8000,
        "n_fft": 256,
        "hop_length": 80,
        "num_mel_bins": 16,
        "subsampling": 8,
    },
}


def write_config(folder, **training):
    run = {
        "model": MODEL,
        "tokenizer": {"vocab_size": 268},
        "data": {"block_size": 128, "train": [{"kind": "generated", "task": "addition", "num_rows": 8}]},
        "training": {"output_dir": str(folder / "out"), "per_device_train_batch_size": 2, **training},
    }
    (folder / "tiny.yaml").write_text(yaml.dump(run))
    return str(folder / "tiny.yaml")


@pytest.fixture
def config(tmp_path):
    return write_config(tmp_path)


def test_every_kind_of_source_is_timed(config, capsys, monkeypatch):
    """Seconds are counted by hand: a clock that goes on by one at each look, and one second for each step."""
    clock = iter(range(10_000))
    monkeypatch.setattr(data.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(data.timing, "seconds_of", lambda run, device: run() or 0.5)
    argv = ["--config", config, "--documents", "24", "--batches", "2", "--warmup", "1", "--device", "cpu"]
    assert data.main(argv) == 0
    lines = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines[2:]] == list(data.SOURCES)
    for _, rows, tokens, used, ratio in lines[2:]:
        # two batches of two rows of 128 tokens, one second each as they arrive, half a second each as they are used
        assert (rows, tokens, used, ratio) == ("2", "256", "512", "0.5")


@pytest.mark.parametrize(
    ("training", "calls"), [({"muon_learning_rate": 0.01}, (3, 3)), ({"max_grad_norm": 0.0}, (0, 0)), ({}, (0, 3))]
)
def test_the_step_is_that_of_the_configuration(tmp_path, capsys, monkeypatch, training, calls):
    """Muon and clipping in each of three steps, or not at all."""
    muon, clip = Mock(wraps=Muon.step), Mock(wraps=torch.nn.utils.clip_grad_norm_)
    monkeypatch.setattr(Muon, "step", lambda self: muon(self))
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    argv = ["--config", write_config(tmp_path, **training), "--sources", "stories", "--documents", "24"]
    assert data.main([*argv, "--batches", "2", "--warmup", "1", "--device", "cpu"]) == 0
    assert "| stories |" in capsys.readouterr().out
    assert (muon.call_count, clip.call_count) == calls
