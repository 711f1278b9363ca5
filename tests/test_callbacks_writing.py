"""Pictures and sounds that a model writes during training, inside real, tiny training runs on the CPU."""

import io
import logging

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image
from transformers import TrainerState

from callbacks import CallbacksConfig, GeneratedMediaConfig, MediaSamplesConfig, add_callbacks
from callbacks.generated_media import GeneratedMediaCallback, Sample, grid_of, size_by_part
from dataset_loading import Collator, DataConfig, SourceConfig, build_datasets, build_examples
from tests.test_callbacks import events, texts
from tests.tiny_artist import CODES, artist_processor, tiny_artist, write_codes
from trainers import RecurrentTrainer, RecurrentTrainingArguments

SOURCES = [
    SourceConfig("generated", task="drawings", num_rows=30, direction=["text -> image", "image -> text"]),
    SourceConfig("generated", task="tunes", num_rows=30, difficulty=[2, 2]),
]
DATA = DataConfig(train=SOURCES, block_size=256)


@pytest.fixture(scope="module")
def examples():
    return {source.label: build_examples(source, DATA, artist_processor(), 4, seed=1) for source in SOURCES}


def train(folder, config, examples, image=None, **options):
    processor = artist_processor(image)
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
            **options,
        }
    )
    torch.manual_seed(0)
    trainer = RecurrentTrainer(
        tiny_artist(image=image),
        arguments,
        train_dataset=build_datasets(DATA, processor, seed=1).train,
        data_collator=Collator(processor),
    )
    add_callbacks(trainer, config, processor, examples)
    trainer.train()
    return trainer


def samples(**options):
    return CallbacksConfig(
        media_samples=MediaSamplesConfig(num_examples=1, num_steps=[2], max_new_tokens=3),
        generated_samples=GeneratedMediaConfig(**{"num_examples": 2, "num_steps": [1, 4], "every_steps": 2, **options}),
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory, examples):
    """A run with samples of two sources: its folder, and its trainer."""
    folder = tmp_path_factory.mktemp("run")
    return folder, train(folder, samples(), examples)


def written(trainer, example, depth, seed):
    """What the model writes with the weights it has now."""
    ids = torch.tensor([example["prompt_ids"]])
    kind = example["modality"].removeprefix("written_")
    return trainer.model.eval().generate(ids, generation_mode=kind, num_steps=depth, flow_seeds=[seed])


def drawn(examples):
    return [row for row in examples["drawings"] if row["modality"] == "written_image"]


def test_grids_have_the_reference_and_what_is_written_at_each_depth(run, examples):
    """After steps 2 and 3; with the weights of that moment."""
    folder, trainer = run
    found = events(folder).Images("train/generated_samples/drawings_image")
    assert [event.step for event in found] == [2, 3]
    grid = np.asarray(Image.open(io.BytesIO(found[-1].encoded_image_string)).convert("RGB"))
    assert grid.shape == (2 * 32 + 2, 3 * 32 + 4, 3)
    for line, example in enumerate(drawn(examples)):
        cells = [grid[34 * line : 34 * line + 32, 34 * column : 34 * column + 32] for column in range(3)]
        np.testing.assert_array_equal(cells[0], np.asarray(example["reference"]))
        for cell, depth in zip(cells[1:], (1, 4), strict=True):
            (picture,) = written(trainer, example, depth, line).images
            np.testing.assert_array_equal(cell, np.asarray(picture))
    assert not np.array_equal(grid[:32, 34:66], grid[:32, 68:])


def test_prompts_are_listed_and_answers_in_text_are_elsewhere(run, examples):
    (_, text) = texts(run[0], "generated_samples/drawings_image").values()
    assert text.splitlines() == [f"    {line}: {row['prompt']}" for line, row in enumerate(drawn(examples))]
    assert set(texts(run[0], "samples/drawings_0")) == {3}
    assert not any("samples/tunes_0" in tag and "written" not in tag for tag in events(run[0]).Tags()["tensors"])


def test_sounds_can_be_heard_and_seen(run, examples):
    """The reference when training begins; what is written later, within -1 and 1."""
    folder, trainer = run
    found = events(folder)
    samples_of_it, rate = examples["tunes"][1]["reference"]
    (event,) = found.Audio("train/generated_samples/tunes_audio_1/reference")
    heard, _ = soundfile.read(io.BytesIO(event.encoded_audio_string), dtype="float32")
    assert event.step == 0 and event.sample_rate == rate == 8000
    np.testing.assert_allclose(heard, samples_of_it, atol=2 / 2**15)
    event = found.Audio("train/generated_samples/tunes_audio_1/steps_4")[-1]
    heard, _ = soundfile.read(io.BytesIO(event.encoded_audio_string), dtype="float32")
    (expected,) = written(trainer, examples["tunes"][1], 4, 1).audio
    np.testing.assert_allclose(heard, expected.clamp(-1, 1).numpy(), atol=2 / 2**15)
    assert len(found.Images("train/generated_samples/tunes_audio")) == 2


def test_the_size_of_latents_is_logged_by_part(run, examples):
    """Patches of 8 x 8 pixels of -2 to 2; of 16 places the parts have 6, 5 and 5."""
    folder, trainer = run
    ratios = []
    for part in (slice(0, 6), slice(6, 11), slice(11, 16)):
        sizes = []
        for source in ("reference", "written"):
            pixels = []
            for seed, example in enumerate(drawn(examples)):
                picture = (
                    example["reference"] if source == "reference" else written(trainer, example, 4, seed).images[0]
                )
                values = torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 127.5 - 1
                patches = values.unfold(1, 8, 8).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).reshape(16, -1)
                pixels.append(2 * patches[part])
            sizes.append(torch.cat(pixels).square().mean().sqrt().item())
        ratios.append(sizes[1] / sizes[0])
    for part, ratio in enumerate(ratios, start=1):
        tag = f"train/generated_samples/drawings_image/latents_{part}_of_3_steps_4"
        assert events(folder).Scalars(tag)[-1].value == pytest.approx(ratio, rel=0.02)


def test_latents_that_drift_raise_an_alarm(tmp_path, examples, caplog):
    one = {"drawings": drawn(examples)[:1]}
    with caplog.at_level(logging.WARNING, logger="callbacks.generated_media"):
        train(tmp_path / "strict", samples(largest_drift=1.000001, num_steps=[2], every_steps=5), one)
        alarms = [record.getMessage() for record in caplog.records if "drifts" in record.getMessage()]
        caplog.clear()
        train(tmp_path / "lax", samples(largest_drift=1e6, num_steps=[2], every_steps=5), one)
    assert len(alarms) == 3 and alarms[0].startswith("step 3: what is written for drawings_image at depth 2 drifts: in")
    assert not any("drifts" in record.getMessage() for record in caplog.records)


def test_images_that_are_tokens(tmp_path, monkeypatch):
    """Drawn at a temperature of 1, from a seed of their own; black where they are no image, as at first. Codes have no
    size that could drift.
    """
    source = SourceConfig("generated", task="drawings", num_rows=30, direction="text -> image")
    examples = {"drawings": build_examples(source, DATA, artist_processor(CODES), 2, seed=1)}
    config = samples(num_steps=[2], every_steps=2)
    train(tmp_path / "untrained", config, examples, image=CODES)
    write_codes(monkeypatch)
    trainer = train(tmp_path / "trained", config, examples, image=CODES)

    grids = {}
    for name in ("untrained", "trained"):
        found = events(tmp_path / name)
        event = found.Images("train/generated_samples/drawings_image")[-1]
        grids[name] = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB"))
        assert not any("latents" in name for name in found.Tags()["scalars"])
    model = trainer.model.eval()
    for line, example in enumerate(examples["drawings"]):
        place = slice(34 * line, 34 * line + 32), slice(34, 66)
        ids = torch.tensor([example["prompt_ids"]])
        torch.manual_seed(line)
        drawn = model.generate(ids, num_steps=2, do_sample=True, top_k=0, max_new_tokens=17)[:, ids.shape[1] :]
        (picture,) = model.decode_image_tokens(drawn)
        np.testing.assert_array_equal(grids["trained"][place], np.asarray(picture))
        assert not grids["untrained"][place].any()


def test_samples_do_not_disturb_the_training(run, tmp_path):
    without = train(tmp_path, CallbacksConfig(), None)
    for name, parameter in without.model.state_dict().items():
        assert torch.equal(parameter, run[1].model.state_dict()[name]), name
    assert not any("samples" in tag for tag in events(tmp_path).Tags()["tensors"])


def test_none_are_asked_for(tmp_path, examples):
    config = CallbacksConfig(
        media_samples=MediaSamplesConfig(num_examples=0), generated_samples=GeneratedMediaConfig(num_examples=0)
    )
    train(tmp_path, config, examples)
    assert not any(
        "samples" in tag for tag in [*events(tmp_path).Tags()["tensors"], *events(tmp_path).Tags()["images"]]
    )


def test_grids_hold_cells_of_several_sizes():
    wide, high = np.full((2, 5, 3), 10, dtype=np.uint8), np.full((4, 3, 3), 20, dtype=np.uint8)
    grid = grid_of([[wide, high], [None, wide]])
    assert grid.shape == (2 * 4 + 2, 2 * 5 + 2, 3)
    assert (grid[:2, :5] == 10).all() and (grid[:4, 7:10] == 20).all() and (grid[6:8, 7:] == 10).all()
    assert (grid[6:, :5] == 0).all() and (grid[4:6] == 128).all() and (grid[2:4, :5] == 128).all()


def drifts_of(example, target, factor):
    """By name, of latents of which each number is `factor`, for a sound of three places; and the alarms."""
    callback = GeneratedMediaCallback(GeneratedMediaConfig(), artist_processor(), {}, None)
    rows = [{**example, "targets": {"written_audio": [target]}}]
    written = {None: [Sample(None, torch.full((3, 64), factor))]}
    return dict(callback.drifts("tunes", rows, written, tiny_artist(), TrainerState()))


@pytest.mark.parametrize(("factor", "is_drift"), [(1.9, False), (2.1, True), (0.51, False), (-0.49, True)])
def test_latents_drift_when_they_are_twice_or_half_as_large(examples, caplog, factor, is_drift):
    with caplog.at_level(logging.WARNING, logger="callbacks.generated_media"):
        ratios = drifts_of(examples["tunes"][1], torch.ones(16, 12), factor)
    assert list(ratios.values()) == pytest.approx([abs(factor)] * 3)
    assert len(caplog.records) == (3 if is_drift else 0)


def test_parts_that_no_reference_has_are_not_compared(examples):
    """The reference has two places."""
    ratios = drifts_of(examples["tunes"][1], torch.ones(16, 8), 1.0)
    assert list(ratios) == [f"generated_samples/tunes/latents_{part}_of_3" for part in (1, 2)]


def test_sizes_are_root_mean_squares_of_what_there_is():
    first, second = torch.full((7, 2), 3.0), torch.tensor([[1.0, -1.0]])
    assert size_by_part([first]) == {1: 3.0, 2: 3.0, 3: 3.0}
    assert size_by_part([second]) == {1: 1.0}  # fewer places than parts
    assert size_by_part([first, second])[1] == pytest.approx(((6 * 9 + 2) / 8) ** 0.5)
    assert size_by_part([]) == {}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": -1}, "generated_samples.num_examples is -1, must be at least 0"),
        ({"every_steps": 0}, "generated_samples.every_steps is 0, must be at least 1"),
        ({"num_steps": []}, r"generated_samples.num_steps is \[\], must hold at least one depth"),
        ({"largest_drift": 1.0}, "generated_samples.largest_drift is 1.0, must be above 1"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        GeneratedMediaConfig(**options)
