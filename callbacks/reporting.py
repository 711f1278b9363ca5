"""How callbacks report, to whatever `report_to` names, and how they let the model write every few steps."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
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
from transformers.integrations import TensorBoardCallback, get_reporting_integration_callbacks

from model import tokenizer_of

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


Example = Mapping[str, Any]


class Reporter:
    """Hands texts and numbers to the reporting callbacks of a trainer, without the console and without the log history.

    Only rank 0 writes: the reporting callbacks see to that.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.handler = trainer.callback_handler

    def write(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, texts: Mapping[str, str | float]
    ) -> None:
        """Write each text or number under its name at the current step; TensorBoard shows `name` as train/name."""
        kinds = tuple(get_reporting_integration_callbacks(args.report_to))
        for callback in self.handler.callbacks:
            if isinstance(callback, kinds):
                callback.on_log(args, state, control, logs=dict(texts), model=self.handler.model)

    def summary_writer(self) -> "SummaryWriter | None":
        """TensorBoard's, for what is no text; None on ranks other than 0, and where the run does not report there."""
        found = [callback for callback in self.handler.callbacks if isinstance(callback, TensorBoardCallback)]
        return found[0].tb_writer if found else None


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
    """The depths to write at: None, for no argument, where the model has no core."""
    return num_steps if model.config.get_text_config().num_core_layers else [None]


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
    new = output[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def verbatim(text: str) -> str:
    """A code block of Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())
