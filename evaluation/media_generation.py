"""Images and audio that a model generates at several depths: what of them is right, and what they look like."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from model import draw_codes
from model.chat import TARGET_PREFIX

from .answers import Answer, AnswerGenerator, Example, TextScores, rights_by_name, shares, text_scores, to_model
from .classifiers import Classifier, ClassifierScores, classify_media
from .depth import chunks, evaluating, wait_for
from .distances import FeatureDistances, FeatureNetwork
from .intervals import Interval, wilson_interval

NUM_SAMPLES = 8
"""Media of each source that are kept to be shown."""

GeneratedItem = Any
"""A PIL image, or (samples, rate)."""


@dataclass
class MediaScores:
    """Media that were written for one source, at one depth. Shares in [0, 1]."""

    modality: str
    """"image" or "audio"."""
    num_examples: int
    checks: dict[str, float]
    """By what can be read exactly: share of media in which it is as asked for; empty where nothing can."""
    classified: dict[str, ClassifierScores]
    """By the name of the classifier."""
    distances: dict[str, FeatureDistances]
    """Of images, by the name of the network."""
    round_trip: TextScores | None
    """What the model itself reads in its media against their prompts; None where it was not asked."""
    milliseconds: float
    """To write a medium, in batches as they came."""
    mean_steps: float | None
    """Core steps of a place; None where nothing could exit."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    """Those of 95 % of the checks."""


@dataclass
class MediaRow:
    """All sources at one depth."""

    num_steps: int | None
    """Core steps; None for a model without a core."""
    sources: dict[str, MediaScores]


@dataclass
class MediaSample:
    """A medium at all depths, to be shown."""

    prompt: str
    reference: GeneratedItem
    generated: dict[int | None, GeneratedItem | None] = field(default_factory=dict)
    """By depth; None where the model wrote none."""
    is_right: dict[int | None, bool] = field(default_factory=dict)
    """By depth, where it can be checked."""


@dataclass
class MediaTable:
    """What was written, at all depths."""

    rows: list[MediaRow]
    real: dict[str, dict[str, float]]
    """By source: the share of each check that real media pass, which no model can be expected to exceed."""
    samples: dict[str, list[MediaSample]]
    """By source."""


class MediaGenerator:
    """Answers prompts with media, in batches. Noise is drawn for each example alone, whatever else is in its batch.

    Args:
        writer: makes batches of prompts.
        options: Options of `generate`, such as guidance_scale; the model's configuration gives the others.
    """

    def __init__(self, writer: AnswerGenerator, options: Mapping[str, Any] | None = None) -> None:
        self.writer = writer
        self.options = dict(options or {})

    def write(
        self, model: PreTrainedModel, examples: Sequence[Example], num_steps: int | None, seeds: Sequence[int]
    ) -> tuple[list[GeneratedItem | None], torch.Tensor | None]:
        """The media of one batch, None for a row that has none, and the core steps of each place, if they vary.

        Args:
            examples: Rows of one modality, with `prompt_ids` and `media`.
            num_steps: core steps per place; None for a model without a core.
            seeds: Seeds of the noise, one for each example.
        """
        medium, tokenizer = modality_of(examples), self.writer.tokenizer
        inputs = {
            **to_model(self.writer.prompts(examples), model),
            **({} if num_steps is None else {"num_steps": num_steps}),
            **self.options,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        if medium == "image" and getattr(model, "decode_image_tokens", None):
            with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
                torch.manual_seed(seeds[0])
                return draw_codes(model, inputs), None
        output = model.generate(**inputs, generation_mode=medium, flow_seeds=list(seeds), do_sample=False)
        media = output.images
        if medium == "audio":
            media = [(samples.cpu().float().numpy(), output.sampling_rate) for samples in output.audio]
        numbers = [next((value for name, value in row if name == medium), None) for row in output.segments]
        steps = output.exit_steps if "exit_criterion" in self.options else None
        return [None if number is None else media[number] for number in numbers], steps


class RoundTrip:
    """Lets a model read what it has written.

    Args:
        writer: writes down what the model reads; its processor makes the prompts.
        question: Text that comes with the medium; "": none.
    """

    def __init__(self, writer: AnswerGenerator, question: str = "") -> None:
        self.writer = writer
        self.question = question

    def read(
        self,
        model: PreTrainedModel,
        examples: Sequence[Example],
        media: Sequence[GeneratedItem | None],
        num_steps: int | None,
    ) -> list[Answer]:
        """What the model reads in media, with the prompts they were written for as references; "" of no medium."""
        kind = modality_of(examples)
        there = [number for number, medium in enumerate(media) if medium is not None]
        questions = [self.example(kind, media[number], examples[number]["prompt"]) for number in there]
        texts = dict(zip(there, self.writer.write(model, questions, num_steps) if there else [], strict=True))
        return [
            Answer("text", None, False, example["prompt"], texts.get(number, ""), example.get("attributes"))
            for number, example in enumerate(examples)
        ]

    def example(self, kind: str, medium: GeneratedItem, expected: str) -> Example:
        """A question about a medium, with the capacity for an answer as long as what is expected."""
        said = [{"type": "text", "text": self.question}] if self.question else []
        messages = [{"role": "user", "content": [{"type": kind, kind: medium}, *said]}]
        encoded = self.writer.processor.encode_chat(messages, add_generation_prompt=True)
        prompt = encoded["input_ids"].tolist()
        answer = self.writer.tokenizer(expected, add_special_tokens=False)["input_ids"]
        return {"prompt_ids": prompt, "input_ids": prompt + answer, "media": encoded["media"]}


@dataclass
class MediaEvaluator:
    """Lets one model write media at one depth after the other.

    Args:
        model: called through `generate`.
        writer: writes media.
        classifiers: Classifiers by name; each classifies all media of its kind.
        networks: Networks by name; each compares all images with their references.
        round_trip: lets the model read what it wrote; None: it does not.
        batch_size: media that are written at the same time.
    """

    model: PreTrainedModel
    writer: MediaGenerator
    classifiers: Mapping[str, Classifier]
    networks: Mapping[str, FeatureNetwork]
    round_trip: RoundTrip | None
    batch_size: int

    def source(self, examples: Sequence[Example], num_steps: int | None, samples: Sequence[MediaSample]) -> MediaScores:
        """One source at one depth; what is to be shown is added to the samples."""
        rows: list[Example] = []
        media: list[GeneratedItem | None] = []
        answers: list[Answer] = []
        steps: list[int] = []
        seconds = 0.0
        for chunk in chunks(examples, self.batch_size):
            wait_for(self.model.device)
            start = time.perf_counter()
            made, exits = self.writer.write(self.model, chunk, num_steps, range(len(media), len(media) + len(chunk)))
            wait_for(self.model.device)
            seconds += time.perf_counter() - start
            rows, media = rows + chunk, media + made
            steps += [] if exits is None else exits[exits > 0].tolist()
            if self.round_trip is not None:
                answers += self.round_trip.read(self.model, chunk, made, num_steps)
        right = [what_is_right(row, medium) for row, medium in zip(rows, media, strict=True)]
        for sample, medium, checks in zip(samples, media[: len(samples)], right[: len(samples)], strict=True):
            sample.generated[num_steps] = medium
            if checks:
                sample.is_right[num_steps] = checks["all"]
        modality, prompts = modality_of(rows), [row["prompt"] for row in rows]
        own = {name: it for name, it in self.classifiers.items() if it.config.modality == modality}
        classified = {name: classify_media(it, prompts, media) for name, it in own.items()}
        there = [medium for medium in media if medium is not None]
        networks, references = self.networks if modality == "image" else {}, [row["reference"] for row in rows]
        return MediaScores(
            modality=modality,
            num_examples=len(media),
            checks=shares(right),
            classified={name: scores for name, scores in classified.items() if scores is not None},
            distances={name: network.distances(references, there) for name, network in networks.items()},
            round_trip=text_scores(answers) if answers else None,
            milliseconds=1000 * seconds / len(media),
            mean_steps=sum(steps) / len(steps) if steps else None,
            intervals={name: wilson_interval(sum(it), len(it)) for name, it in rights_by_name(right).items()},
        )


def what_is_right(example: Example, medium: GeneratedItem | None) -> dict[str, bool]:
    """What a medium has as its prompt asks, where that can be checked; of one that is not there, nothing."""
    check = example.get("check")
    if check is None:
        return {}
    return dict.fromkeys(check(example["reference"]), False) if medium is None else check(medium)


def modality_of(examples: Sequence[Example]) -> str:
    """The kind of medium that examples ask for; ValueError if that is none, or several."""
    found = sorted({example["modality"] for example in examples})
    if len(found) != 1 or not found[0].startswith(TARGET_PREFIX):
        raise ValueError(f"examples ask for {', '.join(found)}; give those of one kind of medium that is written")
    return found[0].removeprefix(TARGET_PREFIX)


def media_table(
    model: PreTrainedModel,
    depths: Sequence[int | None],
    examples: Mapping[str, Sequence[Example]],
    writer: MediaGenerator,
    classifiers: Mapping[str, Classifier] | None = None,
    round_trip: RoundTrip | None = None,
    batch_size: int = 8,
    networks: Mapping[str, FeatureNetwork] | None = None,
) -> MediaTable:
    """Let a model write media at each depth; it is left in the mode (train or eval) it came in.

    Args:
        depths: numbers of core steps; [None] for a model whose depth cannot vary.
        examples: Rows by source, each source with one modality: `prompt_ids`, `media`, `prompt`, `modality`
            ("written_image" or "written_audio"), `reference` (a PIL image, or (samples, rate)), and `check`, a function
            that says of such a medium what is right in it, or None.
        writer: writes media.
        classifiers: Classifiers by name.
        round_trip: lets the model read what it wrote.
        batch_size: media that are written at the same time.
        networks: Networks by name, whose features of images are compared with those of references.

    Raises:
        ValueError: a source without rows, or with several kinds of media.
    """
    empty = [name for name, rows in examples.items() if len(rows) == 0]
    if empty:
        raise ValueError(f"Source {empty[0]!r} has 0 rows to write media for: give it more data or a larger share.")
    evaluator = MediaEvaluator(model, writer, classifiers or {}, networks or {}, round_trip, batch_size)
    real, samples = {}, {}
    for name, rows in examples.items():
        real[name] = shares([what_is_right(row, row["reference"]) for row in rows])
        first = [rows[number] for number in range(min(NUM_SAMPLES, len(rows)))]
        samples[name] = [MediaSample(row["prompt"], row["reference"]) for row in first]
    with evaluating(model):
        for rows in examples.values():  # pays for kernel selection and memory, which is no depth's time
            writer.write(model, [rows[0]], depths[0], [0])
        table = [
            MediaRow(depth, {name: evaluator.source(rows, depth, samples[name]) for name, rows in examples.items()})
            for depth in tqdm(depths, desc="depths", unit="depth", disable=None)
        ]
    return MediaTable(table, real, samples)
