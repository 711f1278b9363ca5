"""What a run reads: the `data` and `tokenizer` parts of a YAML config as plain dataclasses.

The docstring under a field is its `--help` text. Paths arrive resolved, or are relative to the working directory.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from model import MODALITIES

from .augmentation import AugmentationConfig
from .sources.messages import template_columns
from .tasks.base import Role
from .tasks.registry import MEDIA_TASKS, get_task

# What names the data of a source, by its kind.
_NEEDED_FIELD = {
    "hub": "path",
    "files": "paths",
    "generated": "task",
    "imagefolder": "path",
    "audiofolder": "path",
    "folder": "path",
    "webdataset": "paths",
    "chat": "paths",
}
# Fields that only some kinds of source read: set on another kind they would silently do nothing.
_KINDS_OF_FIELD = {
    "path": ("hub", "imagefolder", "audiofolder", "folder", "files", "chat"),
    "format": ("hub", "files"),
    "config_name": ("hub",),
    "split": ("hub",),
    "streaming": ("hub", "webdataset"),
    "paths": ("files", "webdataset", "chat"),
    **dict.fromkeys(("task", "num_rows", "difficulty", "role", "seed"), ("generated",)),
    "rejected_column": ("hub", "files", "chat"),
    **dict.fromkeys(("image_column", "audio_column"), ("hub", "files", "imagefolder", "audiofolder", "webdataset")),
    "media_columns": ("hub", "files", "imagefolder", "audiofolder", "folder", "webdataset"),
    "messages_column": ("chat", "hub", "files"),
}
# Fields that only documents without media read, and what does the same for those with media.
_TEXT_ONLY = {"prompt_column": "prompt: '{column}'", "separator": "prompt"}
# What each format fills in where the config says nothing.
_COLUMNS_OF_FORMAT = {
    "llava": {"messages_column": "conversations", "image_column": "image"},
    "sharegpt": {"messages_column": "conversations"},
    "alpaca": {"prompt": "{instruction}\n\n{input}", "answer_column": "output"},
    "coco": {"image_column": "file_name", "text_column": "caption"},
    "common_voice": {"audio_column": "path", "text_column": "sentence"},
}
MAX_WORKERS = 1024
"""Most processes that read data."""
MAX_GENERATED_ROWS = 10**8
"""Most rows of a generated source, which are all in memory."""
# Folders that are called so are called by the folder above.
_NAMES_OF_SPLITS = ("train", "validation", "valid", "val", "test", "data")


@dataclass(frozen=True)
class Direction:
    """The task of a row: what the user gives, and what the assistant answers with."""

    given: tuple[str, ...]
    """"text" or names of modalities, such as "image" and "audio"."""
    answered: tuple[str, ...]
    """The same; nothing is in both."""

    def __str__(self) -> str:
        return f"{', '.join(self.given)} -> {', '.join(self.answered)}"

    @property
    def media(self) -> set[str]:
        """The modalities of media that take part."""
        return {*self.given, *self.answered} - {"text"}


def parse_direction(text: str) -> Direction:
    """What a config says, such as "text, image -> audio".

    Raises:
        ValueError: It has another form, names something unknown, or something twice.
    """
    given, arrow, answered = text.partition("->")
    sides = [[name.strip() for name in side.split(",")] for side in (given, answered)]
    names = sides[0] + sides[1]
    known = ["text", *MODALITIES]
    if not arrow or not set(names) <= set(known):
        raise ValueError(
            f"direction is {text!r}; name {', '.join(known[:-1])} or {known[-1]} on both sides of an arrow, e.g. "
            "'text -> image'"
        )
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise ValueError(f"direction is {text!r}, with {twice[0]} twice; name it on one side, once")
    return Direction(*map(tuple, sides))


@dataclass
class SourceConfig:
    """One source of documents: a Hugging Face dataset, local files or folders, or a generated task."""

    kind: Literal["hub", "files", "generated", "imagefolder", "audiofolder", "folder", "webdataset", "chat"]
    """Where documents come from: `hub` (any name or folder for `datasets.load_dataset`), `files`, `generated`,
    `imagefolder` and `audiofolder` (a folder with metadata.jsonl or .csv), `folder` (the same of any modality),
    `webdataset` (tar shards) or `chat` (files of messages)."""
    name: str | None = None
    """Name in logs and metrics (`eval_<name>_loss`); by default the task, the stem of the first file (of a
    pattern, its folder) or the end of path."""
    weight: float = 1.0
    """Share of this source among the train sources, in blocks (streaming: in documents); above 0, on any scale."""
    path: str | None = field(default=None, metadata={"is_path": True})
    """hub: dataset name on the Hugging Face hub, or a local folder, also one that `save_to_disk` has written;
    imagefolder, audiofolder, folder: the folder; files and chat with media: the folder that names of media are relative
    to, by default that of the file which names them."""
    format: Literal["llava", "sharegpt", "alpaca", "coco", "common_voice"] | None = None
    """files, hub: published shape of the rows, which fills in the names of columns that are not set: conversations of
    LLaVA or ShareGPT, instructions of Alpaca, captions of COCO, or the tables of Common Voice. docs/data.md has more,
    which are known without it."""
    config_name: str | None = None
    """hub: configuration of the dataset (the `name` argument of `datasets.load_dataset`)."""
    split: str = "train"
    """hub: split to read, slices such as `train[:1%]` included."""
    streaming: bool = False
    """hub, webdataset: read while training instead of downloading or indexing first; the run then needs `max_steps`."""
    paths: list[str] = field(default_factory=list, metadata={"is_path": True})
    """files: paths and glob patterns ending in .txt (one document a file), .jsonl, .json, .csv, .tsv or .parquet;
    webdataset: in .tar; chat: in .json, .jsonl or .parquet. Texts may be compressed (.jsonl.gz), `{000..009}` is a
    range of numbers, and `{a,b}` a list of parts."""
    task: str | None = None
    """generated: name of the task, such as `addition`; docs/data.md has them all."""
    num_rows: int = 10_000
    """generated: number of rows to draw, at least 1."""
    difficulty: list[int] | None = None
    """generated: smallest and largest difficulty, 1 <= smallest <= largest, both included, drawn evenly; by default the
    task's own range."""
    role: Role | None = None
    """generated: which part of the instances to draw from; by default that of the list the source stands in."""
    seed: int = 0
    """generated: another seed, at least 0, gives other rows of the same role."""
    text_column: str = "text"
    """Column of the text, where prompt_column and answer_column are not set."""
    prompt_column: str | None = None
    """Column of the prompt; needs answer_column."""
    answer_column: str | None = None
    """Column of the answer; needs prompt_column, but in conversations, where it is text_column by default."""
    rejected_column: str | None = None
    """For learning from preferences: column of an answer that is worse than that of answer_column, or of a conversation
    that ends with one, where messages_column has that with the better."""
    separator: str = " "
    """Text between prompt and answer; tokenised together with the answer."""
    loss_on: Literal["all", "answer", "tags"] | None = None
    """Which tokens are learned: the whole document; the answer and the end token; or, by `tags`, the answer without a
    place in the document, token by token at the tokens of the prompt, which has as many; by default what the assistant
    says in conversations, the whole of others."""
    image_column: str | None = None
    """Column of the image, or of a list of images; imagefolder: by default `file_name`."""
    audio_column: str | None = None
    """Column of the audio, or of a list of audio files; audiofolder: by default `file_name`."""
    media_columns: dict[str, str] = field(default_factory=dict)
    """Columns of media of any modality, or of lists of them, such as `{file_name: video}`; image_column and
    audio_column say the same of two of them."""
    messages_column: str | None = None
    """Column of the conversation, a list of {role, content}; chat: by default `messages`. Parts that name no file take
    the media of image_column and audio_column, in order."""
    augment: bool = True
    """Whether `data.augmentation` is for this source."""
    direction: str | list[str] | None = None
    """With media: the task, what the user gives and what the assistant answers with, such as `text -> image`,
    `image -> audio` or `text, image -> audio`; rows alternate between several. By default the user gives all media, and
    the assistant answers with the text."""
    prompt: str | list[str] | None = None
    """Template of what the user says after media, with {column} filled in from the row; or such a template for each
    direction. It makes conversations of rows of prompts and answers. By default, with media, it is empty, the question
    of a generated task, or, where the text is given, the text itself."""

    def __post_init__(self) -> None:
        self._check_kind()
        self._fill_in_format()
        self._fill_in_columns()
        if self.kind == "files" and self.path is not None and not self.is_media:
            raise ValueError(
                f"path is {self.path!r}, but files of texts name no media; set image_column, audio_column or "
                "messages_column, or remove it"
            )
        if self.is_media:
            self._check_media()
        if self.direction is not None and not self.has_media:
            raise ValueError(
                f"direction is {self.direction!r}, but the source has no media; set image_column or audio_column"
            )
        if self.loss_on is None:
            self.loss_on = "answer" if self.is_media else "all"
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}, but a share must be positive and finite; give e.g. weight: 1.0")
        if not self.is_media and (self.prompt_column is None) != (self.answer_column is None):
            raise ValueError(
                f"prompt_column is {self.prompt_column!r} and answer_column is {self.answer_column!r}; "
                "set both, or neither to read text_column"
            )
        if self.prompt_column is not None and self.prompt_column == self.answer_column:
            raise ValueError(f"prompt_column and answer_column are both {self.prompt_column!r}; name two columns")
        if self.rejected_column in {self.prompt_column, self.answer_column, self.messages_column} - {None}:
            raise ValueError(f"rejected_column is {self.rejected_column!r}, which is a column of something else too")
        if self.loss_on not in ("all", "answer", "tags"):
            raise ValueError(f"loss_on is {self.loss_on!r}, unknown; choose 'all', 'answer' or 'tags'")
        if self.loss_on != "all" and not self.has_answers:
            raise ValueError(
                f"loss_on is {self.loss_on!r}, but the source has no answers; set prompt_column and answer_column"
            )
        if self.loss_on == "tags" and (self.is_media or self.streaming):
            raise ValueError("loss_on is 'tags', but the source is of conversations or streams; choose 'answer'")
        if self.kind == "generated":
            self._check_generated()
        if self.is_media and self.messages_column is None:
            self._check_directions()

    def _check_kind(self) -> None:
        if self.kind not in _NEEDED_FIELD:
            raise ValueError(f"source kind is {self.kind!r}, unknown; choose one of {', '.join(_NEEDED_FIELD)}")
        required = _NEEDED_FIELD[self.kind]
        if not getattr(self, required):
            raise ValueError(
                f"a source of kind {self.kind} needs {required}, which is {getattr(self, required)!r}; set it"
            )
        for name, kinds in _KINDS_OF_FIELD.items():
            if self.kind not in kinds and self._is_set(name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but a source of kind {self.kind} does not read it; "
                    f"remove it or use kind: {' or '.join(kinds)}"
                )

    def _is_set(self, name: str) -> bool:
        default = {"paths": [], "media_columns": {}}.get(name, type(self).__dataclass_fields__[name].default)
        return getattr(self, name) != default

    def _fill_in_format(self) -> None:
        if self.format is not None and self.format not in _COLUMNS_OF_FORMAT:
            raise ValueError(f"format is {self.format!r}, unknown; choose one of {', '.join(_COLUMNS_OF_FORMAT)}")
        for name, value in _COLUMNS_OF_FORMAT.get(self.format, {}).items():
            if not self._is_set(name):
                setattr(self, name, value)

    def _fill_in_columns(self) -> None:
        """Fill in default columns of the kind of source, and in `media_columns` those that have their own field."""
        if self.kind == "chat" and self.messages_column is None:
            self.messages_column = "messages"
        if self.kind == "imagefolder" and self.image_column is None:
            self.image_column = "file_name"
        if self.kind == "audiofolder" and self.audio_column is None:
            self.audio_column = "file_name"
        named = self.named_columns
        for column, kind in self.media_columns.items():
            if kind not in MODALITIES:
                raise ValueError(
                    f"media_columns has {column!r} of {kind!r}, unknown; choose one of {', '.join(MODALITIES)}"
                )
            if named.get(column, kind) != kind:
                raise ValueError(f"column {column!r} is named as {named[column]} and as {kind}; name it once")
        self.media_columns = named | self.media_columns

    def _check_media(self) -> None:
        for name, instead in _TEXT_ONLY.items():
            if self._is_set(name):
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but a source of conversations does not read it; use {instead}"
                )
        instead = {name: getattr(self, name) for name in ("prompt", "answer_column", "direction")}
        if self.messages_column is not None and any(value is not None for value in instead.values()):
            given = ", ".join(f"{name} ({value!r})" for name, value in instead.items())
            raise ValueError(
                f"messages_column is {self.messages_column!r}, whose messages say all, and so {given} are not read; "
                "remove them or it"
            )
        if self.image_column is not None and self.image_column == self.audio_column:
            raise ValueError(f"image_column and audio_column are both {self.image_column!r}; name two columns")
        if self.kind == "webdataset" and not self.media_columns:
            raise ValueError("a source of kind webdataset needs image_column or audio_column, e.g. image_column: jpg")
        if self.kind == "folder" and not self.media_columns:
            raise ValueError("a source of kind folder needs media_columns, e.g. media_columns: {file_name: video}")

    def _check_generated(self) -> None:
        task = get_task(self.task)
        if self.num_rows < 1:
            raise ValueError(f"num_rows is {self.num_rows}, but a source needs rows; give at least 1")
        if self.num_rows > MAX_GENERATED_ROWS:
            raise ValueError(f"num_rows is {self.num_rows}, more than memory holds; give at most {MAX_GENERATED_ROWS}")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give a number that is not negative")
        if self.role not in (None, "train", "validation", "test"):
            raise ValueError(f"role is {self.role!r}, unknown; choose train, validation or test")
        given = self.difficulty
        if given is not None and (len(given) != 2 or not 1 <= given[0] <= given[1]):
            raise ValueError(f"difficulty is {given}; give [smallest, largest] with 1 <= smallest <= largest")
        task.check_difficulty(given or task.default_difficulty)

    def _check_directions(self) -> None:
        count = len(self.directions)
        if isinstance(self.prompt, list) and len(self.prompt) != count:
            raise ValueError(
                f"prompt has {len(self.prompt)} texts for {count} directions; give one for each, or one for all"
            )
        for direction, prompt in self.directed_prompts:
            if self.has_media:
                self._check_parts(direction)
            is_asked_alone = "text" in direction.given or not direction.given
            if prompt is not None and is_asked_alone and not template_columns(prompt):
                where = f" of direction {str(direction)!r}" if self.has_media else ""
                raise ValueError(
                    f"prompt is {prompt!r}, which all rows{where} would ask; name a column, e.g. 'Show {{text}}'"
                )

    def _check_parts(self, direction: Direction) -> None:
        if self.kind == "generated":
            known = get_task(self.task).directions
            if str(direction) not in known:
                raise ValueError(
                    f"direction is {str(direction)!r}, but {self.task!r} has {' and '.join(map(repr, known))}; choose "
                    "one of them"
                )
            return
        missing = direction.media - set(self.media_columns.values())
        if missing or not direction.media:
            there = ", ".join(self.media_columns.values())
            raise ValueError(
                f"direction is {str(direction)!r}, but the source has text and {there}; choose a direction between "
                "these, or set image_column or audio_column"
            )

    @property
    def is_media(self) -> bool:
        """Whether the rows are conversations, which may hold media, rather than texts."""
        is_chat = self.kind == "chat" or self.messages_column is not None or self.prompt is not None
        return is_chat or self.has_media or (self.kind == "generated" and get_task(self.task).is_chat)

    @property
    def defaults(self) -> dict[str, object]:
        """The columns that rows of the format may lack, with what they then hold."""
        return {"llava": {self.image_column: None}, "alpaca": {"input": ""}}.get(self.format, {})

    @property
    def named_columns(self) -> dict[str, str]:
        """The columns of media that have a field of their own, with their modalities."""
        columns = {self.image_column: "image", self.audio_column: "audio"}
        return {column: kind for column, kind in columns.items() if column is not None}

    @property
    def has_media(self) -> bool:
        """Whether each row has media; messages may have some."""
        if self.kind == "generated":
            return self.task in MEDIA_TASKS
        return bool(self.media_columns) or self.kind in ("folder", "webdataset")

    @property
    def directions(self) -> list[Direction]:
        """The directions of a source with media but without messages, between which its rows alternate."""
        if self.direction is not None:
            given = self.direction if isinstance(self.direction, list) else [self.direction]
            return [parse_direction(text) for text in given]
        if self.task in MEDIA_TASKS:
            return [parse_direction(MEDIA_TASKS[self.task].directions[0])]
        shown = tuple(kind for kind in MODALITIES if kind in self.media_columns.values())
        return [Direction(shown, ("text",))]

    @property
    def directed_prompts(self) -> list[tuple[Direction, str | None]]:
        """The directions with their prompts, between which the rows alternate."""
        directions = self.directions
        prompts = self.prompt if isinstance(self.prompt, list) else [self.prompt] * len(directions)
        return list(zip(directions, prompts, strict=True))

    def media_columns_of(self, number: int) -> dict[str, str]:
        """The part of `media_columns` that row `number` (from 0) needs for its direction."""
        if self.messages_column is not None:
            return self.media_columns
        direction, _ = self.directed_prompts[number % len(self.directed_prompts)]
        return {column: kind for column, kind in self.media_columns.items() if kind in direction.media}

    @property
    def has_answers(self) -> bool:
        """Whether the rows are prompts and answers rather than texts."""
        return self.kind == "generated" or self.prompt_column is not None or self.is_media

    @property
    def label(self) -> str:
        """The name in logs and metrics."""
        if self.name is not None:
            return self.name
        if self.kind == "generated":
            return self.task
        if self.kind == "hub":
            return Path(self.path).name
        if not self.paths:
            names = [name for name in Path(self.path).parts if name not in _NAMES_OF_SPLITS]
            return names[-1]
        path = Path(self.paths[0])
        stem = Path(path.stem).stem if path.suffix == ".gz" else path.stem
        plain = [part for part in (*path.parent.parts, stem) if not set(part) & set("*?[/{")]
        return plain[-1] if plain else "files"


@dataclass
class DataConfig:
    """The sources of a run and how their documents become rows of tokens."""

    train: list[SourceConfig] = field(default_factory=list)
    """Sources to learn from, mixed by weight."""
    validation: list[SourceConfig] = field(default_factory=list)
    """Sources to evaluate on, one metric each; if empty, a part of every train source is split off."""
    validation_fraction: float = 0.05
    """Part of each train source split off when `validation` is empty: the tails of long documents, and of the others
    some as a whole; above 0 and below 1."""
    block_size: int = 256
    """Tokens in a row. At least 2."""
    packing: bool = True
    """Fill rows of exactly block_size tokens with one document after another; else each document starts a row."""
    max_invalid_rows: int = 100
    """Rows that cannot be used are skipped and reported; more than this many (at least 0) stop the run."""
    preprocessing_workers: int = 1
    """Processes that generate and tokenise rows before training, at least 1."""
    streaming_validation_rows: int = 256
    """Rows taken from the front of a streaming train source when `validation` is empty, at least 1."""
    check_media: bool = True
    """Decode every image and audio file once before training, in preprocessing_workers processes, so that damaged ones
    are found then; else only their headers are read."""
    cut_long_audio: bool = False
    """Audio that is longer than what the model reads is cut, with a warning, while its text stays whole; else its row
    cannot be used."""
    cfg_dropout: float = 0.0
    """CFG dropout: probability, at least 0 and below 1, with which a train conversation with media in an answer loses
    what precedes them, as classifier-free guidance needs it; 0.1 is usual."""

    augmentation: AugmentationConfig = field(default_factory=AugmentationConfig)
    """Random changes of train rows, all off by default."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; give a number between 0 and 1, e.g. 0.05"
            )
        if not 0 <= self.cfg_dropout < 1:
            raise ValueError(f"cfg_dropout is {self.cfg_dropout}; give at least 0 and less than 1, e.g. 0.1")
        if self.preprocessing_workers > MAX_WORKERS:
            raise ValueError(f"preprocessing_workers is {self.preprocessing_workers}; give at most {MAX_WORKERS}")
        smallest = {"block_size": 2, "max_invalid_rows": 0, "preprocessing_workers": 1, "streaming_validation_rows": 1}
        for name, least in smallest.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least {least}")
        for source in self.train:
            if source.role not in (None, "train"):
                raise ValueError(
                    f"train source {source.label!r} has role {source.role!r}; remove the role or move it to validation"
                )
        for source in self.validation:
            if source.role == "train":
                raise ValueError(f"validation source {source.label!r} has role 'train'; use validation or test")
            if source.streaming:
                raise ValueError(
                    f"validation source {source.label!r} is streaming; set streaming: false and use a slice as split"
                )
        for where, sources in (("train", self.train), ("validation", self.validation)):
            labels = [source.label for source in sources]
            for label in labels:
                if labels.count(label) > 1:
                    raise ValueError(
                        f"{labels.count(label)} {where} sources are called {label!r}; give each a name of its own"
                    )


@dataclass
class TokenizerConfig:
    """A tokenizer that exists, or one trained on the run's own data."""

    path: str | None = field(default=None, metadata={"is_path": True})
    """Hugging Face name or folder of a tokenizer; if null, a byte-level BPE is trained on the train documents."""
    vocab_size: int = 1024
    """Size of the trained vocabulary, 3 special tokens and 256 bytes included: at least 259, which is pure bytes."""
    split_digits: bool = False
    """In a trained vocabulary every digit stays a token of its own."""

    def __post_init__(self) -> None:
        if self.vocab_size < 259:
            raise ValueError(
                f"tokenizer vocab_size is {self.vocab_size}, but bytes and special tokens are 259; give at least 259"
            )
