"""Text, images and audio to the tensors that the model reads."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import AutoFeatureExtractor, AutoImageProcessor, BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.data.data_collator import pad_without_fast_tokenizer_warning

from .backbones import reason_of
from .chat import (
    ROLE_TOKENS,
    check_texts,
    guard,
    kinds_of_role,
    messages_of,
    outline_of,
    render_messages,
    render_outline,
)
from .chat_guard import encode_text
from .chat_rendering import template_of
from .configuration_megatransformer import (
    MegaTransformerAudioConfig,
    MegaTransformerAudioWriterConfig,
    MegaTransformerConfig,
    MegaTransformerImageWriterConfig,
    MegaTransformerVisionConfig,
)
from .feature_extraction_megatransformer import MegaTransformerFeatureExtractor
from .image_processing_megatransformer import MegaTransformerImageProcessor, flatten
from .media import write_audio
from .media_kinds import (
    WRITTEN_MODALITIES,
    BackboneImages,
    BackboneRecordings,
    Images,
    MediaKind,
    Recordings,
    WrittenImages,
    WrittenRecordings,
)
from .media_sources import source_of
from .modalities import MODALITIES, Modality
from .processor_inputs import as_list, deal_media, preprocess_parts, with_rate
from .processor_options import (
    CALL_OPTIONS,
    CHAT_OPTIONS,
    IDLE_CALL_OPTIONS,
    IDLE_CHAT_OPTIONS,
    limit_of,
    read_options,
)
from .writers import modality_names


def _tokens_of(modalities: Iterable[Modality]) -> list[str]:
    return [token for kind in modalities for token in (kind.start_token, kind.token, kind.end_token)]


_ROLES = tuple(ROLE_TOKENS[role] for role in ("user", "assistant", "system"))
MEDIA_TOKENS = (*_ROLES, *_tokens_of((MODALITIES["image"], MODALITIES["audio"])))
"""What a vocabulary has after pad, begin and end if the run has media, in this order if trained by us. That of tools
comes with fine-tuning (`prepare_tokenizer`).
"""
NULL_TOKEN = "<|null|>"
"""Stands in the place of each token of a prompt that is left out for guidance without a classifier."""
WRITTEN_TOKENS = (*(modality.token for modality in WRITTEN_MODALITIES), NULL_TOKEN)
"""What it has after those if media are written."""


def tokenizer_of(processor: PreTrainedTokenizerBase | ProcessorMixin) -> PreTrainedTokenizerBase:
    """The tokenizer in a processor, or the tokenizer itself."""
    return processor.tokenizer if isinstance(processor, ProcessorMixin) else processor


def media_tokens(config: MegaTransformerConfig) -> list[str]:
    """`MEDIA_TOKENS`, those of a model's further modalities, and `WRITTEN_TOKENS` if it writes media."""
    further = _tokens_of(MODALITIES[name] for name in config.modality_configs or {})
    writes = config.image_writer_config is not None or config.audio_writer_config is not None
    return [*MEDIA_TOKENS, *further, *(WRITTEN_TOKENS if writes else ())]


class MegaTransformerProcessor(ProcessorMixin):
    """Makes batches of text with media: placeholders expanded, media preprocessed, in the order in which they stand.

    In texts a medium is its placeholder, `<|image|>` or `<|audio|>`, which becomes start, as many placeholders as the
    medium has tokens, and end. In messages it is a part {"type": "image", "image": ...}. What the assistant shows is of
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
        image_writer: Arguments of `WrittenImages`. None: no images are written.
        audio_writer: Arguments of `WrittenRecordings`. None: no sound is written.

    Raises:
        ValueError: for parts that do not fit each other, and for texts, messages and media that cannot be used.
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
        self._written = _written_kinds(image_writer, audio_writer)
        tokenizer.padding_side = "left"
        _check_count("image_processor", image_processor, MegaTransformerImageProcessor, num_image_tokens)
        _check_count("feature_extractor", feature_extractor, MegaTransformerFeatureExtractor, num_audio_tokens)
        self._check_vocabulary()
        for name, kind in self.kinds.items():  # as transformers' own processors have them
            setattr(self, f"{name}_token", kind.modality.token)
            setattr(self, f"{name}_token_id", tokenizer.convert_tokens_to_ids(kind.modality.token))
        if self._written:
            self.null_token, self.null_token_id = NULL_TOKEN, tokenizer.convert_tokens_to_ids(NULL_TOKEN)
        self._ids_of_structure: dict[str, list[int]] = {}

    def _check_vocabulary(self) -> None:
        """An unknown token would silently be read as bytes."""
        needed = [*_ROLES, *_tokens_of(kind.modality for kind in self.kinds.values())]
        needed += [NULL_TOKEN] if self._written else []
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
        """As in `ProcessorMixin`, with the parts that not every processor has loaded."""
        config, unused = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        kwargs["trust_remote_code"] = bool(kwargs.get("trust_remote_code"))  # None would ask on standard input
        for name, auto_class in (("image_processor", AutoImageProcessor), ("feature_extractor", AutoFeatureExtractor)):
            if config.get(name) is not None:
                config[name] = auto_class.from_pretrained(pretrained_model_name_or_path, **kwargs)
        return config, unused

    @property
    def model_input_names(self) -> list[str]:
        """Arguments of the model, `input_ids` first."""
        media = [name for kind in self.kinds.values() for name in kind.modality.input_names]
        return ["input_ids", "attention_mask", *media]

    # ----------------------------------------------------------------------------------------------------------- media

    @property
    def kinds(self) -> dict[str, MediaKind]:
        """What this processor makes tensors of: what the model reads besides text, and what it writes."""
        kinds: dict[str, MediaKind] = {}
        if self.image_processor is not None:
            kinds["image"] = _choose(Images, BackboneImages, self.image_processor, self.num_image_tokens)
        if self.feature_extractor is not None:
            kinds["audio"] = _choose(Recordings, BackboneRecordings, self.feature_extractor, self.num_audio_tokens)
        kinds |= self._written
        for name, config in (self.modality_configs or {}).items():
            kinds[name] = MediaKind(name, config)
        return kinds

    @property
    def modality_names(self) -> tuple[str, ...]:
        """What the numbers in `modality_ids` mean, beginning with 0."""
        return modality_names()

    def kinds_of_role(self, role: str) -> dict[str, str]:
        """Types of parts that messages of a role may have besides text, and the kinds that these are."""
        return kinds_of_role(role, self.kinds)

    def load_medium(self, kind: str, source: Any) -> Any:
        """A medium, decoded: a PIL image, or float32 (samples,) at the feature extractor's rate.

        Raises:
            MediaError: it cannot be used; see `load_image` and `load_audio`.
        """
        return self._kind(kind).load(source_of({"type": kind, kind: source}))

    def medium_size(self, kind: str, source: Any) -> Any:
        """(height, width) of an image, seconds of a recording, from the header; of further kinds, their tokens.

        Raises:
            MediaError: as far as the header tells.
        """
        return self._kind(kind).size(source_of({"type": kind, kind: source}))

    def num_media_tokens(self, kind: str, size: Any) -> int:
        """Tokens that a medium of that size (`medium_size`) takes in a text, start and end included."""
        return self._kind(kind).tokens_of_size(size) + 2

    def preprocess_medium(self, kind: str, medium: Any) -> torch.Tensor:
        """One medium to the tensor that `encode_chat` and `collate_media` take."""
        return self._kind(kind).preprocess(medium)

    def collate_media(self, media: dict[str, list[torch.Tensor]]) -> dict[str, torch.Tensor]:
        """Preprocessed media by kind, in the order of their placeholders, to the arguments of the model."""
        batch = {}
        for name, tensors in media.items():
            if tensors:
                batch.update(self._kind(name).collate(tensors))
        return batch

    def _kind(self, name: str) -> MediaKind:
        kinds = self.kinds
        if name not in kinds:
            raise ValueError(f"{name!r} is nothing that this model reads; it reads {', '.join(['text', *kinds])}")
        return kinds[name]

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
                {"type": "text", "text": ...} or {"type": KIND, KIND: medium}; "path", "bytes", "url" or "base64" may
                stand in the place of the second KIND. So are parts of OpenAI's format, "image_url" and "input_audio".
                A medium that is a string is a path, a `data:` or `file://` URI, or base64 (`read_source`).
            media: By kind, media of the parts that have none themselves. A tensor of floats counts as preprocessed.
            add_generation_prompt: Ends with the token that lets the assistant speak.
            continue_final_message: The last message stays open.
            chat_template: In the place of the processor's own.
            allow_fetch: Whether media at http and https addresses are fetched, wherever these lead.

        Returns:
            input_ids: int64 (tokens,).
            answer_mask: bool (tokens,), what is learned: what the assistant says, its end token included, and of its
                media `MediaKind.learned`.
            media: Preprocessed media by kind, in the order of their placeholders; only kinds that occur.

        Raises:
            ValueError: for a message or part of unknown role, type or form, one without content, media that are more or
                fewer than the parts for them, and media that cannot be read (`MediaError`).
        """
        kinds = self.kinds
        outline, texts, parts = outline_of(messages, kinds, continue_final_message)
        template = template_of(self.chat_template, chat_template)
        check_texts(self.tokenizer, texts, template)
        found = preprocess_parts(parts, media or {}, kinds, allow_fetch)
        pieces = render_outline(
            template,
            outline,
            self.tokenizer.bos_token,
            self.tokenizer.eos_token,
            add_generation_prompt,
            continue_final_message,
        )
        counts = {name: iter([kinds[name].num_tokens(tensor) for tensor in found[name]]) for name in found}
        ids, answer_mask = [], []
        for piece, is_answer in pieces:
            if isinstance(piece, int):
                new = [(some := encode_text(self.tokenizer, texts[piece]), [True] * len(some))]
            else:
                new = self._expand(self._encode_structure(piece), counts)
            for some, are_learned in new:
                ids += some
                answer_mask += [is_answer and is_learned for is_learned in are_learned]
        if left_out := [name for name, rest in counts.items() if next(rest, None) is not None]:
            raise ValueError(f"the chat template leaves out the {left_out[0]} of a message; correct it")
        return {"input_ids": torch.tensor(ids), "answer_mask": torch.tensor(answer_mask), "media": found}

    def _encode_structure(self, piece: str) -> list[int]:
        """Ids of what the template writes, which are few and recur."""
        if piece not in self._ids_of_structure:
            self._ids_of_structure[piece] = self.tokenizer.encode(piece, add_special_tokens=False)
        return self._ids_of_structure[piece]

    def _expand(self, ids: list[int], counts: dict[str, Iterator[int]]) -> Iterator[tuple[list[int], list[bool]]]:
        """Runs of ids, with each placeholder as start, placeholders and end, and whether these are learned where the
        assistant says them.
        """
        kinds = self.kinds
        names = {getattr(self, f"{name}_token_id"): name for name in counts}
        for token_id in ids:
            if token_id not in names:
                yield [token_id], [True]
                continue
            if (count := next(counts[names[token_id]], None)) is None:
                raise ValueError(f"the chat template writes more places for {names[token_id]} than messages have")
            kind = kinds[names[token_id]]
            start, end = self.tokenizer.convert_tokens_to_ids([kind.modality.start_token, kind.modality.end_token])
            at_start, in_places, at_end = kind.learned
            yield [start, *[token_id] * count, end], [at_start, *[in_places] * count, at_end]

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
            ValueError: as `encode_chat`, and for an option that asks for what is not done, such as tools.
            TypeError: for an unknown option.
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
            outlines = [outline_of(messages, self.kinds, continue_final_message) for messages in conversations]
            written = [messages_of(outline, texts) for outline, texts, _ in outlines]
            template, tokens = template_of(self.chat_template, chat_template), self.tokenizer.special_tokens_map
            rendered = [render_messages(template, one, **open_end, **tokens)[0] for one in written]
            return rendered if is_batch else rendered[0]
        open_end |= {"chat_template": chat_template, "allow_fetch": bool(options.pop("allow_fetch"))}
        encoded = [self.encode_chat(messages, **open_end) for messages in conversations]
        batch = self._batch(encoded, return_assistant_tokens_mask, **options)
        return batch if return_dict else batch["input_ids"]

    # --------------------------------------------------------------------------------------------------------- batches

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: None = None,
        audio: Any = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """Texts with placeholders, and their media, to a batch.

        Args:
            images: An image, a list of all, or a list of lists (or None), one for each text (`media.load_image`).
            text: One or several; none: media alone.
            videos: Not read.
            audio: As images (`media.load_audio`); arrays are at `sampling_rate`, by default ours.
            kwargs: Media of further modalities by name; return_tensors, padding, max_length, pad_to_multiple_of,
                padding_side, return_attention_mask, truncation, add_special_tokens, sampling_rate, allow_fetch
                (`encode_chat`), also within `text_kwargs`, `audio_kwargs` or `common_kwargs`. Other options of
                transformers are accepted as far as they ask for nothing (`processor_options`). Truncation cuts text at
                the tokenizer's `truncation_side`.

        Returns:
            input_ids first, then attention_mask and what the model takes for the media.

        Raises:
            ValueError: for placeholders and media that differ in number, media that cannot be read, truncation that
                would cut a medium, and an option that asks for what is not done.
            TypeError: for an unknown option.
        """
        if any(video is not None for video in flatten(videos)):
            raise ValueError("videos are not read; give their frames as images")
        options = {"add_special_tokens": True, "allow_fetch": False, "sampling_rate": None, "return_tensors": None}
        further = {name: kwargs.pop(name, None) for name in self.kinds if name not in ("image", "audio")}
        options |= self._read_options(kwargs, CALL_OPTIONS, IDLE_CALL_OPTIONS)
        rate, add_special_tokens = options.pop("sampling_rate"), options.pop("add_special_tokens")
        allow_fetch = bool(options.pop("allow_fetch"))
        audio = audio if rate is None else with_rate(audio, rate)
        media = {"image": list(images) if isinstance(images, tuple) else images, "audio": audio, **further}
        media = {name: as_list(it) for name, it in media.items() if it is not None}
        media = {name: it for name, it in media.items() if flatten(it)}
        if text is None:
            found = {name: [self._preprocess(name, it, allow_fetch) for it in flatten(media[name])] for name in media}
            return BatchFeature(self.collate_media(found), tensor_type=_tensor_type(options["return_tensors"]))
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
            ValueError: for another mode, or one that was not generated.
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
        """Waveforms to files, one each, by soundfile.

        Args:
            audio: Float (samples,) in -1 .. 1, or a list of them.
            saving_path: A path, or as many.
            sampling_rate: Default: that of the sound that the model writes.

        Raises:
            ValueError: for more or fewer paths than waveforms.
        """
        clips = audio if isinstance(audio, list) else [audio]
        paths = saving_path if isinstance(saving_path, list) else [saving_path]
        if len(clips) != len(paths):
            raise ValueError(f"there are {len(clips)} waveforms and {len(paths)} paths; give one for each")
        for clip, path in zip(clips, paths, strict=True):
            write_audio(path, clip, sampling_rate or self.audio_writer["sampling_rate"])

    def _preprocess(self, name: str, medium: Any, allow_fetch: bool) -> torch.Tensor:
        return self._kind(name).preprocess(source_of({"type": name, name: medium}, allow_fetch))

    def _with_media(
        self, rows: list[list[int]], media: dict[str, list[Any]], allow_fetch: bool
    ) -> list[dict[str, Any]]:
        """Rows of ids with one placeholder for a medium, as `encode_chat` gives them."""
        encoded = [{"media": {}} for _ in rows]
        for name in dict.fromkeys([*self.kinds, *media]):
            kind = self._kind(name)
            counts = [row.count(getattr(self, f"{name}_token_id")) for row in rows]
            for sample, part in zip(encoded, deal_media(media.get(name, []), counts, kind.modality), strict=True):
                sample["media"][name] = [self._preprocess(name, medium, allow_fetch) for medium in part]
        for sample, row in zip(encoded, rows, strict=True):
            counts = {name: map(self._kind(name).num_tokens, tensors) for name, tensors in sample["media"].items()}
            sample["input_ids"] = torch.tensor([token_id for some, _ in self._expand(row, counts) for token_id in some])
        return encoded

    def _read_options(self, given: dict[str, Any], known: tuple[str, ...], idle: dict[str, tuple]) -> dict[str, Any]:
        parts = [part for part in (self.image_processor, self.feature_extractor) if part is not None]
        return read_options(given, known, idle, parts)

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
        return BatchFeature({**batch, **self.collate_media(media)}, tensor_type=_tensor_type(return_tensors))

    def _cut(self, number: int, ids: torch.Tensor, limit: int | None) -> slice:
        """What is left of a sample of at most that many tokens.

        Raises:
            ValueError: a medium would lose its place.
        """
        if limit is None or len(ids) <= limit:
            return slice(None)
        at_end = self.tokenizer.truncation_side == "right"
        kept = slice(limit) if at_end else slice(len(ids) - limit, None)
        lost = ids[limit:] if at_end else ids[: len(ids) - limit]
        for kind in self.kinds.values():
            tokens = self.tokenizer.convert_tokens_to_ids([kind.modality.token, kind.modality.end_token])
            if torch.isin(lost, torch.tensor(tokens)).any():
                raise ValueError(
                    f"sample {number} has {len(ids)} tokens, and truncation to {limit} would cut media of type "
                    f"{kind.modality.name!r}; raise max_length or shorten what stands around them"
                )
        return kept


def build_processor(
    config: MegaTransformerConfig,
    tokenizer: Any,
    num_image_tokens: int | None = None,
    num_audio_tokens: int | None = None,
) -> MegaTransformerProcessor:
    """The processor of a model.

    Args:
        config: Of which the parts that read and write media are read. A backbone brings its own image processor or
            feature extractor along.
        tokenizer: A fast one that knows `MEDIA_TOKENS`.
        num_image_tokens: Tokens of an image, if the vision encoder is a backbone.
        num_audio_tokens: The same of a recording.

    Raises:
        ValueError: as `MegaTransformerProcessor`.
    """
    vision, audio, further = config.vision_config, config.audio_config, config.modality_configs or {}
    return MegaTransformerProcessor(
        tokenizer,
        image_processor=None if vision is None else _build_image_processor(vision),
        feature_extractor=None if audio is None else _build_feature_extractor(audio),
        num_image_tokens=num_image_tokens,
        num_audio_tokens=num_audio_tokens,
        modality_configs={name: part if isinstance(part, dict) else part.to_dict() for name, part in further.items()},
        image_writer=None if config.image_writer_config is None else _image_writer(config.image_writer_config),
        audio_writer=None if config.audio_writer_config is None else _audio_writer(config.audio_writer_config),
    )


def _build_image_processor(config: MegaTransformerVisionConfig) -> Any:
    if config.backbone is not None:
        return _part_of(AutoImageProcessor, config.backbone)
    if config.num_channels != 3:
        raise ValueError(f"num_channels is {config.num_channels}, but images are read as RGB; give 3")
    side = config.image_size
    return MegaTransformerImageProcessor(
        patch_size=config.patch_size,
        pixel_shuffle=config.pixel_shuffle,
        size=None if side is None else {"height": side, "width": side},
        max_side=config.max_image_size,
    )


def _build_feature_extractor(config: MegaTransformerAudioConfig) -> Any:
    if config.backbone is not None:
        return _part_of(AutoFeatureExtractor, config.backbone)
    return MegaTransformerFeatureExtractor(
        feature_size=config.num_mel_bins,
        sampling_rate=config.sampling_rate,
        n_fft=config.n_fft,
        hop_length=config.hop_length,
        subsampling=config.subsampling,
        max_seconds=config.max_seconds,
    )


def _part_of(auto_class: type, backbone: str) -> Any:
    """The processor of media that a pretrained encoder brings along, without code of its own."""
    try:
        return auto_class.from_pretrained(backbone, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"the processor of backbone {backbone!r} cannot be loaded: {reason_of(error)}") from error


def _image_writer(config: MegaTransformerImageWriterConfig) -> dict[str, Any]:
    if config.num_channels != 3:
        raise ValueError(f"num_channels is {config.num_channels}, but images are written as RGB; give 3")
    is_learned = config.head == "fsq"
    return {"image_size": config.image_size, "num_tokens": config.num_tokens, "is_learned": is_learned}


def _audio_writer(config: MegaTransformerAudioWriterConfig) -> dict[str, Any]:
    names = ("num_mel_bins", "frames_per_token", "sampling_rate", "n_fft", "hop_length", "max_seconds")
    return {name: getattr(config, name) for name in names}


# -------------------------------------------------------------------------------------------------------- what is given


def _tensor_type(return_tensors: str | None) -> str | None:
    return None if return_tensors == "auto" else return_tensors  # how transformers calls a processor's own default


def _check_count(name: str, part: Any, own_class: type, count: int | None) -> None:
    # By name: a class that was loaded from a checkpoint is another object.
    is_own = type(part).__name__ == own_class.__name__
    if part is not None and is_own != (count is None):
        what = "counts tokens itself" if is_own else "does not count tokens"
        raise ValueError(f"{name} {type(part).__name__} {what}, but their number is {count}; fix the number of tokens")


def _written_kinds(image_writer: dict[str, Any] | None, audio_writer: dict[str, Any] | None) -> dict[str, MediaKind]:
    kinds = [
        *([] if image_writer is None else [WrittenImages(**image_writer)]),
        *([] if audio_writer is None else [WrittenRecordings(**audio_writer)]),
    ]
    return {kind.modality.name: kind for kind in kinds}


def _choose(own_class: type, backbone_class: type, part: Any, count: int | None) -> MediaKind:
    return own_class(part) if count is None else backbone_class(part, count)
