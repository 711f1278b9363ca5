"""Configurations of the models that read, and may write, images and audio: of encoders, of what writes, and of the
whole. They are as strict as that of the text model.
"""

import math
from dataclasses import field
from typing import Any, Literal

from transformers.configuration_utils import SubConfigSpec
from transformers.utils.type_validators import interval

from .configuration_megatransformer_text import (
    MOST_LAYERS,
    MegaTransformerTextConfig,
    StrictConfig,
    TransformerConfig,
    validated,
)


class EncoderConfig(TransformerConfig):
    """What the encoders have in common: a transformer whose tokens all see each other, or a pretrained backbone.

    Args:
        num_hidden_layers: Number of layers.
        backbone: Name on the Hugging Face hub, or folder, of a pretrained model whose encoder takes the place of ours;
            of the options of a transformer none is read then.
        backbone_config: Its configuration, filled in when the model is built, so that a checkpoint loads without it.
        freeze_backbone: Whether the backbone's weights stay as they are.
    """

    is_causal = False

    num_hidden_layers: int = interval(min=1, max=MOST_LAYERS)(default=4)
    backbone: str | None = field(default=None, metadata={"is_path": True})
    backbone_config: dict | None = None
    freeze_backbone: bool = True

    @property
    def mean_executed_layers(self) -> int:
        """Number of layers executed per token."""
        return self.num_hidden_layers


@validated
class MegaTransformerVisionConfig(EncoderConfig):
    """An encoder of images: patches, a transformer in which they all see each other, and a pixel shuffle.

    Args:
        head_dim: Width of a head, at least 4 and divisible by 4. Default: hidden_size / num_attention_heads.
        num_channels: Channels of an image.
        patch_size: Side of a patch in pixels.
        stem: How a patch becomes a vector: "patch" is one linear map, "conv" a stack of 3 x 3 convolutions (Xiao et al.
            2021, arXiv 2106.14881), for a patch size that is a power of 2.
        stem_depth: Number of convolutions of each halving of the image, with stem "conv".
        pixel_shuffle: Side of a square of patches that becomes one token of the language model.
        image_size: Height and width to which every image is resized, at least 1. Default: images keep their shape.
        max_image_size: Longest side of an image that keeps its shape; larger ones are scaled down.
    """

    model_type = "megatransformer_vision"
    base_config_key = "vision_config"

    num_channels: int = interval(min=1)(default=3)
    patch_size: int = interval(min=1)(default=8)
    stem: Literal["patch", "conv"] = "patch"
    stem_depth: int = interval(min=1, max=MOST_LAYERS)(default=1)
    pixel_shuffle: int = interval(min=1)(default=1)
    image_size: int | None = None
    max_image_size: int = interval(min=1)(default=512)

    @property
    def token_size(self) -> int:
        """Side, in pixels, of the square that one token stands for; divides the sides of every image."""
        return self.patch_size * self.pixel_shuffle

    def validate_sizes(self) -> None:
        """Checks that span several fields; run by `strict` after the fields' own."""
        if self.backbone is None and self.head_dim % 4:
            raise ValueError(
                f"positions are rotated by row and by column: head_dim ({self.head_dim}) must be divisible by 4"
            )
        if self.stem == "conv" and (self.patch_size < 2 or self.patch_size & (self.patch_size - 1)):
            raise ValueError(f"stem 'conv' halves the image: patch_size ({self.patch_size}) must be a power of 2")
        if self.stem == "patch" and self.stem_depth > 1:
            raise ValueError(f"stem_depth is {self.stem_depth}, but stem 'patch' has no convolutions; use stem 'conv'")
        if self.backbone is not None:
            return
        for name in ("image_size", "max_image_size"):
            size = getattr(self, name)
            if size is not None and (size < 1 or size % self.token_size):
                raise ValueError(
                    f"{name} ({size}) must be a multiple of patch_size * pixel_shuffle ({self.token_size}), at least 1"
                )


@validated
class MegaTransformerAudioConfig(EncoderConfig):
    """An encoder of audio: a log-mel spectrogram, convolutions that shorten it, a transformer in which all frames see
    each other.

    Args:
        head_dim: Width of a head, at least 2 and divisible by 2. Default: hidden_size / num_attention_heads.
        sampling_rate: Samples per second; other rates are resampled.
        n_fft: Samples in the window of a frame.
        hop_length: Samples from a frame to the next.
        num_mel_bins: Mel bands of a frame.
        max_seconds: Longest audio; what follows is not read.
        subsampling: Frames that become one token of the language model, a power of 2.
    """

    model_type = "megatransformer_audio"
    base_config_key = "audio_config"

    rope_theta: float | int = interval(min=0.0, exclude_min=True)(default=10000.0)
    sampling_rate: int = interval(min=1)(default=16000)
    n_fft: int = interval(min=1)(default=512)
    hop_length: int = interval(min=1)(default=160)
    num_mel_bins: int = interval(min=1)(default=64)
    max_seconds: float | int = interval(min=0.0, exclude_min=True)(default=30.0)
    subsampling: int = interval(min=1)(default=4)

    def validate_sizes(self) -> None:
        """Checks that span several fields; run by `strict` after the fields' own."""
        if self.backbone is None and self.head_dim % 2:
            raise ValueError(f"RoPE rotates pairs of features: head_dim ({self.head_dim}) must be even")
        if self.subsampling & (self.subsampling - 1):
            raise ValueError(
                f"subsampling ({self.subsampling}) must be a power of 2: each convolution halves the frames"
            )
        if self.hop_length > self.n_fft:
            raise ValueError(
                f"hop_length ({self.hop_length}) is more than n_fft ({self.n_fft}): samples would be skipped"
            )


class WriterConfig(StrictConfig):
    """What the output heads have in common: a head that turns hidden states into latents, one token after the other.

    Args:
        head: "flow" is a rectified flow per token (`flow.py`), "fsq" a codebook whose codes are tokens of the
            vocabulary, for which the codec must be an autoencoder with such a codebook.
        flow_hidden_size: Width of the flow head.
        flow_num_layers: Layers of the flow head.
        flow_prediction: What the flow head gives: "v" the velocity, "x" the latent itself (Li and He 2025, arXiv
            2511.13720). Default: "v" for latents of up to 64 numbers, else "x".
        flow_min_sigma: Smallest 1 - t by which the loss divides, with prediction "x": 0.4 suits small models, 0.05
            large ones.
        num_draws: Draws of noise and time for each latent in training.
        input_noise: Largest standard deviation of the noise on latents that are read back, in training.
        num_flow_steps: Euler steps of a latent in `generate`, unless it is told otherwise.
        guidance_scale: Classifier-free guidance in `generate`, unless it is told otherwise; 1 is none.
        guidance_schedule: "constant", or "linear" from 1 at an item's first token to `guidance_scale` at its last.
        flow_shift: s in t' = t / (s - (s - 1) t), the times of the Euler steps; above 1 they are denser near the noise.
        flow_temperature: Variance of the noise that a latent begins with in `generate`.
        loss_weight: Factor on the loss of this modality.
    """

    head: Literal["flow", "fsq"] = "flow"
    flow_hidden_size: int = interval(min=1)(default=128)
    flow_num_layers: int = interval(min=1, max=MOST_LAYERS)(default=2)
    flow_prediction: Literal["v", "x"] | None = None
    flow_min_sigma: float | int = interval(min=0.0, max=1.0, exclude_min=True)(default=0.4)
    num_draws: int = interval(min=1)(default=1)
    input_noise: float | int = interval(min=0.0)(default=0.3)
    num_flow_steps: int = interval(min=1)(default=8)
    guidance_scale: float | int = interval(min=0.0)(default=2.0)
    guidance_schedule: Literal["constant", "linear"] = "constant"
    flow_shift: float | int = interval(min=0.0, exclude_min=True)(default=1.0)
    flow_temperature: float | int = interval(min=0.0)(default=1.0)
    loss_weight: float | int = interval(min=0.0)(default=1.0)


@validated
class MegaTransformerImageWriterConfig(WriterConfig):
    """How images are written: all of one size.

    Args:
        num_channels: Channels of an image.
        image_size: Height and width.
        codec: "patch" are the pixels of a patch themselves, "autoencoder" a trained `MegaTransformerImageAutoencoder`.
        patch_size: Side of a patch in pixels; with an autoencoder it is not read.
        codec_name_or_path: Name on the Hugging Face hub, or folder, of the autoencoder.
        codec_config: Its configuration, filled in when the model is built, so that a checkpoint loads without it.
    """

    model_type = "megatransformer_image_writer"
    base_config_key = "image_writer_config"

    num_channels: int = interval(min=1)(default=3)
    image_size: int = interval(min=1)(default=32)
    codec: Literal["patch", "autoencoder"] = "patch"
    patch_size: int = interval(min=1)(default=8)
    codec_name_or_path: str | None = field(default=None, metadata={"is_path": True})
    codec_config: dict | None = None

    @property
    def num_tokens(self) -> int:
        """Latents of an image; with an autoencoder known when the model is built."""
        patch = self.patch_size if self.codec == "patch" else self.codec_config["patch_size"]
        return (self.image_size // patch) ** 2

    def validate_codec(self) -> None:
        """Checks that span several fields; run by `strict` after the fields' own."""
        if self.codec == "patch" and self.image_size % self.patch_size:
            raise ValueError(f"image_size ({self.image_size}) must be a multiple of patch_size ({self.patch_size})")
        if self.codec == "patch" and self.head == "fsq":
            raise ValueError("head 'fsq' needs codes, which codec 'patch' does not have; use codec 'autoencoder'")
        if self.codec == "autoencoder" and self.codec_name_or_path is None and self.codec_config is None:
            raise ValueError("codec 'autoencoder' needs codec_name_or_path, the folder of a trained one")


@validated
class MegaTransformerAudioWriterConfig(WriterConfig):
    """How audio is written: a log-mel spectrogram, some frames at a time.

    Args:
        sampling_rate: Samples per second.
        n_fft: Samples in the window of a frame.
        hop_length: Samples from a frame to the next.
        num_mel_bins: Mel bands of a frame.
        frames_per_token: Frames that are one latent.
        max_seconds: Longest audio that is learned or written.
        vocoder_name_or_path: Name on the Hugging Face hub, or folder, of a `MegaTransformerVocoder`. Default: the
            phases are found by Griffin and Lim's iteration.
        vocoder_config: Its configuration, filled in when the model is built.
    """

    model_type = "megatransformer_audio_writer"
    base_config_key = "audio_writer_config"

    guidance_scale: float | int = interval(min=0.0)(default=1.5)
    sampling_rate: int = interval(min=1)(default=8000)
    n_fft: int = interval(min=2)(default=256)
    hop_length: int = interval(min=1)(default=80)
    num_mel_bins: int = interval(min=1)(default=64)
    frames_per_token: int = interval(min=1)(default=4)
    max_seconds: float | int = interval(min=0.0, exclude_min=True)(default=4.0)
    vocoder_name_or_path: str | None = field(default=None, metadata={"is_path": True})
    vocoder_config: dict | None = None

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest audio."""
        frames = math.ceil(self.max_seconds * self.sampling_rate) // self.hop_length + 1
        return -(-frames // self.frames_per_token)

    def validate_sizes(self) -> None:
        """Checks that span several fields; run by `strict` after the fields' own."""
        if self.hop_length > self.n_fft:
            raise ValueError(
                f"hop_length ({self.hop_length}) is more than n_fft ({self.n_fft}): samples would be skipped"
            )
        if self.num_mel_bins > self.n_fft // 2:
            raise ValueError(f"num_mel_bins ({self.num_mel_bins}) must be at most n_fft / 2 ({self.n_fft // 2})")
        if self.head == "fsq":
            raise ValueError("head 'fsq' needs an autoencoder, which there is for images alone; use head 'flow'")


class MediaConfig(StrictConfig):
    """What models that read, and may write, images and audio have besides their language model.

    Args:
        vision_config: The encoder of images. Default: none, no images are read.
        audio_config: The encoder of audio. Default: none.
        image_writer_config: What writes images. Default: none, no images are written.
        audio_writer_config: What writes audio. Default: none.
        modality_configs: Configurations of further modalities by their names in `MODALITIES`.
        image_token_id: Id of the token in whose place the features of an image are put.
        audio_token_id: The same for audio. A further modality called NAME has its NAME_token_id.
        written_image_token_id: Id of the token in whose place the latents of a generated image are put.
        written_audio_token_id: The same for audio.
        image_start_token_id: Id of the token that opens an image; the latent after it is the first.
        image_end_token_id: Id of the token that closes it.
        audio_start_token_id: The same for audio.
        audio_end_token_id: The same for audio.
        null_token_id: Id of the token that stands for text that guidance leaves out.
        structure_token_ids: Ids that guidance leaves in: padding, begin, roles, and those of media.
        image_code_offset: Id of code 0, with head "fsq"; the codes follow each other.
    """

    keys_to_ignore_at_inference = [
        *MegaTransformerTextConfig.keys_to_ignore_at_inference,
        *("image_outputs", "audio_outputs", "target_losses"),
    ]
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(MegaTransformerVisionConfig, optional=True),
        "audio_config": SubConfigSpec(MegaTransformerAudioConfig, optional=True),
        "image_writer_config": SubConfigSpec(MegaTransformerImageWriterConfig, optional=True),
        "audio_writer_config": SubConfigSpec(MegaTransformerAudioWriterConfig, optional=True),
    }

    vision_config: MegaTransformerVisionConfig | dict | None = None
    audio_config: MegaTransformerAudioConfig | dict | None = None
    image_writer_config: MegaTransformerImageWriterConfig | dict | None = None
    audio_writer_config: MegaTransformerAudioWriterConfig | dict | None = None
    modality_configs: dict | None = None
    image_token_id: int | None = None
    audio_token_id: int | None = None
    written_image_token_id: int | None = None
    written_audio_token_id: int | None = None
    image_start_token_id: int | None = None
    image_end_token_id: int | None = None
    audio_start_token_id: int | None = None
    audio_end_token_id: int | None = None
    null_token_id: int | None = None
    structure_token_ids: list[int] | None = None
    image_code_offset: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        further = {f"{name}_token_id": kwargs.pop(f"{name}_token_id", None) for name in self.modality_configs or {}}
        super().__post_init__(**kwargs)
        for name, value in further.items():
            setattr(self, name, value)

    @classmethod
    def known_keys(cls, config_dict: dict[str, Any]) -> set[str]:
        """Those of every config, and the ids of the placeholders of further modalities."""
        further = {f"{name}_token_id" for name in config_dict.get("modality_configs") or {}}
        return super().known_keys(config_dict) | further

    @property
    def source_config(self) -> MegaTransformerTextConfig:
        """The part among whose tokens the features of media that are read stand."""
        return self.text_config

    @property
    def sampling_rate(self) -> int | None:
        """The rate of generated audio. Pipelines ask for it."""
        return None if self.audio_writer_config is None else self.audio_writer_config.sampling_rate

    def validate_token_ids(self) -> None:
        """Checks that span several parts; run by `strict` after the fields' own."""
        further = [f"{name}_token_id" for name in self.modality_configs or {}]
        names = [*(name for name in MediaConfig.__dataclass_fields__ if name.endswith("_token_id")), *further]
        ids = {name: getattr(self, name) for name in names if getattr(self, name, None) is not None}
        for name, value in ids.items():
            if not 0 <= value < self.text_config.vocab_size:
                raise ValueError(
                    f"{name} ({value}) is outside the vocabulary of text_config ({self.text_config.vocab_size})"
                )
            if list(ids.values()).count(value) > 1:
                raise ValueError(f"{name} ({value}) is also the id of another token; each needs its own")
        size = self.text_config.vocab_size
        outside = [value for value in self.structure_token_ids or () if not 0 <= value < size]
        if outside:
            raise ValueError(f"structure_token_ids has {outside[0]}, outside the vocabulary of text_config ({size})")
        # Whether there is room for all codes is seen when the codec is known.
        if self.image_code_offset is not None and not 0 <= self.image_code_offset <= size:
            raise ValueError(f"image_code_offset ({self.image_code_offset}) is outside the vocabulary ({size})")


@validated
class MegaTransformerConfig(MediaConfig):
    """A language model that reads, and may write, images and audio.

    Args:
        text_config: The language model.
        use_cache: Whether `forward` returns a cache; that of the text_config has to say so too.
        tie_word_embeddings: That of the text_config, whatever is given.
    """

    model_type = "megatransformer"
    _auto_class = "AutoConfig"
    path_of_recurrence = ("text_config", "recurrence")
    sub_configs_defaults = {"text_config": MegaTransformerTextConfig, **MediaConfig.sub_configs_defaults}

    text_config: MegaTransformerTextConfig | dict | None = None
    use_cache: bool = True
    tie_word_embeddings: bool | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        # `_auto_class` holds one class only, so the map of all of them is written here.
        model = "modeling_megatransformer.MegaTransformerForConditionalGeneration"
        kwargs["auto_map"] = {
            "AutoConfig": "configuration_megatransformer.MegaTransformerConfig",
            "AutoModel": "modeling_megatransformer.MegaTransformerModel",
            "AutoModelForCausalLM": model,
            "AutoModelForImageTextToText": model,
            "AutoModelForMultimodalLM": model,
            "AutoProcessor": "processing_megatransformer.MegaTransformerProcessor",
            **({"AutoModelForTextToWaveform": model} if self.audio_writer_config is not None else {}),
            **(kwargs.get("auto_map") or {}),
        }
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = self.text_config.tie_word_embeddings

    @property
    def num_steps(self) -> int | None:
        """That of the text_config, which `from_pretrained(folder, num_steps=4)` sets as for a text model."""
        return self.text_config.num_steps

    @num_steps.setter
    def num_steps(self, num_steps: int | None) -> None:
        self.text_config.num_steps = num_steps

    @property
    def vocab_size(self) -> int:
        """That of the language model. Libraries ask for it here too."""
        return self.text_config.vocab_size

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.text_config.vocab_size = value
