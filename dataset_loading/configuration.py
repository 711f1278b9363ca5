"""What a run reads: the `data` and `tokenizer` parts of a YAML config as plain dataclasses.

The docstring under a field is its `--help` text. Paths arrive resolved, or are relative to the working directory.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from .synthetic import Role, get_task

# The fields that only one kind of source reads: set on another kind they would silently do nothing.
_FIELDS_OF_KIND = {
    "hub": ("path", "config_name", "split", "streaming"),
    "files": ("paths",),
    "generated": ("task", "num_rows", "difficulty", "role", "seed"),
}


@dataclass
class SourceConfig:
    """One source of documents: a Hugging Face dataset, local files, or a generated task."""

    kind: Literal["hub", "files", "generated"]
    """Where documents come from: `hub` (any name or folder for `datasets.load_dataset`), `files` or `generated`."""
    name: str | None = None
    """Name in logs and metrics (`eval_<name>_loss`); by default the task, the first file's stem (of a
    pattern, the folder it looks in) or the end of path."""
    weight: float = 1.0
    """Share of this source among the train sources, in blocks (streaming: in documents); above 0, of any scale."""
    path: str | None = None
    """hub: dataset name on the Hugging Face hub, or a local folder."""
    config_name: str | None = None
    """hub: configuration of the dataset (the `name` argument of `datasets.load_dataset`)."""
    split: str = "train"
    """hub: split to read, slices such as `train[:1%]` included."""
    streaming: bool = False
    """hub: read while training instead of downloading first; the run then needs `max_steps`."""
    paths: list[str] = field(default_factory=list)
    """files: paths and glob patterns ending in .txt (one document a file), .jsonl or .parquet."""
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
    """Column of the answer; needs prompt_column."""
    separator: str = " "
    """Text between prompt and answer; tokenised together with the answer."""
    loss_on: Literal["all", "answer"] = "all"
    """Which tokens are learned: the whole document, or the answer and the end token."""

    def __post_init__(self) -> None:
        self._check_kind()
        if not 0 < self.weight < float("inf"):
            raise ValueError(f"weight is {self.weight}, but a share must be positive and finite; give e.g. weight: 1.0")
        if (self.prompt_column is None) != (self.answer_column is None):
            raise ValueError(
                f"prompt_column is {self.prompt_column!r} and answer_column is {self.answer_column!r}; "
                "set both, or neither to read text_column"
            )
        if self.prompt_column is not None and self.prompt_column == self.answer_column:
            raise ValueError(f"prompt_column and answer_column are both {self.prompt_column!r}; name two columns")
        if self.loss_on not in ("all", "answer"):
            raise ValueError(f"loss_on is {self.loss_on!r}, unknown; choose 'all' or 'answer'")
        if self.loss_on == "answer" and not self.has_answers:
            raise ValueError("loss_on is 'answer', but the source has no answers; set prompt_column and answer_column")
        if self.kind == "generated":
            self._check_generated()

    def _check_kind(self) -> None:
        if self.kind not in _FIELDS_OF_KIND:
            raise ValueError(f"source kind is {self.kind!r}, unknown; choose one of {', '.join(_FIELDS_OF_KIND)}")
        required = {"hub": "path", "files": "paths", "generated": "task"}[self.kind]
        if not getattr(self, required):
            raise ValueError(
                f"a source of kind {self.kind} needs {required}, which is {getattr(self, required)!r}; set it"
            )
        defaults = type(self).__dataclass_fields__
        for kind, names in _FIELDS_OF_KIND.items():
            for name in names if kind != self.kind else ():
                default = [] if name == "paths" else defaults[name].default
                if getattr(self, name) != default:
                    raise ValueError(
                        f"{name} is {getattr(self, name)!r}, but a source of kind {self.kind} does not read it; "
                        f"remove it or use kind: {kind}"
                    )

    def _check_generated(self) -> None:
        get_task(self.task)
        if self.num_rows < 1:
            raise ValueError(f"num_rows is {self.num_rows}, but a source needs rows; give at least 1")
        if self.seed < 0:
            raise ValueError(f"seed is {self.seed}; give a number that is not negative")
        if self.role not in (None, "train", "validation", "test"):
            raise ValueError(f"role is {self.role!r}, unknown; choose train, validation or test")
        given = self.difficulty
        if given is not None and (len(given) != 2 or not 1 <= given[0] <= given[1]):
            raise ValueError(f"difficulty is {given}; give [smallest, largest] with 1 <= smallest <= largest")

    @property
    def has_answers(self) -> bool:
        """Whether the rows are prompts and answers rather than texts."""
        return self.kind == "generated" or self.prompt_column is not None

    @property
    def label(self) -> str:
        """The name in logs and metrics."""
        if self.name is not None:
            return self.name
        if self.kind == "generated":
            return self.task
        if self.kind == "hub":
            return Path(self.path).name
        path = Path(self.paths[0])
        plain = [part for part in (*path.parent.parts, path.stem) if not set(part) & set("*?[/")]
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
    max_bad_rows: int = 100
    """Rows that cannot be used are skipped and reported; more than this many (at least 0) stop the run."""
    preprocessing_workers: int = 1
    """Processes that generate and tokenise rows before training, at least 1."""
    streaming_validation_rows: int = 256
    """Rows taken from the front of a streaming train source when `validation` is empty, at least 1."""

    def __post_init__(self) -> None:
        if not 0 < self.validation_fraction < 1:
            raise ValueError(
                f"validation_fraction is {self.validation_fraction}; give a number between 0 and 1, e.g. 0.05"
            )
        smallest = {"block_size": 2, "max_bad_rows": 0, "preprocessing_workers": 1, "streaming_validation_rows": 1}
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

    path: str | None = None
    """Hugging Face name or folder of a tokenizer; if null, a byte-level BPE is trained on the train documents."""
    vocab_size: int = 1024
    """Size of the trained vocabulary, 3 special tokens and 256 bytes included: at least 259, which is pure bytes."""
    split_digits: bool = False
    """In a trained vocabulary every digit stays a token of its own."""
    training_rows: int = 10_000
    """Rows of each hub or generated source that the vocabulary is trained on, at least 1; files are read whole."""

    def __post_init__(self) -> None:
        if self.vocab_size < 259:
            raise ValueError(
                f"tokenizer vocab_size is {self.vocab_size}, but bytes and special tokens are 259; give at least 259"
            )
        if self.training_rows < 1:
            raise ValueError(f"tokenizer training_rows is {self.training_rows}; give at least 1")
