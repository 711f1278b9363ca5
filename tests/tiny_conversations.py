"""Random conversations for the tiny model that reads and writes: in each turn texts, media that are read, and media
that were generated, of several lengths.
"""

from dataclasses import dataclass, field

import torch

from tests.tiny_writing import (
    ASSISTANT,
    AUDIO,
    AUDIO_END,
    AUDIO_START,
    BEGIN,
    END,
    FIRST_TEXT,
    FRAMES,
    IMAGE,
    IMAGE_END,
    IMAGE_START,
    NUM_MELS,
    PAD,
    USER,
    VOCABULARY,
    written_audio,
    written_image,
)

SYSTEM_OR_TOOL = 5


@dataclass
class Conversation:
    """A prompt, and its media in the order of their placeholders."""

    ids: list[int]
    images: list[torch.Tensor] = field(default_factory=list)
    """(3, 8, 8), read."""
    clips: list[torch.Tensor] = field(default_factory=list)
    """(mel bins, frames), read."""
    drawn: list[torch.Tensor] = field(default_factory=list)
    """(3, 8, 8), generated."""
    played: list[torch.Tensor] = field(default_factory=list)
    """(mel bins, frames), generated."""

    def __add__(self, other: "Conversation") -> "Conversation":
        names = ("ids", "images", "clips", "drawn", "played")
        return Conversation(*(getattr(self, name) + getattr(other, name) for name in names))


def random_turns(seed: int, num_turns: int, begins: bool = True) -> Conversation:
    """Turns of a user, at times a tool, and the assistant, the last up to where the assistant is to answer."""
    generator = torch.Generator().manual_seed(seed)

    def draw(most: int) -> int:
        return int(torch.randint(most, (), generator=generator))

    def text() -> list[int]:
        return [FIRST_TEXT + draw(VOCABULARY - FIRST_TEXT) for _ in range(1 + draw(3))]

    def clip(tokens: int) -> torch.Tensor:
        return torch.randn(NUM_MELS, tokens * FRAMES, generator=generator).clamp(-2, 2)

    found = Conversation([BEGIN] if begins else [])
    for turn in range(num_turns):
        found.ids += [USER, *text()]
        if draw(2):
            found.ids += [IMAGE_START, *[IMAGE] * 4, IMAGE_END]
            found.images.append(torch.randn(3, 8, 8, generator=generator))
        if draw(3) == 0:
            tokens = 1 + draw(3)
            found.ids += [AUDIO_START, *[AUDIO] * tokens, AUDIO_END]
            found.clips.append(torch.randn(NUM_MELS, 2 * tokens, generator=generator))
        if draw(4) == 0:
            found.ids += [SYSTEM_OR_TOOL, *text()]
        found.ids.append(ASSISTANT)
        if turn == num_turns - 1:
            break
        for _ in range(1 + draw(2)):
            found.ids += text()
            if draw(3):
                found.ids += written_image()
                found.drawn.append(torch.rand(3, 8, 8, generator=generator) * 2 - 1)
            else:
                tokens = 1 + draw(4)
                found.ids += written_audio(tokens)
                found.played.append(clip(tokens))
        found.ids.append(END)
    return found


def batch_of(conversations: list[Conversation]) -> dict[str, torch.Tensor]:
    """Arguments of `generate`, padded on the left."""
    longest = max(len(each.ids) for each in conversations)
    ids = torch.tensor([[PAD] * (longest - len(each.ids)) + each.ids for each in conversations])
    images, clips, drawn, played = (
        [medium for each in conversations for medium in getattr(each, name)]
        for name in ("images", "clips", "drawn", "played")
    )
    inputs = {"input_ids": ids, "attention_mask": (ids != PAD).long()}
    inputs |= {"pixel_values": torch.stack(images)} if images else {}
    inputs |= {"image_targets": torch.stack(drawn)} if drawn else {}
    inputs |= padded("input_features", clips) | padded("audio_targets", played)
    return inputs


def padded(name: str, clips: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Spectrograms of several lengths, and their mask."""
    if not clips:
        return {}
    longest = max(clip.shape[1] for clip in clips)
    both = torch.stack([torch.nn.functional.pad(clip, (0, longest - clip.shape[1])) for clip in clips])
    mask = torch.tensor([[int(frame < clip.shape[1]) for frame in range(longest)] for clip in clips])
    return {name: both, f"{name}_mask": mask}
