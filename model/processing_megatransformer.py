"""Text, images and audio to the tensors that the model reads."""

from typing import Any

import numpy as np
import torch
from transformers import AutoFeatureExtractor, AutoImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.data.data_collator import pad_without_fast_tokenizer_warning
from transformers.processing_utils import MultiModalData

from .audio_modality import AudioModality
from .chat import (
    NULL_TOKEN,
    ConversationEncoder,
    guard,
    is_own_template,
    messages_of,
    outline_of,
    place_items,
    render_messages,
    render_outline,
    special_tokens_of,
)
from .chat_rendering import template_of
from .configuration_megatransformer import MediaConfig
from .image_modality import ImageModality
from .media import write_audio
from .media_sources import source_of
from .modalities import ROLES, further_modality, modality_names, save_modalities, tokens_of
from .modality import Modality
from .processor_inputs import (
    CALL_OPTIONS,
    CHAT_OPTIONS,
    IDLE_CALL_OPTIONS,
    IDLE_CHAT_OPTIONS,
    as_list,
    deal_media,
    flatten_media,
    limit_of,
    preprocess_parts,
    read_options,
    with_rate,
)


def tokenizer_of(processor: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer in a processor, or the tokenizer itself."""
    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


class MegaTransformerProcessor(ProcessorMixin):
    """Makes batches of text with media: placeholders expanded, media preprocessed, in the order in which they stand.

    In texts an item is its placeholder, `<|image|>` or `<|audio|>`, which becomes start, as many placeholders as the
    item has tokens, and end. In messages it is a part {"type": "image", "image": ...}. What the assistant shows is of
    another kind where the model writes such media, "written_image" or "written_audio", with a placeholder of its own.
    Special tokens that are written in the texts of messages are ordinary text, while `__call__` reads them.

    Args:
        tokenizer: A fast one that knows `MEDIA_TOKENS`. From now on it pads in front, since answers go on behind.
        image_processor: Ours, or that of a pretrained backbone. None: no images are read.
        feature_extractor: The same for audio.
        chat_template: Default: `CHAT_TEMPLATE`. Texts are put in after it is rendered, so that it cannot look at them.
            It is saved behind a guard, which keeps texts from becoming special tokens where the tokenizer renders it.
        num_image_tokens: Tokens of every image, where the image processor is not ours.
        num_audio_tokens: The same for audio.
        modality_configs: Configurations of further modalities, by their names in `MODALITIES`.
        image_writer: Arguments of `ImageModality.as_target`. None: no images are written.
        audio_writer: Arguments of `AudioModality.as_target`. None: no audio is written.

    Raises:
        ValueError: parts do not fit each other, or texts, messages and media cannot be used.
    """

    _auto_class = "AutoProcessor"

    def __init__(
        self,
        tokenizer: Any,
        image_processor: Any = None,
        feature_extractor: Any = None,
        chat_template: str | None = None,
        num_image_tokens: int | None = None,
        num_audio_tokens: int | None = None,
        modality_configs: dict[str, dict] | None = None,
        image_writer: dict[str, Any] | None = None,
        audio_writer: dict[str, Any] | None = None,
    ):
        super().__init__(tokenizer, chat_template=guard(tokenizer, chat_template))
        self.auto_map = {"AutoProcessor": "processing_megatransformer.MegaTransformerProcessor"}
        self.image_processor, self.num_image_tokens = image_processor, num_image_tokens
        self.feature_extractor, self.num_audio_tokens = feature_extractor, num_audio_tokens
        self.modality_configs = modality_configs or None
        self.image_writer, self.audio_writer = image_writer, audio_writer
        given = ((ImageModality, image_writer), (AudioModality, audio_writer))
        targets = [modality.as_target(**options) for modality, options in given if options is not None]
        self._targets = {target.name: target for target in targets}
        tokenizer.padding_side = "left"
        self._check_vocabulary()
        for name, kind in self.modalities.items():  # as transformers' own processors have them
            setattr(self, f"{name}_token", kind.token)
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(kind.token))
        if self._targets:
            self.null_token, self.null_token_id = NULL_TOKEN, tokenizer.convert_tokens_to_ids(NULL_TOKEN)

    def _check_vocabulary(self) -> None:
        """An unknown token would silently be read as bytes."""
        needed = [*ROLES, *tokens_of(self.modalities.values())]
        needed += [NULL_TOKEN] if self._targets else []
        missing = [token for token in needed if token not in self.tokenizer.get_added_vocab()]
        if missing or not (self.tokenizer.bos_token and self.tokenizer.eos_token):
            raise ValueError(
                f"the tokenizer lacks {', '.join(missing) or 'a begin or end token'}; add them as special tokens"
            )

    # ------------------------------------------------------------------------------------------------- saving, loading

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The part that every processor has, and that is saved in files of its own."""
        return ["tokenizer"]

    @classmethod
    def get_processor_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """The parts that `ProcessorMixin` gives, and those that not every processor has loaded."""
        config, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # None would ask on standard input
        for name, auto_class in (("image_processor", AutoImageProcessor), ("feature_extractor", AutoFeatureExtractor)):
            if config.get(name) is not None:
                config[name] = auto_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return config, unused

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> list[str]:
        """Saves as `ProcessorMixin` does, and the files of further modalities."""
        files = super().save_pretrained(save_directory, *args, **kwargs)
        save_modalities(self.modality_configs or (), save_directory)
        return files

    @property
    def model_input_names(self) -> list[str]:
        """Arguments of the model, `input_ids` first."""
        media = [name for kind in self.modalities.values() for name in kind.input_names]
        return ["input_ids", "attention_mask", *media]

    # ----------------------------------------------------------------------------------------------------------- media

    @property
    def modalities(self) -> dict[str, Modality]:
        """What this processor makes tensors of: what the model reads besides text, and what it writes."""
        modalities: dict[str, Modality] = {}
        if self.image_processor is not None:
            modalities["image"] = ImageModality(self.image_processor, self.num_image_tokens)
        if self.feature_extractor is not None:
            modalities["audio"] = AudioModality(self.feature_extractor, self.num_audio_tokens)
        modalities |= self._targets
        for name, config in (self.modality_configs or {}).items():
            modalities[name] = further_modality(name, config)
        return modalities

    @property
    def modality_names(self) -> tuple[str, ...]:
        """What the numbers in `modality_ids` mean, beginning with 0."""
        return modality_names()

    def load_item(self, kind: str, source: Any) -> Any:
        """An item, decoded: a PIL image, or float32 (samples,) at the feature extractor's rate. MediaError if it cannot
        be used.
        """
        return self._modality(kind).load(source_of({"type": kind, kind: source}))

    def item_size(self, kind: str, source: Any) -> Any:
        """(height, width) of an image, seconds of a waveform, from the header; of further modalities, their tokens.
        MediaError: the header tells that it cannot be used.
        """
        return self._modality(kind).size(source_of({"type": kind, kind: source}))

    def num_media_tokens(self, kind: str, size: Any) -> int:
        """Tokens that an item of that size (`item_size`) takes in a text, start and end included."""
        return self._modality(kind).tokens_of_size(size) + 2

    def _get_num_multimodal_tokens(
        self, image_sizes: list[tuple[int, int]] | None = None, **kwargs: Any
    ) -> MultiModalData:
        """The number of placeholders of each image of (height, width), start and end left out, as vLLM asks for it."""
        if image_sizes is None:
            return MultiModalData()
        counts = [self._modality("image").tokens_of_size(tuple(size)) for size in image_sizes]
        return MultiModalData(num_image_tokens=counts, num_image_patches=[1] * len(counts))

    def preprocess_item(self, kind: str, medium: Any) -> torch.Tensor:
        """One item to the tensor that `encode_chat` and `collate_media` take."""
        return self._modality(kind).preprocess(medium)

    def collate_media(self, media: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Preprocessed media by modality, in the order of their placeholders, to the arguments of the model."""
        batch = {}
        for name, tensors in media.items():
            if tensors:
                batch.update(self._modality(name).collate(tensors))
        return batch

    def _modality(self, name: str) -> Modality:
        modalities = self.modalities
        if name not in modalities:
            raise ValueError(f"{name!r} is nothing that this model reads; it reads {', '.join(['text', *modalities])}")
        return modalities[name]

    # ----------------------------------------------------------------------------------------------------------- chats

    def encode_chat(
        self,
        messages: list[dict[str, Any]],
        media: dict[str, list[Any]] | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        allow_fetch: bool = False,
    ) -> dict[str, Any]:
        """One conversation to token ids, without padding.

        Args:
            messages: [{"role": "user" | "assistant" | "system" | "tool", "content": text or parts}]; a part is
                {"type": "text", "text": ...} or {"type": KIND, KIND: item}; "path", "bytes", "url" or "base64" may
                stand in the place of the second KIND. So are parts of OpenAI's format, "image_url" and "input_audio".
                An item that is a string is a path, a `data:` or `file://` URI, or base64 (`read_source`).
            media: Items of the parts that have none themselves, or of as many marks such as "<image>" in texts, by
                modality. A tensor of floats counts as preprocessed.
            add_generation_prompt: Ends with the token that lets the assistant speak.
            continue_final_message: The last message stays open.
            chat_template: A template in the place of the processor's own.
            allow_fetch: Whether media at http and https addresses are fetched, wherever these lead.

        Returns:
            input_ids: int64 (tokens,).
            answer_mask: bool (tokens,), what is learned: what the assistant says, its end token included, and of its
                media `Modality.learned`; but for messages with "weight" 0 or "train" false.
            media: Preprocessed media by modality, in the order of their placeholders; only modalities that occur.

        Raises:
            ValueError: a message or part has an unknown role, type or form, or no content; items are more or
                fewer than the parts for them, or cannot be read (`MediaError`).
        """
        encoder = ConversationEncoder(self.tokenizer, self.modalities, template_of(self.chat_template, chat_template))
        if media and isinstance(messages, (list, tuple)):
            messages, _ = place_items(messages, {kind: [{"type": kind}] * len(items) for kind, items in media.items()})
        encoded = encoder.encode(messages, add_generation_prompt, continue_final_message)
        found = preprocess_parts(encoded.media, media or {}, encoder.modalities, allow_fetch)
        ids, is_answer = encoder.expand(encoded.ids, encoded.is_answer, found)
        return {"input_ids": torch.tensor(ids.tolist()), "answer_mask": torch.tensor(is_answer), "media": found}

    def apply_chat_template(
        self,
        conversation: list[dict[str, Any]] | list[list[dict[str, Any]]],
        chat_template: str | None = None,
        add_generation_prompt: bool = False,
        continue_final_message: bool | str = False,
        return_assistant_tokens_mask: bool = False,
        tokenize: bool = False,
        return_tensors: str | None = None,
        return_dict: bool = False,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> str | list[str] | list[list[int]] | BatchFeature:
        """One conversation or several to text, to ids, or to a batch with media (`encode_chat`).

        Args:
            tokenize: Ids instead of text. In text, special tokens that a message contains cannot be told from others.
            return_dict: The batch instead of its ids.
            return_assistant_tokens_mask: The batch has `assistant_masks`, 1 for what the assistant says.
            processor_kwargs, kwargs: Options of padding and truncation (`__call__`), and allow_fetch (`encode_chat`).

        Raises:
            ValueError: the cases of `encode_chat`, and an option asks for what is not done, such as tools.
            TypeError: an option is unknown.
        """
        given = {"return_tensors": return_tensors, **(processor_kwargs or {}), **kwargs}
        options = {"allow_fetch": False, **self._read_options(given, CHAT_OPTIONS, IDLE_CHAT_OPTIONS)}
        is_batch = isinstance(conversation, (list, tuple)) and any(isinstance(it, (list, tuple)) for it in conversation)
        conversations = conversation if is_batch else [conversation]
        open_end = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message in (True, "content"),
        }
        if not tokenize:
            template = template_of(self.chat_template, chat_template)
            rendered = [self._render(template, messages, **open_end) for messages in conversations]
            return rendered if is_batch else rendered[0]
        open_end |= {"chat_template": chat_template, "allow_fetch": bool(options.pop("allow_fetch"))}
        encoded = [self.encode_chat(messages, **open_end) for messages in conversations]
        batch = self._batch(encoded, return_assistant_tokens_mask, **options)
        return batch if return_dict else batch["input_ids"]

    def _render(self, template: str, messages: list[dict[str, Any]], **open_end: bool) -> str:
        """A conversation as text, with the guard of the template around its texts."""
        may_end_empty, has_fields = open_end["continue_final_message"], not is_own_template(template)
        outline, texts, _ = outline_of(messages, self.modalities, may_end_empty, has_fields)
        tokens = special_tokens_of(self.tokenizer)
        form = render_outline(template, outline, tokens, *open_end.values()).outline
        return render_messages(template, messages_of(form, texts), **open_end, **dict(tokens))[0]

    # --------------------------------------------------------------------------------------------------------- batches

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts with placeholders, and their media, to a batch.

        Args:
            images: An image, a list of all, or a list of lists (or None), one for each text (`media.load_image`).
            text: One or several; none: media alone.
            videos: Media of a further modality "video", if there is one.
            audio: Waveforms, given as images are (`media.load_audio`); arrays are at `sampling_rate`, by default ours.
            kwargs: Media of further modalities by name; return_tensors, padding, max_length, pad_to_multiple_of,
                padding_side, return_attention_mask, truncation, add_special_tokens, sampling_rate, allow_fetch
                (`encode_chat`), also within `text_kwargs`, `audio_kwargs` or `common_kwargs`. Other options of
                transformers are accepted as far as they ask for nothing (`processor_inputs`). Truncation cuts text at
                the tokenizer's `truncation_side`.

        Returns:
            input_ids first, then attention_mask and what the model takes for the media.

        Raises:
            ValueError: placeholders and media differ in number, media cannot be read, truncation
                would cut an item, or an option asks for what is not done.
            TypeError: an option is unknown.
        """
        if "video" not in self.modalities and any(video is not None for video in flatten_media(videos)):
            raise ValueError("videos are not read; give their frames as images")
        options = {"add_special_tokens": True, "allow_fetch": False, "sampling_rate": None, "return_tensors": None}
        further = {name: kwargs.pop(name, None) for name in self.modalities if name not in ("image", "audio")}
        options |= self._read_options(kwargs, CALL_OPTIONS, IDLE_CALL_OPTIONS)
        rate, add_special_tokens = options.pop("sampling_rate"), options.pop("add_special_tokens")
        allow_fetch = bool(options.pop("allow_fetch"))
        audio = audio if rate is None else with_rate(audio, rate)
        media = {"image": list(images) if isinstance(images, tuple) else images, "audio": audio, **further}
        media |= {} if videos is None else {"video": videos}
        media = {name: as_list(it) for name, it in media.items() if it is not None}
        media = {name: it for name, it in media.items() if flatten_media(it)}
        if text is None:
            found = {
                name: [self._preprocess(name, it, allow_fetch) for it in flatten_media(media[name])] for name in media
            }
            return BatchFeature(self.collate_media(found), tensor_type=options["return_tensors"])
        texts = [text] if isinstance(text, str) else text
        if not isinstance(texts, (list, tuple)) or not all(isinstance(sample, str) for sample in texts):
            raise ValueError(f"text is {type(text).__name__}, and not a string or a list of strings")
        rows = [self.tokenizer(sample, add_special_tokens=add_special_tokens)["input_ids"] for sample in texts]
        return self._batch(self._with_media(rows, media, allow_fetch), **options)

    def post_process_multimodal_output(
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        """What `generate` returned, in the form that is asked for.

        Args:
            generated_outputs: Token ids, a `MediaGenerateOutput`, or images already.
            generation_mode: "text": texts; "image": PIL images; "audio": waveforms, float (samples,); "any": for each
                row a list of parts as messages have them.

        Raises:
            ValueError: the mode is another, or was not generated.
        """
        if generation_mode in (None, "text"):
            ids = getattr(generated_outputs, "sequences", generated_outputs)
            return super().post_process_multimodal_output(ids, skip_special_tokens, **kwargs)
        if generation_mode == "any":
            return [self._parts(generated_outputs, row, skip_special_tokens) for row in generated_outputs.segments]
        if isinstance(generated_outputs, list):
            return generated_outputs
        media = getattr(generated_outputs, {"image": "images", "audio": "audio"}.get(generation_mode, ""), None)
        if media is None:
            raise ValueError(
                f"there is nothing of mode {generation_mode!r} in the output; give generation_mode to `generate` too"
            )
        return media

    def _parts(self, output: Any, segments: list[tuple[str, Any]], skip_special_tokens: bool) -> list[dict[str, Any]]:
        parts = []
        for name, value in segments:
            if name == "text":
                text = self.tokenizer.decode(value, skip_special_tokens=skip_special_tokens)
                parts += [{"type": "text", "text": text}] if text else []
            elif name == "image":
                parts.append({"type": "image", "image": output.images[value]})
            else:
                rate = output.sampling_rate
                parts.append({"type": "audio", "audio": output.audio[value], "sampling_rate": rate})
        return parts

    def save_audio(self, audio: Any, saving_path: Any, sampling_rate: int | None = None, **kwargs: Any) -> None:
        """Waveforms, float (samples,) in -1 .. 1, one or a list, to as many files, by soundfile. `sampling_rate`: by
        default that of the audio that the model writes. ValueError: there are more or fewer paths than waveforms.
        """
        clips = audio if isinstance(audio, list) else [audio]
        paths = saving_path if isinstance(saving_path, list) else [saving_path]
        if len(clips) != len(paths):
            raise ValueError(f"there are {len(clips)} waveforms and {len(paths)} paths; give one for each")
        for clip, path in zip(clips, paths, strict=True):
            write_audio(path, clip, sampling_rate or self.audio_writer["sampling_rate"])

    def _preprocess(self, name: str, medium: Any, allow_fetch: bool) -> torch.Tensor:
        return self._modality(name).preprocess(source_of({"type": name, name: medium}, allow_fetch))

    def _with_media(
        self, rows: list[list[int]], media: dict[str, list[Any]], allow_fetch: bool
    ) -> list[dict[str, Any]]:
        """Rows of ids with one placeholder for an item, as `encode_chat` gives them."""
        encoded = [{"media": {}} for _ in rows]
        for name in dict.fromkeys([*self.modalities, *media]):
            kind = self._modality(name)
            counts = [row.count(getattr(self, f"{name}_token_id")) for row in rows]
            for sample, part in zip(encoded, deal_media(media.get(name, []), counts, kind), strict=True):
                sample["media"][name] = [self._preprocess(name, medium, allow_fetch) for medium in part]
        encoder = ConversationEncoder(self.tokenizer, self.modalities)
        for sample, row in zip(encoded, rows, strict=True):
            ids, _ = encoder.expand(np.array(row, dtype=np.int64), np.ones(len(row), dtype=bool), sample["media"])
            sample["input_ids"] = torch.tensor(ids)
        return encoded

    def _read_options(self, given: dict[str, Any], known: tuple[str, ...], idle: dict[str, tuple]) -> dict[str, Any]:
        parts = [part for part in (self.image_processor, self.feature_extractor) if part is not None]
        options = read_options(given, known, idle, parts)
        if options.get("return_tensors") == "auto":  # how transformers calls a processor's own default
            options["return_tensors"] = None
        return options

    def _batch(
        self,
        encoded: list[dict[str, Any]],
        with_masks: bool = False,
        return_tensors: str | None = None,
        padding: bool | str | None = None,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_attention_mask: bool | None = None,
        **options: Any,
    ) -> BatchFeature:
        """Encoded conversations to one batch."""
        limit = limit_of(truncation, max_length, self.tokenizer.model_max_length)
        kept = [self._cut(number, sample["input_ids"], limit) for number, sample in enumerate(encoded)]
        rows = {"input_ids": [sample["input_ids"][part].tolist() for sample, part in zip(encoded, kept, strict=True)]}
        options |= {"padding": padding or False, "max_length": max_length if padding == "max_length" else None}
        batch = dict(pad_without_fast_tokenizer_warning(self.tokenizer, rows, **options))
        if with_masks:
            answers = [iter(sample["answer_mask"][part].tolist()) for sample, part in zip(encoded, kept, strict=True)]
            batch["assistant_masks"] = [
                [int(real and next(answer)) for real in row]
                for row, answer in zip(batch["attention_mask"], answers, strict=True)
            ]
        if return_attention_mask is False:
            del batch["attention_mask"]
        media: dict[str, list[torch.Tensor]] = {}
        for sample in encoded:
            for name, tensors in sample["media"].items():
                media.setdefault(name, []).extend(tensors)
        return BatchFeature({**batch, **self.collate_media(media)}, tensor_type=return_tensors)

    def _cut(self, number: int, ids: torch.Tensor, limit: int | None) -> slice:
        """What is left of a sample of at most that many tokens; ValueError if an item would lose its place."""
        if limit is None or len(ids) <= limit:
            return slice(None)
        at_end = self.tokenizer.truncation_side == "right"
        kept = slice(limit) if at_end else slice(len(ids) - limit, None)
        lost = ids[limit:] if at_end else ids[: len(ids) - limit]
        for kind in self.modalities.values():
            tokens = self.tokenizer.convert_tokens_to_ids([kind.token, kind.end_token])
            if torch.isin(lost, torch.tensor(tokens)).any():
                raise ValueError(
                    f"sample {number} has {len(ids)} tokens, and truncation to {limit} would cut media of type "
                    f"{kind.name!r}; raise max_length or shorten what stands around them"
                )
        return kept


def build_processor(
    config: MediaConfig,
    tokenizer: Any,
    num_image_tokens: int | None = None,
    num_audio_tokens: int | None = None,
) -> MegaTransformerProcessor:
    """The processor of a model, from its configuration and a fast tokenizer that knows `MEDIA_TOKENS`. A backbone
    brings its own image processor or feature extractor along, and needs the number of tokens of its items. ValueError:
    the cases of `MegaTransformerProcessor`.
    """
    vision, audio, further = config.vision_config, config.audio_config, config.modality_configs or {}
    images, recordings = config.image_writer_config, config.audio_writer_config
    return MegaTransformerProcessor(
        tokenizer,
        image_processor=None if vision is None else ImageModality.build_processor(vision),
        feature_extractor=None if audio is None else AudioModality.build_processor(audio),
        num_image_tokens=num_image_tokens,
        num_audio_tokens=num_audio_tokens,
        modality_configs={name: part if isinstance(part, dict) else part.to_dict() for name, part in further.items()},
        image_writer=None if images is None else ImageModality.target_options(images),
        audio_writer=None if recordings is None else AudioModality.target_options(recordings),
    )
