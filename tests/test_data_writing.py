"""Rows in which the assistant shows media: every kind of source and every direction, against what the processor makes
of the same conversation.
"""

import io
import json
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dataset_loading import Collator, DataConfig, SourceConfig, build_datasets, build_examples, get_task
from dataset_loading.augmentation import AudioAugmentationConfig, AugmentationConfig, ImageAugmentationConfig
from dataset_loading.bad_rows import BadRows
from dataset_loading.splits import load_split
from dataset_loading.tasks.registry import generate_row
from tests.tiny_processor import audio_file, image_file, picture, sound, tiny_processor, writing_processor

PROCESSOR = writing_processor()
TOKENIZER = PROCESSOR.tokenizer
VALIDATION = [SourceConfig("generated", task="addition", num_rows=3)]
PICTURES = [picture(24, 16, seed) for seed in range(4)]
RECORDED = [np.round(sound(1000 + 700 * seed, seed) * 32767).astype(np.int16) for seed in range(4)]
HEARD = [samples.astype(np.float32) / 32768 for samples in RECORDED]
TEXTS = [f"it is {number}" for number in range(4)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0)


def build(source, processor=PROCESSOR, **fields):
    fields = {"validation": VALIDATION, "block_size": 256, "max_invalid_rows": 0, "packing": False, **fields}
    return build_datasets(DataConfig(train=[source], **fields), processor)


def talk(given, answered):
    """A conversation of two, each a list of texts, pictures and sounds."""
    kinds = {str: "text", np.ndarray: "audio"}
    messages = []
    for role, parts in (("user", given), ("assistant", answered)):
        typed = [(kinds.get(type(part), "image"), part) for part in parts]
        messages.append({"role": role, "content": [{"type": kind, kind: part} for kind, part in typed]})
    return messages


def check_rows(rows, conversations, processor=PROCESSOR):
    assert len(rows) == len(conversations)
    for index, messages in enumerate(conversations):
        chat, row = processor.encode_chat(messages), rows[index]
        assert row["input_ids"].tolist() == chat["input_ids"].tolist()
        assert row["labels"].tolist() == torch.where(chat["answer_mask"], chat["input_ids"], -100).tolist()
        assert row["media"].keys() == chat["media"].keys()
        for kind, tensors in chat["media"].items():
            assert all(torch.equal(*pair) for pair in zip(row["media"][kind], tensors, strict=True))


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------ every kind of source


def folder(place):
    place.mkdir()
    rows = []
    for number, text in enumerate(TEXTS):
        PICTURES[number].save(place / f"{number}.png")
        (place / f"{number}.wav").write_bytes(audio_file(RECORDED[number]))
        rows.append({"file_name": f"{number}.png", "heard_file_name": f"{number}.wav", "text": text, "who": "Ann"})
    write_lines(place / "metadata.jsonl", rows)
    return {"kind": "imagefolder", "path": str(place), "audio_column": "heard_file_name"}


def jsonl(place):
    folder(place)
    columns = {"image_column": "file_name", "audio_column": "heard_file_name"}
    return {"kind": "files", "paths": [str(place / "metadata.jsonl")], **columns}


def parquet(place):
    place.mkdir()
    columns = {
        "seen": [{"bytes": image_file(image), "path": None} for image in PICTURES],
        "heard": [[{"bytes": audio_file(samples), "path": "x.wav"}] for samples in RECORDED],
        "text": TEXTS,
        "who": ["Ann"] * 4,
    }
    text = datasets.Value("string")
    features = datasets.Features(seen=datasets.Image(), heard=datasets.List(datasets.Audio()), text=text, who=text)
    pq.write_table(pa.table(columns, schema=features.arrow_schema), place / "train.parquet")
    columns = {"image_column": "seen", "audio_column": "heard"}
    return {"kind": "files", "paths": [str(place / "*.parquet")], **columns}


def hub(place):
    parquet(place)
    return {"kind": "hub", "path": str(place), "image_column": "seen", "audio_column": "heard"}


def webdataset(place):
    place.mkdir()
    with tarfile.open(place / "a.tar", "w") as tar:
        for number, text in enumerate(TEXTS):
            members = {
                "png": image_file(PICTURES[number]),
                "wav": audio_file(RECORDED[number]),
                "json": json.dumps({"text": text, "who": "Ann"}).encode(),
            }
            for extension, content in members.items():
                entry = tarfile.TarInfo(f"{number}.{extension}")
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    return {"kind": "webdataset", "paths": [str(place / "*.tar")], "image_column": "png", "audio_column": "wav"}


DIRECTIONS = {
    "image -> text": lambda it: ([PICTURES[it]], [TEXTS[it]]),
    "text -> image": lambda it: ([TEXTS[it]], [PICTURES[it]]),
    "audio -> text": lambda it: ([HEARD[it]], [TEXTS[it]]),
    "text -> audio": lambda it: ([TEXTS[it]], [HEARD[it]]),
    "image -> audio": lambda it: ([PICTURES[it]], [HEARD[it]]),
    "audio -> image": lambda it: ([HEARD[it]], [PICTURES[it]]),
    "image, audio -> text": lambda it: ([PICTURES[it], HEARD[it]], [TEXTS[it]]),
    "text, image -> audio": lambda it: ([PICTURES[it], TEXTS[it]], [HEARD[it]]),
    "audio, text -> image": lambda it: ([HEARD[it], TEXTS[it]], [PICTURES[it]]),
    "text->image,audio": lambda it: ([TEXTS[it]], [PICTURES[it], HEARD[it]]),
    "image -> text, audio": lambda it: ([PICTURES[it]], [TEXTS[it], HEARD[it]]),
}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_rows_of_every_direction_are_what_the_processor_makes_of_them(tmp_path, direction):
    source = SourceConfig(**folder(tmp_path / "data"), direction=direction)
    check_rows(build(source).train, [talk(*DIRECTIONS[direction](number)) for number in range(4)])


def test_codes_are_labels_in_their_places_and_the_end_is_none(tmp_path):
    sizes = PROCESSOR.image_writer | {"is_learned": True}
    processor = writing_processor(image_writer=sizes)
    rows = build(SourceConfig(**folder(tmp_path / "data"), direction="text -> image"), processor).train
    check_rows(rows, [talk([TEXTS[number]], [PICTURES[number]]) for number in range(4)], processor)
    assert [int(label) for label in rows[0]["labels"][-6:-1]] == [processor.written_image_token_id] * 4 + [-100]


@pytest.mark.parametrize("kind", [folder, jsonl, parquet, hub, webdataset])
def test_directions_of_every_kind_of_source_take_turns(tmp_path, kind):
    """With a prompt for each; nothing of a column that a direction does not need is looked at."""
    directions = ["text -> image", "image -> audio", "audio -> text"]
    prompts = ["{who} draws: {text}", "How does it sound?", ""]
    source = SourceConfig(**kind(tmp_path / "data"), direction=directions, prompt=prompts)
    check_rows(
        build(source).train,
        [
            talk(["Ann draws: it is 0"], [PICTURES[0]]),
            talk([PICTURES[1], "How does it sound?"], [HEARD[1]]),
            talk([HEARD[2]], ["it is 2"]),
            talk(["Ann draws: it is 3"], [PICTURES[3]]),
        ],
    )


@pytest.mark.parametrize("kind", [hub, webdataset])
def test_streams_take_the_same_turns(tmp_path, kind):
    """And their prompts are dropped too, where something is written."""
    fields = {**kind(tmp_path / "data"), "direction": ["text -> image", "audio -> text"]}
    loaded, stream = (
        build(SourceConfig(**fields, streaming=streaming), cfg_dropout=0.9 if streaming else 0.0).train
        for streaming in (False, True)
    )
    rows = list(stream)
    assert len(rows) == 4
    for index, row in enumerate(rows):
        length = len(loaded[index]["labels"])
        assert row["labels"][:length].tolist() == loaded[index]["labels"].tolist()
        for kind, tensors in loaded[index]["media"].items():
            assert all(torch.equal(*pair) for pair in zip(row["media"][kind], tensors, strict=True))
    dropped = [bool((row["input_ids"] == PROCESSOR.null_token_id).any()) for row in rows]
    assert any(dropped[::2]) and not any(dropped[1::2])


def test_columns_that_a_direction_does_not_need_may_be_wrong(tmp_path):
    place = tmp_path / "data"
    folder(place)
    rows = [{"file_name": f"{number}.png", "heard_file_name": "no.wav", "text": "it"} for number in range(2)]
    write_lines(place / "metadata.jsonl", rows)
    fields = {"kind": "imagefolder", "path": str(place), "audio_column": "heard_file_name"}
    drawn = build(SourceConfig(**fields, direction="text -> image")).train
    check_rows(drawn, [talk(["it"], [PICTURES[number]]) for number in range(2)])
    with pytest.raises(ValueError, match="no usable rows"):
        build(SourceConfig(**fields, direction="text -> audio"), max_invalid_rows=2)


def test_a_chat_says_itself_who_shows_what(tmp_path):
    folder(tmp_path / "data")
    parts = {"image": {"type": "image", "path": "0.png"}, "audio": {"type": "audio", "path": "1.wav"}}
    messages = [
        {"role": "user", "content": "draw it"},
        {"role": "assistant", "content": [parts["image"]]},
        {"role": "user", "content": [parts["audio"]]},
        {"role": "assistant", "content": [{"type": "text", "text": "so:"}, parts["audio"], parts["image"]]},
    ]
    write_lines(tmp_path / "data" / "talk.jsonl", [{"messages": messages}])
    source = SourceConfig("chat", paths=[str(tmp_path / "data" / "talk.jsonl")])
    both = talk(["draw it"], [PICTURES[0]]) + talk([HEARD[1]], ["so:", HEARD[1], PICTURES[0]])
    check_rows(build(source).train, [both])
    (example,) = build_examples(source, DataConfig(), PROCESSOR)
    assert {kind: len(tensors) for kind, tensors in example["media"].items()} == {"written_image": 1, "audio": 1}
    assert {kind: len(tensors) for kind, tensors in example["targets"].items()} == {
        "written_audio": 1,
        "written_image": 1,
    }
    assert example["answer"] == "so:" and example["reference"].size == (16, 16)
    assert example["modality"] == "written_image"  # that of the reference
    write_lines(
        tmp_path / "data" / "talk.jsonl", [{"messages": [*messages[:3], {"role": "assistant", "content": "so"}]}]
    )
    (example,) = build_examples(source, DataConfig(), PROCESSOR)
    assert (example["modality"], example["targets"], example["reference"]) == ("audio", {}, None)


@pytest.mark.parametrize(("task", "medium"), [("scenes", "image"), ("drawings", "image"), ("tunes", "audio")])
def test_generated_tasks_are_drawn_and_played(task, medium):
    source = SourceConfig("generated", task=task, num_rows=4, direction=[f"text -> {medium}", f"{medium} -> text"])
    conversations = []
    for index in range(4):
        row = generate_row(get_task(task), get_task(task).default_difficulty, "train", (0, 0), index)
        shown = get_task(task).render(row["medium"])
        sides = [row["answer"]], [shown[0] if medium == "audio" else shown]
        conversations.append(talk(*(sides[::-1] if index % 2 else sides)))
    check_rows(build(source).train, conversations)
    asked = {"direction": f"text -> {medium}", "prompt": "Now: {answer}"}
    told = build(SourceConfig("generated", task=task, num_rows=1, **asked))
    first = [{**conversations[0][0], "content": f"Now: {conversations[0][0]['content'][0]['text']}"}]
    check_rows(told.train, [[*first, conversations[0][1]]])


def test_drawings_and_tunes_are_written_unless_said_otherwise():
    for task, kind in (("drawings", "written_image"), ("tunes", "written_audio"), ("scenes", "image")):
        assert list(build(SourceConfig("generated", task=task, num_rows=1)).train[0]["media"]) == [kind]


# ------------------------------------------------------------------------------------------------- batches and packing


def test_documents_are_packed_by_the_tokens_of_what_is_written():
    """Rows are as long as was planned from the headers alone; batches have the targets in the order of their places."""
    sources = [
        SourceConfig("generated", task="drawings", num_rows=12),
        SourceConfig("generated", task="tunes", num_rows=12, difficulty=[1, 4]),
        SourceConfig("generated", task="melodies", num_rows=6),
    ]
    config = DataConfig(train=sources, validation=VALIDATION, block_size=160, check_media=False, max_invalid_rows=0)
    rows = build_datasets(config, PROCESSOR).train
    batch = Collator(PROCESSOR)([rows[index] for index in range(len(rows))])
    pad = TOKENIZER.pad_token_id
    assert rows.lengths.tolist() == (batch["input_ids"] != pad).sum(dim=1).tolist()
    places = (batch["input_ids"] == PROCESSOR.written_image_token_id).sum()
    assert places == 4 * len(batch["image_targets"]) > 0
    mask = batch["audio_targets_mask"]
    assert mask.sum() == 4 * (batch["input_ids"] == PROCESSOR.written_audio_token_id).sum()
    found = {1: 0, 2: 0, 3: 0, 4: 0}
    for number in found:
        found[number] = int(((batch["modality_ids"] == number) & (batch["input_ids"] == TOKENIZER.bos_token_id)).sum())
    assert found[1] == 0 and found[3] == len(batch["image_targets"]) and found[4] == len(mask)
    assert found[2] == len(batch["input_features"])


def test_media_that_are_written_and_read_count_as_written(tmp_path):
    fields = folder(tmp_path / "data")
    for direction, number in {"image -> audio": 4, "audio -> image": 3, "image, audio -> text": 2}.items():
        row = build(SourceConfig(**fields, direction=direction)).train[0]
        assert set(row["modality_ids"].tolist()) == {number}


# ----------------------------------------------------------------------------------------------------- what is dropped


def without_prompt(ids):
    """Token by token: what stands before the first written medium becomes null, special tokens and media excepted, or
    the places of media where there is no text.
    """
    names, null = TOKENIZER.convert_ids_to_tokens(ids), PROCESSOR.null_token_id
    end = min(index for index, name in enumerate(names) if name.startswith("<|written_")) - 1
    texts = [index for index in range(end) if not names[index].startswith("<|")]
    places = [index for index in range(end) if names[index] in ("<|image|>", "<|audio|>")]
    hidden = texts or places
    return [null if index in hidden else token for index, token in enumerate(ids)], bool(texts)


@pytest.mark.parametrize(
    "direction", ["text -> image", "text, image -> audio", "image -> audio", "image, audio -> text"]
)
def test_prompts_are_dropped_and_nothing_else(tmp_path, direction):
    """What is left, the labels and the positions stay as they are; of a prompt of media alone the media go."""
    fields = {**folder(tmp_path / "data"), "direction": direction}
    whole, often = (build(SourceConfig(**fields), cfg_dropout=drop).train for drop in (0.0, 0.5))
    dropped = 0
    for epoch in range(6):
        often.set_epoch(epoch)
        for index in range(4):
            row, other = whole[index], often[index]
            assert torch.equal(row["labels"], other["labels"]) and len(row["input_ids"]) == len(other["input_ids"])
            if torch.equal(row["input_ids"], other["input_ids"]):
                assert row["media"].keys() == other["media"].keys()
                continue
            dropped += 1
            wanted, has_text = without_prompt(row["input_ids"].tolist())
            assert other["input_ids"].tolist() == wanted
            assert other["media"].keys() == {kind for kind in row["media"] if has_text or kind.startswith("written_")}
    assert dropped == 0 if direction.endswith("text") else 4 < dropped < 20


def test_as_many_prompts_are_dropped_as_was_asked_for_and_others_in_each_epoch():
    """By seed, epoch and row alone, whichever documents share a row; validation keeps its prompts."""
    source = SourceConfig("generated", task="drawings", num_rows=400)
    held_out = SourceConfig("generated", task="drawings", num_rows=50)
    config = DataConfig([source], [held_out], block_size=128, cfg_dropout=0.25)
    null = PROCESSOR.null_token_id

    def dropped(rows):
        """Whether each document that begins in a row has lost its prompt."""
        found = []
        for index in range(len(rows)):
            ids = rows[index]["input_ids"]
            found += [bool((it == null).any()) for it in ids.tensor_split(torch.nonzero(ids == 1).flatten()[1:])]
        return found

    first, again, other = (build_datasets(config, PROCESSOR, seed) for seed in (0, 0, 1))
    marks = dropped(first.train)
    assert len(marks) == 400 and abs(sum(marks) - 100) < 40
    assert marks == dropped(again.train) != dropped(other.train)
    again.train.set_epoch(1)
    assert marks != dropped(again.train)
    assert not any(dropped(first.validation["drawings"]))


# ------------------------------------------------------------------------------------------------------------ examples


def test_examples_have_what_is_to_be_written_apart(tmp_path):
    fields = {**folder(tmp_path / "data"), "direction": ["text -> image", "image -> audio"]}
    examples = build_examples(SourceConfig(**fields), DataConfig(), PROCESSOR)
    drawn, played = examples[0], examples[1]
    for example, messages in ((drawn, talk([TEXTS[0]], [PICTURES[0]])), (played, talk([PICTURES[1]], [HEARD[1]]))):
        whole = PROCESSOR.encode_chat(messages)
        asked = PROCESSOR.encode_chat(messages[:1], add_generation_prompt=True)
        assert example["input_ids"] == whole["input_ids"].tolist()
        assert example["prompt_ids"] == asked["input_ids"].tolist()
        assert example["media"].keys() == asked["media"].keys() and example["answer"] == ""
        assert example["targets"].keys() == {example["modality"]} and example["check"] is None
        assert torch.equal(example["targets"][example["modality"]][0], whole["media"][example["modality"]][0])
    assert (drawn["modality"], drawn["prompt"], played["modality"]) == ("written_image", TEXTS[0], "written_audio")
    assert drawn["reference"].size == (16, 16)
    wanted = PROCESSOR.preprocess_item("written_image", PICTURES[0])
    assert torch.equal(PROCESSOR.preprocess_item("written_image", drawn["reference"]), wanted)
    samples, rate = played["reference"]
    assert rate == 8000 and np.array_equal(samples, HEARD[1])
    assert played["waveforms"]() == []


def test_examples_of_tasks_are_checked_by_what_their_prompt_asks_for():
    seen = []

    def check(prompt, made):
        seen.append((prompt, made))
        return {"all": True}

    source = SourceConfig("generated", task="drawings", num_rows=9, direction=["text -> image", "image -> text"])
    examples = build_examples(source, DataConfig(), PROCESSOR, limit=2, checks={"drawings": check})
    asked, told = examples[0], examples[1]
    assert asked["check"]("a picture") == {"all": True} and seen == [(asked["prompt"], "a picture")]
    assert told["check"] is None and told["reference"] is None and told["targets"] == {}
    assert set(asked["attributes"](asked["prompt"])) == {"number", "size", "colour", "shape", "position"}
    assert asked["prompt"] and not asked["answer"] and told["answer"] and not told["prompt"]


# --------------------------------------------------------------------------------------------------- what is held out


def test_a_text_and_its_media_are_on_one_side_whichever_shows_the_other(tmp_path):
    """Two sources of one folder share nothing between training and validation."""
    place = tmp_path / "data"
    place.mkdir()
    for number in range(40):
        picture(8, 8, number).save(place / f"{number}.png")
    write_lines(place / "metadata.jsonl", [{"file_name": f"{it}.png", "text": f"text {it}"} for it in range(40)])
    sources = [
        SourceConfig("imagefolder", name=name, path=str(place), direction=direction)
        for name, direction in (("read", "image -> text"), ("drawn", "text -> image"))
    ]
    split = load_split(DataConfig(train=sources, validation_fraction=0.3), 0, BadRows(0))

    def texts(rows):
        parts = [part for row in rows["messages"] for message in json.loads(row) for part in message["content"]]
        return {part["text"] for part in parts if part["type"] == "text"}

    (train, held_out), (other_train, other_held_out) = (
        (texts(split.train[number][1]), texts(split.validation[number][1])) for number in range(2)
    )
    assert train == other_train and held_out == other_held_out and 3 < len(held_out) < 25
    assert not train & held_out


# ----------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"direction": "image"}, "direction is 'image'; name text, image or audio on both sides of an arrow"),
        ({"direction": "text -> video"}, "direction is 'text -> video'; name text, image or audio"),
        ({"direction": "text -> text"}, "with text twice; name it on one side, once"),
        ({"direction": "text -> audio"}, "the source has text and image; choose a direction between these"),
        ({"direction": "text -> image", "prompt": "Draw!"}, "which all rows of direction 'text -> image' would ask"),
        ({"direction": ["text -> image"], "prompt": ["{text}", ""]}, "prompt has 2 texts for 1 directions; give one"),
    ],
)
def test_directions_that_cannot_be_are_refused(fields, reason):
    with pytest.raises(ValueError, match=reason):
        SourceConfig("imagefolder", path="x", **fields)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"kind": "generated", "task": "scene_questions", "direction": "text -> image"}, "has 'image -> text'; choose"),
        ({"kind": "generated", "task": "tunes", "direction": "text -> image"}, "'text -> audio' and 'audio -> text'"),
        ({"kind": "files", "paths": ["a.txt"], "direction": "text -> image"}, "the source has no media"),
        ({"kind": "chat", "paths": ["a.json"], "direction": "text -> image"}, "whose messages say all"),
    ],
)
def test_directions_where_there_are_none_are_refused(fields, reason):
    with pytest.raises(ValueError, match=reason):
        SourceConfig(**fields)


def test_a_model_that_does_not_write_says_so_before_training(tmp_path):
    fields = folder(tmp_path / "data")
    with pytest.raises(ValueError, match="'text -> image', but the model does not write image; set image_w"):
        build(SourceConfig(**fields, direction=["image -> text", "text -> image"]), tiny_processor())
    with pytest.raises(ValueError, match="does not write audio"):
        build_examples(SourceConfig("generated", task="tunes"), DataConfig(), tiny_processor())
    with pytest.raises(ValueError, match=r"cfg_dropout is 0.1, but the model writes text alone; set it to 0"):
        build(SourceConfig(**fields), tiny_processor(), cfg_dropout=0.1)
    with pytest.raises(ValueError, match=r"cfg_dropout is 1.5; give at least 0 and less than 1"):
        DataConfig(cfg_dropout=1.5)


def test_rows_that_cannot_be_written_are_bad_rows(tmp_path):
    """An answer without anything that is written, and media that are not there; the others are used."""
    place = tmp_path / "data"
    folder(place)
    (place / "1.png").write_bytes(b"not a picture")
    rows = [{"file_name": f"{number}.png", "text": text} for number, text in enumerate(("fine", "broken", " "))]
    write_lines(place / "metadata.jsonl", rows)
    built = build(SourceConfig("imagefolder", path=str(place), direction="text -> image"), max_invalid_rows=2)
    check_rows(built.train, [talk(["fine"], [PICTURES[0]])])
    assert built.report[-1].bad_rows == 2
    shown = {"role": "assistant", "content": [{"type": "image", "path": "0.png"}]}
    write_lines(place / "talk.jsonl", [{"messages": [{"role": "user", "content": "draw"}, shown]}])
    with pytest.raises(ValueError, match="shows type 'image', which the model does not write, and says nothing"):
        build(SourceConfig("chat", paths=[str(place / "talk.jsonl")]), tiny_processor())


# -------------------------------------------------------------------------------------------------------- augmentation


def test_what_is_written_is_cut_mirrored_moved_and_made_louder_alone(tmp_path):
    """Of all changes of pictures and recordings only these, and not where the text forbids them."""
    place = tmp_path / "data"
    place.mkdir()
    picture(16, 16).save(place / "0.png")
    (place / "0.wav").write_bytes(audio_file(RECORDED[0]))
    row = {"file_name": "0.png", "heard": "0.wav", "text": "a cat"}
    write_lines(place / "metadata.jsonl", [row, row | {"text": "a cat at the left"}])
    fields = {"kind": "imagefolder", "path": str(place), "audio_column": "heard"}
    image = ImageAugmentationConfig(flip=1.0, colour=0.5)
    audio = AudioAugmentationConfig(speed=[0.5], noise_snr=0, shift=0.2, time_masks=3, frequency_masks=3)
    options = {"augmentation": AugmentationConfig(image=image, audio=audio)}
    plain = build(SourceConfig(**fields, direction="text -> image, audio")).train
    changed = build(SourceConfig(**fields, direction="text -> image, audio"), **options).train
    changed.set_epoch(1)  # in which the silence that is drawn is long enough to see
    before, after = plain[0]["media"], changed[0]["media"]
    assert torch.equal(after["written_image"][0], before["written_image"][0].flip(-1))
    assert torch.equal(changed[1]["media"]["written_image"][0], before["written_image"][0])
    start, frames = before["written_audio"][0], after["written_audio"][0]
    assert frames.shape[1] > start.shape[1]
    quiet = (frames == frames.min()).all(dim=0).tolist().index(False)
    assert quiet > 1 and abs((frames.exp().sum() / start.exp().sum()).log()) < 0.5
    assert changed.lengths[0] >= len(changed[0]["input_ids"])


@pytest.mark.parametrize("prompts", [["Draw {text}", "What?"], ["Draw {text}", "What?", "Draw {text}", "What?"]])
def test_prompts_are_as_many_as_directions(prompts):
    """Neither fewer, which would leave out directions, nor more."""
    directions = ["text -> image", "image -> text", "text -> image"]
    with pytest.raises(ValueError, match=f"prompt has {len(prompts)} texts for 3 directions; give one for each"):
        SourceConfig("imagefolder", path="pictures", direction=directions, prompt=prompts)
