"""The requests of clients: those of OpenAI's API, with fields of our own. Others are refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from model.exit_criteria import EXIT_CRITERIA

from .clients import fields_of_generation_config

MOST_CHOICES, MOST_LIKELY, MOST_PARTS = 16, 20, 16
OF_TEXT = ("temperature", "top_p", "top_k", "repetition_penalty", "stop", "max_tokens", "max_completion_tokens")
OF_TEXT += ("decoding", "logprobs", "top_logprobs", "tools", "tool_choice", "generation_config")
"""Fields that images and sounds have no use for."""
Name = Annotated[str, Field(min_length=1, max_length=200)]
Text = Annotated[str, Field(max_length=2**24)]
StopString = Annotated[str, Field(min_length=1, max_length=100)]
TokenIds = Annotated[list[int], Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]


def neutral(*values: Any) -> BeforeValidator:
    """The check of a field that is not supported: it may have a value that asks for nothing."""

    def check(value: Any) -> Any:
        if value is not None and value not in values:
            raise ValueError("is not supported by this server; leave it out")
        return None

    return BeforeValidator(check)


class Strict(BaseModel):
    """Fields that are not here are errors, and so are values of other types, and numbers that are none."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


# ------------------------------------------------------------------------------------------------------------- messages


class TextPart(Strict):
    """A part of a message that is text."""

    type: Literal["text"]
    text: Text


class ImageAddress(Strict):
    """An image, as a `data:` URI."""

    url: str
    detail: Annotated[None, neutral("auto")] = None


class ImagePart(Strict):
    """A part of a message that is an image."""

    type: Literal["image_url"]
    image_url: ImageAddress


class AudioData(Strict):
    """A sound, as base64 of a file."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg"] = "wav"


class AudioPart(Strict):
    """A part of a message that is a sound."""

    type: Literal["input_audio"]
    input_audio: AudioData


Part = Annotated[TextPart | ImagePart | AudioPart, Field(discriminator="type")]


class Call(Strict):
    """The name of a tool, and its arguments as JSON."""

    name: Name
    arguments: Text


class ToolCall(Strict):
    """A call of a tool by the assistant."""

    id: Name
    type: Literal["function"] = "function"
    function: Call


class Message(Strict):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | list[Part] | None = None
    name: Annotated[None, neutral()] = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Name | None = None
    refusal: Annotated[None, neutral()] = None
    audio: Annotated[None, neutral()] = None


class Function(Strict):
    """A tool that the assistant may call."""

    name: Name
    description: Text | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool, as OpenAI's format has it."""

    type: Literal["function"]
    function: Function


# ------------------------------------------------------------------------------------------------------------- requests


class StreamOptions(Strict):
    """Options of a stream."""

    include_usage: bool = False
    include_obfuscation: Annotated[None, neutral(False)] = None


class DeepRequest(Strict):
    """The fields of all requests: how deep."""

    num_steps: Annotated[int, Field(ge=1)] | None = None
    exit_criterion: Literal[("none", *EXIT_CRITERIA)] | None = None
    exit_threshold: float | None = None

    @model_validator(mode="after")
    def check_depth(self) -> "DeepRequest":
        """Raises ValueError for a threshold of nothing."""
        if self.exit_threshold is not None and self.exit_criterion in (None, "none"):
            raise ValueError("exit_threshold has no effect without exit_criterion; name one, or leave it out")
        return self


class Generation(DeepRequest):
    """The fields of all requests for text: how long, how it is drawn.

    Fields of our own are `num_steps`, `exit_criterion`, `exit_threshold`, `decoding`, `top_k`, `repetition_penalty` and
    `exit_steps`, which asks for the steps of each token.
    """

    model: Name | None = None
    decoding: Literal["plain", "wavefront"] | None = None
    exit_steps: bool = False
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    repetition_penalty: Annotated[float, Field(gt=0, le=100)] = 1.0
    seed: Seed | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    stop: StopString | list[StopString] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None
    frequency_penalty: Annotated[None, neutral(0)] = None
    presence_penalty: Annotated[None, neutral(0)] = None
    logit_bias: Annotated[None, neutral({})] = None

    @property
    def stop_strings(self) -> list[str]:
        """Strings that end the text."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def has_usage(self) -> bool:
        """Whether a stream ends with the sums of tokens and steps."""
        return self.stream_options is not None and self.stream_options.include_usage

    @model_validator(mode="after")
    def check(self) -> "Generation":
        """Raises ValueError for fields that do not fit together."""
        if len(self.stop_strings) > 4:
            raise ValueError("stop has more than 4 strings; give fewer")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options have no effect without stream; leave them out")
        return self


class ChatRequest(Generation):
    """`/v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Annotated[None, neutral(True, False)] = None
    modalities: list[Literal["text", "image", "audio"]] | None = None
    audio: dict[str, Any] | None = None
    generation_config: str | None = None
    store: Annotated[None, neutral(False)] = None
    response_format: Annotated[None, neutral({"type": "text"})] = None

    @model_validator(mode="before")
    @classmethod
    def take_generation_config(cls, values: Any) -> Any:
        """Makes fields of the generation config in JSON that `transformers chat` gives."""
        if isinstance(values, dict) and isinstance(values.get("generation_config"), str):
            values = values | fields_of_generation_config(values["generation_config"])
        return values

    @model_validator(mode="after")
    def check_tools(self) -> "ChatRequest":
        """Nothing is asked for beside what excludes it."""
        for tool in self.tools or ():
            if tool.function.name != "calculator":
                raise ValueError(f"the tool {tool.function.name!r} is not known to the models here; give 'calculator'")
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs has no effect without logprobs; leave it out")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("max_tokens and max_completion_tokens are the same; give one")
        of_text = [
            name for name in OF_TEXT if name in self.model_fields_set and getattr(self, name) not in (None, False)
        ]
        if self.writes and of_text:
            raise ValueError(f"{of_text[0]} has no effect on images and sounds; leave it out")
        if self.audio is not None and self.writes != "audio":
            raise ValueError("audio has no effect unless modalities name it; leave it out")
        if self.audio and (self.audio.get("format", "wav") != "wav" or self.audio.keys() - {"format", "voice"}):
            raise ValueError("audio is written as wav alone; give {'format': 'wav'}")
        return self

    @property
    def writes(self) -> str | None:
        """The modality beside text that is asked for."""
        asked = [name for name in self.modalities or () if name != "text"]
        if len(set(asked)) > 1:
            raise ValueError("modalities has image and audio; give one of them")
        return asked[0] if asked else None


class CompletionRequest(Generation):
    """`/v1/completions`: a text goes on; token ids are read as they are."""

    prompt: Text | TokenIds | Annotated[list[Text | TokenIds], Field(min_length=1, max_length=MOST_CHOICES)]
    logprobs: Annotated[int, Field(ge=0, le=MOST_LIKELY)] | None = None
    echo: Annotated[None, neutral(False)] = None
    suffix: Annotated[None, neutral("")] = None
    best_of: Annotated[None, neutral(1)] = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return list(self.prompt)


class Drawing(DeepRequest):
    """The fields of all requests for media."""

    model: Name | None = None
    seed: Seed | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    num_flow_steps: Annotated[int, Field(ge=1, le=1000)] | None = None
    user: str | None = None


class ImageRequest(Drawing):
    """`/v1/images/generations`."""

    prompt: Text
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    size: Annotated[str, Field(pattern=r"^(auto|\d{1,5}x\d{1,5})$")] = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=MOST_PARTS)] = 0
    quality: Annotated[None, neutral("auto", "standard")] = None
    style: Annotated[None, neutral()] = None
    background: Annotated[None, neutral("auto")] = None

    @model_validator(mode="after")
    def check_stream(self) -> "ImageRequest":
        """Raises ValueError for fields that do not fit together."""
        if self.partial_images and not self.stream:
            raise ValueError("partial_images has no effect without stream; leave it out")
        if self.stream and self.n > 1:
            raise ValueError("n has to be 1 in a stream; ask for each image by itself")
        return self


class SpeechRequest(Drawing):
    """`/v1/audio/speech`."""

    input: Text
    voice: Annotated[None, neutral("default")] = None
    response_format: Literal["wav"] = "wav"
    speed: Annotated[None, neutral(1)] = None
    instructions: Annotated[None, neutral("")] = None
    stream_format: Annotated[None, neutral("audio")] = None
