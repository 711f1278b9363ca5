"""Configuration of the sequence-to-sequence model: an encoder and a decoder, each a text model of its own."""

from typing import Any

from transformers import PreTrainedConfig
from transformers.utils.type_validators import interval

from .configuration_megatransformer_text import MegaTransformerTextConfig, StrictConfig, validated

SHARED = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings")
"""Options that both parts have from the whole."""


@validated
class MegaTransformerSourceConfig(MegaTransformerTextConfig):
    """The encoder of a source: a text model whose tokens all see each other, without a cache and without exits."""

    model_type = "megatransformer_source"
    base_config_key = "encoder_config"
    is_causal = False


@validated
class MegaTransformerTargetConfig(MegaTransformerTextConfig):
    """The decoder of a target: a text model whose layers also see the last states of the encoder.

    Args:
        encoder_hidden_size: Width of the encoder. Default: filled in from that.
    """

    model_type = "megatransformer_target"
    base_config_key = "decoder_config"

    encoder_hidden_size: int = interval(min=1)(default=512)


@validated
class MegaTransformerSeq2SeqConfig(StrictConfig):
    """An encoder that reads a source, and a decoder that writes a target.

    Args:
        encoder_config: The encoder. What both parts share it has from here.
        decoder_config: The decoder, likewise.
        vocab_size: Number of rows of the embeddings; token ids are below it.
        pad_token_id: Id of the padding token.
        bos_token_id: Id of the token that begins a document.
        eos_token_id: Id of the token that ends a target.
        decoder_start_token_id: Id of the token before the first of a target. Default: `bos_token_id`.
        tie_word_embeddings: Whether encoder, decoder and head share one embedding matrix, for which both parts need one
            `hidden_size` and one `embedding_scale`.
        use_cache: Whether `forward` returns a cache when nothing else says so.
    """

    model_type = "megatransformer_seq2seq"
    keys_to_ignore_at_inference = [
        *MegaTransformerTextConfig.keys_to_ignore_at_inference,
        *("encoder_last_hidden_state", "encoder_hidden_states", "encoder_attentions"),
    ]
    path_of_recurrence = ("decoder_config", "recurrence")
    sub_configs_defaults = {
        "encoder_config": MegaTransformerSourceConfig,
        "decoder_config": MegaTransformerTargetConfig,
    }

    encoder_config: MegaTransformerSourceConfig | dict | None = None
    decoder_config: MegaTransformerTargetConfig | dict | None = None
    vocab_size: int = interval(min=1)(default=32000)
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    decoder_start_token_id: int | None = None
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        module = "modeling_megatransformer_seq2seq.MegaTransformer"
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_megatransformer_seq2seq.MegaTransformerSeq2SeqConfig",
            "AutoModel": f"{module}Seq2SeqModel",
            "AutoModelForSeq2SeqLM": f"{module}ForSeq2SeqLM",
            **(kwargs.get("auto_map") or {}),
        }
        super().__post_init__(**kwargs)
        self.share()

    def share(self) -> None:
        """Gives both parts what they have from the whole."""
        for part in (self.encoder_config, self.decoder_config):
            for name in SHARED:
                setattr(part, name, getattr(self, name))
        self.decoder_config.encoder_hidden_size = self.encoder_config.hidden_size
        if self.decoder_start_token_id is None:
            self.decoder_start_token_id = self.bos_token_id

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> PreTrainedConfig:
        """That of the decoder, unless that of the encoder alone is asked for."""
        return self.encoder_config if encoder and not decoder else self.decoder_config

    @property
    def num_steps(self) -> int | None:
        """That of the decoder."""
        return self.decoder_config.num_steps

    @num_steps.setter
    def num_steps(self, num_steps: int | None) -> None:
        self.decoder_config.num_steps = num_steps

    def validate_residuals(self) -> None:
        """Checks that span both parts; run by `strict` after the fields' own."""
        for name in ("encoder_config", "decoder_config"):
            if getattr(self, name).residual == "admin":
                raise ValueError(f"{name}.residual is 'admin', whose profiling pass is for text models; take another")

    def validate_tying(self) -> None:
        """Checks that span both parts; run by `strict` after the fields' own."""
        for name in ("hidden_size", "embedding_scale"):
            encoder, decoder = getattr(self.encoder_config, name), getattr(self.decoder_config, name)
            if self.tie_word_embeddings and encoder != decoder:
                raise ValueError(
                    f"tie_word_embeddings is true, but {name} is {encoder} in encoder_config and {decoder} in "
                    "decoder_config; make them equal, or set it to false"
                )
