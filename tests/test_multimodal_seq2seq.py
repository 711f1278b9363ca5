"""Sequence to sequence with images and audio: what is read stands in the source, what is written in the target, and
each way of computing it gives the same.
"""

import copy
import json
import textwrap

import pytest
import torch
import yaml

import pretrain
from dataset_loading import build_collator
from evaluation.__main__ import main as evaluate
from inference.generate import main as generate
from inference.loading import load_model
from model.depth import keyed_generator
from model.output_heads import TargetLatents
from tests.processes import run_python
from tests.tiny_media_run import ENCODER
from tests.tiny_multimodal_seq2seq import tiny_multimodal_seq2seq
from tests.tiny_writing import (
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    BEGIN,
    END,
    FIRST_TEXT,
    IMAGE,
    NULL,
    NUM_MELS,
    NUM_PATCHES,
    PAD,
    WRITTEN_AUDIO,
    WRITTEN_IMAGE,
    written_audio,
    written_image,
)

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def model():
    return tiny_multimodal_seq2seq()


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def sources() -> dict[str, torch.Tensor]:
    """A row of text with a clip of 6 frames (3 tokens), and one of an image (4 tokens) alone, which is padded."""
    ids = torch.tensor([[BEGIN, 20, *[AUDIO] * 3, 25, 31], [BEGIN, *[IMAGE] * 4, PAD, PAD]])
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "input_features": draw(1, NUM_MELS, 6, seed=1),
        "pixel_values": draw(1, 3, 8, 8, seed=2).clamp(-1, 1),
    }


def targets() -> dict[str, torch.Tensor]:
    """A row that writes a clip of 3 tokens between texts, and one that writes an image."""
    rows = [[BEGIN, 17, *written_audio(3), 30, END], [BEGIN, *written_image(), END]]
    ids = torch.full((2, max(map(len, rows))), PAD)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
    labels = ids[:, 1:].masked_fill(torch.isin(ids[:, 1:], torch.tensor([PAD, WRITTEN_IMAGE])), -100)
    return {
        "decoder_input_ids": ids[:, :-1],
        "labels": labels,
        "audio_targets": draw(1, NUM_MELS, 6, seed=3),
        "image_targets": draw(1, 3, 8, 8, seed=4).clamp(-1, 1),
    }


def row_of(batch: dict[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    """A row alone without its padding; the first has the audio, the second the images."""
    other = "pixel_values", "image_targets", "input_features", "audio_targets"
    media = other[2:] if row == 0 else other[:2]
    lengths = {"input_ids": 7 - 2 * row, "attention_mask": 7 - 2 * row, "decoder_input_ids": 8 - row, "labels": 8 - row}
    alone = {name: batch[name][row : row + 1, :length] for name, length in lengths.items() if name in batch}
    return alone | {name: batch[name] for name in media if name in batch}


def test_the_loss_is_its_formula(model):
    """Cross-entropy of tokens, and the loss of each latent from the state of the place before, by hand."""
    batch = sources() | targets()
    out = model(**batch, flow_seeds=torch.tensor([5, 6]))
    real = batch["labels"] != -100
    chosen = out.logits.log_softmax(-1).gather(-1, batch["labels"].clamp(min=0)[..., None]).squeeze(-1)
    expected = -chosen[real].mean()
    for name, token in (("audio", WRITTEN_AUDIO), ("image", WRITTEN_IMAGE)):
        head = model.model.writers[name]
        latents, _ = head.latents_of(batch)
        rows, columns = (batch["decoder_input_ids"] == token).nonzero(as_tuple=True)
        found = torch.zeros(2, *out.last_hidden_state.shape[1:])
        found[rows, columns - 1] = out.last_hidden_state[rows, columns - 1]  # and of no other place
        of_latents, places = out.target_losses[name]
        assert places.tolist() == rows.tolist()
        given = TargetLatents(latents, rows, columns, torch.arange(len(rows)))
        torch.testing.assert_close(head.losses(found, given, torch.tensor([5, 6])), of_latents)
        expected = expected + head.config.loss_weight * of_latents.mean()
    torch.testing.assert_close(out.loss, expected)


@torch.no_grad()
def test_rows_of_a_batch_are_the_rows_alone(model):
    batch, seeds = sources() | targets(), torch.tensor([5, 6])
    out = model(**batch, flow_seeds=seeds)
    for row in range(2):
        alone = model(**row_of(batch, row), flow_seeds=seeds[row : row + 1])
        length = alone.logits.shape[1]
        torch.testing.assert_close(out.logits[row, :length], alone.logits[0], **CLOSE)
        name = ("audio", "image")[row]
        torch.testing.assert_close(out.target_losses[name][0], alone.target_losses[name][0], **CLOSE)


def test_what_is_predicted_is_not_seen(model):
    """All of the target sees what is read, and no place a latent behind it: what changes with each of its frames."""
    batch = sources() | targets()
    with torch.no_grad():
        logits = model(**batch).logits[0]
        for frame in range(6):
            changed = {name: batch[name].clone() for name in ("input_features", "audio_targets")}
            for tensor in changed.values():
                tensor[..., frame] += 1
            heard = model(**batch | {"input_features": changed["input_features"]}).logits[0] != logits
            assert heard.any(-1).all()
            written = model(**batch | {"audio_targets": changed["audio_targets"]}).logits[0] != logits
            # Two frames are a latent; the first stands at place 3.
            assert written.any(-1).tolist() == [place >= 3 + frame // 2 for place in range(8)]


def test_every_parameter_learns(model):
    batch = sources() | targets()
    model.train()
    model(**batch).loss.backward()
    model.eval()
    missing = [name for name, it in model.named_parameters() if it.grad is None]
    model.zero_grad()
    assert missing == []


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"exit_criterion": "kl_divergence", "exit_threshold": 0.05}])
def test_text_is_written_as_without_a_cache(model, options):
    """Recognition: greedy tokens are the likeliest after a pass over all that stands before them."""
    out = model.generate(**sources(), max_new_tokens=5, return_dict_in_generate=True, **options)
    if options.get("num_beams"):
        uncached = model.generate(**sources(), max_new_tokens=5, use_cache=False, **options)
        assert out.sequences.tolist() == uncached.tolist()
        return
    for row, tokens in enumerate(out.sequences.tolist()):
        for place in range(1, tokens.index(END) if END in tokens else len(tokens)):
            depth = {} if not options else {"num_steps": int(out.exit_steps[row, place - 1])}
            read = torch.tensor([tokens[:place]])
            logits = model(**row_of(sources(), row), decoder_input_ids=read, **depth).logits[0, -1]
            if not options:  # with exits, tokens before have other depths
                logits[[*model.placeholder_ids]] = -torch.inf
                assert int(logits.argmax()) == tokens[place]
    assert out.exit_steps.shape == (2, out.sequences.shape[1] - 1)


def spoken(model, source: dict, guidance: float, seed: int, steps: int) -> list[torch.Tensor]:
    """The latents of a clip, each from a pass over everything before it, and one over the source without its text."""
    head, features = model.model.writers["audio"], {it: source[it] for it in source if it in ("input_features",)}
    is_text = source["input_ids"] >= FIRST_TEXT
    without = source | {"input_ids": source["input_ids"].masked_fill(is_text, NULL)}
    written, found = [BEGIN, AUDIO_START], []
    noise = torch.randn(head.num_places, head.codec.latent_size, generator=keyed_generator("sample", "audio", seed, 0))
    while len(found) < head.num_places:
        states = []
        for given in (source, without) if guidance != 1 else (source,):
            encoded = model.model.encode(
                given["input_ids"], given["attention_mask"], **{it: given[it] for it in features}
            )
            embeds = model.model.embed_tokens(torch.tensor([written]))
            for number, latent in enumerate(found):
                embeds[0, 2 + number] = head.embed(latent[None])[0]
            out = model.model(
                inputs_embeds=embeds, source=(encoded.last_hidden_state, given["attention_mask"]), use_cache=False
            )
            states.append(out.last_hidden_state[:, -1])
        logits = model.compute_logits(states[0])[0]
        if found and logits[WRITTEN_AUDIO] < logits[AUDIO_END]:
            break
        place = torch.tensor([len(found)])
        conditions = [head.condition(state, place) for state in states]
        away = [(torch.tensor([guidance - 1]), other) for other in conditions[1:]]
        latent = head.head.sample(conditions[0], noise[place], steps, 1.0, away)
        found.append(head.codec.project(latent)[0])
        written.append(WRITTEN_AUDIO)
    return found


@torch.no_grad()
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_sound_is_written_as_without_a_cache(model, guidance):
    """Synthesis, with classifier-free guidance over the source, beside a row that reads an image alone. In float64,
    since each latent is made from those before it, by which rounding grows a thousandfold.
    """
    model, given = copy.deepcopy(model).double(), sources()
    given = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    out = model.generate(**given, generation_mode="audio", flow_seeds=[7, 8], guidance_scale=guidance, num_flow_steps=3)
    expected = spoken(model, row_of(given, 0), guidance, seed=7, steps=3)
    torch.testing.assert_close(out.latents["audio"][0], torch.stack(expected), **CLOSE)
    assert out.sequences[0].tolist()[:3] == [BEGIN, AUDIO_START, WRITTEN_AUDIO]
    # The second row, whose image guidance leaves out too, is that row alone.
    alone = model.generate(
        **row_of(given, 1), generation_mode="audio", flow_seeds=[8], guidance_scale=guidance, num_flow_steps=3
    )
    torch.testing.assert_close(out.latents["audio"][1], alone.latents["audio"][0], **CLOSE)


@torch.no_grad()
def test_copies_images_and_exits(model):
    """Each prompt may be answered twice; images have their size; a place may take fewer steps."""
    options = {"generation_mode": "image", "flow_seeds": [1, 2, 3, 4], "num_return_sequences": 2, "do_sample": True}
    out = model.generate(**sources(), **options, exit_criterion="kl_divergence", velocity_threshold=0.5)
    assert [image.size for image in out.images] == [(8, 8)] * 4
    assert (out.sequences == WRITTEN_IMAGE).sum(1).tolist() == [NUM_PATCHES] * 4
    assert int(out.exit_steps.max()) <= 3
    one = model.generate(**row_of(sources(), 1), generation_mode="image", flow_seeds=[3])
    full = model.generate(**sources(), **options)
    torch.testing.assert_close(full.latents["image"][2], one.latents["image"][0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 32)}, "give input_ids, and no inputs_embeds"),
        ({"encoder_outputs": True, "guidance_scale": 2.0}, "give input_ids and no encoder_outputs, or guidance_scale"),
        (
            {"generation_mode": "text", "guidance_scale": 2.0, "input_ids": torch.ones(1, 3).long()},
            "guidance_scale of texts",
        ),
    ],
)
def test_what_guidance_cannot_have_is_refused(model, change, message):
    given = {"generation_mode": "audio", "max_new_tokens": 6, **change}
    if given.get("encoder_outputs"):
        given["encoder_outputs"] = model.model.encode(torch.tensor([[BEGIN, 20]]))
    with pytest.raises(ValueError, match=message):
        model.generate(**given)


def test_codes_are_for_causal_models():
    with pytest.raises(ValueError, match=r"image_writer_config.head is 'fsq', whose codes only causal models write"):
        tiny_multimodal_seq2seq(image_writer_config={"head": "fsq", "codec": "autoencoder", "codec_config": {}})


def test_a_checkpoint_runs_elsewhere(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    expected = model.generate(**sources(), max_new_tokens=4)
    torch.save(sources(), tmp_path / "inputs.pt")
    code = """
        import torch
        from transformers import AutoModelForMultimodalLM, AutoModelForSpeechSeq2Seq, AutoModelForTextToWaveform
        inputs = torch.load("inputs.pt")
        for auto in (AutoModelForSpeechSeq2Seq, AutoModelForMultimodalLM, AutoModelForTextToWaveform):
            model = auto.from_pretrained("model", trust_remote_code=True)
            print(model.generate(**inputs, max_new_tokens=4).tolist())
    """
    done = run_python("-c", textwrap.dedent(code), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(expected.tolist())) == 3


# ------------------------------------------------------------------------------------------------------------ training

PART = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "num_prelude_layers": 1,
    "num_core_layers": 0,
    "num_coda_layers": 0,
}
MELODIES = {"kind": "generated", "task": "melodies", "difficulty": [1, 1], "loss_on": "answer"}
RUN = {
    "model": {
        "model_type": "megatransformer_multimodal_seq2seq",
        "vocab_size": 320,
        "encoder_config": PART,
        "decoder_config": {**PART, "num_core_layers": 1, "recurrence": {"mean_steps": 3, "backprop_steps": 2}},
        "audio_config": {**ENCODER, "num_mel_bins": 16, "sampling_rate": 8000, "n_fft": 256, "hop_length": 80},
        "audio_writer_config": {
            "sampling_rate": 8000,
            "n_fft": 256,
            "hop_length": 80,
            "num_mel_bins": 16,
            "frames_per_token": 8,
            "flow_hidden_size": 16,
            "num_flow_steps": 2,
        },
    },
    "tokenizer": {"vocab_size": 320},
    "data": {
        "block_size": 200,
        "packing": False,
        "cfg_dropout": 0.1,
        "train": [
            {**MELODIES, "num_rows": 16, "name": "melodies"},
            {**MELODIES, "num_rows": 16, "name": "sung", "direction": "text -> audio"},
        ],
        "validation": [
            {**MELODIES, "num_rows": 2, "name": "melodies"},
            {**MELODIES, "num_rows": 2, "name": "sung", "direction": "text -> audio"},
        ],
    },
    "callbacks": {
        "media_samples": {"num_examples": 1, "num_steps": [2], "max_new_tokens": 3, "every_steps": 2},
        "generated_samples": {"num_examples": 1, "num_steps": [2], "every_steps": 2},
    },
    "training": {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Both directions in one model: it recognises, and speaks."""
    folder = tmp_path_factory.mktemp("speech")
    (folder / "run.yaml").write_text(yaml.safe_dump(RUN))
    argv = ["--config", str(folder / "run.yaml"), "--training.output_dir", str(folder / "out")]
    assert pretrain.main(argv) == 0
    return folder / "out"


def test_it_learns_both_directions(run):
    history = json.loads((run / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert all(entry["flow_loss_audio"] > 0 for entry in history if "flow_loss_audio" in entry)
    evaluated = {name for entry in history for name in entry}
    assert {"eval_melodies_loss", "eval_sung_flow_loss_audio"} <= evaluated


def test_a_row_is_divided_before_its_answer(run):
    """What is read goes with the source, what is written with the target."""
    model, processor = load_model(run)
    ids = {name: getattr(model.config, f"{name}_token_id") for name in ("audio_start", "audio_end", "written_audio")}
    target = [ids["audio_start"], ids["written_audio"], ids["audio_end"], model.config.eos_token_id]
    source = [model.config.bos_token_id, 30, 31]
    row = {"input_ids": source + target, "labels": [-100] * 3 + target, "modality_ids": [0] * 7}
    row["labels"][4] = -100  # as an image has it
    clip = torch.zeros(16, 8)
    collate = build_collator(processor, is_encoder_decoder=True)
    batch = collate([{**row, "media": {"written_audio": [clip]}}])
    assert batch["input_ids"].tolist() == [source]
    assert batch["decoder_input_ids"].tolist() == [[model.config.bos_token_id, *target[:-1]]]
    assert batch["labels"].tolist() == [row["labels"][3:]]
    assert batch["audio_targets"].shape == (1, 16, 8)
    row["labels"][5] = -100
    row["input_ids"][5] = 33  # a token that is no label is that of another turn
    with pytest.raises(ValueError, match="no source with one target"):
        collate([{**row, "media": {"written_audio": [clip]}}])


def test_its_commands(run, tmp_path, capsys):
    assert evaluate([str(run), "--num-steps", "2", "--limit", "2", "--output", str(tmp_path / "report")]) == 0
    report = capsys.readouterr().out
    assert "melodies" in report
    assert "sung" in report
    written = tmp_path / "said.wav"
    assert generate([str(run), "--mode", "audio", "--prompt", "C4", "--out", str(written)]) == 0
    assert written.stat().st_size > 44
    capsys.readouterr()
    assert generate([str(run), "--audio", str(written), "--prompt", "?", "--max-new-tokens", "4"]) == 0
