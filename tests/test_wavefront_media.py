"""Images and audio by the scheduler of items: with no tolerance those of plain decoding."""

import pytest
import torch

from model.scheduler import Scheduler
from tests.tiny_writing import tiny_writer

STEPS = 6
OPTIONS = {"guidance_scale": 1, "flow_seeds": [3, 5, 7], "num_steps": STEPS}


def prompts() -> dict[str, torch.Tensor]:
    """Three prompts of different lengths."""
    ids = torch.randint(20, 28, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[2, :4] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def wave(model, mode: str, draft_steps: int | str, tolerance: float, **options):
    options = prompts() | OPTIONS | options
    return model.generate(
        **options, generation_mode=mode, decoding="wavefront", draft_steps=draft_steps, latent_tolerance=tolerance
    )


def check_equal(plain, wave) -> None:
    assert torch.equal(plain.sequences, wave.sequences) and plain.segments == wave.segments
    for name, items in plain.latents.items():
        for theirs, ours in zip(items, wave.latents[name], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("draft_steps", [1, 2, 4, "auto"])
@pytest.mark.parametrize("mode", ["image", "audio"])
def test_without_tolerance_media_are_those_of_plain_decoding(mode, draft_steps):
    model = tiny_writer(scale=2.0, audio={"max_seconds": 0.1})
    plain = model.generate(**prompts(), **OPTIONS, generation_mode=mode)
    found = wave(model, mode, draft_steps, 0.0)
    check_equal(plain, found)
    assert torch.equal(plain.exit_steps, found.exit_steps)
    lengths = {len(latents) for latents in found.latents[mode]}
    assert mode == "image" or len(lengths) > 1  # audio ends where the model says so


@pytest.mark.parametrize("mode", ["image", "audio"])
def test_drafts_that_always_hold_are_those_of_fewer_steps(mode, monkeypatch):
    """A latent drafted after d steps reads what all before it have left after at most d; which is plain decoding with d
    steps, but for the end of audio, which the last step says.
    """
    counts, make = [], Scheduler.__init__
    monkeypatch.setattr(
        Scheduler, "__init__", lambda scheduler, *args: (make(scheduler, *args), counts.append(scheduler.counts))[0]
    )
    model = tiny_writer(scale=2.0, num_coda_layers=0)
    plain = model.generate(**prompts(), **OPTIONS | {"num_steps": 2}, generation_mode=mode)
    found = wave(model, mode, 2, 1e9)
    for theirs, ours in zip(plain.latents[mode], found.latents[mode], strict=True):
        length = min(len(theirs), len(ours))
        torch.testing.assert_close(ours[:length], theirs[:length], rtol=1e-4, atol=1e-4)
    if mode == "image":
        assert counts[0].kept_drafts == counts[0].drafts > 0
        places = len(found.latents[mode][0])
        assert counts[0].ticks <= 2 * (places + 1) + STEPS


def test_a_tolerance_keeps_what_is_near_and_costs_little():
    """Latents are within it at each place where what is before is the same: at the first."""
    model = tiny_writer(scale=2.0)
    plain, found = model.generate(**prompts(), **OPTIONS, generation_mode="image"), wave(model, "image", 4, 0.2)
    first, theirs = (torch.stack(output.latents["image"])[:, 0] for output in (found, plain))
    change = (first - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    assert change.max() <= 0.2


def test_a_model_whose_texts_are_waves_draws_plainly():
    """What its generation config says of decoding is for texts; drafts of latents are asked for."""
    model = tiny_writer(scale=2.0)
    plain = model.generate(**prompts(), **OPTIONS, generation_mode="image")
    model.generation_config.decoding = "wavefront"
    check_equal(plain, model.generate(**prompts(), **OPTIONS, generation_mode="image"))


def test_chunks_streamers_and_a_turn_behind(monkeypatch):
    model, shown, streamed = tiny_writer(scale=2.0), [], []

    class Streamer:
        def put(self, tokens):
            streamed.extend(tokens.flatten().tolist())

        def end(self):
            streamed.append("end")

    one = OPTIONS | {name: value[:1] for name, value in prompts().items()} | {"flow_seeds": [3]}
    found = wave(model, "image", 2, 0.0, **one, on_chunk=shown.append, chunk_size=2, streamer=Streamer())
    assert streamed == [*found.sequences[0].tolist(), "end"]  # transformers gives it the prompt
    assert shown[-1].is_complete and not any(chunk.is_complete for chunk in shown[:-1])
    plain = model.generate(**one, generation_mode="image")
    behind = torch.cat((found.sequences, torch.tensor([[21, 22]])), dim=1)
    texts = [
        model.generate(behind, past_key_values=output.past_key_values, num_steps=STEPS, max_new_tokens=4)
        for output in (plain, found)
    ]
    assert torch.equal(*texts)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"latent_tolerance": None}, "say by latent_tolerance"),
        ({"guidance_scale": 2.0}, "not possible with guidance; give guidance_scale=1"),
        ({"exit_criterion": "latent_difference"}, "not possible with an exit_criterion"),
        ({"decoding": "plain", "draft_steps": None}, "latent_tolerance has no effect"),
        ({"latent_tolerance": -1.0}, "latent_tolerance is -1.0; give a number of at least 0"),
        ({"generation_mode": "any"}, "has no effect in generation_mode 'any'"),
        ({"generation_mode": "text", "flow_seeds": None}, "latent_tolerance has no effect in a text"),
        ({"state_warm_start": True}, "not possible with state_warm_start"),
    ],
)
def test_what_is_refused(options, said):
    model = tiny_writer()
    given = {"generation_mode": "image", "decoding": "wavefront", "draft_steps": 2, "latent_tolerance": 0.1}
    with pytest.raises(ValueError, match=said):
        model.generate(**prompts() | OPTIONS | given | options)
