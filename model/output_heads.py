"""What is written: a codec, the way in for what was written before, and the way out.

The latents of an item stand in the positions of its placeholders, one each. A position's own latent is what goes in;
what comes out of the position before it, of the start token for the first, is that latent, so that nothing sees what it
is to predict, and an item that the model has written is read from its cache like text.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .chat import TARGET_PREFIX
from .codecs import Codec, build_codec
from .configuration_megatransformer import MediaConfig, WriterConfig
from .configuration_megatransformer_text import MegaTransformerTextConfig
from .depth import keyed_generator
from .flow import FlowHead, draw_times
from .fusion import check_counts
from .modalities import TARGET_MODALITIES


@dataclass
class TargetLatents:
    """Latents of one modality, and where they stand."""

    latents: torch.Tensor
    """(tokens, latent_size)."""
    rows: torch.Tensor
    """(tokens,): their rows in the batch."""
    columns: torch.Tensor
    """(tokens,): their positions in the row."""
    places: torch.Tensor
    """(tokens,): their numbers in their item, from 0."""


@dataclass
class Targets:
    """What the losses of a batch's generated media need beside hidden states."""

    latents: dict[str, TargetLatents]
    """Latents by modality; one that there is none of is left out."""
    seeds: torch.Tensor
    """(batch,), of noise and times."""
    num_in_batch: dict[str, int | torch.Tensor]
    """Numbers by modality by which the sum of losses is divided. Default: the number of latents."""


class OutputHead(nn.Module):
    """A codec, and, where its head is a flow, what embeds latents and what makes them. `name` is "image" or "audio"."""

    def __init__(self, name: str, config: WriterConfig, text_config: MegaTransformerTextConfig):
        super().__init__()
        self.name, self.config = name, config
        self.target_name = f"{name}_targets"
        self.codec: Codec = build_codec(config)
        self.num_places = self.codec.max_tokens
        self.head = None
        if config.head == "fsq":
            return
        hidden, eps = text_config.hidden_size, text_config.norm_eps
        self.up_proj = nn.Linear(self.codec.latent_size, hidden)
        self.down_proj = nn.Linear(hidden, hidden)
        self.norm = nn.RMSNorm(hidden, eps=eps)
        self.scale = text_config.initializer_range * text_config.embedding_scale  # that of an embedded token
        self.head = FlowHead(config, hidden, self.codec.latent_size, self.num_places, eps)

    @property
    def some_weight(self) -> nn.Parameter:
        """A weight that has their device and type; see `ModalityEncoder.some_weight`."""
        return next(self.norm.parameters())

    def embed(self, latents: torch.Tensor) -> torch.Tensor:
        """(tokens, latent_size) -> (tokens, hidden)."""
        hidden = nn.functional.gelu(self.up_proj(latents.to(self.some_weight.dtype)))
        return self.norm(self.down_proj(hidden)) * self.scale

    def latents_of(self, targets: Mapping[str, Any]) -> tuple[torch.Tensor, list[int]]:
        """The latents of all target media, (tokens, latent_size), and how many each has; ValueError for a wrong shape,
        or values that are not finite.
        """
        with torch.no_grad():
            latents, lengths = self.codec.encode(targets[self.target_name], targets.get(f"{self.target_name}_mask"))
        check_finite_targets(self, latents)
        return latents, lengths

    def losses(self, hidden: torch.Tensor, targets: TargetLatents, seeds: torch.Tensor) -> torch.Tensor:
        """The loss of each latent, float32 (tokens,), from hidden states (batch, sequence, hidden) after the final
        norm, and seeds of noise and times, (batch,).
        """
        draws, size = self.head.num_draws, self.codec.latent_size
        noise, times = [], []
        for row, count in zip(*targets.rows.unique_consecutive(return_counts=True), strict=True):
            generator = keyed_generator("flow", self.name, int(seeds[row]))
            noise.append(torch.randn((int(count), draws, size), generator=generator))
            times.append(draw_times((int(count), draws), generator))
        device = hidden.device
        with torch.autocast(device.type, enabled=False):
            condition = self.condition(hidden[targets.rows, targets.columns - 1], targets.places)
            return self.head.losses(
                condition, targets.latents, torch.cat(noise).to(device), torch.cat(times).to(device)
            )

    def condition(self, before: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """What the head is told: hidden states of the positions before, (tokens, hidden), and (tokens,) positions."""
        return self.head.condition(before.to(self.some_weight.dtype), places)

    def no_loss(self, hidden: torch.Tensor) -> torch.Tensor:
        """0, through all weights: ranks that write nothing go where the others go."""
        with torch.autocast(hidden.device.type, enabled=False):
            places = torch.zeros(1, dtype=torch.long, device=hidden.device)
            condition = self.condition(hidden[:1, 0], places)
            latents = torch.zeros(1, self.codec.latent_size, device=hidden.device)
            return 0.0 * (self.head(latents.to(condition), places.to(condition), condition).sum())


def output_head_configs(config: MediaConfig) -> dict[str, WriterConfig]:
    """The configurations of all output heads of a model, by modality."""
    configs = {name: getattr(config, f"{name}_writer_config") for name in TARGET_MODALITIES}
    return {name: part for name, part in configs.items() if part is not None}


def take_targets(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes the arguments that are targets out of `kwargs`, and leaves out what is None."""
    names = [f"{name}_targets{end}" for name in TARGET_MODALITIES for end in ("", "_mask")]
    return {name: value for name in names if (value := kwargs.pop(name, None)) is not None}


def encode_targets(
    writers: nn.ModuleDict,
    targets: Mapping[str, Any],
    input_ids: torch.LongTensor,
    config: MediaConfig,
    filled: Collection[str] = (),
) -> dict[str, TargetLatents]:
    """The latents of what is to be generated, or was, by modality, from `take_targets` and `input_ids` (batch,
    sequence) with their placeholders, of which `filled` names those that have their features already. ValueError: a
    target is of what this model does not generate, or not finite; or they and placeholders differ in number.
    """
    check_target_names(writers, targets)
    found = {}
    for name, output_head in writers.items():
        token_id = getattr(config, f"{TARGET_PREFIX}{name}_token_id")
        is_place = torch.zeros_like(input_ids, dtype=torch.bool) if token_id is None else input_ids == token_id
        counts = is_place.sum(dim=1).tolist()
        if targets.get(output_head.target_name) is None:
            if sum(counts) and f"{TARGET_PREFIX}{name}" not in filled:
                raise ValueError(
                    f"there are {sum(counts)} places for a written {name}, but no {output_head.target_name}; make text "
                    "and media with the same processor, or let `generate` fill them"
                )
            continue
        latents, lengths = output_head.latents_of(targets)
        check_counts(f"a written {name}", counts, lengths)
        rows, columns = is_place.nonzero(as_tuple=True)
        places = torch.cat([torch.arange(length, device=input_ids.device) for length in lengths])
        found[name] = TargetLatents(latents, rows, columns, places)
    return found


def check_target_names(writers: nn.ModuleDict, targets: Mapping[str, Any]) -> None:
    """Raises ValueError for a target of what this model does not generate."""
    if unknown := [name for name in targets if name.partition("_")[0] not in writers]:
        raise ValueError(
            f"{unknown[0]} was given, but this model writes {', '.join(['text', *writers])}; leave it out, or take a "
            "model with such a output_head"
        )


def read_targets(writers: nn.ModuleDict, targets: Mapping[str, Any]) -> dict[str, tuple[torch.Tensor, ...]]:
    """The features of generated media, (tokens, hidden) each, by the names of their placeholders; media that are codes
    have none. ValueError: a target is of what this model does not generate, or not finite.
    """
    check_target_names(writers, targets)
    features = {}
    for name, output_head in writers.items():
        if output_head.head is not None and targets.get(output_head.target_name) is not None:
            latents, lengths = output_head.latents_of(targets)
            features[f"{TARGET_PREFIX}{name}"] = output_head.embed(latents).split(lengths)
    return features


def put_codes(
    writers: nn.ModuleDict, targets: dict[str, Any], input_ids: torch.LongTensor, config: MediaConfig
) -> torch.LongTensor:
    """Token ids with the codes of images in their positions, where the head is "fsq"; these targets are taken out.
    ValueError: there are more or fewer images than placeholders, or some that are not finite.
    """
    for name, output_head in writers.items():
        if output_head.head is not None or targets.get(output_head.target_name) is None:
            continue
        is_place = input_ids == getattr(config, f"written_{name}_token_id")
        images = targets.pop(output_head.target_name)
        check_finite_targets(output_head, images)  # NaN has a code, too
        with torch.no_grad():
            codes = output_head.codec.encode_ids(images)  # (images, tokens)
        check_counts(f"a written {name}", is_place.sum(dim=1).tolist(), [codes.shape[1]] * len(codes))
        input_ids = input_ids.masked_scatter(is_place, codes + config.image_code_offset)
    return input_ids


def check_finite_targets(output_head: OutputHead, values: torch.Tensor) -> None:
    """Raises ValueError for targets, or their latents, that are NaN or infinite."""
    if not torch.isfinite(values).all():
        raise ValueError(
            f"{output_head.target_name} has values that are NaN or infinite; check the {output_head.name} files"
        )


def embed_latents(
    embeds: torch.Tensor,
    writers: nn.ModuleDict,
    found: Mapping[str, TargetLatents],
    seeds: torch.Tensor | None,
    run_all: bool,
) -> torch.Tensor:
    """The embeddings, (batch, sequence, hidden), with those of latents in their positions. Generation reads latents
    that are not quite right: noise by `seeds` (batch,) is added; None: no noise. With `run_all` output heads without
    latents run as well; see `read_media`.
    """
    for name, output_head in writers.items():
        if output_head.head is None:
            continue
        if name in found:
            written = found[name]
            latents = written.latents if seeds is None else perturb(output_head, written, seeds)
            embeds = embeds.index_put((written.rows, written.columns), output_head.embed(latents).to(embeds))
        elif run_all:
            nothing = output_head.embed(torch.zeros(1, output_head.codec.latent_size, device=embeds.device))
            embeds = embeds + 0.0 * nothing.to(embeds)
    return embeds


def seeds_of_rows(input_ids: torch.LongTensor, pad_token_id: int | None) -> torch.LongTensor:
    """A seed of noise for each row, int64 (batch,) on the CPU, from its tokens alone: rows of a batch have different
    ones, and padding changes none.
    """
    rows = (row[row != (-1 if pad_token_id is None else pad_token_id)] for row in input_ids.cpu())
    return torch.tensor([keyed_generator("row", *row.tolist()).initial_seed() for row in rows])


def perturb(output_head: OutputHead, targets: TargetLatents, seeds: torch.Tensor) -> torch.Tensor:
    """Latents with noise of a deviation that is drawn for each, from 0 to `input_noise`. Source: CALM, arXiv
    2510.27688.
    """
    parts = []
    for row, count in zip(*targets.rows.unique_consecutive(return_counts=True), strict=True):
        generator = keyed_generator("input noise", output_head.name, int(seeds[row]))
        amount = output_head.config.input_noise * torch.rand(int(count), 1, generator=generator)
        parts.append(amount * torch.randn(int(count), output_head.codec.latent_size, generator=generator))
    return output_head.codec.project(targets.latents + torch.cat(parts).to(targets.latents))


def check_codes(writers: nn.ModuleDict, config: MediaConfig) -> None:
    """Raises ValueError for a vocabulary without room for the codes of a head "fsq"."""
    offset, size = config.image_code_offset, config.text_config.vocab_size
    for name, output_head in writers.items():
        if output_head.head is None and offset is not None and offset + output_head.codec.num_codes > size:
            raise ValueError(
                f"the {output_head.codec.num_codes} codes of a written {name} follow {offset} tokens of text, but "
                f"vocab_size is {size}; raise model.text_config.vocab_size to "
                f"{offset + output_head.codec.num_codes} or more"
            )


def images_of_codes(codec: Codec, offset: int, sequences: torch.LongTensor) -> list[Any]:
    """PIL images of token ids (rows, tokens), row by row: each run of as many codes as an image has. ValueError: a run
    is no whole number of images.
    """
    images = []
    for row, ids in enumerate(sequences):
        codes = ids[(ids >= offset) & (ids < offset + codec.num_codes)] - offset
        if len(codes) % codec.max_tokens:
            raise ValueError(
                f"row {row} has {len(codes)} codes, but an image has {codec.max_tokens}; raise max_new_tokens, or "
                "train longer"
            )
        if len(codes):
            images += codec.decode_ids(codes.view(-1, codec.max_tokens))
    return images
