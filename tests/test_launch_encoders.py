"""`configs/recurrent_vlm_zero3.yaml` on two ranks, ZeRO-3, tiny pretrained encoders."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import SiglipModel, WhisperModel

from tests.hub_encoders import save_tiny_encoders
from tests.test_launch import REPOSITORY, trained

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

FROZEN = "model.readers.image.encoder.model.head."  # as the file has it

TINY = """
model:
  text_config:
    {vocab_size: 512, hidden_size: 32, intermediate_size: 48, num_attention_heads: 4, num_core_layers: 1,
     recurrence: {mean_steps: 3, backprop_steps: 2}}
tokenizer: {path: null, vocab_size: 512}
data:
  block_size: 128
  train:
    - {kind: generated, task: scenes, num_rows: 60}
    - {kind: generated, task: melodies, num_rows: 60}
    - {kind: generated, task: stories, num_rows: 60}
  validation:
    - {kind: generated, task: scenes, num_rows: 4}
callbacks:
  samples: {max_new_tokens: 2, num_steps: [1, 3]}
  media_samples: {max_new_tokens: 2, num_steps: [1, 3]}
training:
  bf16: false
  max_steps: 4
  warmup_steps: 1
  logging_steps: 1
  per_device_train_batch_size: 2
  gradient_accumulation_steps: 2
  dataloader_num_workers: 0
  parameter_groups: [{pattern: model.readers.image.encoder.*, freeze_steps: 2}, {pattern: model.readers.audio.encoder.*,
    lr_factor: 0}]
"""


def test_pretrained_encoders_under_zero_3(tmp_path: Path):
    """They begin with their own weights, also where DeepSpeed divides all of them: of sound they are the same after a
    training at rate 0, of pictures they have been learned, but for what the file freezes.
    """
    (tmp_path / "tiny.yaml").write_text(TINY)
    encoders = save_tiny_encoders(tmp_path)
    config = REPOSITORY / "configs" / "recurrent_vlm_zero3.yaml"
    losses = trained(tmp_path / "out", "--config", config, "--config", tmp_path / "tiny.yaml", *encoders)
    assert len(losses) == 4
    found = load_file(tmp_path / "out" / "model.safetensors")
    audio = WhisperModel.from_pretrained(tmp_path / "whisper").get_encoder().state_dict()
    assert all(torch.equal(found[f"model.readers.audio.encoder.model.{name}"], value) for name, value in audio.items())
    image = SiglipModel.from_pretrained(tmp_path / "siglip").vision_model.state_dict()
    names = {f"model.readers.image.encoder.model.{name}": value for name, value in image.items()}
    same = {name for name, value in names.items() if torch.equal(found[name], value)}
    assert same == {name for name in names if name.startswith(FROZEN)}
    assert all(torch.allclose(found[name], value, atol=0.01) for name, value in names.items())
