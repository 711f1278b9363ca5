"""A process with the models of a server, each with an engine: jobs in, pieces of text and media out.

The main thread runs the engines. Others read the pipe, make tensors of prompts, and generate what no engine does:
images, sound, and the texts of models without a core or behind an encoder.
"""

import logging
import os
import queue
import signal
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import nn
from transformers import (
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    StoppingCriteriaList,
)
from transformers.utils.logging import disable_progress_bar

from model import MediaError, length_before, tokenizer_of
from model.chat import ROLE_TOKENS, encode_conversation
from model.depth import DepthOptions
from model.exit_criteria import EXIT_CRITERIA
from model.media_sources import own_part, source_of

from ..checkpoints import find_checkpoint
from ..devices import choose_device, choose_threads
from ..engine import InferenceEngine, Stream, TextRequest
from ..loading import load_model
from ..prompts import check_characters, encode_prompt, prompt_limit
from .limits import Limits
from .media import CancelledJobError, MediaWriter, has_codes
from .messages import AnswerJob, Cancel, End, Failed, ImagePiece, Load, ModelCard, Ready, Refusal, TextPiece
from .text import TextWriter

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """The settings that a worker is started with.

    Args:
        runs: The name of each model, and its checkpoint.
        limits: Those of the server.
        device: Where the models go; None: a GPU if there is one.
        most_threads: The most threads of torch, where the largest model is worth as many; None: all cores.
    """

    runs: tuple[tuple[str, str], ...]
    limits: Limits
    device: str | None = None
    most_threads: int | None = None


class RefusedError(ValueError):
    """A job that cannot be done; the message is for the client."""


# --------------------------------------------------------------------------------------------------------------- models


class Served:
    """A model that is served: its prompts as tensors, its engine, and what it generates without one.

    Args:
        name: How clients name it.
        model: The model.
        processor: Its processor, or its tokenizer if it reads text alone.
        limits: Those of the server.
    """

    def __init__(
        self, name: str, model: nn.Module, processor: PreTrainedTokenizerBase | ProcessorMixin, limits: Limits
    ):
        self.name, self.model, self.processor, self.limits = name, model, processor, limits
        self.tokenizer, self.config = tokenizer_of(processor), model.config.get_text_config()
        self.context = min(prompt_limit(model, None), limits.max_length)
        known = self.tokenizer.get_vocab()
        roles = [token for token in ROLE_TOKENS.values() if token in known]
        self.ends = [self.tokenizer.eos_token_id, *(known[token] for token in roles)]
        self.spelled_roles = [token for token in ROLE_TOKENS.values() if token not in known]
        self.writes = tuple(getattr(model, "output_modalities", ("text",)))
        self.engine: InferenceEngine | None = None
        if self.config.num_core_layers and not model.config.is_encoder_decoder:
            most = max(limits.max_steps, self.usual_steps)
            try:
                self.engine = InferenceEngine(model, limits.max_places, self.context, most, tokenizer=self.tokenizer)
            except ValueError as error:
                logger.warning("%s answers one request at a time: %s", name, error)

    @property
    def usual_steps(self) -> int | None:
        """Core steps of a token, if a request names none."""
        return (self.config.num_steps or self.config.recurrence.mean_steps) if self.config.num_core_layers else None

    @property
    def exit_criteria(self) -> tuple[str, ...]:
        """Criteria by which a token may stop; one of them needs a head that not every model has."""
        if self.usual_steps is None:
            return ()
        return tuple(name for name, it in EXIT_CRITERIA.items() if it.is_in(self.config))

    def card(self) -> ModelCard:
        """The facts that are told of it."""
        reads = getattr(self.processor, "modality_names", ("text",))
        heads = getattr(getattr(self.model, "model", None), "writers", {})
        side = getattr(heads["image"].codec, "side", None) if "image" in heads else None
        return ModelCard(
            self.name,
            tuple(name for name in reads if not name.startswith("written_")),
            self.writes,
            self.processor.chat_template is not None and not self.model.config.is_encoder_decoder,
            self.model.num_parameters(),
            self.usual_steps,
            self.context,
            side,
            self.exit_criteria,
        )

    def inputs_of(self, job: AnswerJob) -> dict[str, Any]:
        """The tensors of a prompt. RefusedError: it cannot be read, or is too long."""
        limits = self.limits
        try:
            inputs = self._encode(job.prompt)
        except MediaError as error:
            raise RefusedError(str(error)) from error
        length = inputs["input_ids"].shape[1]
        if not length:
            raise RefusedError("the prompt is empty; give a text")
        if length > limits.max_prompt_tokens:
            raise RefusedError(f"the prompt has {length} tokens, more than {limits.max_prompt_tokens}; shorten it")
        if length + (job.max_new_tokens if job.kind == "text" else 0) > self.context:
            raise RefusedError(
                f"the prompt has {length} tokens, which with {job.max_new_tokens} new ones are more than the "
                f"{self.context} that this model has here; shorten it, or lower max_tokens"
            )
        return dict(inputs.to(self.model.device, self.model.dtype))

    def _encode(self, prompt: list[dict[str, Any]] | str | list[int]) -> Any:
        most = self.limits.max_prompt_tokens
        if isinstance(prompt, str):
            check_characters(self.tokenizer, prompt, most)
            return encode_prompt(self.tokenizer, prompt)
        if prompt and isinstance(prompt[0], int):
            if not 0 <= min(prompt) <= max(prompt) < self.config.vocab_size:
                raise RefusedError(f"the prompt has token ids outside 0 .. {self.config.vocab_size - 1}")
            ids = torch.tensor([prompt])
            return BatchFeature({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
        if self.processor.chat_template is None:
            raise RefusedError("this model has seen no conversations and has no chat template; use /v1/completions")
        for text in texts_of(prompt):
            check_characters(self.tokenizer, text, most)
        if isinstance(self.processor, ProcessorMixin):
            self._check_media(prompt)
            return self.processor.apply_chat_template(
                prompt, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )
        if any(isinstance(message["content"], list) for message in prompt):
            raise RefusedError("this model reads text alone; leave images and sounds out")
        ids = encode_conversation(self.tokenizer, prompt, add_generation_prompt=True)
        return self._encode(ids)

    def _check_media(self, messages: list[dict[str, Any]]) -> None:
        """Raises RefusedError for too many or too large media, by what their headers say."""
        given = [
            own_part(part)
            for message in messages
            if isinstance(message["content"], list)
            for part in message["content"]
        ]
        media = [part for part in given if part["type"] != "text"]
        if len(media) > self.limits.max_media:
            raise RefusedError(f"{len(media)} images and sounds are more than {self.limits.max_media}; send fewer")
        for part in media:
            kind = part["type"]
            if kind not in self.processor.modalities:
                raise RefusedError(f"this model reads no {kind}; leave it out")
            size = self.processor.item_size(kind, source_of(part))
            if kind == "image" and size[0] * size[1] > self.limits.max_megapixels * 1e6:
                raise RefusedError(
                    f"an image has {size[1]} x {size[0]} pixels, more than {self.limits.max_megapixels} millions; "
                    "scale it down"
                )
            if kind == "audio" and size > self.limits.max_audio_seconds:
                raise RefusedError(
                    f"a sound has {size:.0f} seconds, more than {self.limits.max_audio_seconds}; send less"
                )

    def depth(self, job: AnswerJob) -> DepthOptions:
        """Steps and exits: those of the job, else the model's own."""
        asked = self.asked_depth(job)
        if asked and not self.config.num_core_layers:
            raise RefusedError(f"{next(iter(asked))} was given, but this model has no core to repeat; leave it out")
        return DepthOptions.resolve(asked, self.model.generation_config, self.config.recurrence)

    @staticmethod
    def asked_depth(job: AnswerJob) -> dict[str, Any]:
        """The options of depth that a job names."""
        names = ("num_steps", "exit_criterion", "exit_threshold")
        return {name: value for name in names if (value := getattr(job, name)) is not None}

    def request_of(self, job: AnswerJob, inputs: dict[str, Any]) -> TextRequest:
        """The request to the engine."""
        depth = self.depth(job)
        return TextRequest(
            inputs,
            job.max_new_tokens,
            depth.steps_of("text"),
            depth.exits,
            job.seed,
            job.temperature,
            job.top_k,
            job.top_p,
            job.repetition_penalty,
            self.ends_of(job),
            self.stop_of(job),
            job.drafts,
            job.num_likely,
        )

    def ends_of(self, job: AnswerJob) -> list[int]:
        """Tokens that end the text: in a conversation, also those with which the next message would begin."""
        return self.ends if is_conversation(job) else self.ends[:1]

    def stop_of(self, job: AnswerJob) -> tuple[str, ...]:
        """Strings that end the text."""
        return (*job.stop, *(self.spelled_roles if is_conversation(job) else ()))

    # ---------------------------------------------------------------------------------------------- without the engine

    def generate_text(
        self, job: AnswerJob, inputs: dict[str, Any], is_cancelled: Callable[[], bool]
    ) -> tuple[list[int], list[int]]:
        """The new tokens of a text and their steps."""
        if job.num_likely is not None:
            raise RefusedError("logprobs are not possible with this model; leave them out")
        options = self.asked_depth(job)
        self.depth(job)
        if job.seed is not None:
            options |= {"do_sample": True, "sampling_seed": job.seed, "temperature": job.temperature}
            options |= {"top_k": job.top_k, "top_p": job.top_p}
        else:
            options["do_sample"] = False
        stop = self.stop_of(job)
        output = self.model.generate(
            **inputs,
            **options,
            max_new_tokens=job.max_new_tokens,
            repetition_penalty=job.repetition_penalty,
            eos_token_id=self.ends_of(job),
            pad_token_id=self.tokenizer.pad_token_id,
            stopping_criteria=StoppingCriteriaList([lambda ids, scores, **_: is_cancelled()]),
            return_dict_in_generate=True,
            **({"stop_strings": list(stop), "tokenizer": self.tokenizer} if stop else {}),
        )
        new = output.sequences[0, length_before(self.model, inputs["input_ids"]) :].tolist()
        steps = getattr(output, "exit_steps", None)
        usual = job.num_steps or self.usual_steps or 0
        return new, [usual] * len(new) if steps is None else steps[0].tolist()[: len(new)]

    def generate_media(
        self, job: AnswerJob, inputs: dict[str, Any], show: Callable[[bytes], None], is_cancelled: Callable[[], bool]
    ) -> tuple[bytes, list[int]]:
        """A PNG or a WAV, and the steps of its positions."""
        if job.kind not in self.writes and not (job.kind == "image" and has_codes(self.model)):
            raise RefusedError(f"this model writes {', '.join(self.writes)}; it has no {job.kind} to give")
        options = {**job.flow, **self.asked_depth(job)}
        self.depth(job)
        return MediaWriter(self.model, job, inputs, options, show, is_cancelled).write()


def is_conversation(job: AnswerJob) -> bool:
    """Whether the prompt is of messages."""
    return isinstance(job.prompt, list) and isinstance(job.prompt[0], dict)


def texts_of(messages: Sequence[dict[str, Any]]) -> list[str]:
    """All texts of messages."""
    found = []
    for message in messages:
        parts = message["content"]
        found += [parts] if isinstance(parts, str) else [part["text"] for part in parts if part["type"] == "text"]
    return found


# -------------------------------------------------------------------------------------------------------------- process


@dataclass(eq=False)
class Running:
    """A job that an engine works at."""

    job: AnswerJob
    served: Served
    stream: Stream
    writer: TextWriter
    num_shown: int = 0


class Worker:
    """The loop of a worker.

    Args:
        connection: The pipe to the server.
        served: The models by name.
    """

    def __init__(self, connection: Connection, served: dict[str, Served]):
        self.connection, self.served = connection, served
        self.lock = threading.Lock()
        self.inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.preparing, self.generating = ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        self.running: dict[int, Running] = {}
        self.cancelled: set[int] = set()
        self.open: set[int] = set()
        self.told = (0, 0)

    def run(self) -> None:
        """Works until the server closes the pipe."""
        threading.Thread(target=self._listen, daemon=True).start()
        while True:
            is_idle = not self.running
            while is_idle or not self.inbox.empty():
                self.inbox.get()()
                is_idle = False
            engines = [it.engine for it in self.served.values() if it.engine is not None and not it.engine.is_idle]
            for engine in engines:
                engine.step()
            for running in list(self.running.values()):
                self._show(running)
            self._tell_load()

    def _listen(self) -> None:
        """Messages of the server go to the main thread; with the server, the worker ends."""
        while True:
            try:
                message = self.connection.recv()
            except (EOFError, OSError):
                os._exit(0)
            self.inbox.put(partial(self._take, message))

    def say(self, message: Any) -> None:
        """Tells the server something."""
        with self.lock:
            try:
                self.connection.send(message)
            except (BrokenPipeError, OSError):
                os._exit(0)

    def _take(self, message: AnswerJob | Cancel) -> None:
        if isinstance(message, Cancel):
            if message.number in self.open:
                self.cancelled.add(message.number)
            running = self.running.get(message.number)
            if running is not None:
                running.served.engine.cancel(running.stream)
                self._close(message.number)
            return
        self.open.add(message.number)
        self._in_thread(self.preparing, message, self._prepare)

    def _close(self, number: int) -> None:
        self.running.pop(number, None)
        self.open.discard(number)
        self.cancelled.discard(number)

    def _in_thread(self, pool: ThreadPoolExecutor, job: AnswerJob, work: Callable[..., None], *given: Any) -> None:
        """Does a part of a job in a thread; what goes wrong is told to the client in one line, and logged."""

        def do() -> None:
            if job.number in self.cancelled:
                self.inbox.put(partial(self._close, job.number))
            else:
                work(job, *given)

        pool.submit(do).add_done_callback(partial(self._refuse_failed, job.number))

    def _refuse_failed(self, number: int, done: Future[None]) -> None:
        error = done.exception()
        if isinstance(error, CancelledJobError):
            self.inbox.put(partial(self._close, number))
        elif error is not None:
            self.inbox.put(partial(self._refuse, refusal_of(number, error)))

    def _refuse(self, refused: Refusal) -> None:
        self._close(refused.number)
        self.say(refused)

    def _prepare(self, job: AnswerJob) -> None:
        served = self.served[job.model]
        inputs = served.inputs_of(job)
        if job.kind == "text" and served.engine is not None:
            request = served.request_of(job, inputs)
            self.inbox.put(partial(self._submit, job, served, request))
        else:
            self._in_thread(self.generating, job, self._generate, served, inputs)

    def _submit(self, job: AnswerJob, served: Served, request: TextRequest) -> None:
        if job.number in self.cancelled:
            self._close(job.number)
            return
        try:
            stream = served.engine.submit(request)
        except ValueError as error:
            self._refuse(Refusal(job.number, 400, str(error)))
            return
        self.running[job.number] = Running(job, served, stream, TextWriter(served.tokenizer, served.stop_of(job)))

    def _generate(self, job: AnswerJob, served: Served, inputs: dict[str, Any]) -> None:
        length = inputs["input_ids"].shape[1]
        with torch.no_grad():
            if job.kind != "text":
                media, steps = served.generate_media(
                    job,
                    inputs,
                    lambda part: self.say(ImagePiece(job.number, part)),
                    lambda: job.number in self.cancelled,
                )
                end = End(job.number, "stop", length, len(steps), sum(steps), media, tuple(steps))
                self.inbox.put(partial(self._finish, end))
                return
            tokens, steps = served.generate_text(job, inputs, lambda: job.number in self.cancelled)
        writer = TextWriter(served.tokenizer, served.stop_of(job))
        is_stopped = bool(tokens) and (tokens[-1] in served.ends_of(job))
        parts = [writer.push(tokens, steps), writer.end()]
        text, shown = "".join(part for part, _ in parts), tuple(token for _, part in parts for token in part)
        reason = "stop" if is_stopped or writer.is_stopped else "length"
        end = End(job.number, reason, length, len(tokens), sum(steps))
        self.inbox.put(partial(self._finish, end, TextPiece(job.number, text, shown)))

    def _finish(self, end: End, piece: TextPiece | None = None) -> None:
        if piece is not None:
            self.say(piece)
        self._close(end.number)
        self.say(end)

    def _show(self, running: Running) -> None:
        """Tells what is new of a text."""
        stream, job, first = running.stream, running.job, running.num_shown
        if len(stream.tokens) > first:
            running.num_shown = len(stream.tokens)
            text, tokens = running.writer.push(
                stream.tokens[first:], stream.exit_steps[first:], stream.likelihoods[first:]
            )
            if tokens:
                self.say(TextPiece(job.number, text, tokens))
        if stream.is_done:
            text, tokens = running.writer.end()
            if tokens:
                self.say(TextPiece(job.number, text, tokens))
            end = End(
                job.number,
                stream.finish_reason,
                stream.request.num_tokens,
                len(stream.tokens),
                sum(stream.exit_steps),
            )
            self._finish(end)

    def _tell_load(self) -> None:
        counts = [it.engine.scheduler.counts for it in self.served.values() if it.engine is not None]
        launches, items = sum(it.ticks for it in counts), sum(it.items for it in counts)
        if launches - self.told[0] >= 100 or (not self.running and launches > self.told[0]):
            self.say(Load(launches - self.told[0], items - self.told[1]))
            self.told = launches, items


def refusal_of(number: int, error: Exception) -> Refusal:
    """The answer to the client for an error. Only those that are about a request say more than that there was one."""
    if isinstance(error, RefusedError | MediaError) or (isinstance(error, ValueError) and not mentions_path(error)):
        return Refusal(number, 400, " ".join(str(error).split())[:500])
    logger.error("a job failed", exc_info=error)
    return Refusal(number, 500, "the server failed at this request; its log says why")


def mentions_path(error: Exception) -> bool:
    """Whether a message may have the name of a file of this machine."""
    return os.sep in str(error)


def run_worker(connection: Connection, settings: Settings) -> None:
    """The main function of the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the server tells its workers when to end
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    disable_progress_bar()  # it would be for nobody, and its lock would outlive a worker that is ended
    served = {}
    try:
        device = choose_device(settings.device)
        for name, path in settings.runs:
            model, processor = load_model(find_checkpoint(path), device)
            served[name] = Served(name, model, processor, settings.limits)
        choose_threads(max((it.model for it in served.values()), key=lambda model: model.num_parameters()))
        torch.set_num_threads(min(torch.get_num_threads(), settings.most_threads or torch.get_num_threads()))
    except (ValueError, OSError) as error:
        connection.send(Failed(str(error)))
        return
    worker = Worker(connection, served)
    worker.say(Ready(tuple(it.card() for it in served.values())))
    worker.run()
