"""How callbacks report, to whatever `report_to` names, and how they let the model write every few steps."""

import html
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import (
    TensorBoardCallback,
    TrackioCallback,
    WandbCallback,
    get_reporting_integration_callbacks,
)

from model import length_before, tokenizer_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


Example = Mapping[str, Any]


class Backend(Protocol):
    """What shows texts, images, audio and histograms, each under its name at a step."""

    def text(self, name: str, text: str, step: int) -> None:
        """Show Markdown."""

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        """Show an image, (height, width, 3) of uint8."""

    def audio(self, name: str, samples: np.ndarray, rate: int, step: int) -> None:
        """Let a waveform be heard, (samples,) of float within -1 and 1."""

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        """Show how values are distributed, (values,), all of them finite."""


class TensorBoardBackend:
    """The backend of `report_to: tensorboard`."""

    def __init__(self, writer: "SummaryWriter") -> None:
        self.writer = writer

    def text(self, name: str, text: str, step: int) -> None:
        self.writer.add_text(name, text, step)
        self.writer.flush()  # after the last step nobody else does, here and below

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.writer.add_image(name, pixels, step, dataformats="HWC")
        self.writer.flush()

    def audio(self, name: str, samples: np.ndarray, rate: int, step: int) -> None:
        self.writer.add_audio(name, torch.from_numpy(samples)[None], step, rate)
        self.writer.flush()

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self.writer.add_histogram(name, values, step)
        self.writer.flush()


class LogBackend:
    """What the backends of wandb and trackio share, whose modules have the same names for what they log."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def log(self, name: str, value: Any, step: int) -> None:
        """Log a value as transformers logs numbers, beside the step that it belongs to."""
        self.module.log({name: value, "train/global_step": step})

    def image(self, name: str, pixels: np.ndarray, step: int) -> None:
        self.log(name, self.module.Image(Image.fromarray(pixels)), step)

    def audio(self, name: str, samples: np.ndarray, rate: int, step: int) -> None:
        # As int16: trackio would make floats as loud as they can be.
        integers = (samples * (2**15 - 1)).round().astype(np.int16)
        self.log(name, self.module.Audio(integers, sample_rate=rate), step)

    def histogram(self, name: str, values: np.ndarray, step: int) -> None:
        self.log(name, self.module.Histogram(values), step)


class WandbBackend(LogBackend):
    """The backend of `report_to: wandb`."""

    def text(self, name: str, text: str, step: int) -> None:
        self.log(name, self.module.Html(f"<pre>{html.escape(text)}</pre>"), step)


class TrackioBackend(LogBackend):
    """The backend of `report_to: trackio`."""

    def text(self, name: str, text: str, step: int) -> None:
        self.log(name, self.module.Markdown(text), step)


class Reporter:
    """Hands numbers, texts, images, audio, figures and histograms to the reporting callbacks of a trainer, under the
    current step, without the console and without the log history; `name` is shown as train/name. Numbers and texts go
    to all that `report_to` names, the others to TensorBoard, wandb and trackio.

    Only rank 0 writes.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer

    def write(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, values: Mapping[str, str | float]
    ) -> None:
        """Write each text or number under its name at the current step."""
        kinds = tuple(get_reporting_integration_callbacks(args.report_to))
        texts = {name: value for name, value in values.items() if isinstance(value, str)}
        numbers = {name: value for name, value in values.items() if name not in texts}
        for callback in self.trainer.callback_handler.callbacks:
            logs = numbers if isinstance(callback, tuple(BACKENDS)) else dict(values)
            if isinstance(callback, kinds) and logs:
                callback.on_log(args, state, control, logs=logs, model=self.trainer.model)
        for name, text in texts.items():
            for backend in self.backends:
                backend.text(f"train/{name}", text, state.global_step)

    def image(self, name: str, pixels: np.ndarray) -> None:
        """Show an image, (height, width, 3) of uint8."""
        for backend in self.backends:
            backend.image(f"train/{name}", pixels, self.trainer.state.global_step)

    def audio(self, name: str, waveform: np.ndarray | torch.Tensor, rate: int) -> None:
        """Let a waveform be heard, (samples,) of float; what is beyond -1 and 1 is cut off."""
        samples = torch.as_tensor(waveform).float().clamp(-1, 1).cpu().numpy()
        for backend in self.backends:
            backend.audio(f"train/{name}", samples, rate, self.trainer.state.global_step)

    def figure(self, name: str, figure: "Figure") -> None:
        """Show a figure of matplotlib as an image."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg  # here, since it takes as long as all others

        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        self.image(name, np.ascontiguousarray(np.asarray(canvas.buffer_rgba())[..., :3]))

    def histogram(self, name: str, values: torch.Tensor) -> None:
        """Show how values of any shape are distributed; those that are not finite are left out."""
        values = values.detach().float().cpu().flatten()
        values = values[values.isfinite()].numpy()
        for backend in self.backends if len(values) else ():
            backend.histogram(f"train/{name}", values, self.trainer.state.global_step)

    @property
    def shows_images(self) -> bool:
        """Whether the run has a backend, on rank 0."""
        return any(isinstance(it, tuple(BACKENDS)) for it in self.trainer.callback_handler.callbacks)

    @property
    def backends(self) -> list[Backend]:
        """Those of the run, on rank 0; elsewhere there are none."""
        if not self.trainer.state.is_world_process_zero:
            return []
        callbacks = self.trainer.callback_handler.callbacks
        return [
            open_backend(self, it)
            for it in callbacks
            for kind, open_backend in BACKENDS.items()
            if isinstance(it, kind)
        ]

    def begin(self, callback: TrainerCallback) -> None:
        """Let a reporting callback begin again, which has ended with the training while others still write."""
        trainer = self.trainer
        callback.on_log(trainer.args, trainer.state, trainer.control, logs={}, model=trainer.model)


def open_tensorboard(reporter: Reporter, callback: TensorBoardCallback) -> TensorBoardBackend:
    """The backend that writes to the files of a callback."""
    if callback.tb_writer is None:
        reporter.begin(callback)
    return TensorBoardBackend(callback.tb_writer)


def open_wandb(reporter: Reporter, callback: WandbCallback) -> WandbBackend:
    """The backend that writes to the run of this process."""
    import wandb  # only where it is installed

    return WandbBackend(wandb)


def open_trackio(reporter: Reporter, callback: TrackioCallback) -> TrackioBackend:
    """The backend that writes to the run of this process."""
    import trackio  # only where it is installed

    run = trackio.context_vars.current_run.get()
    if run is None:
        reporter.begin(callback)
    elif reporter.trainer.args.run_name is None:
        reporter.trainer.args.run_name = run.name  # by which it goes on where it has ended, instead of a new one
    return TrackioBackend(trackio)


BACKENDS = {TensorBoardCallback: open_tensorboard, WandbCallback: open_wandb, TrackioCallback: open_trackio}
"""What shows images, audio, texts and histograms, by the callback of transformers."""


def image_pixels(levels: torch.Tensor) -> np.ndarray:
    """(height, width, 3) of uint8, from (1 or 3, height, width) in [0, 1]."""
    return (levels * 255).round().byte().expand(3, -1, -1).permute(1, 2, 0).cpu().contiguous().numpy()


class ReportingCallback(TrainerCallback):
    """A callback with a reporter of its own."""

    def __init__(self, reporter: Reporter) -> None:
        self.reporter = reporter


class PeriodicCallback(ReportingCallback):
    """Lets the model write every few steps and at the end.

    All ranks generate (under ZeRO-3 none has the whole model), with the same tokens; rank 0 writes. The random state of
    the training is left as it was, and so is the mode (train or eval) of the model.

    Args:
        every_steps: optimizer steps from one time to the next.
    """

    def __init__(self, every_steps: int, reporter: Reporter) -> None:
        super().__init__(reporter)
        self.every_steps = every_steps
        self.last_step: int | None = None

    def on_step_end(self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        """Write if this step is due."""
        if state.global_step % self.every_steps == 0:
            self.last_step = state.global_step
            self.write_all(args, state, control, model)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel, **kwargs: Any) -> None:
        """Write unless the last step did."""
        if state.global_step != self.last_step:
            self.write_all(args, state, control, model)

    def write_all(self, args: Any, state: TrainerState, control: Any, model: PreTrainedModel) -> None:
        """All that the model writes at this step, to where the run reports to."""
        self.reporter.write(args, state, control, self.write(model, state))

    @abstractmethod
    def write(self, model: PreTrainedModel, state: TrainerState) -> dict[str, str | float]:
        """Let the model write; Markdown and numbers by name."""


def check_samples(section: str, config: Any, **least: int) -> None:
    """Raises ValueError for a number of a section of options below its least value, and for depths that are none."""
    for name, value in least.items():
        if getattr(config, name) < value:
            raise ValueError(f"{section}.{name} is {getattr(config, name)}, must be at least {value}.")
    if not config.num_steps or min(config.num_steps) < 1:
        raise ValueError(f"{section}.num_steps is {config.num_steps}, must hold at least one depth, each at least 1.")


def depths_of(model: PreTrainedModel, num_steps: list[int]) -> list[int | None]:
    """The depths to write at: None, for no argument, where the model has but one."""
    return num_steps if model.config.get_text_config().has_depths else [None]


@contextmanager
def aside(model: PreTrainedModel, seed: int = 0) -> Iterator[None]:
    """Let a model that is being trained generate, with draws from `seed`, and leave everything as it was."""
    was_training = model.training
    model.eval()
    try:
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)


def inputs_of(
    example: Example, model: PreTrainedModel, processor: PreTrainedTokenizerBase | ProcessorMixin, depth: int | None
) -> dict[str, Any]:
    """Arguments of `generate`: a prompt and its media, the likeliest tokens, and the depth."""
    tokenizer, media = tokenizer_of(processor), example["media"] and processor.collate_media(example["media"])
    ids = torch.tensor([example["prompt_ids"]], device=model.device)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "do_sample": False,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **({} if depth is None else {"num_steps": depth}),
        **{
            name: value.to(model.device, model.dtype if value.is_floating_point() else None)
            for name, value in media.items()
        },
    }


def generate_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, inputs: Mapping[str, Any], max_new_tokens: int
) -> str:
    """What a model writes after one prompt, without special tokens."""
    output = model.generate(**inputs, max_new_tokens=max_new_tokens)
    new = output[0, length_before(model, inputs["input_ids"]) :]
    return tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def verbatim(text: str) -> str:
    """A code block of Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())
