"""A modality that nobody thought of: one class in a file, and an entry in a YAML. It is trained from a folder, saved,
loaded here and elsewhere, and asked, like images.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import pretrain
from dataset_loading import DataConfig, SourceConfig
from dataset_loading.bad_rows import BadRows
from dataset_loading.sources.loading import load_rows
from inference import generate
from inference.loading import load_model
from model import MODALITIES, MegaTransformerConfig, MegaTransformerForConditionalGeneration
from model.modalities import save_modalities
from tests.processes import run_python
from tests.tiny_media_run import TINY_MEDIA_RUN, write_media_config

VIDEO = '''
"""Videos, as animated GIFs: a token for each frame."""

import io

import numpy as np
import torch
from PIL import Image, ImageSequence
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from model.media import MediaError
from model.modality import Modality, register

SIDE = 8


class VideoConfig:
    """Of the encoder of videos."""

    def __init__(self, width: int = 8):
        self.width = width


class VideoEncoder(nn.Module):
    """A feature for each frame, of its pixels and those of the frame before."""

    def __init__(self, config: VideoConfig):
        super().__init__()
        self.config, self.output_size = config, config.width
        self.proj = nn.Linear(6 * SIDE**2, config.width)

    def forward(self, frames, frames_mask):
        frames = frames.flatten(2)
        before = nn.functional.pad(frames, (0, 0, 1, 0))[:, :-1]
        return self.proj(torch.cat((frames, before), dim=-1)), frames_mask.bool()


@register
class VideoModality(Modality):
    """Frames, in one size."""

    name = "video"
    config_class = VideoConfig
    input_names = ("frames", "frames_mask")
    file_suffixes = (".gif",)

    @classmethod
    def build_encoder(cls, config):
        return VideoEncoder(config)

    @classmethod
    def dummy_inputs(cls, config):
        return {"frames": torch.zeros(1, 1, 3, SIDE, SIDE), "frames_mask": torch.ones(1, 1)}

    def load(self, source):
        if isinstance(source, list):
            return source
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as file:
            frames = [frame.convert("RGB") for frame in ImageSequence.Iterator(file)]
        if len(frames) < 2:
            raise MediaError(f"{source} is no video: it has 1 frame; give a GIF with some")
        return frames

    def size(self, source):
        return len(self.load(source))

    def preprocess(self, medium):
        frames = [np.asarray(frame.resize((SIDE, SIDE)), np.float32) for frame in self.load(medium)]
        return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2) / 255

    def num_tokens(self, preprocessed):
        return len(preprocessed)

    def collate(self, preprocessed):
        mask = pad_sequence([torch.ones(len(frames)) for frames in preprocessed], batch_first=True)
        return {"frames": pad_sequence(preprocessed, batch_first=True), "frames_mask": mask}
'''

ELSEWHERE = """
import json, sys, torch
from transformers import AutoModelForMultimodalLM, AutoProcessor
folder, clip = sys.argv[1:]
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True).eval()
messages = [{"role": "user", "content": [{"type": "video", "path": clip}, {"type": "text", "text": "where to?"}]}]
batch = processor.apply_chat_template(
    messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
)
with torch.no_grad():
    logits = model(**batch, num_steps=2).logits
ids = model.generate(**batch, num_steps=2, max_new_tokens=4, do_sample=False)
torch.save({"batch": dict(batch), "logits": logits, "ids": ids}, "found.pt")
model.save_pretrained("again")
processor.save_pretrained("again")
assert not [name for name in sys.modules if name.split(".")[0] in ("model", "tests", "video_modality")]
"""


@pytest.fixture(autouse=True)
def video(tmp_path, monkeypatch):
    """The modality, from a file outside of `model`; it leaves no trace."""
    path = tmp_path / "video_modality.py"
    path.write_text(VIDEO)
    spec = importlib.util.spec_from_file_location("video_modality", path)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "video_modality", module)
    monkeypatch.setitem(MODALITIES, "video", None)  # taken away at the end, with what takes its place now
    spec.loader.exec_module(module)
    assert list(MODALITIES) == ["image", "audio", "video"]


def frames(seed: int) -> list[Image.Image]:
    """Three to five frames."""
    draw = torch.Generator().manual_seed(seed)
    colours = torch.randint(256, (3 + seed % 3, 3), generator=draw).tolist()
    return [Image.new("RGB", (12, 10), tuple(colour)) for colour in colours]


def write_clip(path: Path, seed: int) -> str:
    first, *rest = frames(seed)
    first.save(path, save_all=True, append_images=rest)
    return str(path)


def write_videos(folder: Path) -> dict:
    """A source of videos in a folder, the first of which is a picture."""
    folder.mkdir()
    for seed in range(9):
        write_clip(folder / f"{seed}.gif", seed)
    Image.new("RGB", (12, 10)).save(folder / "0.gif")
    lines = [json.dumps({"file_name": f"{seed}.gif", "text": "to the left"}) for seed in range(9)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return {"kind": "folder", "path": str(folder), "media_columns": {"file_name": "video"}, "prompt": "where to?"}


@pytest.fixture
def run(tmp_path, caplog):
    """The folder of a finished run on videos, scenes and stories."""
    caplog.set_level("WARNING")
    scenes, _, stories = TINY_MEDIA_RUN["data"]["train"]
    config = write_media_config(
        tmp_path,
        model={**TINY_MEDIA_RUN["model"], "modality_configs": {"video": {"width": 12}}},
        tokenizer={"vocab_size": 275},
        data={"train": [{**write_videos(tmp_path / "clips"), "weight": 2}, scenes, stories]},
        training={"max_steps": 3},
    )
    flags = ["--model.text_config.vocab_size", "275", "--training.output_dir", str(tmp_path / "out")]
    assert pretrain.main(["--config", str(config), *flags]) == 0
    return tmp_path / "out"


def ask(video) -> list[dict]:
    return [{"role": "user", "content": [{"type": "video", "video": video}, {"type": "text", "text": "where to?"}]}]


def encode(processor, *conversations):
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "padding": True}
    return processor.apply_chat_template(list(conversations), add_generation_prompt=True, **options)


def greedy(model, processor, ids, media, max_new_tokens):
    """Without `generate`: the whole through the model for each new token."""
    length = ids.shape[1]
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(ids, **media, num_steps=2, use_cache=False).logits[0, -1]
        logits[[getattr(model.config, f"{name}_token_id") for name in ("image", "audio", "video")]] = -torch.inf
        ids = torch.cat((ids, logits.argmax().view(1, 1)), dim=1)
        if ids[0, -1] == processor.tokenizer.eos_token_id:
            break
    return ids[0, length:]


def test_a_further_modality_is_one_file(run, tmp_path, caplog, capsys):
    (bad,) = [record.message for record in caplog.get_records("setup") if "bad row" in record.message]
    assert "0.gif is no video: it has 1 frame" in bad
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    logged = set().union(*history)
    assert {"loss_video", "tokens_video", "loss_image", "loss_text"} <= logged and "loss_audio" not in logged

    model, processor = load_model(run)
    assert model.input_modalities == ("text", "image", "audio", "video")
    assert model.model.readers["video"].encoder.proj.weight.shape == (12, 384)
    torch.manual_seed(0)
    fresh = MegaTransformerForConditionalGeneration(MegaTransformerConfig(**model.config.to_dict()))
    names = [name for name, _ in model.named_parameters() if "readers.video" in name]
    assert len(names) == 8 and load_file(run / "model.safetensors").keys() >= set(names)
    assert not torch.equal(fresh.state_dict()[names[0]], model.state_dict()[names[0]])

    batch = encode(processor, ask(frames(20)), ask(frames(4)))
    assert (batch["input_ids"] == model.config.video_token_id).sum(1).tolist() == [5, 4]
    assert batch["frames"].shape == (2, 5, 3, 8, 8) and batch["frames_mask"].sum(1).tolist() == [5, 4]
    clip = write_clip(tmp_path / "new.gif", 20)
    in_text = processor(text="<|video|>where to?", videos=[clip], return_tensors="pt")
    assert torch.equal(in_text["frames"], batch["frames"][:1])
    written = model.generate(**batch, num_steps=2, max_new_tokens=4, do_sample=False, prefill_chunk_size=3)
    for row, count in enumerate((5, 4)):
        ids = batch["input_ids"][row][batch["attention_mask"][row].bool()][None]
        alone = {name: batch[name][row : row + 1, :count] for name in ("frames", "frames_mask")}
        expected = greedy(model, processor, ids, alone, 4)
        assert torch.equal(written[row, batch["input_ids"].shape[1] :][: len(expected)], expected)
        with torch.no_grad():
            other = model(ids, frames=1 - alone["frames"], frames_mask=alone["frames_mask"], num_steps=2).logits
            assert (other - model(ids, **alone, num_steps=2).logits).abs().max() > 1e-4

    flags = ["--prompt", "where to?", "--video", clip, "--num-steps", "2", "--max-new-tokens", "4"]
    assert generate.main([str(run), *flags, "--greedy", "--no-stream"]) == 0
    answer = processor.tokenizer.decode(written[0, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answer.strip() in capsys.readouterr().out


@pytest.mark.slow
def test_its_checkpoint_is_loaded_elsewhere(run, tmp_path):
    """In another process, without this repository and the file; and so is what is saved there."""
    clip, (model, processor) = write_clip(tmp_path / "new.gif", 20), load_model(run)
    batch = encode(processor, ask(clip))
    with torch.no_grad():
        logits = model(**batch, num_steps=2).logits
    ids = model.generate(**batch, num_steps=2, max_new_tokens=4, do_sample=False)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (run, "again"):
        run_python("-c", ELSEWHERE, folder, clip, cwd=elsewhere).check_returncode()
        found = torch.load(elsewhere / "found.pt")
        assert all(torch.equal(found["batch"][name], batch[name]) for name in batch)
        assert torch.equal(found["ids"], ids) and torch.equal(found["logits"], logits)


def test_a_folder_without_metadata_is_searched_for_its_files(tmp_path):
    write_videos(tmp_path / "left")
    (tmp_path / "left" / "metadata.jsonl").unlink()
    (tmp_path / "left" / "notes.md").write_text("#")
    source = SourceConfig(
        "folder", path=str(tmp_path), media_columns={"file_name": "video"}, prompt="where to?", answer_column="label"
    )
    rows = load_rows(source, "train", DataConfig(), 0, BadRows.of_building(0))
    found = [json.loads(messages) for messages in rows["messages"]]
    assert len(found) == 9 and found[0][0]["content"][0] == {"type": "video", "path": str(tmp_path / "left" / "0.gif")}
    assert found[0][1]["content"] == [{"type": "text", "text": "left"}]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "folder"}, "a source of kind folder needs media_columns"),
        ({"kind": "folder", "media_columns": {"a": "smell"}}, "media_columns has 'a' of 'smell', unknown; choose one"),
        ({"kind": "imagefolder", "media_columns": {"file_name": "video"}}, "named as image and as video; name it once"),
    ],
)
def test_media_columns_that_cannot_be_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        SourceConfig(path=str(tmp_path), **options)


def test_a_file_that_cannot_go_along_is_named(tmp_path, monkeypatch, caplog):
    for name, code in (("a.py", "from model import Modality\n"), ("encoders.py", "x = 1\n")):
        (tmp_path / name).write_text(code)
        monkeypatch.setattr("inspect.getfile", lambda _, path=str(tmp_path / name): path)
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "modalities.py").write_text("")
        save_modalities(["video"], tmp_path / "out")
        assert os.listdir(tmp_path / "out") == ["modalities.py"]
    assert len([it for it in caplog.messages if "lacks the code of modality 'video'" in it]) == 2


def test_it_leaves_no_trace(monkeypatch):
    monkeypatch.delitem(MODALITIES, "video")
    with pytest.raises(ValueError, match="'video', which is not registered"):
        MegaTransformerForConditionalGeneration(MegaTransformerConfig(modality_configs={"video": {}}))
