"""A modality that nobody thought of, in this file alone: registered, named in a YAML, trained from files, saved and
loaded, and asked.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence

import pretrain
from inference.loading import load_model
from model import MODALITIES, MegaTransformerConfig, MegaTransformerForConditionalGeneration, Modality
from tests.tiny_media_run import TINY_MEDIA_RUN, write_media_config


class GestureConfig:
    """Of the encoder of gestures."""

    def __init__(self, width: int = 8):
        self.width = width


class GestureEncoder(nn.Module):
    """A feature for each point, of itself and the point before."""

    def __init__(self, config: GestureConfig):
        super().__init__()
        self.config, self.output_size = config, config.width
        self.proj = nn.Linear(4, config.width)

    def forward(self, points, points_mask):
        before = nn.functional.pad(points, (0, 0, 1, 0))[:, :-1]
        return self.proj(torch.cat((points, before), dim=-1)), points_mask.bool()


class Gestures(Modality):
    """Lists of points (x, y), as JSON or in files of it, a token each."""

    name = "gesture"
    config_class = GestureConfig
    input_names = ("points", "points_mask")

    def build_encoder(self, config):
        return GestureEncoder(config)

    def dummy_inputs(self, config):
        return {"points": torch.zeros(1, 1, 2), "points_mask": torch.ones(1, 1)}

    def preprocess(self, medium, config):
        if isinstance(medium, str):
            with open(medium) as file:
                medium = json.load(file)
        points = torch.tensor(medium)
        if points.ndim != 2 or points.shape[1] != 2:
            raise ValueError(f"{medium} is no list of points")
        return points

    def num_tokens(self, preprocessed, config):
        return len(preprocessed)

    def collate(self, preprocessed):
        mask = pad_sequence([torch.ones(len(points)) for points in preprocessed], batch_first=True)
        return {"points": pad_sequence(preprocessed, batch_first=True), "points_mask": mask}


def gesture(seed: int) -> list[list[float]]:
    """Of three to five points."""
    return torch.rand(3 + seed % 3, 2, generator=torch.Generator().manual_seed(seed)).tolist()


def ask(*parts) -> list[dict]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": "what?"}]}]


def write_chats(folder):
    """Conversations about gestures in files, the first of which holds none."""
    lines = []
    for seed in range(9):
        (folder / f"{seed}.json").write_text(json.dumps(gesture(seed)) if seed else "[1, 2, 3]")
        messages = [*ask({"type": "gesture", "path": f"{seed}.json"}), {"role": "assistant", "content": "a wave"}]
        lines.append(json.dumps({"messages": messages}) + "\n")
    (folder / "chats.jsonl").write_text("".join(lines))
    return {"kind": "chat", "paths": [str(folder / "chats.jsonl")], "name": "waves"}


@pytest.fixture
def run(tmp_path, monkeypatch, caplog):
    """The folder of a finished run on gestures, scenes and stories."""
    caplog.set_level("WARNING")
    monkeypatch.setitem(MODALITIES, "gesture", Gestures())
    scenes, _, stories = TINY_MEDIA_RUN["data"]["train"]
    config = write_media_config(
        tmp_path,
        model={**TINY_MEDIA_RUN["model"], "modality_configs": {"gesture": {"width": 12}}},
        tokenizer={"vocab_size": 275},
        data={"train": [{**write_chats(tmp_path), "weight": 2}, scenes, stories]},
        training={"max_steps": 3},
    )
    flags = ["--model.text_config.vocab_size", "275", "--training.output_dir", str(tmp_path / "out")]
    assert pretrain.main(["--config", str(config), *flags]) == 0
    return tmp_path / "out"


def greedy(model, processor, ids, media, max_new_tokens):
    """Without `generate`: the whole through the model for each new token."""
    length = ids.shape[1]
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(ids, **media, num_steps=2, use_cache=False).logits[0, -1]
        logits[[getattr(model.config, f"{name}_token_id") for name in ("image", "audio", "gesture")]] = -torch.inf
        ids = torch.cat((ids, logits.argmax().view(1, 1)), dim=1)
        if ids[0, -1] == processor.tokenizer.eos_token_id:
            break
    return ids[0, length:]


def test_a_further_modality_is_one_file(run, caplog):
    (bad,) = [record.message for record in caplog.get_records("setup") if "bad row" in record.message]
    assert "[1, 2, 3] is no list of points" in bad
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    logged = set().union(*history)
    assert {"loss_gesture", "tokens_gesture", "loss_image", "loss_text"} <= logged and "loss_audio" not in logged

    model, processor = load_model(run)
    assert model.input_modalities == ("text", "image", "audio", "gesture")
    reader = model.model.readers["gesture"]
    assert reader.encoder.proj.weight.shape == (12, 4)
    torch.manual_seed(0)
    fresh = MegaTransformerForConditionalGeneration(MegaTransformerConfig(**model.config.to_dict()))
    names = [name for name, _ in model.named_parameters() if "readers.gesture" in name]
    assert len(names) == 8 and load_file(run / "model.safetensors").keys() >= set(names)
    assert not torch.equal(fresh.state_dict()[names[0]], model.state_dict()[names[0]])

    points = gesture(20)
    batch = processor.apply_chat_template(
        [ask({"type": "gesture", "gesture": points}), ask({"type": "gesture", "gesture": gesture(4)})],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        padding=True,
    )
    assert (batch["input_ids"][0] == model.config.gesture_token_id).sum() == len(points) == 5
    assert batch["points"].shape == (2, 5, 2) and batch["points_mask"].sum(1).tolist() == [5, 4]
    written = model.generate(**batch, num_steps=2, max_new_tokens=4, do_sample=False, prefill_chunk_size=3)
    for row, count in enumerate((5, 4)):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        alone = {name: batch[name][row : row + 1, :count] for name in ("points", "points_mask")}
        expected = greedy(model, processor, ids, alone, 4)
        assert torch.equal(written[row, batch["input_ids"].shape[1] :][: len(expected)], expected)
        with torch.no_grad():
            other = model(ids, points=-alone["points"], points_mask=alone["points_mask"], num_steps=2).logits
            assert (other - model(ids, **alone, num_steps=2).logits).abs().max() > 1e-4


def test_it_leaves_no_trace():
    """After the tests above, as before them."""
    assert list(MODALITIES) == ["image", "audio"]
    with pytest.raises(ValueError, match="'gesture', which is not registered"):
        MegaTransformerForConditionalGeneration(MegaTransformerConfig(modality_configs={"gesture": {}}))
