"""What a fuzzer damages: small inputs of every kind that are right, and the functions by which commands read them."""

from __future__ import annotations

import io
import itertools
import json
import logging
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from datasets import Audio, Features, Image, List, Value
from peft import LoraConfig, get_peft_model
from PIL import ImageFile
from PIL.PngImagePlugin import PngInfo
from transformers import LogitsProcessorList, TrainerState, set_seed

from configs import RunConfig, load_config, load_run_config
from configs.pretraining import describe_run
from configs.resuming import check_options
from dataset_loading import Collator, DataConfig, SourceConfig, build_datasets
from dataset_loading.codec_data import build_codec_datasets
from dataset_loading.preferences import build_pairs, build_prompts
from inference.adapters import base_model
from inference.conversation import Conversation
from inference.decoding import FiniteLogits
from inference.loading import load_codec, load_model
from inference.prompts import check_prompts, encode_prompt, encode_question, read_prompts
from model import MegaTransformerForConditionalGeneration, codec_media, tokenizer_of
from model.chat import prepare_tokenizer
from model.step_lora import add_step_lora
from tests.hub_encoders import siglip2
from tests.tiny_artist import artist_config, artist_processor, tiny_artist
from tests.tiny_codecs import tiny_autoencoder
from tests.tiny_language_model import tiny_model, tiny_tokenizer
from tests.tiny_media import tiny_media_config
from tests.tiny_media_run import TINY_MEDIA_RUN
from tests.tiny_processor import audio_file, image_file, picture, sound, tiny_processor
from trainers import check_weights, checkpoints, find_resume_point

ROOT = Path(__file__).parent.parent
HELD_OUT = SourceConfig("generated", task="addition", num_rows=3)
CODE = "*.py"
"""Goes with every saved model, and is never run."""


ODD_FILES = ("zero", "pipe", "folder", "loop", "away")
"""Names of what is no file of a folder."""


def make_odd(path: Path, name: str) -> None:
    """Make one of `ODD_FILES`."""
    if name == "pipe":
        os.mkfifo(path)
    elif name == "folder":
        path.mkdir()
    else:
        path.symlink_to({"zero": "/dev/zero", "loop": path.name, "away": "/etc/hostname"}[name])


@dataclass(frozen=True)
class Sample:
    """An input that is right.

    Args:
        kind: Of what it is, for the table.
        name: Its own.
        files: Content of each file, by its name in the folder.
        damaged: Names of the files that are damaged, one at a time.
        read: Reads the input in a folder, as commands do.
    """

    kind: str
    name: str
    files: Mapping[str, bytes]
    damaged: tuple[str, ...]
    read: Callable[[Path], None]

    def write(self, folder: Path) -> None:
        """The files, and beside those of data what names may lead to: links, and files that are none."""
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        for name in ODD_FILES if self.kind in ("metadata", "chat", "tar", "parquet") else ():
            make_odd(folder / f"{name}.png", name)


def build_samples() -> list[Sample]:
    """All of them, the same at every call."""
    set_seed(0)
    builders = (media_samples, metadata_samples, chat_samples, yaml_samples, tar_samples, table_samples)
    return [sample for build in (*builders, checkpoint_samples) for sample in build()]


# --------------------------------------------------------------------------------------------------------------- media


def media_samples() -> Iterator[Sample]:
    """Pictures and recordings of all formats, shown to a model."""
    for name, content in (*pictures().items(), *recordings().items()):
        kind = "audio" if name in recordings() else "image"
        yield Sample(
            "media", name, {name: content}, (name,), lambda folder, kind=kind, name=name: show(folder / name, kind)
        )


def pictures() -> dict[str, bytes]:
    """By name of the file."""
    image = picture()
    turned = image.getexif()
    turned[0x0112] = 6
    notes = PngInfo()
    notes.add_itxt("XML:com.adobe.xmp", '<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="6"/>', zip=True)
    notes.add_text("Comment", "a picture", zip=True)
    frames = {"save_all": True, "append_images": [picture(seed=1), picture(seed=2)]}
    return {
        "rgb.png": image_file(image),
        "turned.png": image_file(image, exif=turned, pnginfo=notes),
        "palette.png": image_file(image.quantize(16), transparency=3),
        "alpha.png": image_file(image.convert("LA")),
        "deep.png": image_file(image.convert("I;16")),
        "animated.png": image_file(image, **frames),
        "plain.jpg": image_file(image, "JPEG"),
        "turned.jpg": image_file(image, "JPEG", exif=turned, progressive=True, comment=b"a picture"),
        "cmyk.jpg": image_file(image.convert("CMYK"), "JPEG"),
        "animated.gif": image_file(image, "GIF", **frames),
        "turned.webp": image_file(image, "WEBP", exif=turned),
        "lossless.webp": image_file(image.convert("RGBA"), "WEBP", lossless=True),
        "lzw.tiff": image_file(image, "TIFF", compression="tiff_lzw"),
        "float.tiff": image_file(image.convert("F").point(lambda value: value * 0.003 + 0), "TIFF"),
        "plain.bmp": image_file(image, "BMP"),
        "plain.ppm": image_file(image, "PPM"),
        "plain.jp2": image_file(image, "JPEG2000"),
        "plain.avif": image_file(image, "AVIF"),
    }


def recordings() -> dict[str, bytes]:
    """By name of the file."""
    samples, both = sound(3000), np.stack([sound(2000), sound(2000, 1)], axis=1)
    return {
        "plain.wav": audio_file(samples),
        "float.wav": audio_file(both, 44100, subtype="FLOAT"),
        "adpcm.wav": audio_file(samples, subtype="IMA_ADPCM"),
        "plain.flac": audio_file(samples, format="FLAC"),
        "vorbis.ogg": audio_file(both, 16000, format="OGG", subtype="VORBIS"),
        "opus.ogg": audio_file(samples, 16000, format="OGG", subtype="OPUS"),
        "plain.mp3": audio_file(samples, 16000, format="MP3"),
        "plain.aiff": audio_file(samples, format="AIFF"),
        "plain.caf": audio_file(samples, format="CAF"),
    }


def show(path: Path, kind: str) -> None:
    """The inputs of a model that is asked about a file."""
    encode_question(PROCESSOR, ([(kind, str(path))], "What?"))


# ---------------------------------------------------------------------------------------------------- data sets on disk


def read_source(folder: Path, **fields: Any) -> None:
    """All rows of a source, as batches of training."""
    source = SourceConfig(**{name: _inside(folder, name, value) for name, value in fields.items()})
    config = DataConfig(train=[source], validation=[HELD_OUT], packing=False, block_size=128)
    train = build_datasets(config, PROCESSOR).train
    rows = iter(train) if source.streaming else (train[number] for number in range(min(4, len(train))))
    Collator(PROCESSOR)(list(itertools.islice(rows, 4)))


def _inside(folder: Path, name: str, value: Any) -> Any:
    if name == "path":
        return str(folder / value)
    return [str(folder / part) for part in value] if name == "paths" else value


def source_sample(
    kind: str, name: str, files: Mapping[str, bytes], damaged: tuple[str, ...], /, **fields: Any
) -> Sample:
    """One that is read by `read_source`."""
    return Sample(kind, name, files, damaged, lambda folder: read_source(folder, **fields))


def as_lines(rows: list[dict]) -> bytes:
    """JSONL."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def media_files() -> dict[str, bytes]:
    """Small pictures and recordings, as they lie beside metadata."""
    shown = {f"deep/{number}.png": image_file(picture(16, 8, number)) for number in range(3)}
    return shown | {f"{number}.wav": audio_file(sound(900, number)) for number in range(3)}


def metadata_samples() -> Iterator[Sample]:
    """Folders of media with a file about them, and files of rows."""
    media = media_files()
    shown = [{"file_name": f"deep/{number}.png", "text": f"caption {number}"} for number in range(3)]
    heard = [{"file_name": f"{number}.wav", "said": f"words {number}"} for number in range(3)]
    both = [{"seen": ["deep/1.png", "deep/0.png"], "heard": "1.wav", "text": "first", "size": 3}] * 2
    table = b'file_name,text,who\ndeep/0.png,"a, b",Ann\ndeep/2.png,c,Bob\ndeep/1.png,d,Eve\n'
    images, sounds = {"kind": "imagefolder", "path": ""}, {"kind": "audiofolder", "path": "", "answer_column": "said"}
    yield source_sample(
        "metadata", "images", media | {"metadata.jsonl": as_lines(shown)}, ("metadata.jsonl",), **images
    )
    yield source_sample(
        "metadata", "sounds", media | {"metadata.jsonl": as_lines(heard)}, ("metadata.jsonl",), **sounds
    )
    yield source_sample(
        "metadata", "csv", media | {"metadata.csv": table}, ("metadata.csv",), prompt="{who} sees?", **images
    )
    fields = {"kind": "files", "paths": ["*.jsonl"], "image_column": "seen", "audio_column": "heard"}
    yield source_sample(
        "metadata", "rows", media | {"rows.jsonl": as_lines(both)}, ("rows.jsonl",), prompt="{size}?", **fields
    )
    labels = {"kind": "imagefolder", "path": "", "prompt": "What?", "answer_column": "label"}
    yield source_sample("metadata", "labels", media, ("deep/0.png", "deep/1.png"), **labels)
    texts = as_lines([{"text": f"a text about {number}"} for number in range(4)])
    yield source_sample("metadata", "texts", {"a.jsonl": texts}, ("a.jsonl",), kind="files", paths=["a.jsonl"])
    plain = {"a.txt": "one text, naïve\n".encode(), "b.txt": b"another\r\ntext"}
    yield source_sample("metadata", "plain", plain, ("a.txt",), kind="files", paths=["*.txt"])
    files = media | {"metadata.jsonl": as_lines(shown)}
    yield Sample("metadata", "codec", files, ("metadata.jsonl", "deep/0.png"), read_codec_media)


def read_codec_media(folder: Path) -> None:
    """All media of a folder, as a codec takes them."""
    config = DataConfig(train=[SourceConfig("imagefolder", path=str(folder))], validation_fraction=0.4)
    train, _ = build_codec_datasets(config, codec_media(tiny_autoencoder().config))
    for number in range(len(train)):
        train[number]


TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is 2*21?"},
    {"role": "assistant", "content": "calculator(2*21)"},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "42"},
]


def chat_samples() -> Iterator[Sample]:
    """Conversations, with media and without, preferences, and prompts."""
    parts = [
        {"type": "text", "text": "Look: "},
        {"type": "image", "path": "deep/1.png"},
        {"type": "audio", "audio": "0.wav"},
    ]
    shown = [{"role": "user", "content": parts}, {"role": "assistant", "content": [{"type": "text", "text": "Noise"}]}]
    rows = [{"messages": talk} for talk in (TALK, shown, TALK[1:3])]
    media, text = media_files(), {"kind": "chat"}
    yield source_sample("chat", "lines", media | {"a.jsonl": as_lines(rows)}, ("a.jsonl",), paths=["a.jsonl"], **text)
    whole = json.dumps(rows).encode()
    yield source_sample("chat", "list", media | {"a.json": whole}, ("a.json",), paths=["a.json"], **text)
    beside = [{"talk": [TALK[1], shown[1]], "images": ["deep/0.png"]}] * 3
    columns = {"kind": "files", "messages_column": "talk", "image_column": "images"}
    yield source_sample(
        "chat", "beside", media | {"a.jsonl": as_lines(beside)}, ("a.jsonl",), paths=["a.jsonl"], **columns
    )
    told = [
        {"conversations": [{"from": "human", "value": f"Hi {number}"}, {"from": "gpt", "value": "Hello"}]}
        for number in range(3)
    ]
    known = as_lines([{"messages": TALK}, *told])
    yield source_sample("chat", "sharegpt", {"a.jsonl": known}, ("a.jsonl",), paths=["a.jsonl"], **text)
    pairs = [{"prompt": f"{number}+1=", "answer": str(number + 1), "worse": "0"} for number in range(8)]
    fields = {"prompt_column": "prompt", "answer_column": "answer"}
    yield Sample(
        "chat", "pairs", {"a.jsonl": as_lines(pairs)}, ("a.jsonl",), lambda folder: read_pairs(folder, **fields)
    )
    asked = [{"role": "user", "content": f"{number}+1="} for number in range(8)]
    talks = [{"better": [question, TALK[2]], "worse": [question, TALK[4]]} for question in asked]
    talked = {"messages_column": "better"}
    yield Sample(
        "chat", "talked", {"a.jsonl": as_lines(talks)}, ("a.jsonl",), lambda folder: read_pairs(folder, **talked)
    )
    prompts = [{"prompt": "What?", "image": "deep/0.png"}, {"prompt": "The wind"}, {"audio": ["0.wav"]}]
    yield Sample("chat", "prompts", media | {"a.jsonl": as_lines(prompts)}, ("a.jsonl",), read_prompt_file)


def read_pairs(folder: Path, **columns: str) -> None:
    """Pairs for preferences, and prompts for rewards."""
    source = SourceConfig("files", paths=[str(folder / "a.jsonl")], rejected_column="worse", **columns)
    config = DataConfig(train=[source], validation_fraction=0.4)
    build_pairs(config, CHATTING)[0][:]
    build_prompts(config)[0][:]


def read_prompt_file(folder: Path) -> None:
    """The prompts of `inference.generate`."""
    prompts = read_prompts(folder / "a.jsonl")
    check_prompts(folder / "a.jsonl", PROCESSOR, prompts, limit=256)


def tar_samples() -> Iterator[Sample]:
    """Shards, indexed and streamed."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for number in range(3):
            members = {
                "png": image_file(picture(16, 8, number)),
                "wav": audio_file(sound(900, number)),
                "json": json.dumps({"caption": f"it is {number}"}).encode(),
                "txt": f"text {number}".encode(),
            }
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"some.folder/{number}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    fields = {"image_column": "png", "audio_column": "wav", "text_column": "caption", "prompt": "{txt}"}
    for name, streaming in (("indexed", False), ("streamed", True)):
        yield source_sample(
            *("tar", name, {"0.tar": buffer.getvalue()}, ("0.tar",)),
            **{"kind": "webdataset", "paths": ["*.tar"], "streaming": streaming, **fields},
        )


def table_samples() -> Iterator[Sample]:
    """Tables with texts, media and conversations, as files and as folders of the hub."""
    texts = pa.table({"text": [f"a text about {number}" for number in range(4)], "size": list(range(4))})
    yield source_sample(
        "parquet", "texts", {"a.parquet": parquet(texts)}, ("a.parquet",), kind="files", paths=["a.parquet"]
    )
    columns = {
        "picture": [{"bytes": image_file(picture(16, 8, number)), "path": None} for number in range(3)],
        "heard": [[{"bytes": audio_file(sound(900, number)), "path": "x.wav"}] for number in range(3)],
        "text": [f"text {number}" for number in range(3)],
    }
    features = Features(picture=Image(), heard=List(Audio()), text=Value("string"))
    table = pa.table(columns, schema=features.arrow_schema)
    media = {"image_column": "picture", "audio_column": "heard"}
    content = {"a.parquet": parquet(table)}
    yield source_sample("parquet", "media", content, ("a.parquet",), kind="files", paths=["a.parquet"], **media)
    yield source_sample("parquet", "hub", content, ("a.parquet",), kind="hub", path="", **media)
    yield source_sample("parquet", "arrow", {"a.arrow": arrow(table)}, ("a.arrow",), kind="hub", path="", **media)
    talks = pa.table({"messages": [[{"role": turn["role"], "content": turn["content"]} for turn in TALK]] * 3})
    yield source_sample(
        "parquet", "chat", {"a.parquet": parquet(talks)}, ("a.parquet",), kind="chat", paths=["a.parquet"]
    )
    names = pa.table({"file_name": [f"deep/{number}.png" for number in range(3)], "text": ["a", "b", "c"]})
    files = media_files() | {"metadata.parquet": parquet(names)}
    yield source_sample("parquet", "metadata", files, ("metadata.parquet",), kind="imagefolder", path="")
    rows = as_lines([{"text": f"a text about {number}", "size": number} for number in range(4)])
    yield source_sample("parquet", "hub rows", {"a.jsonl": rows}, ("a.jsonl",), kind="hub", path="")


def parquet(table: pa.Table) -> bytes:
    """A file."""
    buffer = io.BytesIO()
    pq.write_table(table, buffer)
    return buffer.getvalue()


def arrow(table: pa.Table) -> bytes:
    """A file, as `datasets` writes it."""
    buffer = io.BytesIO()
    with pa.ipc.new_stream(buffer, table.schema) as stream:
        stream.write_table(table)
    return buffer.getvalue()


# -------------------------------------------------------------------------------------------------------------- configs


def yaml_samples() -> Iterator[Sample]:
    """Runs, those that are shipped and small ones, and a file of DeepSpeed."""
    for path in sorted((ROOT / "configs").glob("*.yaml")):
        yield Sample("yaml", path.stem, {"run.yaml": path.read_bytes()}, ("run.yaml",), read_run)
    small = yaml.safe_dump(TINY_MEDIA_RUN, sort_keys=False).encode()
    yield Sample("yaml", "small", {"run.yaml": small}, ("run.yaml",), plan_run)
    for name in ("zero1", "zero2", "zero3_offload"):
        files = {"run.yaml": small, "deepspeed.json": (ROOT / f"configs/deepspeed/{name}.json").read_bytes()}
        yield Sample("yaml", f"deepspeed {name}", files, ("deepspeed.json",), read_deepspeed)


def read_run(folder: Path) -> None:
    """All but the arguments of training, as `python -m evaluation` does."""
    load_run_config(folder / "run.yaml")


def plan_run(folder: Path) -> None:
    """What a run would need, as `pretrain.py --dry_run` says."""
    describe_run(load_config(["--config", str(folder / "run.yaml"), "--dry_run"]))


def read_deepspeed(folder: Path) -> None:
    """A run under DeepSpeed, up to its arguments."""
    load_config(["--config", str(folder / "run.yaml"), "--training.deepspeed", str(folder / "deepspeed.json")])


# ---------------------------------------------------------------------------------------------------------- checkpoints


def checkpoint_samples() -> Iterator[Sample]:
    """Models with their tokenizers and processors, adapters, and what training goes on from."""
    jsons = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
    weights = "model.safetensors"
    plain = saved(save_plain)
    yield Sample("checkpoints", "text", plain, (*jsons, weights), continue_text)
    sharded = saved(lambda folder: save_plain(folder, max_shard_size="50KB"))
    shard = next(name for name in sharded if name.startswith("model-"))
    yield Sample("checkpoints", "sharded", sharded, ("model.safetensors.index.json", shard), continue_text)
    chatting = saved(save_chatting)
    yield Sample("checkpoints", "chat", chatting, ("chat_template.jinja", "tokenizer_config.json"), talk)
    artist = saved(save_reader)
    of_processor = ("processor_config.json", "chat_template.jinja")
    yield Sample("checkpoints", "reader", artist, (*jsons, weights, *of_processor), answer_about_a_picture)
    yield Sample("checkpoints", "writer", artist, ("config.json", "generation_config.json", *of_processor), draw)
    lora = saved(save_lora)
    yield Sample("checkpoints", "lora", lora, ("adapter_config.json", "adapter_model.safetensors"), continue_adapted)
    steps = saved(save_step_lora)
    yield Sample(
        "checkpoints",
        "step_lora",
        steps,
        ("step_lora.json", "step_lora.safetensors", "base_model.json"),
        continue_adapted,
    )
    codec = saved(lambda folder: tiny_autoencoder().save_pretrained(folder))
    yield Sample("checkpoints", "codec", codec, ("config.json", weights), load_codec)
    yield Sample("checkpoints", "written codec", codec, ("config.json", weights), build_writer)
    encoder = saved(lambda folder: siglip2(side=16, width=8, inner=8, layers=1, heads=1).save_pretrained(folder))
    yield Sample("checkpoints", "backbone", encoder, ("config.json",), build_reader)
    for name, is_whole in (("resume", True), ("resume without manifest", False)):
        run = saved(partial(save_run, has_manifests=is_whole))
        ours = [name for name in run if name.startswith("checkpoint-2/")]
        known = ["checkpoint-2/manifest.json", "checkpoint-2/config.yaml"] if is_whole else []
        yield Sample("checkpoints", name, run, (*ours, "checkpoint-2/trainer_state.json", *known), resume)


def saved(save: Callable[[Path], object]) -> dict[str, bytes]:
    """The files that a function writes into a folder, without the code."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(folder)
        paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.match(CODE)]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def save_plain(folder: Path, **options: Any) -> None:
    """A model of text, and its tokenizer."""
    tiny_model().save_pretrained(folder, **options)
    tiny_tokenizer().save_pretrained(folder)


def save_chatting(folder: Path) -> None:
    """One that was taught to talk."""
    tiny_model().save_pretrained(folder)
    CHATTING.save_pretrained(folder)


def save_reader(folder: Path) -> None:
    """One that reads and writes media."""
    tiny_artist().save_pretrained(folder)
    artist_processor().save_pretrained(folder)
    (folder / "question.png").write_bytes(image_file(picture()))


def save_lora(folder: Path) -> None:
    """An adapter of PEFT, and in `base` the model."""
    save_plain(folder / "base")
    base = base_model(folder / "base")
    get_peft_model(tiny_model(), LoraConfig(r=2, target_modules=["qkv_proj"])).save_pretrained(folder)
    base.save(folder)


def save_step_lora(folder: Path) -> None:
    """Our own adapter, and in `base` the model."""
    save_plain(folder / "base")
    add_step_lora(tiny_model(), ["layers.0.mlp.down_proj"], num_steps=2, rank=2, alpha=4).save(folder)
    base_model(folder / "base").save(folder)


def save_run(folder: Path, has_manifests: bool) -> None:
    """Two checkpoints of a run."""
    for step in (1, 2):
        save_training(folder / f"checkpoint-{step}", step)
        if has_manifests:
            small_run().save(folder / f"checkpoint-{step}" / "config.yaml")
            checkpoints.complete_checkpoint(folder / f"checkpoint-{step}")


def save_training(folder: Path, step: int) -> None:
    """What training goes on from."""
    save_plain(folder)
    model = tiny_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    torch.save(torch.optim.lr_scheduler.ConstantLR(optimizer).state_dict(), folder / "scheduler.pt")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    state = {"global_step": step, "epoch": 0.1, "log_history": [], "max_steps": 9}
    (folder / "trainer_state.json").write_text(json.dumps(state))


def checks_of_logits() -> LogitsProcessorList:
    """What the commands give to `generate`."""
    return LogitsProcessorList([FiniteLogits()])


def continue_text(folder: Path, base: Path | None = None) -> None:
    """Two tokens, as `inference.generate` writes them."""
    model, processor = load_model(folder, base=base)
    tokenizer = tokenizer_of(processor)
    inputs = encode_prompt(tokenizer, "the cat")
    ids = model.generate(
        **inputs,
        max_new_tokens=2,
        do_sample=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        return_dict_in_generate=True,
        logits_processor=checks_of_logits(),
    ).sequences
    tokenizer.decode(ids[0], skip_special_tokens=True)


def continue_adapted(folder: Path) -> None:
    """The same, of an adapter."""
    continue_text(folder, folder / "base")


def talk(folder: Path) -> None:
    """An answer, as `inference.chat` gives it."""
    model, processor = load_model(folder)
    conversation = Conversation(
        model, processor, {"max_new_tokens": 2, "do_sample": False, "logits_processor": checks_of_logits()}, "Be brief."
    )
    for message in conversation.ask("Hello"):
        str(message)


def answer_about_a_picture(folder: Path) -> None:
    """Two tokens about a picture."""
    model, processor = load_model(folder)
    inputs = encode_question(processor, ([("image", str(folder / "question.png"))], "What?"))
    ids = model.generate(**inputs, max_new_tokens=2, do_sample=False, logits_processor=checks_of_logits())
    tokenizer_of(processor).decode(ids[0], skip_special_tokens=True)


def draw(folder: Path) -> None:
    """A picture, as `inference.generate --mode image` draws it."""
    model, processor = load_model(folder)
    model.generate(
        **encode_question(processor, ([], "a circle")), generation_mode="image", flow_seeds=[0], do_sample=False
    )


def build_writer(folder: Path) -> None:
    """A model that is to write with a codec of its own, as `pretrain.py` builds it."""
    config = artist_config(
        {"image_size": 16, "patch_size": 4, "codec": "autoencoder", "codec_name_or_path": str(folder)}
    )
    MegaTransformerForConditionalGeneration(config).model.load_backbones()


def build_reader(folder: Path) -> None:
    """A model that is to see with an encoder of others."""
    vision = {"backbone": str(folder), "image_size": 16}
    MegaTransformerForConditionalGeneration(tiny_media_config(parts={"vision_config": vision}))


def resume(folder: Path) -> None:
    """Where a run goes on, and whether it can."""
    args = SimpleNamespace(resume_from_checkpoint="true", output_dir=str(folder), max_steps=9)
    point = find_resume_point(args)
    if point is None:
        return
    check_options(small_run(), Path(point))
    check_weights(point, tiny_model())
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        torch.load(Path(point, name), weights_only=True)
    TrainerState.load_from_json(str(Path(point, "trainer_state.json")))


@cache
def small_run() -> RunConfig:
    """One to which checkpoints are compared."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "run.yaml")
        path.write_text(yaml.safe_dump(TINY_MEDIA_RUN), encoding="utf-8")
        return load_config(["--config", str(path), "--training.output_dir", "runs/small"])


PROCESSOR = tiny_processor()
CHATTING = tiny_tokenizer()
prepare_tokenizer(CHATTING, 320)
ImageFile.LOAD_TRUNCATED_IMAGES = False
logging.getLogger("PIL").setLevel(logging.ERROR)
