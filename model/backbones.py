"""Pretrained encoders of others, by name or folder, in the place of ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from textwrap import shorten

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .configuration_megatransformer import EncoderConfig
from .configuration_megatransformer_text import check_num_labels

PARTS = {"pixel_values": "vision_config", "input_features": "audio_config"}
"""Where the configuration of the encoder stands in that of a model with several parts, by its main input."""
LONGEST_REASON = 300
"""Characters of what a library says that are repeated."""


class Backbone(nn.Module):
    """The encoder of a pretrained model, whose main input is "pixel_values" or "input_features". Its weights are random
    until `load` fetches them, or a checkpoint of ours has them; `backbone_config` is filled in if it is missing.
    ValueError: there is no such model, or its encoder takes something else.
    """

    def __init__(self, config: EncoderConfig, main_input_name: str):
        super().__init__()
        self.config, self.main_input_name = config, main_input_name
        if config.backbone_config is None:
            # Code beside it is never run: left out, `trust_remote_code` would have transformers ask on standard input.
            with loading(f"backbone {config.backbone!r}"):
                found = AutoConfig.from_pretrained(config.backbone, trust_remote_code=False)
            config.backbone_config = getattr(found, PARTS[main_input_name], found).to_dict()
        backend = config._attn_implementation
        with loading(f"backbone {config.backbone!r}"):
            model = AutoModel.from_config(config_of(config), attn_implementation=backend, trust_remote_code=False)
            self.model = encoder_of(model)
        config._attn_implementation = self.model.config._attn_implementation
        if self.model.main_input_name != main_input_name:
            raise ValueError(f"backbone {config.backbone!r} takes {self.model.main_input_name}, not {main_input_name}")
        self.output_size = self.model.config.hidden_size
        self.model.requires_grad_(not config.freeze_backbone)

    def load(self) -> None:
        """Fetches the pretrained weights; ValueError if some are missing, or damaged."""
        with loading(f"backbone {self.config.backbone!r}"):
            model, report = AutoModel.from_pretrained(
                self.config.backbone,
                config=config_of(self.config),
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=False,
            )
        if report["missing_keys"] or report["mismatched_keys"]:
            missing = sorted([*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])])
            raise ValueError(
                f"the weights of backbone {self.config.backbone!r} lack {missing[0]!r} (and {len(missing) - 1} more)"
            )
        self.model.load_state_dict(encoder_of(model).state_dict())

    def train(self, mode: bool = True) -> "Backbone":
        """A frozen one stays as it is in evaluation: without dropout."""
        super().train(mode)
        self.model.train(mode and not self.config.freeze_backbone)
        return self

    def forward(
        self,
        hidden_states: list[torch.Tensor] | None = None,
        attentions: list[torch.Tensor] | None = None,
        **inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, None]:
        """Features (media, tokens, output_size), all real: such models take inputs of one size. `hidden_states` and
        `attentions` are those of our encoders.
        """
        asked = {} if hidden_states is None else {"output_hidden_states": True}
        asked |= {} if attentions is None else {"output_attentions": True}
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.config.freeze_backbone):
            outputs = self.model(inputs[self.main_input_name], **asked)
        if hidden_states is not None:
            hidden_states += [*outputs.hidden_states[:-1], outputs.last_hidden_state]
        if attentions is not None:
            attentions += outputs.attentions
        return outputs.last_hidden_state, None


@contextmanager
def loading(what: str) -> Iterator[None]:
    """Turns whatever libraries raise about files of a model, which is of all kinds, into a ValueError of one line."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what} cannot be loaded: {reason_of(error)}; give a name or folder that can") from error


def config_of(config: EncoderConfig) -> PreTrainedConfig:
    """`backbone_config` as an object of its class; ValueError if transformers has no such model."""
    options = dict(config.backbone_config)
    name = options.get("model_type")
    if not isinstance(name, str) or name not in CONFIG_MAPPING:
        raise ValueError(f"backbone_config has model_type {repr(name)[:60]}, which transformers does not have")
    check_num_labels(options)
    return AutoConfig.for_model(**options)


def reason_of(error: Exception) -> str:
    """What a library says, in one short line, and without the advice to run foreign code."""
    reason = " ".join(str(error).split())
    if "trust_remote_code" in reason:
        return "it needs code that comes with it, which is not run"
    kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
    return kind + shorten(reason, LONGEST_REASON, placeholder=" ...")


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The encoder of an encoder-decoder, or the model itself."""
    return model.get_encoder() if model.config.is_encoder_decoder else model
