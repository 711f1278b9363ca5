"""What all models share: loading, saving, and the one function that initialises weights."""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init

from .attention import Attention, check_backend
from .blocks import AdminResidual, PositionEmbedding, RezeroResidual, ScaledEmbedding
from .peer import ExpertTable, PeerFeedForward
from .recurrence import ScalarInjection

if TYPE_CHECKING:
    from transformers import TrainerCallback

ENCODERS = ("vision_config", "audio_config")
"""Parts with attention of their own, beside the text model."""


class MegaTransformerPreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation."""

    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TransformerBlock"]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def depth_callback(self) -> "TrainerCallback":
        """What makes a trainer that knows nothing of depth draw it: `Trainer(model, callbacks=[model.depth_callback()],
        ...)`. Here for those who have the checkpoint alone.
        """
        from .depth_callback import RecurrentDepthCallback  # brings all that trainers need, which is slow to import

        return RecurrentDepthCallback()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Sets them as the original does; an `nn.Embedding` becomes one that has the scale, and stays the same object,
        which callers go on to use.
        """
        if type(value) is nn.Embedding:
            value.__class__ = ScaledEmbedding
            value.embed_scale = self.config.get_text_config().embedding_scale
        super().set_input_embeddings(value)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """All weight initialisation. h: hidden_size, l: layers executed at the mean depth, l_P + mean_steps l_R + l_C.

        | parameter                                          | distribution                                       |
        |----------------------------------------------------|----------------------------------------------------|
        | embedding, heads, q/k/v, gate/up, injection, probe | truncated normal, std = sqrt(2 / 5h), cut at 3 std |
        | output projections of attention and feed-forward   | the same with std / sqrt(2 l)                      |
        | learned positions                                  | the same with std * embedding_scale                |
        | experts of PEER: what goes in                      | the same with std                                  |
        | experts of PEER: what comes out                    | the same with std * sqrt(h) / sqrt(2 l)            |
        | half-keys of PEER                                  | the same with std = sqrt(2 / key_dim)              |
        | convolutions                                       | the same with std = sqrt(2 / inputs of an output)  |
        | norms                                              | 1                                                  |
        | biases, embedding of the padding token             | 0                                                  |
        | last layers and modulations of a flow head         | 0                                                  |
        | convolutions beside a residual path                | 0                                                  |
        | scales of ReZero                                   | 0                                                  |
        | scale of the injection "scalar"                    | 1                                                  |
        | scales of Admin, until they are profiled           | 1                                                  |

        All placements of norms have the same: with 2 l branches of variance about 1 / (2 l), a stream that nothing
        norms ("none", or "pre" up to the last norm) grows to about twice its variance over the whole depth, and where
        each sum is normed ("post", "sandwich") each branch is as small a part of it. Branches that have a factor of
        their own (ReZero, Admin, `loop_scale_steps` in the core) are not divided by sqrt(2 l) as well.

        Source: Takase et al. 2023, arXiv 2312.16903, with l counted as the paper of the architecture counts it (132 for
        its model). Both halves of a gated layer have std; its released code differs between training and inference
        here. Convolutions: He et al. 2015, arXiv 1502.01852. h, l: those of the language model, or of the encoder that
        the parameter belongs to.
        """
        config = self.config.get_text_config()
        std = config.initializer_range
        shrunk = 1 / math.sqrt(2 * config.mean_executed_layers) if getattr(module, "is_output_projection", False) else 1
        if isinstance(module, ExpertTable):
            self._init_normal(module.weight, std * module.gain * shrunk)
        elif isinstance(module, nn.Embedding):
            is_positions = isinstance(module, PositionEmbedding)
            self._init_normal(module.weight, std * (config.embedding_scale if is_positions else 1))
            if module.padding_idx is not None:
                init.zeros_(module.weight[module.padding_idx])
        elif isinstance(module, nn.Linear):
            if getattr(module, "is_zero_at_first", False):
                init.zeros_(module.weight)
            else:
                self._init_normal(module.weight, std * shrunk)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, (nn.Conv1d, nn.Conv2d)):
            if getattr(module, "is_zero_at_first", False):
                init.zeros_(module.weight)
            else:
                self._init_normal(module.weight, math.sqrt(2 / module.weight[0].numel()))
            init.zeros_(module.bias)
        elif isinstance(module, (nn.RMSNorm, nn.LayerNorm)) and module.weight is not None:
            init.ones_(module.weight)
            if getattr(module, "bias", None) is not None:
                init.zeros_(module.bias)
        elif isinstance(module, Attention) and config.qk_bias:
            init.zeros_(module.qk_bias)
        elif isinstance(module, PeerFeedForward):
            self._init_normal(module.keys, math.sqrt(2 / config.peer_key_dim))
        elif isinstance(module, RezeroResidual):
            init.zeros_(module.weight)
        elif isinstance(module, ScalarInjection):
            init.ones_(module.weight)
        elif isinstance(module, AdminResidual):
            init.ones_(module.weight)
            init.zeros_(module.is_profiled)

    @staticmethod
    def _init_normal(weight: torch.Tensor, std: float) -> None:
        init.trunc_normal_(weight, std=std, a=-3 * std, b=3 * std)

    def get_correct_attn_implementation(self, requested_attention: str | None, is_init_check: bool = False) -> str:
        """Chooses the backend as transformers does, but refuses those that would leave out a term of the attention
        logits, and takes eager where none was asked for and sdpa would leave one out.
        """
        config = self.config.get_text_config()
        if requested_attention is None and config.attn_logit_softcapping is not None:
            requested_attention = "eager"
        check_backend(config, requested_attention)
        return super().get_correct_attn_implementation(requested_attention, is_init_check)

    def set_attn_implementation(
        self, attn_implementation: str | dict[str, str], allow_all_kernels: bool = False
    ) -> None:
        """Sets, as in transformers, a backend for all parts, or a dict by part ("text_config", "vision_config",
        "audio_config"). In a dict, "" is the text model's, unless "text_config" names another; parts that it leaves out
        stay as they are.

        Raises:
            ValueError: the model does not have a part, or the part cannot use the backend.
        """
        names = ("text_config", *(name for name in self.config.sub_configs if name in ENCODERS))
        asked = attn_implementation
        if not isinstance(asked, dict):
            asked = dict.fromkeys(names, attn_implementation)
        unknown = sorted(asked.keys() - {"", *names})
        if unknown:
            raise ValueError(
                f"attn_implementation names {unknown[0]!r}; the parts with attention are {', '.join(names)}"
            )
        # transformers checks parts that are models. The text model is one with the whole, and a configuration without
        # attention, or of a backbone, belongs to none.
        by_part = {name: backend for name, backend in asked.items() if name in ENCODERS}
        own = asked.get("text_config", asked.get(""))
        if own is not None:
            by_part[""] = own
        for name in by_part.keys() & ENCODERS:
            part = getattr(self.config, name)
            if part is not None and part.backbone is not None:
                part._attn_implementation = by_part[name]
        super().set_attn_implementation(by_part, allow_all_kernels)
        if own is not None:
            self.config.get_text_config()._attn_implementation = self.config._attn_implementation
        if not isinstance(attn_implementation, dict):  # parts without attention say the same as the whole
            for name in self.config.sub_configs.keys() - ENCODERS:
                if getattr(self.config, name) is not None:
                    getattr(self.config, name)._attn_implementation = self.config._attn_implementation
