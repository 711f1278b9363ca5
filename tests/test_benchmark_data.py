"""The benchmark of the loader: every kind of source gives rows, and what the table says is what was measured."""

import pytest
import yaml

from benchmarks import data

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


@pytest.fixture
def config(tmp_path):
    run = {
        "model": MODEL,
        "tokenizer": {"vocab_size": 268},
        "data": {"block_size": 128, "train": [{"kind": "generated", "task": "addition", "num_rows": 8}]},
        "training": {"output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 2},
    }
    (tmp_path / "tiny.yaml").write_text(yaml.dump(run))
    return str(tmp_path / "tiny.yaml")


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
