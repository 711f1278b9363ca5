"""Callbacks around a model that reads images and sound, inside real, tiny training runs on the CPU."""

import io
import logging

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from callbacks import CallbacksConfig, MediaSamplesConfig, add_callbacks
from callbacks.media_samples import MediaSamplesCallback, spectrogram_image
from callbacks.model_size import part_sizes
from dataset_loading import Collator, DataConfig, SourceConfig, build_examples, get_task
from dataset_loading.tasks.registry import generate_row
from tests.test_callbacks import events, texts
from tests.tiny_language_model import tiny_model, tiny_tokenizer
from tests.tiny_processor import picture, sound, tiny_processor
from tests.tiny_reader import tiny_reader
from trainers import RecurrentTrainer, RecurrentTrainingArguments

NAMES = ("text", "image", "audio")


def chat(media, prompt, answer):
    content = [*media, {"type": "text", "text": prompt}] if prompt else media
    return [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]


def row(processor, messages):
    """As the data of a run has it."""
    encoded = processor.encode_chat(messages)
    ids = encoded["input_ids"]
    last = max((NAMES.index(kind) for kind in encoded["media"]), default=0)
    return {
        "input_ids": ids,
        "labels": torch.where(encoded["answer_mask"], ids, -100),
        "modality_ids": torch.full_like(ids, last),
        "media": encoded["media"],
    }


def example(processor, media, prompt, answer, waveforms=()):
    encoded = processor.encode_chat(chat(media, prompt, answer)[:1], add_generation_prompt=True)
    ids = encoded["input_ids"].tolist()
    media = encoded["media"]
    return {"prompt_ids": ids, "media": media, "prompt": prompt, "answer": answer, "waveforms": lambda: waveforms}


IMAGE = {"type": "image", "image": picture(seed=1)}
AUDIO = {"type": "audio", "audio": sound(2400)}


def train(folder, config, examples, model=None, **options):
    processor = tiny_processor()
    rows = [
        row(processor, chat(media, "say", answer))
        for media, answer in (([IMAGE], "a"), ([AUDIO], "bb"), ([], "ccc"), ([AUDIO, IMAGE, IMAGE], "d"))
    ]
    arguments = RecurrentTrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "use_cpu": True,
            "disable_tqdm": True,
            "learning_rate": 1e-3,
            "recurrence_logging_steps": 2,
            "train_sampling_strategy": "sequential",
            **options,
        }
    )
    torch.manual_seed(0)
    trainer = RecurrentTrainer(
        model or tiny_reader(),
        arguments,
        train_dataset=rows * 4,
        data_collator=Collator(processor),
    )
    add_callbacks(trainer, config, processor, examples)
    trainer.train()
    return trainer


def samples(**options):
    return CallbacksConfig(media_samples=MediaSamplesConfig(**{"num_steps": [1, 4], "max_new_tokens": 4, **options}))


def answer(model, example, num_steps, max_new_tokens):
    """Greedy decoding by whole forward passes, without `generate`."""
    processor = tiny_processor()
    media, tokenizer = processor.collate_media(example["media"]), processor.tokenizer
    ids = torch.tensor([example["prompt_ids"]])
    length = ids.shape[1]
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(ids, **media, num_steps=num_steps).logits[0, -1]
        logits[[model.config.image_token_id, model.config.audio_token_id]] = -torch.inf
        ids = torch.cat((ids, logits.argmax().view(1, 1)), dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[0, length:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with samples of two sources: its folder, its trainer, its examples."""
    folder, processor = tmp_path_factory.mktemp("run"), tiny_processor()
    examples = {
        "scenes": [
            example(processor, [IMAGE], "", "a square"),
            example(processor, [{"type": "image", "image": picture(seed=5)}, IMAGE], "how many?", "two"),
            example(processor, [IMAGE], "never shown", "none"),
        ],
        "digits": [example(processor, [AUDIO, IMAGE], "what?", "one", waveforms=[AUDIO["audio"]])],
    }
    return folder, train(folder, samples(every_steps=2), examples), examples


def test_prompt_reference_and_answers_stand_in_tensorboard(run):
    """With the weights of that moment, at each depth, of as many examples as asked for."""
    folder, trainer, examples = run
    model = trainer.model.eval()
    for name, it in (
        ("scenes_0", examples["scenes"][0]),
        ("scenes_1", examples["scenes"][1]),
        ("digits_0", examples["digits"][0]),
    ):
        found = texts(folder, f"samples/{name}")
        assert list(found) == [2, 3]
        lines = [f"prompt: {it['prompt']}", f"reference: {it['answer']}"]
        lines += [f"{depth} steps: {answer(model, it, depth, 4)}" for depth in (1, 4)]
        assert found[3] == "\n".join(f"    {line}" for line in "\n".join(lines).splitlines())
    assert not any("scenes_2" in tag for tag in events(folder).Tags()["tensors"])


def test_pictures_stand_beside_them_as_they_are(run):
    """Pictures of 32 x 16 are not resized, so that the model sees their pixels."""
    found = events(run[0])
    for tag, seed in (("scenes_0/image_0", 1), ("scenes_1/image_0", 5), ("scenes_1/image_1", 1)):
        (event,) = found.Images(f"train/samples/{tag}")
        shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"), dtype=int)
        assert shown.shape == (16, 32, 3) and np.abs(shown - np.asarray(picture(seed=seed))).max() <= 1


def test_sounds_can_be_heard_and_seen(run):
    """A player with the samples at their rate, and a spectrogram."""
    found = events(run[0])
    (event,) = found.Audio("train/samples/digits_0/audio_0")
    heard, rate = soundfile.read(io.BytesIO(event.encoded_audio_string), dtype="float32")
    assert rate == event.sample_rate == 8000
    np.testing.assert_allclose(heard, AUDIO["audio"], atol=2 / 2**15)
    (event,) = found.Images("train/samples/digits_0/spectrogram_0")
    features = run[2]["digits"][0]["media"]["audio"][0]
    assert (event.height, event.width) == tuple(features.shape)


def test_sounds_of_sources_can_be_heard(tmp_path):
    """Examples as the data give them: what the task plays, at the processor's rate."""
    source = SourceConfig("generated", task="melodies", num_rows=4, difficulty=[1, 1])
    data = DataConfig(train=[source], block_size=256)
    train(tmp_path, samples(num_examples=1), {"melodies": build_examples(source, data, tiny_processor(), 2)})
    (event,) = events(tmp_path).Audio("train/samples/melodies_0/audio_0")
    heard, _ = soundfile.read(io.BytesIO(event.encoded_audio_string), dtype="float32")
    medium = generate_row(get_task("melodies"), (1, 1), "test", (0, 0), 0)["medium"]
    played, rate = get_task("melodies").render(medium)
    assert rate == 8000 and len(heard) == len(played)
    np.testing.assert_allclose(heard, played, atol=2 / 2**15)


def test_low_tones_stand_at_the_bottom_of_a_spectrogram():
    time = torch.arange(8000) / 8000
    features = [
        tiny_processor().preprocess_item("audio", torch.sin(2 * torch.pi * tone * time).numpy()) for tone in (200, 3000)
    ]
    low, high = (spectrogram_image(it)[0].mean(dim=1).argmax().item() for it in features)
    assert high < 5 < 12 < low
    assert spectrogram_image(features[0]).min() == 0 and spectrogram_image(features[0]).max() == 1
    assert torch.isfinite(spectrogram_image(torch.zeros(4, 5))).all()  # silence


def test_samples_do_not_disturb_the_training(run, tmp_path):
    without = train(tmp_path, samples(), None)
    for name, parameter in without.model.state_dict().items():
        assert torch.equal(parameter, run[1].model.state_dict()[name]), name
    assert not any("samples" in tag for tag in events(tmp_path).Tags()["tensors"])


def test_losses_by_modality_and_the_watch_over_depth(run):
    """With a model that reads media: as for text, and the figures of each."""
    entries = [entry for entry in run[1].state.log_history if "loss" in entry]
    assert {"depth_gap", "token_correlation", "state_change_03"} <= entries[0].keys()
    assert {name for entry in entries for name in entry if name.startswith("loss_")} >= {
        "loss_text",
        "loss_image",
        "loss_audio",
    }
    assert all(entry["core_steps_per_second"] > 0 for entry in entries)


def test_none_are_asked_for(tmp_path):
    examples = {"scenes": [example(tiny_processor(), [IMAGE], "", "a")]}
    train(tmp_path, samples(num_examples=0), examples)
    assert not any("samples" in tag for tag in events(tmp_path).Tags()["tensors"])


def test_without_tensorboard_the_answers_are_logged(tmp_path, caplog):
    examples = {"scenes": [example(tiny_processor(), [IMAGE], "", "a")]}
    with caplog.at_level(logging.INFO, logger="callbacks.media_samples"):
        trainer = train(tmp_path, samples(), examples, report_to="none")
    written = answer(trainer.model.eval(), examples["scenes"][0], 4, 4)
    assert f"step 3, samples/scenes_0, 4 steps: {written!r}" in caplog.text


def test_a_model_without_a_core_answers_once(tmp_path):
    examples = {"scenes": [example(tiny_processor(), [IMAGE], "", "a")]}
    train(tmp_path, samples(), examples, model=tiny_reader(num_core_layers=0))
    (found,) = texts(tmp_path, "samples/scenes_0").values()
    assert "answer: " in found and "steps" not in found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": -1}, "media_samples.num_examples is -1, must be at least 0"),
        ({"every_steps": 0}, "media_samples.every_steps is 0, must be at least 1"),
        ({"max_new_tokens": 0}, "media_samples.max_new_tokens is 0"),
        ({"num_steps": []}, r"media_samples.num_steps is \[\], must hold at least one depth"),
        ({"num_steps": [0]}, r"media_samples.num_steps is \[0\]"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        MediaSamplesConfig(**options)


def test_a_model_of_text_answers_questions():
    """Against greedy decoding by hand."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = tokenizer.encode("the cat")
    callback = MediaSamplesCallback(MediaSamplesConfig(max_new_tokens=5), tokenizer, {}, None)
    answered = callback.answer(model, {"prompt_ids": ids, "media": {}}, depth=2)
    written = list(ids)
    for _ in range(5):
        written.append(model(torch.tensor([written]), num_steps=2).logits[0, -1].argmax().item())
    assert answered == tokenizer.decode(written[len(ids) :], skip_special_tokens=True)


def test_the_parts_that_read_media_have_sizes_of_their_own():
    model = tiny_reader()
    parts = part_sizes(model)
    for name, reader in model.model.readers.items():
        for part, module in (("encoder", reader.encoder), ("projector", reader.projector)):
            assert parts[f"{part} of {name}"].parameters == sum(it.numel() for it in module.parameters())
    assert sum(part.parameters for part in parts.values()) == sum(it.numel() for it in model.parameters())
    assert parts["core"].passes == 3 and parts["encoder of image"].passes == 1
