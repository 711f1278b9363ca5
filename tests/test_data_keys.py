"""What messages and rows say besides what is read of them: harmless, or the reason against the row."""

import json
import logging

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from dataset_loading import DataConfig, SourceConfig
from dataset_loading.preferences import build_pairs
from dataset_loading.sources.references import fingerprint
from model.chat import encode_conversation
from tests.test_data_chat import build, chat_tokenizer
from tests.tiny_processor import image_file, picture, tiny_processor

ASKED, SAID = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
CALL = [{"id": "1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
REFUSED = {
    "calls of a user": ([{**ASKED, "tool_calls": CALL}, SAID], "'tool_calls', which only the assistant may have"),
    "calls of another form": ([ASKED, {**SAID, "tool_calls": [{"add": 1}]}], "has a call {'add': 1}; give {"),
    "a call": (
        [ASKED, {**SAID, "function_call": {"name": "add"}}],
        "'function_call', which is not read; write it as tool_calls",
    ),
    "half a weight": ([ASKED, {**SAID, "weight": 0.5}], "'weight' 0.5, which is not honoured"),
    "twice a weight": ([ASKED, {**SAID, "weight": 2}], "'weight' 2, which is not honoured; give 0 or 1"),
    "a question trained": ([{**ASKED, "train": True}, SAID], "'train' True, which is not honoured; give 0, as it"),
    "thoughts": ([ASKED, {**SAID, "reasoning_content": 5}], "has reasoning_content 5; give a text"),
    "thinking": ([ASKED, {**SAID, "thinking": "so"}], "'thinking', which is not read; call it reasoning_content"),
    "a name": ([{**ASKED, "name": "Ann"}, SAID], "'name', which is not read"),
    "unknown": ([ASKED, {**SAID, "mood": "sad"}], "'mood', which is unknown; remove it"),
}
HARMLESS = {
    "empty": ([{**ASKED, "name": None}, {**SAID, "tool_calls": [], "refusal": None, "reasoning_content": ""}]),
    "as it is": ([{**ASKED, "weight": 0, "train": False}, {**SAID, "weight": 1, "train": True}]),
    "ids": ([{**ASKED, "id": "7", "timestamp": 3}, {**SAID, "model": "x"}]),
    "answers of tools": ([ASKED, SAID, {"role": "tool", "content": "4", "tool_call_id": "1", "name": "add"}, SAID]),
}


def write(folder, rows, ending="jsonl"):
    path = folder / f"rows.{ending}"
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif ending == "json":
        path.write_text(json.dumps(rows))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize("case", REFUSED)
def test_a_message_that_says_more_than_is_read_is_refused(tmp_path, caplog, case):
    """In what is learned, and in what a model is asked."""
    messages, reason = REFUSED[case]
    path = write(tmp_path, [{"messages": messages}, {"messages": [ASKED, SAID]}])
    with caplog.at_level(logging.WARNING):
        assert len(build(SourceConfig("chat", paths=[path]), chat_tokenizer()).train) == 1
    assert "rows.jsonl line 1: message " in caplog.text and reason in caplog.text
    assert "1 rows cannot be used and are left out: 1 of rows (1 x message" in caplog.text
    with pytest.raises(ValueError) as error:
        encode_conversation(chat_tokenizer(), messages)
    assert reason in str(error.value)
    with pytest.raises(ValueError) as error:
        tiny_processor().apply_chat_template(messages, tokenize=True)
    assert reason in str(error.value)


@pytest.mark.parametrize("case", HARMLESS)
def test_what_changes_nothing_is_left_out(tmp_path, case):
    plain = [{"role": message["role"], "content": message["content"]} for message in HARMLESS[case]]
    tokenizer = chat_tokenizer()
    path = write(tmp_path, [{"messages": HARMLESS[case]}])
    row = build(SourceConfig("chat", paths=[path]), tokenizer, max_invalid_rows=0).train[0]
    assert row["input_ids"].tolist() == encode_conversation(tokenizer, plain)
    assert encode_conversation(tokenizer, HARMLESS[case]) == encode_conversation(tokenizer, plain)


def test_with_a_loss_on_all_a_question_is_learned_too(tmp_path):
    asked = [{**ASKED, "weight": 1}, SAID]
    for loss_on, is_read in (("all", True), ("answer", False)):
        source = SourceConfig("chat", paths=[write(tmp_path, [{"messages": asked}])], loss_on=loss_on)
        if is_read:
            assert len(build(source, chat_tokenizer(), max_invalid_rows=0).train) == 1
        else:
            with pytest.raises(ValueError, match="give 0, as it is not learned"):
                build(source, chat_tokenizer(), max_invalid_rows=0)


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "text", "text": "a", "image": "a.png"}, "a part of type 'text' has 'image', which is not read"),
        ({"type": "image", "path": "a.png", "text": "a"}, "a part of type 'image' has 'text', which is not read"),
        ({"type": "audio", "path": "a.wav", "start": 3}, "a part of type 'audio' has 'start', which is not read"),
    ],
)
def test_a_part_that_says_more_than_is_read_is_refused(tmp_path, part, reason):
    path = write(tmp_path, [{"messages": [{"role": "user", "content": [part]}, SAID]}])
    with pytest.raises(ValueError, match=reason):
        build(SourceConfig("chat", paths=[path]), chat_tokenizer(), max_invalid_rows=0)


CHAT_ROW = {"messages": [ASKED, SAID]}
QUESTION_ROW = {"instruction": "add", "answer": "4"}
ROWS = {
    "a system of numbers": (
        CHAT_ROW,
        {"system": [1]},
        r"columns system and system_prompt have \[\[1\]\]; give one text",
    ),
    "tools": (CHAT_ROW, {"tools": [{"name": "add"}]}, "column 'tools' is not read"),
    "a mask": (CHAT_ROW, {"loss_mask": [0, 1]}, "column 'loss_mask' is not read"),
    "a weight": (CHAT_ROW, {"weight": 0.0}, "column 'weight' is not read"),
    "prompt and system": (QUESTION_ROW, {"system": "be brief"}, "column 'system' is not read"),
    "prompt and history": (QUESTION_ROW, {"history": [["a", "b"]]}, "column 'history' is not read"),
    "instruction and input": (QUESTION_ROW, {"input": "2 and 2"}, "column 'input' is not read .* name it in prompt"),
}


@pytest.mark.parametrize("way", ["jsonl", "parquet", "hub", "stream"])
@pytest.mark.parametrize("case", ROWS)
def test_a_row_that_says_more_than_is_read_is_refused(tmp_path, monkeypatch, case, way):
    """And is not where the column says nothing."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    plain, besides, reason = ROWS[case]
    (tmp_path / "data").mkdir()
    empty = dict.fromkeys(besides)
    path = write(tmp_path / "data", [plain | empty, plain | besides], "parquet" if way == "parquet" else "jsonl")
    columns = {"messages_column": "messages"} if "messages" in plain else None
    columns = columns or {"prompt_column": "instruction", "answer_column": "answer"}
    if way in ("jsonl", "parquet"):
        source = SourceConfig("files", paths=[path], **columns)
    else:
        source = SourceConfig("hub", path=str(tmp_path / "data"), streaming=way == "stream", **columns)
    with pytest.raises(ValueError, match=f"row 2: .*{reason}|line 2: .*{reason}"):
        list(build(source, chat_tokenizer(), max_invalid_rows=0).train)
    assert len(list(build(source, chat_tokenizer()).train)) == 1


def test_columns_that_are_used_are_no_reason(tmp_path):
    rows = [{"system": "be brief", "question": "2+2?", "answer": "4", "weight": 0.2}]
    source = SourceConfig("files", paths=[write(tmp_path, rows)], prompt="{system} {question}", answer_column="answer")
    assert len(build(source, chat_tokenizer(), max_invalid_rows=0).train) == 1


def test_images_beside_messages_have_to_be_read(tmp_path):
    path = write(tmp_path, [CHAT_ROW | {"images": ["a.png"]}])
    with pytest.raises(
        ValueError, match=r"column 'images' is not read and changes .* set image_column, with kind: files"
    ):
        build(SourceConfig("chat", paths=[path]), chat_tokenizer(), max_invalid_rows=0)


def test_pairs_have_neither(tmp_path, caplog):
    good, bad = [ASKED, SAID], [ASKED, {**SAID, "function_call": {"name": "add"}}]
    worse = [ASKED, {"role": "assistant", "content": "5"}]
    rows = [{"chosen": good, "rejected": worse}] * 40
    rows += [{"chosen": bad, "rejected": worse}, {"chosen": good, "rejected": bad}]
    columns = {"messages_column": "chosen", "rejected_column": "rejected"}
    source = SourceConfig("files", paths=[write(tmp_path, rows)], **columns)
    with caplog.at_level(logging.WARNING):
        held_out = [SourceConfig("generated", task="addition", num_rows=3)]
        train, _ = build_pairs(DataConfig(train=[source], validation=held_out), chat_tokenizer())
    assert len(train) == 40
    assert (
        "2 rows cannot be used and are left out: 2 of rows (2 x message 1 (assistant) has 'function_call'"
        in caplog.text
    )


def test_the_keys_of_others_are_named(tmp_path):
    talk = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    path = write(tmp_path, [{"conversations": talk}])
    with pytest.raises(ValueError, match=r"no column 'messages' .*; set messages_column: conversations"):
        build(SourceConfig("chat", paths=[path]), chat_tokenizer(), max_invalid_rows=0)
    talk[0]["from"] = "somebody"
    path = write(tmp_path, [{"conversations": talk}])
    with pytest.raises(ValueError, match="a message is from 'somebody', none of human, user, gpt"):
        build(SourceConfig("chat", paths=[path], messages_column="conversations"), chat_tokenizer(), max_invalid_rows=0)


def test_marks_in_a_text_are_where_its_images_stand(tmp_path):
    """As LLaVA writes them."""
    for number in range(2):
        (tmp_path / f"p{number}.png").write_bytes(image_file(picture(seed=number)))
    answer = {"role": "assistant", "content": "noise"}
    first = [{"role": "user", "content": "hello"}, SAID, {"role": "user", "content": "<image>\nwhat is it?"}, answer]
    second = [{"role": "user", "content": "Compare <image> with <image>."}, answer]
    rows = [
        {"images": ["p0.png"], "messages": first},
        {"images": ["p1.png", "p0.png"], "messages": second},
        {"images": ["p0.png"], "messages": second},
    ]
    path, processor = write(tmp_path, rows), tiny_processor()
    source = SourceConfig("files", paths=[path], image_column="images", messages_column="messages")
    built = build(source, processor, block_size=256).train
    parts = [
        [{"type": "image", "path": str(tmp_path / name)} for name in names]
        for names in (["p0.png"], ["p1.png", "p0.png"])
    ]
    first[2] = {"role": "user", "content": [*parts[0], {"type": "text", "text": "\nwhat is it?"}]}
    text = [{"type": "text", "text": it} for it in ("Compare ", " with ", ".")]
    second[0] = {"role": "user", "content": [text[0], parts[1][0], text[1], parts[1][1], text[2]]}
    assert len(built) == 2
    for row, messages in zip([built[0], built[1]], [first, second], strict=True):
        expected = processor.encode_chat(messages)
        assert row["input_ids"].tolist() == expected["input_ids"].tolist()
        assert all(map(torch.equal, row["media"]["image"], expected["media"]["image"]))
    with pytest.raises(ValueError, match="line 3: 1 media of type 'image', but 2 marks '<image>' in the texts"):
        build(source, processor, block_size=256, max_invalid_rows=0)


@pytest.mark.parametrize("way", ["files", "chat", "prompt"])
def test_marks_beside_items_of_their_own_message(tmp_path, caplog, way):
    """Of a column, of parts that name files, and of a prompt with its answer; others make the row invalid, also where
    the row has no image. A model is asked with the same rule.
    """
    (tmp_path / "p.png").write_bytes(image_file(picture(seed=1)))
    item, answer = {"type": "image", "path": "p.png"}, {"role": "assistant", "content": "noise"}
    texts = ["before <image> behind", "two <image> <image>", "no mark"]
    messages = [[{"role": "user", "content": text}, answer] for text in texts]
    columns = {"image_column": "image"} | ({} if way == "prompt" else {"messages_column": "messages"})
    if way == "chat":
        for row, text in zip(messages, texts, strict=True):
            row[0]["content"] = [item, {"type": "text", "text": text}]
        source = SourceConfig("chat", paths=[write(tmp_path, [{"messages": row} for row in messages])])
    elif way == "files":
        rows = [{"image": "p.png", "messages": row} for row in messages] + [{"image": None, "messages": messages[0]}]
        source = SourceConfig("files", paths=[write(tmp_path, rows)], **columns)
    else:
        rows = [{"image": "p.png", "question": text, "answer": "noise"} for text in texts]
        path = write(tmp_path, rows)
        source = SourceConfig("files", paths=[path], prompt="{question}", answer_column="answer", **columns)
    processor = tiny_processor()
    with caplog.at_level(logging.WARNING):
        built = build(source, processor, block_size=256).train
    assert "line 2: 1 media of type 'image', but 2 marks '<image>' in the texts" in caplog.text
    assert way != "files" or "line 4: 0 media of type 'image', but 1 marks" in caplog.text
    assert len(built) == 2
    own = {**item, "path": str(tmp_path / "p.png")}
    parts = [
        [{"type": "text", "text": "before "}, own, {"type": "text", "text": " behind"}],
        [own, {"type": "text", "text": "no mark"}],
    ]
    for row, content in zip([built[0], built[1]], parts, strict=True):
        expected = processor.encode_chat([{"role": "user", "content": content}, answer])["input_ids"].tolist()
        assert row["input_ids"].tolist() == expected
        text = "".join(part.get("text", "<image>") for part in content)
        asked = [own, {"type": "text", "text": text}] if content is parts[0] else content
        again = processor.encode_chat([{"role": "user", "content": asked}, answer])
        assert again["input_ids"].tolist() == expected
    marked = [{"role": "user", "content": "before <image> behind"}, answer]
    beside = processor.encode_chat(marked, media={"image": [own["path"]]})
    assert beside["input_ids"].tolist() == built[0]["input_ids"].tolist()
    with pytest.raises(ValueError, match="2 media of type 'image', but 1 marks '<image>'"):
        processor.encode_chat(marked, media={"image": [own["path"]] * 2})
    with pytest.raises(ValueError, match="1 media of type 'image', but 2 marks '<image>'"):
        processor.encode_chat([{"role": "user", "content": [own, {"type": "text", "text": texts[1]}]}])


def test_marks_without_any_media_are_text():
    tokenizer, messages = chat_tokenizer(), [{"role": "user", "content": "what does <video> do in HTML?"}, SAID]
    ids = encode_conversation(tokenizer, messages)
    assert "what does <video> do in HTML?" in tokenizer.decode(ids)


LEFT_OUT = [ASKED, {"role": "assistant", "content": "5", "weight": 0}, {"role": "user", "content": "again"}, SAID]


@pytest.mark.parametrize("key", ["weight", "train", "trainable", "training", "learn", "loss"])
def test_an_answer_without_weight_is_read_and_not_learned(tmp_path, key):
    """The tokens are those of the same messages without it; of the labels its own are missing, its end included."""
    tokenizer = chat_tokenizer()
    plain = [{"role": it["role"], "content": it["content"]} for it in LEFT_OUT]
    messages = [plain[0], {**plain[1], key: 0 if key == "weight" else False}, *plain[2:]]
    path = write(tmp_path, [{"messages": messages}, {"messages": plain}])
    rows = build(SourceConfig("chat", paths=[path]), tokenizer, max_invalid_rows=0).train
    row, other = rows[0], rows[1]
    assert row["input_ids"].tolist() == other["input_ids"].tolist() == encode_conversation(tokenizer, plain)
    begin = len(encode_conversation(tokenizer, plain[:1], add_generation_prompt=True))
    end = len(encode_conversation(tokenizer, plain[:2]))
    expected = other["labels"].clone()
    assert (expected[begin:end] != -100).all()
    expected[begin:end] = -100
    assert row["labels"].tolist() == expected.tolist() and (expected != -100).any()


def test_with_a_loss_on_all_a_message_without_weight_keeps_its_text_out(tmp_path):
    tokenizer = chat_tokenizer()
    messages = [{**ASKED, "weight": 0}, SAID]
    source = SourceConfig("chat", paths=[write(tmp_path, [{"messages": messages}])], loss_on="all")
    row = build(source, tokenizer, max_invalid_rows=0).train[0]
    text = tokenizer.encode("2+2?", add_special_tokens=False)
    start = next(i for i in range(len(row["input_ids"])) if row["input_ids"][i : i + len(text)].tolist() == text)
    expected = row["input_ids"].clone()
    expected[[0, *range(start, start + len(text))]] = -100
    assert row["labels"].tolist() == expected.tolist()


def test_the_processor_masks_what_has_no_weight(tmp_path):
    processor = tiny_processor()
    plain = [{key: value for key, value in message.items() if key != "weight"} for message in LEFT_OUT]
    masks = [
        processor.apply_chat_template(it, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        for it in (LEFT_OUT, plain, plain[:2])
    ]
    assert masks[0]["input_ids"] == masks[1]["input_ids"]
    (weighted,), (whole,), (first,) = (found["assistant_masks"] for found in masks)
    assert weighted == [0] * len(first) + whole[len(first) :] and sum(first) > 0


def test_a_row_of_which_nothing_is_learned_is_a_bad_one(tmp_path):
    path = write(tmp_path, [{"messages": LEFT_OUT[:2]}])
    with pytest.raises(ValueError, match="all messages of the assistant are left out of the loss"):
        build(SourceConfig("chat", paths=[path]), chat_tokenizer(), max_invalid_rows=0)


@pytest.mark.parametrize("way", ["jsonl", "parquet", "hub", "stream", "prompt"])
def test_a_column_of_the_system_is_its_message(tmp_path, monkeypatch, way):
    """Not where the messages begin with one, which has to be the same; nor where it says nothing."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    system = {"role": "system", "content": "be brief"}
    rows = [{"messages": [ASKED, SAID], "system": "be brief"}, {"messages": [ASKED, SAID], "system": None}]
    rows += [
        {"messages": [system, ASKED, SAID], "system": "be brief"},
        {"messages": [system, ASKED, SAID], "system": ""},
    ]
    columns = {"messages_column": "messages"}
    expected = [[system, ASKED, SAID], [ASKED, SAID], [system, ASKED, SAID], [system, ASKED, SAID]]
    if way == "prompt":
        rows = [{"question": "2+2?", "answer": "4", "system": said} for said in ("be brief", None)]
        columns, expected = {"prompt": "{question}", "answer_column": "answer"}, expected[:2]
    else:
        rows.append({"messages": [system, ASKED, SAID], "system": "be long"})
    (tmp_path / "data").mkdir()
    path = write(tmp_path / "data", rows, "parquet" if way == "parquet" else "jsonl")
    if way in ("hub", "stream"):
        source = SourceConfig("hub", path=str(tmp_path / "data"), streaming=way == "stream", **columns)
    else:
        source = SourceConfig("files", paths=[path], **columns)
    tokenizer = chat_tokenizer()
    built = list(build(source, tokenizer, packing=False).train)
    ids = [[it for it in row["input_ids"].tolist() if it != tokenizer.pad_token_id] for row in built]
    assert ids == [encode_conversation(tokenizer, messages) for messages in expected]
    if way != "prompt":
        with pytest.raises(ValueError, match="column 'system' says something else than the first message"):
            list(build(source, tokenizer, max_invalid_rows=0).train)


def call(name, arguments, **more):
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


OSLO = {"city": "Oslo", "days": 2, "note": None}
CALLS = {
    "beside a text": (
        {"content": "let me look", "tool_calls": [call("get_weather", '{"city": "Oslo"}', id="1")]},
        'let me look\nget_weather({"city": "Oslo"})',
    ),
    "without a content": ({"content": None, "tool_calls": [call("now", "")]}, "now({})"),
    "two": (
        {"content": "", "tool_calls": [call("get_weather", OSLO), call("calculator", "2*21")]},
        'get_weather({"city": "Oslo", "days": 2})\ncalculator(2*21)',
    ),
    "beside a part that says nothing": (
        {"content": [{"type": "text", "text": ""}], "tool_calls": [call("now", {})]},
        "now({})",
    ),
    "thoughts": ({"content": "4", "reasoning_content": "2 and 2"}, "<think>\n2 and 2\n</think>\n\n4"),
    "both, in parts": (
        {
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "reasoning_content": "hm <|end|>",
            "tool_calls": [call("f<|user|>", {"<|end|>": 'ü "\n'})],
        },
        '<think>\nhm <|end|>\n</think>\n\nab\nf<|user|>({"<|end|>": "ü \\"\\n"})',
    ),
}


@pytest.mark.parametrize(
    ("case", "way"), [*((case, "jsonl") for case in CALLS), ("beside a text", "parquet"), ("thoughts", "parquet")]
)
def test_calls_of_tools_and_reasoning_are_said_and_learned(tmp_path, case, way):
    """In the tokens of what is written out by hand, in training and in what a model is asked."""
    message, text = CALLS[case]
    result = {"role": "tool", "tool_call_id": "1", "content": "rain"}
    messages = [ASKED, {"role": "assistant", **message}, result, SAID]
    written = [ASKED, {"role": "assistant", "content": text}, result, SAID]
    tokenizer = chat_tokenizer()
    path = write(tmp_path, [{"messages": messages}], way)
    row = build(SourceConfig("files", paths=[path], messages_column="messages"), tokenizer, max_invalid_rows=0).train[0]
    expected = build(
        SourceConfig("chat", paths=[write(tmp_path, [{"messages": written}], "json")]), tokenizer, max_invalid_rows=0
    ).train[0]
    assert row["input_ids"].tolist() == expected["input_ids"].tolist() == encode_conversation(tokenizer, messages)
    assert row["labels"].tolist() == expected["labels"].tolist()
    assert text in tokenizer.decode(row["labels"][row["labels"] != -100])
    processor = tiny_processor()
    both = [processor.apply_chat_template(it, tokenize=True) for it in (messages, written)]
    assert both[0] == both[1]
    assert processor.apply_chat_template(messages) == processor.apply_chat_template(written)


def test_calls_keep_rows_apart_that_say_the_same_otherwise():
    """Or one could be held out while the other is learned."""
    texts = [{"type": "text", "text": "a"}]
    rows = [
        [{"role": "assistant", "content": texts, **more}]
        for more in ({}, {"tool_calls": CALL}, {"reasoning_content": "a"}, {"reasoning_content": "b"})
    ]
    assert len({fingerprint(row, {}) for row in rows}) == 4
