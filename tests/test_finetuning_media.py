"""Fine-tuning of a model that reads pictures and sound: adapters in its encoders and projectors."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import finetune
import pretrain
from inference.loading import load_model
from tests.test_finetuning import refusal, tune
from tests.tiny_finetuning import write_tuning_config
from tests.tiny_media_run import TINY_MEDIA_RUN, write_media_config

PEFT = {
    "rank": 2,
    "dropout": 0.0,
    "target_modules": dict.fromkeys(("core", "vision", "audio"), "all-linear") | {"projectors": ["down_proj"]},
}
TRAINING = {name: TINY_MEDIA_RUN["training"][name] for name in ("max_steps", "per_device_train_batch_size")}
TRAINING |= {"train_sampling_strategy": "sequential", "modality_weights": {"image": 2.0}}
NO_SAMPLES = {"media_samples": {"num_examples": 0}}


@pytest.fixture(scope="module")
def media_base(tmp_path_factory) -> Path:
    """A checkpoint that reads pictures and sound."""
    folder = tmp_path_factory.mktemp("media")
    config = write_media_config(folder, training={"max_steps": 1}, callbacks=NO_SAMPLES)
    assert pretrain.main(["--config", str(config), "--training.output_dir", str(folder / "out")]) == 0
    return folder / "out"


def tune_media(folder: Path, base: Path, **sections) -> Path:
    data = {name: TINY_MEDIA_RUN["data"][name] for name in ("block_size", "packing", "train", "validation")}
    flags = ("--training.save_strategy", "no", "--training.gradient_accumulation_steps", "1")
    return tune(
        folder, base, *flags, **{"data": data, "peft": PEFT, "training": TRAINING, "callbacks": NO_SAMPLES, **sections}
    )


def test_adapters_in_encoders_and_projectors_learn(media_base, tmp_path):
    """From conversations with pictures and sound, weighted and logged by modality; the processor stands beside them."""
    folder = tune_media(tmp_path, media_base)
    weights = load_file(folder / "adapter_model.safetensors")
    parts = ("model.core.", "readers.image.encoder.", "readers.audio.encoder.", "readers.image.projector.down_proj")
    for part in parts:
        learned = [weight.abs().max() > 0 for name, weight in weights.items() if part in name and "lora_B" in name]
        assert learned and all(learned), part
    assert not any("projector.up_proj" in name or "prelude" in name for name in weights)
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    logged = {name for entry in history for name in entry}
    assert {"loss_image", "loss_audio", "weight_share_image"} <= logged
    assert {"eval_scenes_loss", "eval_melodies_loss"} <= json.loads((folder / "eval_results.json").read_text()).keys()
    model, processor = load_model(folder)
    assert type(processor).__name__ == "MegaTransformerProcessor"
    base = load_model(media_base)[0].state_dict()
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, base[name])}
    named = {name.removeprefix("base_model.model.").partition(".lora_")[0] + ".weight" for name in weights}
    assert changed == named


def test_losses_of_text_alone_are_refused(media_base, tmp_path, capsys):
    """TRL's know neither weights nor latents."""
    training = {**TRAINING, "loss_type": "dft"}
    data = {name: TINY_MEDIA_RUN["data"][name] for name in ("block_size", "packing", "train", "validation")}
    config = write_tuning_config(tmp_path, media_base, data=data, peft=PEFT, training=training)
    line = refusal(capsys, finetune.main, "--config", config, "--training.output_dir", tmp_path / "out")
    assert "training.loss_type: 'dft' is for models of text alone" in line
