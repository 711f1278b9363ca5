"""Options of the processor's calls as clients give them: those that ask for nothing change nothing, truncation cuts
texts and never media, and what is misspelt or cannot be done is refused.
"""

import pytest
import torch
from transformers.utils import PaddingStrategy
from trl.chat_template_utils import (
    is_chat_template_prefix_preserving,
    is_chat_template_stop_token_trained,
    supports_tool_calling,
)
from trl.data_utils import apply_chat_template, prepare_multimodal_messages
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from tests.tiny_processor import picture, sound, tiny_processor

PROCESSOR = tiny_processor()
TEXT = "<|begin|><|user|><|image|>what?<|audio|><|assistant|>"
MESSAGES = [
    {
        "role": "user",
        "content": [
            {"type": "image", "image": picture()},
            {"type": "text", "text": "what?"},
            {"type": "audio", "audio": sound()},
        ],
    }
]
TALK = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "Noise."}]},
]
CHAT = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}


def by_text(**options):
    return PROCESSOR(text=TEXT, images=picture(), audio=sound(), return_tensors="pt", **options)


def by_messages(**options):
    return PROCESSOR.apply_chat_template(MESSAGES, **CHAT, **options)


def same(batch, other) -> bool:
    return batch.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in batch.items())


IDLE = [
    {"add_special_tokens": False},
    {"audio_kwargs": {"sampling_rate": 8000, "return_attention_mask": True}},
    {"common_kwargs": {"return_tensors": "pt"}},
    {"do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True, "data_format": None},
    {"images_kwargs": {}, "text_kwargs": None, "videos_kwargs": {}},
    {"images_kwargs": {"max_side": 64, "image_mean": (0.5, 0.5, 0.5), "size": None}},
    {"load_audio_from_video": False},
    {"max_length": None, "pad_to_multiple_of": None, "padding_side": None},
    {"padding": None},
    {"padding": "do_not_pad"},
    {"padding": PaddingStrategy.LONGEST},
    {"padding": True, "padding_side": "right"},
    {"return_attention_mask": True, "return_token_type_ids": False, "return_offsets_mapping": None},
    {"truncation": False},
    {"truncation": True},
    {"truncation": True, "max_length": 33},
    {"truncation": "longest_first", "max_length": 4096},
    {"verbose": False, "stride": 0, "is_split_into_words": False},
]


@pytest.mark.parametrize("options", IDLE, ids=str)
def test_what_asks_for_nothing_changes_nothing(options):
    plain = by_text()
    assert plain["input_ids"].shape == (1, 33) and set(plain) == set(PROCESSOR.model_input_names)
    for batch in (by_text(**options), by_messages(**options), by_messages(processor_kwargs=options)):
        assert same(batch, plain)


@pytest.mark.parametrize(
    "options",
    [
        {"tools": None, "documents": None, "chat_template": None},
        {"tools": [], "documents": []},
        {"sanitize_control_tokens": True, "enable_thinking": False},
        {"return_assistant_tokens_mask": False, "continue_final_message": False},
    ],
    ids=str,
)
def test_what_asks_a_chat_template_for_nothing_changes_nothing(options):
    assert same(by_messages(**options), by_text())
    text = PROCESSOR.apply_chat_template(MESSAGES, add_generation_prompt=True, **options)
    assert text == TEXT == PROCESSOR.apply_chat_template([MESSAGES], add_generation_prompt=True, **options)[0]


def test_no_media_are_none_in_any_form():
    plain = PROCESSOR(text=["ab", "c"], padding=True, return_tensors="pt")
    for none in (None, [], [[], []], [None, None], ()):
        assert same(PROCESSOR(text=["ab", "c"], images=none, padding=True, return_tensors="pt"), plain)
    reads_sound = tiny_processor(image_processor=None)
    assert reads_sound(text="a", images=[], videos=[], audio=[]) == {"input_ids": [[12 + ord("a") - 33]]} | {
        "attention_mask": [[1]]
    }
    texts, images = ["<|image|>a", "b", "<|image|>"], [picture(seed=1), picture(seed=2)]
    by_list = PROCESSOR(text=texts, images=images, padding=True, return_tensors="pt")
    for given in ([images[:1], None, images[1:]], [images[0], None, images[1]], tuple(images)):
        assert same(PROCESSOR(text=texts, images=given, padding=True, return_tensors="pt"), by_list)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"paddding": True}, "'paddding' is no option of this call; did you mean 'padding'?"),
        ({"trunctation": None}, "'trunctation' is no option of this call; did you mean 'truncation'?"),
        ({"text_kwargs": {"add_special_token": False}}, "did you mean 'add_special_tokens'?"),
        ({"colour": 1}, "'colour' is no option of this call; choose from"),
        ({"return_offsets_mapping": True}, "return_offsets_mapping is True, which this call cannot do; leave it out"),
        ({"images_kwargs": {"max_side": 65}}, "max_side is 65, which this call cannot do"),
        ({"load_audio_from_video": True}, "load_audio_from_video is True, which"),
        ({"truncation": "only_second"}, "truncation is 'only_second'; give True or False"),
    ],
    ids=str,
)
def test_what_is_misspelt_or_cannot_be_done_is_refused(options, reason):
    for call in (by_text, by_messages, lambda **options: PROCESSOR.apply_chat_template(MESSAGES, **options)):
        if call in (by_text, by_messages) or "truncation" not in options:
            with pytest.raises((TypeError, ValueError)) as error:
                call(**options)
            assert reason in str(error.value) and "\n" not in str(error.value)


def test_tools_are_refused():
    with pytest.raises(ValueError, match=r"tools is \[\{.*which this call cannot do"):
        by_messages(tools=[{"type": "function"}])


@pytest.mark.parametrize("side", ["right", "left"])
def test_texts_are_cut_as_the_tokenizer_cuts_them(side):
    processor = tiny_processor()
    processor.tokenizer.truncation_side = side
    options = {"truncation": True, "max_length": 4, "padding": "max_length", "return_tensors": "pt"}
    texts = ["abcdefg", "abc", "<|user|>hello"]
    assert same(processor(text=texts, **options), processor.tokenizer(texts, **options))
    processor.tokenizer.model_max_length = 3
    assert (
        processor(text=texts, truncation=True)["input_ids"] == processor.tokenizer(texts, truncation=True)["input_ids"]
    )


def test_media_are_never_cut():
    """What stands around them is, as far as they are."""
    talk = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "abc"}]}]
    whole = PROCESSOR.apply_chat_template(talk, **CHAT)
    for limit in (16, 12):
        batch = PROCESSOR.apply_chat_template(talk, **CHAT, truncation=True, max_length=limit)
        assert batch["input_ids"].tolist() == whole["input_ids"][:, :limit].tolist()
        assert torch.equal(batch["pixel_values"], whole["pixel_values"])
    for limit in (11, 5, 1):
        with pytest.raises(
            ValueError, match=f"sample 0 has 16 tokens, and truncation to {limit} would cut media of type"
        ):
            PROCESSOR.apply_chat_template(talk, **CHAT, truncation=True, max_length=limit)
    with pytest.raises(ValueError, match="sample 1 has 12 tokens, and truncation to 5 would cut media of type 'image'"):
        PROCESSOR(text=["abcdefg", "ab<|image|>"], images=[picture()], truncation=True, max_length=5)


def test_masks_are_cut_and_kept_without_an_attention_mask():
    talk = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cdef"}]
    options = {
        "return_assistant_tokens_mask": True,
        "truncation": True,
        "max_length": 7,
        "return_attention_mask": False,
    }
    batch = PROCESSOR.apply_chat_template(talk, **CHAT | {"add_generation_prompt": False}, **options)
    assert set(batch) == {"input_ids", "assistant_masks"} and batch["assistant_masks"].tolist() == [[0] * 5 + [1] * 2]


# ------------------------------------------------------------------------------------------------------------- clients


def sft_examples() -> list[dict]:
    return [
        {"images": [picture(seed=seed)], "messages": [{**message, "content": text} for message in TALK]}
        for seed, text in enumerate(("Look.", "Look again, please."))
    ]


@pytest.mark.parametrize("limit", [None, 64])
def test_the_collator_of_sft_with_images(limit):
    """TRL's; of every row ids, masks and labels are those of `encode_chat`."""
    collator = DataCollatorForVisionLanguageModeling(PROCESSOR, max_length=limit, assistant_only_loss=True)
    batch = collator(sft_examples())
    assert batch["pixel_values"].shape == (2, 3, 16, 32)
    for example, ids, labels in zip(sft_examples(), batch["input_ids"], batch["labels"], strict=True):
        messages = prepare_multimodal_messages(example["messages"], images=example["images"])
        encoded = PROCESSOR.encode_chat(messages)
        length = len(encoded["input_ids"])
        assert ids[:length].tolist() == encoded["input_ids"].tolist() and (ids[length:] == 0).all()
        assert (labels[:length] != -100).tolist() == encoded["answer_mask"].tolist() and (labels[length:] == -100).all()


def test_the_collator_of_sft_with_prompts_and_completions():
    example = {"images": [picture()], "prompt": TALK[:1], "completion": TALK[1:]}
    example |= {
        name: [{**it, "content": it["content"][-1]["text"]} for it in example[name]] for name in list(example)[1:]
    }
    batch = DataCollatorForVisionLanguageModeling(PROCESSOR, completion_only_loss=True)([example])
    talk = [{**TALK[0], "content": [{"type": "image", "image": picture()}, TALK[0]["content"][1]]}, TALK[1]]
    assert batch["input_ids"][0].tolist() == PROCESSOR.encode_chat(talk)["input_ids"].tolist()
    assert PROCESSOR.decode(batch["labels"][batch["labels"] != -100]) == "Noise.<|end|>"


def test_the_calls_of_grpo_with_images():
    prompts = [prepare_multimodal_messages([{"role": "user", "content": "?"}], images=[picture()]), TALK[:0]]
    prompts[1] = [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]
    options = {"tools": None, "chat_template": None, "add_generation_prompt": True, "tokenize": True}
    batch = PROCESSOR.apply_chat_template(conversation=prompts, return_dict=True, **options)
    texts = [apply_chat_template({"prompt": prompt}, PROCESSOR, tools=None)["prompt"] for prompt in prompts]
    again = PROCESSOR(images=[[picture()], None], text=texts, padding=True, return_tensors="pt")
    for row, ids, mask in zip(batch["input_ids"], again["input_ids"], again["attention_mask"], strict=True):
        assert row == ids[mask.bool()].tolist()


def test_what_trl_asks_of_a_chat_template():
    assert is_chat_template_stop_token_trained(PROCESSOR)
    assert is_chat_template_prefix_preserving(PROCESSOR) and supports_tool_calling(PROCESSOR)


def test_the_calls_of_transformers_serve():
    options = {"add_generation_prompt": True, "tools": None, "return_tensors": None, "return_dict": True}
    batch = PROCESSOR.apply_chat_template(MESSAGES, tokenize=True, load_audio_from_video=False, **options)
    assert batch["input_ids"] == by_text()["input_ids"].tolist()
    assert (
        PROCESSOR.apply_chat_template(MESSAGES, **CHAT | {"return_tensors": "auto"})["input_ids"] == batch["input_ids"]
    )


def test_the_calls_of_lm_eval():
    """Placeholders before the images are known, images of each request in a list, and no padding for one alone."""
    history = [{"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": "what?"}]}]
    text = PROCESSOR.apply_chat_template(history, add_generation_prompt=True, continue_final_message=False)
    assert text == "<|begin|><|user|><|image|>what?<|assistant|>"
    alone = PROCESSOR(text=text, images=[picture()], return_tensors=None)
    options = {"truncation": False, "padding": "longest", "return_tensors": "pt"}
    batch = PROCESSOR(images=[[picture()], [picture(8, 8)]], text=[text, text], **options)
    assert alone["input_ids"][0] == batch["input_ids"][0].tolist() and (batch["attention_mask"][1] == 0).sum() == 7
    begun = [*history, {"role": "assistant", "content": [{"type": "text", "text": "It is"}]}]
    assert PROCESSOR.apply_chat_template(begun, continue_final_message=True) == f"{text}It is"


def test_the_calls_of_pipelines_on_a_feature_extractor():
    extractor = PROCESSOR.feature_extractor
    options = {"sampling_rate": extractor.sampling_rate, "return_tensors": "pt", "return_attention_mask": True}
    assert same(extractor(sound(), **options, padding="longest"), extractor(sound(), return_tensors="pt"))
