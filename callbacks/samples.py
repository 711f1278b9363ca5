"""Texts written by the model during training, at several depths."""

import logging
from dataclasses import dataclass, field

from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerState

from .reporting import PeriodicCallback, Reporter, aside, check_samples, depths_of, generate_text, inputs_of, verbatim

logger = logging.getLogger(__name__)


@dataclass
class SamplesConfig:
    """Samples from fixed prompts."""

    prompts: list[str] = field(default_factory=list)
    """Texts to continue by the likeliest tokens; none: no samples. An empty prompt starts from the begin token."""

    every_steps: int = 500
    """Optimizer steps between samples, at least 1; there is one at the end as well."""

    num_steps: list[int] = field(default_factory=lambda: [1, 4, 8])
    """Core steps per token, each at least 1, one sample for each. A model without a core gives one sample."""

    max_new_tokens: int = 48
    """Most tokens in a sample, at least 1."""

    def __post_init__(self) -> None:
        check_samples("samples", self, every_steps=1, max_new_tokens=1)


class SamplesCallback(PeriodicCallback):
    """Writes samples, to the reports and to the log."""

    def __init__(self, config: SamplesConfig, tokenizer: PreTrainedTokenizerBase, reporter: Reporter) -> None:
        super().__init__(config.every_steps, reporter)
        if "" in config.prompts and tokenizer.bos_token_id is None:
            raise ValueError(
                "samples.prompts has an empty prompt, but the tokenizer has no begin token to start from: "
                "give it a text."
            )
        self.config = config
        self.tokenizer = tokenizer

    def write(self, model: PreTrainedModel, state: TrainerState) -> dict[str, str]:
        """One text per prompt and depth."""
        texts = {}
        for depth in depths_of(model, self.config.num_steps):
            name = "samples" if depth is None else f"samples/num_steps_{depth}"
            with aside(model):
                pairs = [(prompt, self.continue_prompt(model, prompt, depth)) for prompt in self.config.prompts]
            texts[name] = "\n\n---\n\n".join(verbatim(f"{prompt}⟶{continuation}") for prompt, continuation in pairs)
            if state.is_world_process_zero:
                for prompt, continuation in pairs:
                    logger.info("step %d, %s: %r -> %r", state.global_step, name, prompt, continuation)
        return texts

    def continue_prompt(self, model: PreTrainedModel, prompt: str, depth: int | None) -> str:
        """The text after one prompt. Prompts go one by one: a few short ones, and none is padded."""
        ids = self.tokenizer(prompt, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if self.tokenizer.bos_token_id is not None:
            ids = [self.tokenizer.bos_token_id, *ids]
        inputs = inputs_of({"prompt_ids": ids, "media": {}}, model, self.tokenizer, depth)
        return generate_text(model, self.tokenizer, inputs, self.config.max_new_tokens)
