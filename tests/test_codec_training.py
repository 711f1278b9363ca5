"""Training of codecs: their data, their trainer, and `pretrain.py` from YAML to scores."""

import json
import math
import re

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from transformers import AutoFeatureExtractor, AutoModel, set_seed

import pretrain
from configs import load_config
from dataset_loading import DataConfig, SourceConfig
from dataset_loading.codec_data import build_codec_datasets
from evaluation.__main__ import main as evaluate
from evaluation.reconstruction import ImageScores
from model import MegaTransformerImageAutoencoder, codec_media
from tests.test_trainer import Interrupt, losses
from tests.tiny_codecs import AUTOENCODER, VOCODER, pictures, tiny_autoencoder, tiny_vocoder
from trainers import ParameterGroup, ReconstructionTrainer, RecurrentTrainingArguments, find_resume_point
from trainers.objectives import ObjectiveOptions

SCENES = SourceConfig("generated", task="scenes", num_rows=24, difficulty=[1, 1])
IMAGES = codec_media(tiny_autoencoder().config)
SOUNDS = codec_media(tiny_vocoder().config)


# ----------------------------------------------------------------------------------------------------------------- data


def write_folder(folder, files) -> str:
    """Files with a metadata.jsonl, and one row that is text alone."""
    folder.mkdir()
    lines = []
    for name, content in files.items():
        (folder / name).write_bytes(b"") if content is None else content(folder / name)
        lines.append(json.dumps({"file_name": name, "text": f"this is {name}"}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return str(folder)


def picture_file(colour, size=(20, 30)):
    return lambda path: Image.new("RGB", size, colour).save(path)


def sound_file(samples, rate=8000):
    return lambda path: soundfile.write(path, samples, rate)


def test_pictures_without_their_texts(tmp_path):
    """The square in the middle in one size, from -1 to 1; damaged files are skipped and counted."""
    files = {f"{number}.png": picture_file((255, 0, 10 * number)) for number in range(8)}
    path = write_folder(tmp_path / "photos", {**files, "damaged.png": None})
    train, validation = build_codec_datasets(
        DataConfig(train=[SourceConfig("imagefolder", path=path)], validation_fraction=0.3), IMAGES
    )
    (held_out,) = validation.values()
    assert len(train) + len(held_out) == 8 and len(held_out) >= 1
    colours = [float(row[2, 0, 0]) for rows in (train, held_out) for row in (rows[i] for i in range(len(rows)))]
    assert sorted(colours) == pytest.approx([10 * number / 127.5 - 1 for number in range(8)])
    assert train[0].shape == (3, 16, 16) and train[0][:2].unique().tolist() == [-1, 1]
    assert IMAGES.collate_codec_inputs([train[0], train[1]])["pixel_values"].shape == (2, 3, 16, 16)
    with pytest.raises(ValueError, match=r"damaged\.png"):
        build_codec_datasets(DataConfig(train=[SourceConfig("imagefolder", path=path)], max_invalid_rows=0), IMAGES)


def test_clips_are_parts_of_recordings(tmp_path):
    """Others in each epoch, the same in each run; for validation recordings are whole."""
    samples = np.linspace(-1, 1, 6000, dtype=np.float32)
    path = write_folder(tmp_path / "sounds", {"long.wav": sound_file(samples), "short.wav": sound_file(samples[:700])})
    sources = [SourceConfig("audiofolder", path=path)]
    other = write_folder(tmp_path / "others", {"other.wav": sound_file(0.5 * samples[:5000])})
    config = DataConfig(train=sources, validation=[SourceConfig("audiofolder", path=other)])
    train, validation = build_codec_datasets(config, SOUNDS, seed=3)
    long, short = train[0], train[1]
    assert len(long) == len(short) == 1600
    torch.testing.assert_close(long.diff(), torch.full((1599,), 2 / 5999), atol=1e-4, rtol=0)  # nothing left out
    assert short[700:].abs().max() == 0 and float(short[0]) == pytest.approx(-1, abs=1e-3)
    assert torch.equal(train[0], long)
    train.set_epoch(1)
    assert not torch.equal(train[0], long)
    assert torch.equal(build_codec_datasets(config, SOUNDS, seed=3)[0][0], long)
    (whole,) = validation.values()
    assert len(whole[0]) == 5000
    batch = SOUNDS.collate_codec_inputs([whole[0], short])
    assert batch["waveforms"].shape == (2, 5000) and batch["lengths"].tolist() == [5000, 1600]
    assert batch["waveforms"][1, 1600:].abs().max() == 0


def test_recordings_may_be_louder_in_training_alone(tmp_path):
    path = write_folder(tmp_path / "sounds", {f"{i}.wav": sound_file(np.full(2000, 0.1 + i / 100)) for i in range(20)})
    config = DataConfig(train=[SourceConfig("audiofolder", path=path)], validation_fraction=0.3)
    config.augmentation.audio.volume = 6.0
    train, validation = build_codec_datasets(config, SOUNDS)
    train_levels = [float(train[number].max()) * 100 % 1 for number in range(len(train))]
    assert max(min(level, 1 - level) for level in train_levels) > 0.05
    (held_out,) = validation.values()
    levels = [float(held_out[number].max()) * 100 for number in range(len(held_out))]
    assert levels == pytest.approx([round(level) for level in levels], abs=0.01)


def test_sources_are_mixed_and_generated():
    config = DataConfig(
        train=[SCENES, SourceConfig("generated", name="more", task="scenes", num_rows=8, weight=0.5)],
        validation=[SourceConfig("generated", task="scenes", num_rows=3)],
    )
    train, validation = build_codec_datasets(config, IMAGES, batch_size=30)
    assert len(train) == 36 and train[0].shape == (3, 16, 16)
    assert {name: len(rows) for name, rows in validation.items()} == {"scenes": 3}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "generated", "task": "addition"}, "source 'addition' has no media"),
        ({"kind": "hub", "path": "x", "image_column": "image", "streaming": True}, "'x' is streaming"),
        ({"kind": "generated", "task": "melodies", "num_rows": 2}, "no usable media of type 'image' in 2 rows"),
    ],
)
def test_sources_without_such_media_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        build_codec_datasets(DataConfig(train=[SourceConfig(**source)], validation=[SCENES]), IMAGES)


def test_too_little_data_is_refused():
    with pytest.raises(ValueError, match="24 media of type 'image', less than one batch of 25"):
        build_codec_datasets(DataConfig(train=[SCENES]), IMAGES, batch_size=25)


def test_files_that_vanish_are_replaced(tmp_path):
    files = {f"{number}.png": picture_file((number, 0, 0)) for number in range(4)}
    path = write_folder(tmp_path / "photos", files)
    config = DataConfig(train=[SourceConfig("imagefolder", path=path)], validation=[SCENES])
    train, _ = build_codec_datasets(config, IMAGES)
    second = train[1]
    (tmp_path / "photos" / "0.png").unlink()
    assert torch.equal(train[0], second)
    for number in range(1, 4):
        (tmp_path / "photos" / f"{number}.png").unlink()
    with pytest.raises(ValueError, match="no medium of 'photos' can be read any more"):
        train[0]


# -------------------------------------------------------------------------------------------------------------- trainer


def build_trainer(folder, model=None, **options) -> ReconstructionTrainer:
    args = RecurrentTrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 6,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **options,
        }
    )
    set_seed(0)
    return ReconstructionTrainer(
        model=(model or tiny_autoencoder(latent_noise=0.3)).train(),
        args=args,
        train_dataset=list(pictures(24)),
        data_collator=IMAGES.collate_codec_inputs,
        score=ImageScores(),
    )


def test_objectives_are_refused_for_a_codec(tmp_path):
    with pytest.raises(ValueError, match=r"training\.objective is about .* and codecs have none; leave"):
        build_trainer(tmp_path / "run", objective=ObjectiveOptions("full"))
    assert not (tmp_path / "run").exists()


def test_resumed_equals_uninterrupted_bitwise(tmp_path):
    """With noise on latents and a discriminator that joins on the way."""
    options = {"latent_noise": 0.3, "adversarial_weight": 0.1, "adversarial_start": 2}
    whole = build_trainer(tmp_path / "whole", tiny_autoencoder(**options))
    whole.train()
    first = build_trainer(tmp_path / "cut", tiny_autoencoder(**options))
    first.add_callback(Interrupt(3))
    first.train()
    second = build_trainer(tmp_path / "cut", tiny_autoencoder(**options), resume_from_checkpoint="true")
    torch.manual_seed(123)
    second.train(resume_from_checkpoint=find_resume_point(second.args))
    assert losses(second) == losses(whole) and len(losses(whole)) == 6
    for ours, theirs in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    logs = [entry for entry in whole.state.log_history if "loss" in entry]
    assert ["loss_generator" in entry for entry in logs] == [False, False, True, True, True, True]


def test_the_parts_of_the_loss_are_logged(tmp_path):
    trainer = build_trainer(tmp_path, tiny_autoencoder(gradient_loss_weight=2.0), logging_steps=3)
    trainer.train()
    for entry in (entry for entry in trainer.state.log_history if "loss" in entry):
        assert entry["loss"] == pytest.approx(entry["loss_pixels"] + 2 * entry["loss_gradients"], rel=1e-3)


def test_accumulation_equals_one_large_batch(tmp_path):
    weights = []
    for rows in (4, 2):
        options = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 4 // rows, "optim": "sgd"}
        trainer = build_trainer(
            tmp_path, tiny_autoencoder(latent_noise=0.0), **options, train_sampling_strategy="sequential"
        )
        trainer.train()
        weights.append(list(trainer.model.parameters()))
    for ours, theirs in zip(*weights, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-4)


def test_groups_freezing_and_muon(tmp_path):
    group = ParameterGroup("decoder.*", learning_rate=1e-4)
    trainer = build_trainer(tmp_path, freeze=["encoder.*"], parameter_groups=[group], muon_learning_rate=1e-3)
    before = {name: parameter.clone() for name, parameter in trainer.model.named_parameters()}
    trainer.train()
    for name, parameter in trainer.model.named_parameters():
        assert torch.equal(parameter, before[name]) == name.startswith("encoder"), name
    assert {group["is_muon"] for group in trainer.optimizer.param_groups} == {True, False}
    with pytest.raises(ValueError, match=r"nothing\.\*"):
        build_trainer(tmp_path, freeze=["nothing.*"])


def test_what_is_left_behind_is_the_average_if_one_is_asked_for(tmp_path):
    runs = []
    for decay in (None, 0.5):
        runs.append(build_trainer(tmp_path, ema_decay=decay))
        runs[-1].train()
    assert losses(runs[0]) == losses(runs[1])
    for last, average in zip(*(trainer.model.parameters() for trainer in runs), strict=True):
        assert not torch.equal(last, average)


# ---------------------------------------------------------------------------------------------------------- the command

RUNS = {
    "autoencoder": {
        "trainer": "reconstruction",
        "model": {"model_type": "megatransformer_image_autoencoder", **AUTOENCODER},
        "data": {
            "train": [{"kind": "generated", "task": "scenes", "num_rows": 120, "difficulty": [1, 1]}],
            "validation": [{"kind": "generated", "task": "scenes", "num_rows": 6, "difficulty": [1, 1]}],
        },
    },
    "vocoder": {
        "trainer": "reconstruction",
        "model": {"model_type": "megatransformer_vocoder", **VOCODER},
        "data": {
            "train": [{"kind": "generated", "task": "melodies", "num_rows": 12, "difficulty": [1, 1]}],
            "validation": [{"kind": "generated", "task": "melodies", "num_rows": 3, "difficulty": [1, 1]}],
        },
    },
}
TRAINING = {
    "max_steps": 8,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 4,
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}


def write_run(folder, name, **sections):
    run = {**RUNS[name], "training": {**TRAINING, "output_dir": str(folder / "out")}, **sections}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    return ["--config", str(folder / "run.yaml")]


@pytest.mark.parametrize("name", RUNS)
def test_from_yaml_to_scores(tmp_path, capsys, name):
    assert pretrain.main(write_run(tmp_path, name)) == 0
    out = tmp_path / "out"
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    logged = [entry["loss"] for entry in history if "loss" in entry]
    assert len(logged) == 8 and logged[-1] < logged[0]
    source, scores = {
        "autoencoder": ("scenes", ("psnr", "ssim")),
        "vocoder": ("melodies", ("mel_l1", "mr_stft", "si_sdr")),
    }[name]
    evaluated = [entry for entry in history if f"eval_{source}_loss" in entry]
    assert len(evaluated) == 2 and all(f"eval_{source}_{score}" in entry for entry in evaluated for score in scores)
    assert type(AutoModel.from_pretrained(out)).__name__ in (
        "MegaTransformerImageAutoencoder",
        "MegaTransformerVocoder",
    )
    if name == "vocoder":
        extractor = AutoFeatureExtractor.from_pretrained(out)
        assert (extractor.n_fft, extractor.hop_length, extractor.feature_size) == (256, 80, 64)
        return
    capsys.readouterr()
    assert evaluate([str(out), "--limit", "4", "--device", "cpu"]) == 0
    table = capsys.readouterr().out
    assert re.search(r"\| scenes \| *autoencoder, 96 of 768 numbers \| +\d+\.\d{3} \| +\d\.\d{3} \|", table), table
    assert "96 principal components" in table


def test_scores_beside_griffin_lim(tmp_path, capsys):
    """A vocoder that knows nothing yet, with the run's configuration beside it."""
    config, out = write_run(tmp_path, "vocoder"), tmp_path / "out"
    load_config(config).save(out / "config.yaml")
    tiny_vocoder().save_pretrained(out)
    assert evaluate([str(out), "--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = {
        cells[2].strip(): dict(zip(titles, map(float, cells[3:-1]), strict=True))
        for titles in [[cell.strip() for cell in lines[0].split("|")[3:-1]]]
        for cells in (line.split("|") for line in lines[2:])
    }
    assert rows["Griffin-Lim"]["mel_l1"] < 0.5 * rows["vocoder"]["mel_l1"]
    for scores in rows.values():
        assert scores["x real time"] > 1 and math.isfinite(scores["si_sdr"])


BAD = {
    "trainer": (["--trainer", "pretrain"], "trainer: 'pretrain' trains no megatransformer_image_autoencoder"),
    "kind of media": (["--data.train", "[{kind: generated, task: stories}]"], "source 'stories' has no media"),
    "sizes": (["--model.image_size", "18"], "image_size (18) must be a multiple of patch_size (4)"),
    "channels": (["--model.num_channels", "1"], "num_channels is 1"),
    "key": (["--model.latent_sise", "1"], "did you mean latent_size?"),
    "callbacks": (["--callbacks.stability.core_steps", "5"], "callbacks.stability is set, but nothing reads it where"),
}


@pytest.mark.parametrize(("flags", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line_and_exit_code_2(tmp_path, capsys, flags, message):
    with pytest.raises(SystemExit) as exit:
        pretrain.main([*write_run(tmp_path, "autoencoder"), *flags])
    error = capsys.readouterr().err
    assert exit.value.code == 2 and re.fullmatch(r"error: [^\n]+", error.splitlines()[-1]) and message in error
    assert not (tmp_path / "out").exists()


def test_a_language_model_has_another_trainer(capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--trainer", "reconstruction", "--dry-run"])
    assert "trainer: 'reconstruction' trains no megatransformer_text; set trainer: pretrain" in capsys.readouterr().err


def test_a_dry_run_says_how_large_it_is(tmp_path, capsys):
    assert pretrain.main([*write_run(tmp_path, "autoencoder"), "--dry-run"]) == 0
    text = capsys.readouterr().out
    parameters = sum(parameter.numel() for parameter in tiny_autoencoder().parameters())
    assert text.startswith("| part |") and f"| all | {parameters:,} |" in text and "layers" not in text


def test_options_of_language_models_are_refused_for_a_codec(tmp_path, capsys):
    config, out = write_run(tmp_path, "autoencoder"), tmp_path / "out"
    load_config(config).save(out / "config.yaml")
    tiny_autoencoder().save_pretrained(out)
    with pytest.raises(SystemExit):
        evaluate([str(out), "--num-steps", "4"])
    assert "error: --num-steps is for language models, and this is a codec: leave it out." in capsys.readouterr().err


def test_weights_that_do_not_fit_are_refused(tmp_path, capsys):
    config, out = write_run(tmp_path, "autoencoder"), tmp_path / "out"
    load_config(config).save(out / "config.yaml")
    tiny_autoencoder(num_decoder_layers=2).save_pretrained(out)
    weights = MegaTransformerImageAutoencoder.from_pretrained(out).state_dict()
    weights.pop("decoder.head.bias")
    tiny_autoencoder(num_decoder_layers=2).save_pretrained(out, state_dict=weights)
    with pytest.raises(SystemExit):
        evaluate([str(out)])
    assert "lacks 1 of the weights (decoder.head.bias)" in capsys.readouterr().err
