"""Sources with media to rows: every kind of source against what the processor makes of the same conversation."""

import io
import json
import tarfile
from itertools import chain, pairwise

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils.data import DataLoader

from dataset_loading import (
    Collator,
    DataConfig,
    SourceConfig,
    TokenizerConfig,
    build_datasets,
    build_examples,
    build_tokenizer,
    build_validation,
    get_task,
    train_tokenizer,
)
from dataset_loading.bad_rows import BadRows
from dataset_loading.packing.media import pack_whole
from dataset_loading.splits import load_split
from dataset_loading.tasks.registry import generate_row
from model import MEDIA_TOKENS
from model.modalities import MODALITIES, Modality
from tests.tiny_processor import audio_file, image_file, picture, sound, tiny_processor

PROCESSOR = tiny_processor()
VALIDATION = [SourceConfig("generated", task="addition", num_rows=3)]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def build(source, packing=False, **fields):
    fields = {"validation": VALIDATION, "block_size": 256, "max_invalid_rows": 0, **fields}
    return build_datasets(DataConfig(train=[source], packing=packing, **fields), PROCESSOR)


def user(*parts):
    """What a user says: text, pictures and sounds."""
    content = []
    for part in parts:
        kind = "text" if isinstance(part, str) else "audio" if isinstance(part, np.ndarray) else "image"
        content.append({"type": kind, kind: part})
    return {"role": "user", "content": content}


def assistant(text):
    return {"role": "assistant", "content": text}


def expected_rows(conversations):
    """What the processor makes of them, one by one: ids, labels, media."""
    rows = []
    for messages in conversations:
        chat = PROCESSOR.encode_chat(messages)
        labels = torch.where(chat["answer_mask"], chat["input_ids"], -100)
        rows.append((chat["input_ids"], labels, chat["media"]))
    return rows


def check_row(row, wanted):
    ids, labels, media = wanted
    assert row["input_ids"].tolist() == ids.tolist()
    assert row["labels"].tolist() == labels.tolist()
    assert row["position_ids"].tolist() == list(range(len(ids)))
    check_media(row["media"], media)


def check_rows(rows, conversations):
    wanted = expected_rows(conversations)
    assert len(rows) == len(wanted)
    for index, row in enumerate(wanted):
        check_row(rows[index], row)
    assert rows.lengths.tolist() == [len(ids) for ids, _, _ in wanted]


def check_media(media, wanted):
    assert media.keys() == wanted.keys()
    for kind, tensors in wanted.items():
        assert len(media[kind]) == len(tensors)
        for got, tensor in zip(media[kind], tensors, strict=True):
            assert torch.equal(got, tensor)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# ------------------------------------------------------------------------------------------------ every kind of source

PICTURES = [picture(40, 24, seed) for seed in range(3)]
SOUNDS = [sound(samples, seed) for seed, samples in enumerate((3000, 4000, 16000))]  # the last is as long as is read
RECORDED = [np.round(samples * 32767).astype(np.int16) for samples in SOUNDS]
HEARD = [samples.astype(np.float32) / 32768 for samples in RECORDED]


def write_media(folder):
    (folder / "deep").mkdir(parents=True)
    for number, (image, samples) in enumerate(zip(PICTURES, RECORDED, strict=True)):
        image.save(folder / "deep" / f"{number}.png")
        (folder / f"{number}.wav").write_bytes(audio_file(samples))


def imagefolder(folder):
    write_media(folder)
    rows = [{"file_name": f"deep/{number}.png", "text": f"caption {number}"} for number in range(3)]
    write_lines(folder / "metadata.jsonl", rows)
    return {"kind": "imagefolder", "path": str(folder)}, [
        [user(image), assistant(f"caption {number}")] for number, image in enumerate(PICTURES)
    ]


def imagefolder_by_label(folder):
    for name, image in zip(("cat", "dog", "cat"), PICTURES, strict=True):
        (folder / name).mkdir(parents=True, exist_ok=True)
        image.save(folder / name / f"{len(list((folder / name).iterdir()))}.png")
    order = [("cat", PICTURES[0]), ("cat", PICTURES[2]), ("dog", PICTURES[1])]
    source = {"kind": "imagefolder", "path": str(folder), "prompt": "What is it?", "answer_column": "label"}
    return source, [[user(image, "What is it?"), assistant(name)] for name, image in order]


def imagefolder_with_csv_beside_its_files(folder):
    write_media(folder)
    (folder / "deep" / "metadata.csv").write_text('file_name,text,who\n0.png,"a, b",Ann\n2.png,c,Bob\n')
    source = {"kind": "imagefolder", "path": str(folder), "prompt": "{who} sees {who}?"}
    return source, [
        [user(PICTURES[0], "Ann sees Ann?"), assistant("a, b")],
        [user(PICTURES[2], "Bob sees Bob?"), assistant("c")],
    ]


def audiofolder(folder):
    write_media(folder)
    write_lines(
        folder / "metadata.jsonl", [{"file_name": f"{number}.wav", "said": "zéro <|end|>"} for number in (2, 0)]
    )
    source = {"kind": "audiofolder", "path": str(folder), "answer_column": "said"}
    return source, [[user(HEARD[number]), assistant("zéro <|end|>")] for number in (2, 0)]


def folder_of_both_with_parquet(folder):
    write_media(folder)
    columns = {
        "file_names": [["deep/1.png", "deep/0.png"], ["deep/2.png"]],
        "heard_file_name": ["1.wav", "0.wav"],
        "text": ["first", "second"],
    }
    datasets.Dataset.from_dict(columns).to_parquet(folder / "metadata.parquet")
    source = {"kind": "imagefolder", "path": str(folder), "image_column": "file_names"}
    return {**source, "audio_column": "heard_file_name"}, [
        [user(PICTURES[1], PICTURES[0], HEARD[1]), assistant("first")],
        [user(PICTURES[2], HEARD[0]), assistant("second")],
    ]


def jsonl(folder):
    write_media(folder)
    rows = [{"seen": "deep/1.png", "text": "one", "size": 3}, {"seen": ["deep/0.png"], "text": "nought", "size": 4.5}]
    write_lines(folder / "rows.jsonl", rows)
    source = {"kind": "files", "paths": [str(folder / "*.jsonl")], "image_column": "seen", "prompt": "size {size}"}
    return source, [
        [user(PICTURES[1], "size 3"), assistant("one")],
        [user(PICTURES[0], "size 4.5"), assistant("nought")],
    ]


def parquet_of_two_files(folder):
    """Bytes of the media in the file, as the hub has them."""
    folder.mkdir()
    for number in range(2):
        columns = {
            "picture": [{"bytes": image_file(PICTURES[number]), "path": None}],
            "heard": [[{"bytes": audio_file(RECORDED[it]), "path": "x.wav"} for it in (number, 2)]],
            "text": [f"text {number}"],
        }
        features = datasets.Features(
            picture=datasets.Image(), heard=datasets.List(datasets.Audio()), text=datasets.Value("string")
        )
        pq.write_table(pa.table(columns, schema=features.arrow_schema), folder / f"{number}.parquet")
    source = {"kind": "files", "paths": [str(folder / "*.parquet")], "image_column": "picture", "audio_column": "heard"}
    return source, [
        [user(PICTURES[number], HEARD[number], HEARD[2]), assistant(f"text {number}")] for number in range(2)
    ]


def hub(folder):
    """A local folder, which `load_dataset` takes for pictures by its files."""
    imagefolder(folder)
    for path in folder.glob("*.wav"):
        path.unlink()
    source = {"kind": "hub", "path": str(folder), "image_column": "image"}
    return source, [[user(image), assistant(f"caption {number}")] for number, image in enumerate(PICTURES)]


def hub_of_classes(folder):
    folder.mkdir()
    features = datasets.Features(img=datasets.Image(), label=datasets.ClassLabel(names=["cat", "dog"]))
    columns = {"img": [{"bytes": image_file(image), "path": None} for image in PICTURES], "label": [1, 0, 1]}
    pq.write_table(pa.table(columns, schema=features.arrow_schema), folder / "train.parquet")
    source = {"kind": "hub", "path": str(folder), "image_column": "img", "answer_column": "label", "prompt": "What?"}
    names = ("dog", "cat", "dog")
    return source, [[user(image, "What?"), assistant(name)] for image, name in zip(PICTURES, names, strict=True)]


def hub_with_messages(folder):
    """Messages as structs of one type, so that parts have each other's keys, and pictures beside them."""
    folder.mkdir()
    texts = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}, {"type": "image", "text": None}]
    rows = {
        "messages": [
            [
                {"role": "user", "content": texts},
                {"role": "assistant", "content": [{"type": "text", "text": "that"}]},
            ]
        ],
        "images": [[{"bytes": image_file(image), "path": None} for image in PICTURES[:2]]],
    }
    data = datasets.Dataset.from_dict(rows).cast_column("images", datasets.List(datasets.Image()))
    data.to_parquet(folder / "train.parquet")
    source = {"kind": "hub", "path": str(folder), "image_column": "images", "messages_column": "messages"}
    return source, [[user(PICTURES[0], "What?", PICTURES[1]), assistant("that")]]


def webdataset(folder):
    folder.mkdir()
    for shard, numbers in enumerate([(0, 1), (2,)]):
        with tarfile.open(folder / f"{shard}.tar", "w") as tar:
            for number in numbers:
                members = {
                    "png": image_file(PICTURES[number]),
                    "wav": audio_file(RECORDED[number]),
                    "json": json.dumps({"caption": f"it is {number}"}).encode(),
                    "txt": f"text {number}".encode(),
                }
                for extension, content in members.items():
                    entry = tarfile.TarInfo(f"some.folder/{number}.{extension}")
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    columns = {"image_column": "png", "audio_column": "wav", "text_column": "caption", "prompt": "{txt}"}
    return {"kind": "webdataset", "paths": [str(folder / "*.tar")], **columns}, [
        [user(PICTURES[number], HEARD[number], f"text {number}"), assistant(f"it is {number}")] for number in range(3)
    ]


def chat(folder):
    """Parts with files, strings, several turns, no media at all."""
    write_media(folder)
    parts = [{"type": "text", "text": "Look: "}, {"type": "image", "path": "deep/1.png"}, {"type": "text", "text": "?"}]
    rows = [
        [
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": parts},
            {"role": "assistant", "content": "A thing."},
            {
                "role": "user",
                "content": [{"type": "audio", "audio": "0.wav"}, {"type": "image", "image": "deep/0.png"}],
            },
            {"role": "assistant", "content": [{"type": "text", "text": "No"}, {"type": "text", "text": "ise"}]},
        ],
        [{"role": "user", "content": "Hello <|image|>"}, {"role": "assistant", "content": "Hi"}],
    ]
    (folder / "a.json").write_text(json.dumps([{"talk": rows[0]}]))
    write_lines(folder / "b.jsonl", [{"talk": rows[1]}])
    paths = [str(folder / "a.json"), str(folder / "b.jsonl")]
    return {"kind": "chat", "paths": paths, "messages_column": "talk"}, [
        [
            {"role": "system", "content": "Be short."},
            user("Look: ", PICTURES[1], "?"),
            assistant("A thing."),
            user(HEARD[0], PICTURES[0]),
            assistant("Noise"),
        ],
        [{"role": "user", "content": "Hello <|image|>"}, assistant("Hi")],
    ]


def generated_scenes(folder):
    return _generated("scene_questions", {"num_rows": 4, "prompt": "Look! {prompt}"}, "Look! ")


def generated_melodies(folder):
    return _generated("melodies", {"num_rows": 4}, "")


def _generated(name, fields, before):
    task, conversations = get_task(name), []
    for index in range(4):
        row = generate_row(task, task.default_difficulty, "train", (0, 0), index)
        medium, prompt = task.render(row["medium"]), before + row["prompt"]
        medium = medium[0] if isinstance(medium, tuple) else medium
        conversations.append([user(medium, *([prompt] if prompt else [])), assistant(row["answer"])])
    return {"kind": "generated", "task": name, **fields}, conversations


KINDS = [
    imagefolder,
    imagefolder_by_label,
    imagefolder_with_csv_beside_its_files,
    audiofolder,
    folder_of_both_with_parquet,
    jsonl,
    parquet_of_two_files,
    hub,
    hub_of_classes,
    hub_with_messages,
    webdataset,
    chat,
    generated_scenes,
    generated_melodies,
]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_what_the_processor_makes_of_the_conversation(tmp_path, kind):
    """Tokens, labels on what the assistant says, media in order."""
    fields, conversations = kind(tmp_path / "data")
    check_rows(build(SourceConfig(**fields)).train, conversations)


def test_rows_are_the_same_with_several_processes(tmp_path):
    fields, conversations = parquet_of_two_files(tmp_path / "data")
    check_rows(build(SourceConfig(**fields), preprocessing_workers=2).train, conversations)


@pytest.mark.parametrize("kind", [imagefolder, parquet_of_two_files, webdataset, chat, generated_melodies])
def test_packed_rows_have_every_document_whole(tmp_path, kind):
    """Taken apart again where positions restart, they are the documents, each with its media."""
    fields, conversations = kind(tmp_path / "data")
    wanted = sorted(expected_rows(conversations), key=lambda row: row[0].tolist())
    lengths = [len(ids) for ids, _, _ in wanted]
    block_size = max(*lengths, sum(lengths) * 3 // 4)
    rows = build(SourceConfig(**fields), packing=True, block_size=block_size).train
    assert len(rows) < len(wanted) or len(wanted) == 2
    found = []
    for index in range(len(rows)):
        row = rows[index]
        assert all(len(row[name]) == block_size for name in ("input_ids", "labels", "position_ids", "modality_ids"))
        starts = [*torch.nonzero(row["position_ids"] == 0).flatten().tolist(), block_size]
        waiting = {kind: list(tensors) for kind, tensors in row["media"].items()}
        for start, stop in pairwise(starts):
            ids = row["input_ids"][start:stop]
            if (ids == PROCESSOR.tokenizer.pad_token_id).all():
                assert (row["labels"][start:stop] == -100).all() and stop == block_size
                continue
            assert row["position_ids"][start:stop].tolist() == list(range(stop - start))
            counts = {it: (ids == PROCESSOR.tokenizer.convert_tokens_to_ids(f"<|{it}_start|>")).sum() for it in waiting}
            media = {it: [waiting[it].pop(0) for _ in range(count)] for it, count in counts.items() if count}
            found.append((ids, row["labels"][start:stop], media))
        assert not any(waiting.values())
    assert len(found) == len(wanted)
    for (ids, labels, media), (wanted_ids, wanted_labels, wanted_media) in zip(
        sorted(found, key=lambda row: row[0].tolist()), wanted, strict=True
    ):
        assert ids.tolist() == wanted_ids.tolist() and labels.tolist() == wanted_labels.tolist()
        check_media(media, wanted_media)


def best_fit(lengths, order, block_size):
    """Each document into the row with the least room that has enough, found by looking at all of them."""
    rows = []
    for number in order:
        rooms = [block_size - sum(lengths[it] for it in row) for row in rows]
        fitting = [place for place, room in enumerate(rooms) if room >= lengths[number]]
        if fitting:
            rows[min(fitting, key=lambda place: rooms[place])].append(number)
        else:
            rows.append([number])
    return rows


def test_documents_are_packed_tightly_and_whole():
    """Each once, none over the block, as a search through all rows would place them; no two rows could be one."""
    for seed in range(5):
        lengths = np.random.default_rng(seed).integers(1, 65, 300)
        members, ends = pack_whole(lengths, 64, seed)
        rows = [part.tolist() for part in np.split(members, ends[:-1])]
        assert rows == best_fit(lengths, np.random.default_rng(seed).permutation(300).tolist(), 64)
        assert sorted(members.tolist()) == list(range(300))
        sizes = sorted(lengths[row].sum() for row in rows)
        assert sizes[-1] <= 64 and sizes[0] + sizes[1] > 64
        assert len(sizes) <= 1.1 * lengths.sum() / 64 + 1
    assert pack_whole(np.array([3, 3, 3]), 6)[0].tolist() == [0, 1, 2]
    assert pack_whole(lengths, 64, 1)[0].tolist() != pack_whole(lengths, 64, 2)[0].tolist()


def test_modality_ids_count_a_document_by_its_last_kind(tmp_path):
    fields, conversations = chat(tmp_path / "data")
    of_chat = expected_rows(conversations)
    length = sum(len(ids) for ids, _, _ in of_chat)
    row = build(SourceConfig(**fields), packing=True, block_size=length).train[0]
    starts = torch.nonzero(row["position_ids"] == 0).flatten()
    ids = row["modality_ids"].split(torch.diff(starts, append=torch.tensor([length])).tolist())
    assert {(len(part), *set(part.tolist())) for part in ids} == {(len(of_chat[0][0]), 2), (len(of_chat[1][0]), 0)}
    fields, _ = imagefolder(tmp_path / "more")
    assert set(build(SourceConfig(**fields)).train[0]["modality_ids"].tolist()) == {1}


def test_texts_side_by_side_are_read_as_one(tmp_path):
    """With a vocabulary that has them whole."""
    tokenizer = train_tokenizer(["hello there"] * 9, 300, media_tokens=MEDIA_TOKENS)
    processor = tiny_processor(tokenizer=tokenizer)
    parts = [{"type": "text", "text": text} for text in ("hel", "lo", " th", "ere")]
    messages = [{"role": "user", "content": parts}, assistant("hello")]
    write_lines(tmp_path / "a.jsonl", [{"messages": messages}])
    source = SourceConfig("chat", paths=[str(tmp_path / "a.jsonl")])
    (row,) = build_datasets(DataConfig([source], VALIDATION, packing=False), processor).train
    assert row["input_ids"].tolist() == processor.encode_chat(messages)["input_ids"].tolist()
    assert tokenizer.convert_ids_to_tokens(row["input_ids"])[2:4] == ["hello", "Ġthere"]


def test_loss_on_all_learns_what_the_user_says_too(tmp_path):
    fields, _ = chat(tmp_path / "data")
    row = build(SourceConfig(**fields, loss_on="all")).train[1]
    assert row["labels"][0] == -100 and row["labels"][1:].tolist() == row["input_ids"][1:].tolist()
    row = build(SourceConfig(**fields, loss_on="all")).train[0]
    starts = ("<|image_start|>", "<|image|>", "<|image_end|>", "<|audio_start|>", "<|audio|>", "<|audio_end|>")
    media = torch.isin(row["input_ids"], torch.tensor(PROCESSOR.tokenizer.convert_tokens_to_ids(list(starts))))
    assert ((row["labels"] == -100) == media)[1:].all() and media.sum() > 10


# ------------------------------------------------------------------------------------------------------------- batches


def test_batches_of_media_and_text(tmp_path):
    """input_ids first; padding is no label; media of the whole batch in order; a batch of text has none."""
    fields, _ = parquet_of_two_files(tmp_path / "data")
    images, texts = (
        build(SourceConfig(**fields)).train,
        build(SourceConfig("generated", task="stories", num_rows=2)).train,
    )
    rows = [texts[0], images[1], images[0]]
    batch = Collator(PROCESSOR)(rows)
    assert next(iter(batch)) == "input_ids"
    longest = max(len(row["input_ids"]) for row in rows)
    for number, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][number].tolist() == row["input_ids"].tolist() + [0] * (longest - length)
        assert batch["labels"][number].tolist() == row["labels"].tolist() + [-100] * (longest - length)
        assert batch["attention_mask"][number].tolist() == [1] * length + [0] * (longest - length)
        wanted = row["modality_ids"].tolist() if number else [0] * length
        assert batch["modality_ids"][number].tolist() == wanted + [0] * (longest - length)
    media = {kind: [*rows[1]["media"][kind], *rows[2]["media"][kind]] for kind in ("image", "audio")}
    for name, values in PROCESSOR.collate_media(media).items():
        assert torch.equal(batch[name], values)
    assert Collator(PROCESSOR)(rows[:1]).keys() == {"input_ids", "labels", "position_ids", "modality_ids"}


def test_rows_are_the_same_in_workers_and_in_any_order(tmp_path):
    fields, _ = webdataset(tmp_path / "data")
    config = DataConfig(
        train=[SourceConfig(**fields), SourceConfig("generated", task="scenes", num_rows=5)],
        validation=VALIDATION,
        block_size=128,
    )
    rows = build_datasets(config, PROCESSOR).train
    wanted = [rows[index] for index in reversed(range(len(rows)))][::-1]
    for workers in (0, 2):
        loader = DataLoader(rows, batch_size=None, num_workers=workers)
        for got, row in zip(loader, wanted, strict=True):
            assert all(torch.equal(got[name], row[name]) for name in row if name != "media")
            check_media(got["media"], row["media"])
    assert rows.lengths.tolist() == [int((row["input_ids"] != 0).sum()) for row in wanted]


# --------------------------------------------------------------------------------------------------- what is held out


def test_equal_media_and_texts_stay_on_one_side(tmp_path):
    """By what is in the files, not by their names; nothing moves when more come."""
    folder = tmp_path / "data"
    folder.mkdir()

    def sides(count):
        rows = []
        for number in range(count):
            picture(8, 8, number // 2).save(folder / f"{number}.png")
            rows.append({"file_name": f"{number}.png", "text": f"text {number // 4}"})
        write_lines(folder / "metadata.jsonl", rows)
        config = DataConfig(train=[SourceConfig("imagefolder", path=str(folder))], validation_fraction=0.3)
        split = load_split(config, 0, BadRows(0))
        (_, train), (_, validation) = split.train[0], split.validation[0]
        return [{json.loads(row)[0]["content"][0]["path"] for row in side["messages"]} for side in (train, validation)]

    train, validation = sides(60)
    numbers = {int(path.rsplit("/", 1)[1][:-4]) // 2 for path in train}
    assert numbers.isdisjoint(int(path.rsplit("/", 1)[1][:-4]) // 2 for path in validation)
    assert 6 <= len(validation) <= 30 and len(train) + len(validation) == 60
    more_train, more_validation = sides(80)
    assert train < more_train and validation < more_validation


def test_train_media_that_validation_has_are_dropped(tmp_path):
    """Whatever they are called, and from whichever kind of source."""
    fields, conversations = webdataset(tmp_path / "tars")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "p.png").write_bytes(image_file(PICTURES[1]))
    (folder / "s.wav").write_bytes(audio_file(RECORDED[1]))
    row = {"file_name": "p.png", "s_file_name": "s.wav", "text": "it is 1", "q": "text 1"}
    write_lines(folder / "metadata.jsonl", [row, row | {"q": "text 2"}])
    validation = SourceConfig("imagefolder", path=str(folder), audio_column="s_file_name", prompt="{q}")
    train = build(SourceConfig(**fields), validation=[validation]).train
    wanted = expected_rows([conversations[0], conversations[2]])
    assert len(train) == 2
    for index in range(2):
        check_row(train[index], wanted[index])


def test_validation_is_in_order_and_the_same_alone(tmp_path):
    fields, conversations = imagefolder(tmp_path / "shapes")
    config = DataConfig(
        train=[SourceConfig("generated", task="scenes", num_rows=30)],
        validation=[SourceConfig(**fields)],
        block_size=80,
    )
    whole, alone = build_datasets(config, PROCESSOR).validation["shapes"], build_validation(config, PROCESSOR)["shapes"]
    ids = [row["input_ids"][row["input_ids"] != 0].tolist() for row in (whole[index] for index in range(len(whole)))]
    wanted = [ids.tolist() for ids, _, _ in expected_rows(conversations)]
    assert [*chain(*ids)] == [*chain(*wanted)]
    assert [row["input_ids"].tolist() for row in (alone[index] for index in range(len(alone)))] == [
        row["input_ids"].tolist() for row in (whole[index] for index in range(len(whole)))
    ]


def test_the_vocabulary_is_trained_on_what_is_said(tmp_path):
    """Prompts and answers of the train part."""
    fields, _ = webdataset(tmp_path / "data")
    config = DataConfig(train=[SourceConfig(**fields)], validation=VALIDATION)
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=268), config, media_tokens=[])
    assert "it" in tokenizer.get_vocab() and "pn" not in tokenizer.get_vocab()


# ----------------------------------------------------------------------------------------------------------- examples


@pytest.mark.parametrize("kind", KINDS)
def test_examples_ask_and_answer(tmp_path, kind):
    """The last answer of the conversation, and what comes before it, as generation will get it."""
    fields, conversations = kind(tmp_path / "data")
    if fields["kind"] == "generated":
        fields["role"] = "train"  # as in the conversations
    examples = build_examples(SourceConfig(**fields), DataConfig(block_size=256), PROCESSOR)
    assert len(examples) == len(conversations)
    for example, messages in zip(examples, conversations, strict=True):
        whole = PROCESSOR.encode_chat(messages)
        asked = PROCESSOR.encode_chat(messages[:-1], add_generation_prompt=True)
        assert example["input_ids"] == whole["input_ids"].tolist()
        assert example["labels"] == torch.where(whole["answer_mask"], whole["input_ids"], -100).tolist()
        assert example["prompt_ids"] == asked["input_ids"].tolist()
        assert example["answer"] == messages[-1]["content"]
        check_media(example["media"], whole["media"])
        assert example["modality"] == [*example["media"], "text"][-1 if not example["media"] else -2]
    assert [it["answer"] for it in examples[1:]] == [messages[-1]["content"] for messages in conversations[1:]]


def test_examples_of_generated_media_know_their_task():
    source = SourceConfig("generated", task="melodies", num_rows=20, difficulty=[2, 3])
    examples = build_examples(source, DataConfig(), PROCESSOR, limit=5)
    assert len(examples) == 5
    for example in examples:
        assert example["difficulty"] in (2, 3) and example["prompt"] == "" and example["modality"] == "audio"
        assert example["attributes"](example["answer"])["length"] == str(example["difficulty"])


def test_examples_of_a_split_source_are_those_held_out(tmp_path):
    folder = tmp_path / "shapes"
    folder.mkdir()
    for number in range(40):
        picture(8, 8, number).save(folder / f"{number}.png")
    write_lines(folder / "metadata.jsonl", [{"file_name": f"{it}.png", "text": f"text {it}"} for it in range(40)])
    config = DataConfig(train=[SourceConfig("imagefolder", path=str(folder))], validation_fraction=0.3, packing=False)
    held_out = build_validation(config, PROCESSOR)["shapes"]
    examples = build_examples(config.train[0], config, PROCESSOR)
    assert 3 < len(examples) < 30
    assert [example["input_ids"] for example in examples] == [
        held_out[index]["input_ids"].tolist() for index in range(len(held_out))
    ]


# ------------------------------------------------------------------------------------------------------ further kinds


class Points(Modality):
    """Comma separated numbers in a file, one token each."""

    name = "points"
    config_class = dict
    input_names = ("points",)

    @classmethod
    def build_encoder(cls, config):
        raise NotImplementedError

    @classmethod
    def dummy_inputs(cls, config):
        raise NotImplementedError

    def preprocess(self, medium):
        with open(medium) as file:
            return torch.tensor([float(number) for number in file.read().split(",")])

    def num_tokens(self, preprocessed):
        return len(preprocessed)

    def collate(self, preprocessed):
        return {"points": torch.nn.utils.rnn.pad_sequence(preprocessed, batch_first=True)}


def test_a_further_modality_needs_no_change_here(tmp_path, monkeypatch):
    """In a chat beside a picture; its number is the one after audio; a file of it that cannot be read is a bad row."""
    monkeypatch.setitem(MODALITIES, "points", Points)
    tokens = [f"<|{name}|>" for name in ("points_start", "points", "points_end")]
    tokenizer = train_tokenizer([], 271, media_tokens=[*MEDIA_TOKENS, *tokens])
    processor = tiny_processor(tokenizer=tokenizer, modality_configs={"points": {}})
    (tmp_path / "a.txt").write_text("1,2,3.5")
    (tmp_path / "b.txt").write_text("none")
    PICTURES[0].save(tmp_path / "a.png")

    def ask(name):
        parts = [{"type": "points", "path": name}, {"type": "image", "path": "a.png"}]
        return [{"role": "user", "content": parts}, assistant("yes")]

    write_lines(tmp_path / "a.jsonl", [{"messages": ask(name)} for name in ("a.txt", "b.txt")])
    source = SourceConfig("chat", paths=[str(tmp_path / "a.jsonl")])
    built = build_datasets(DataConfig([source], VALIDATION, packing=False), processor)
    (row,) = built.train
    points = {"type": "points", "points": str(tmp_path / "a.txt")}
    chat = processor.encode_chat(
        [{"role": "user", "content": [points, *user(PICTURES[0])["content"]]}, assistant("yes")]
    )
    assert row["input_ids"].tolist() == chat["input_ids"].tolist()
    assert row["media"]["points"][0].tolist() == [1, 2, 3.5]
    assert set(row["modality_ids"].tolist()) == {5} and built.report[-1].bad_rows == 1
    batch = Collator(processor)([row, row])
    assert batch["points"].tolist() == [[1, 2, 3.5]] * 2 and batch["pixel_values"].shape[0] == 2
