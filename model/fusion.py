"""Features of media onto their placeholders: read once, scattered once, counts compared."""

from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .chat import TARGET_PREFIX
from .configuration_megatransformer import EncoderConfig, MediaConfig
from .configuration_megatransformer_text import MegaTransformerTextConfig
from .modalities import MODALITIES


class Projector(nn.Module):
    """Features of an encoder to vectors like the embeddings of tokens: linear, GELU, linear.

    The norms in front and behind see to it that no modality drowns the others: whatever the encoder gives, a feature
    begins with the mean square that embeddings have at initialisation.
    """

    def __init__(self, width: int, config: MegaTransformerTextConfig):
        super().__init__()
        self.norm_in = nn.RMSNorm(width, eps=config.norm_eps)
        self.up_proj = nn.Linear(width, config.hidden_size)
        self.down_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.norm_out = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.scale = config.initializer_range * config.embedding_scale

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(tokens, width) -> (tokens, hidden)."""
        hidden = nn.functional.gelu(self.up_proj(self.norm_in(features)))
        return self.norm_out(self.down_proj(hidden)) * self.scale


class ModalityEncoder(nn.Module):
    """The encoder of a modality, by its name, and its projector."""

    def __init__(self, name: str, config: EncoderConfig, text_config: MegaTransformerTextConfig):
        super().__init__()
        self.modality = MODALITIES[name]
        self.encoder = self.modality.build_encoder(config)
        self.projector = Projector(self.encoder.output_size, text_config)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the arguments of `forward`; the first has to be there for the others to mean anything."""
        return self.modality.input_names

    @property
    def some_weight(self) -> nn.Parameter:
        """A weight that has their device and type: that of a norm, since quantised matrices have another. Not by its
        name: ZeRO-3 gathers a weight that is asked for by name, in the order in which a rank does so, and ranks differ
        in what they read.
        """
        return next(self.projector.norm_in.parameters())

    def dummy_inputs(self) -> dict[str, torch.Tensor]:
        """The smallest input there is."""
        inputs = self.modality.dummy_inputs(self.encoder.config)
        return {name: value.to(self.some_weight.device) for name, value in inputs.items()}

    def forward(
        self, layers: dict[str, list[torch.Tensor]] | None = None, **inputs: torch.Tensor
    ) -> tuple[torch.Tensor, list[int]]:
        """The features of all media, (tokens, hidden), and how many tokens each item has. `layers` are the lists in
        which an encoder gathers what its layers give.

        One tensor, since ZeRO-3 gathers the weights of a module once for each that it returns, and ranks with more
        media than others would wait for them. Processors give float32, whatever the type of the weights.
        """
        dtype = self.some_weight.dtype
        inputs = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        features, is_real = self.encoder(**inputs, **(layers or {}))  # (media, tokens, width), (media, tokens) or None
        if is_real is None:
            features, tokens = self.projector(features.flatten(0, 1)), features.shape[1]
            # A program of torch.export serves any number of media: to it they are one.
            is_one = torch.compiler.is_exporting()
            return features, [features.shape[0]] if is_one else [tokens] * (features.shape[0] // tokens)
        return self.projector(features[is_real]), is_real.sum(dim=1).tolist()

    def read(
        self, output_hidden_states: bool = False, output_attentions: bool = False, **inputs: torch.Tensor
    ) -> BaseModelOutputWithPooling:
        """`pooler_output`: the features of each item, a tuple of (tokens, hidden), ready to be scattered. Of an
        encoder that shows its layers also `last_hidden_state`, except in training, where nobody would read it; and
        what is asked for.
        """
        layers: dict[str, list[torch.Tensor]] = {}
        if self.modality.shows_layers and (output_hidden_states or not self.training):
            layers["hidden_states"] = []
        if self.modality.shows_layers and output_attentions:
            layers["attentions"] = []
        features, lengths = self(layers, **inputs)
        hidden_states = layers.get("hidden_states")
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden_states[-1] if hidden_states else None,
            pooler_output=features.split(lengths),
            hidden_states=tuple(hidden_states) if output_hidden_states and hidden_states else None,
            attentions=tuple(layers["attentions"]) if "attentions" in layers else None,
        )


def take_inputs(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Takes what encoders of any modality read out of `kwargs`, and leaves out what is None."""
    names = [name for modality in MODALITIES.values() for name in modality.input_names]
    return {name: value for name in names if (value := kwargs.pop(name, None)) is not None}


def read_media(
    readers: nn.ModuleDict, media: dict[str, Any], run_all: bool, **asked: bool
) -> dict[str, BaseModelOutputWithPooling]:
    """Reads media, by modality (`ModalityEncoder.read`), of what `take_inputs` gives. With `run_all`, encoders without
    input read something, of which nothing is kept but the gradient, which is 0. `asked` are output_hidden_states and
    output_attentions. ValueError: no encoder takes an input, or it is no input without another.
    """
    known = {name for reader in readers.values() for name in reader.input_names}
    if unknown := [name for name in media if name not in known]:
        readable = ", ".join(["text", *readers])
        raise ValueError(
            f"{unknown[0]} was given, but this model reads {readable}; leave it out, or take another model"
        )
    outputs = {}
    for name, reader in readers.items():
        inputs = {key: media[key] for key in reader.input_names if key in media}
        if reader.input_names[0] in inputs:
            outputs[name] = reader.read(**inputs, **asked)
        elif inputs:
            raise ValueError(f"{next(iter(inputs))} was given without {reader.input_names[0]}, which it describes")
        elif run_all:
            parts = reader.read(**reader.dummy_inputs()).pooler_output
            outputs[name] = BaseModelOutputWithPooling(pooler_output=tuple(part[:0] for part in parts))
    return outputs


def embed_media(
    embeds: torch.Tensor,
    is_token: Callable[[int], torch.Tensor],
    features: dict[str, Iterable[torch.Tensor]],
    config: MediaConfig,
    is_whole: bool = True,
) -> torch.Tensor:
    """The embeddings, (batch, sequence, hidden), with the features of items, (tokens, hidden) each, in the positions of
    their placeholders, row by row; those of generated media by "written_image" and "written_audio". `is_token` gives
    where the token of an id stands, (batch, sequence) of bool; `is_whole`: each of the features is that of a whole
    item, which lies in one row. ValueError if counts differ, or an item is spread over two rows.
    """
    generated = [name for name in features if name.startswith(TARGET_PREFIX)]
    for name in (*MODALITIES, *generated):
        token_id = getattr(config, f"{name}_token_id", None)
        given = list(features.get(name, ()))
        if token_id is None:
            if given:
                raise ValueError(f"there are features of {name}, but config.{name}_token_id, their place, is not set")
            continue
        is_place = is_token(token_id)  # (batch, sequence)
        if not torch.compiler.is_exporting():  # whose programs have no numbers to compare
            check_counts(name, is_place.sum(dim=1).tolist(), [len(part) for part in given], is_whole)
        if given:
            # Also where there is nothing to put: its gradient, which is 0, is what other ranks wait for.
            embeds = embeds.masked_scatter(is_place.unsqueeze(-1), torch.cat(given).to(embeds))
    return embeds


def check_counts(name: str, places: list[int], lengths: list[int], is_whole: bool = True) -> None:
    """Compares the placeholders in each row with the tokens of each item; `is_whole`: an item lies in one row.
    ValueError names the first row that does not fit.
    """
    if sum(places) == sum(lengths) and not (is_whole and any(lengths)):
        return
    ends = {0, *accumulate(lengths)}
    row = next((row for row, end in enumerate(accumulate(places)) if end not in ends), None)
    if row is None and sum(places) == sum(lengths):
        return
    row = len(places) - 1 if row is None else row
    shown = f"{lengths[:8]}{' ...' if len(lengths) > 8 else ''}"
    raise ValueError(
        f"sample {row} has {places[row]} placeholders of {name}, which do not fit the features given: {sum(places)} "
        f"placeholders in {len(places)} samples, {sum(lengths)} features of {len(lengths)} media ({shown}); make text "
        "and media with the same processor, and do not cut its output"
    )
