"""The trainer of recurrent-depth models: draws the depth of each micro-batch, weighs modalities, and watches whether
depth is used.
"""

import copy
import functools
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import unwrap_peft_model
from transformers.utils import ModelOutput

from model import MediaConfig
from model.cross_entropy import count_labels
from model.depth import sample_depth
from model.recurrence import draw_training_states

from .base import BaseTrainer
from .losses import ModalityLosses, TargetLosses, flow_seeds, target_sums
from .objectives import TrainingPass, build_objective, check_model
from .objectives.steps import dropped_steps, scheduled_mean
from .signals import sheltered
from .token_batches import TokenBatchSampler, build_token_batches

logger = logging.getLogger(__name__)


class RecurrentTrainer(BaseTrainer):
    """`transformers.Trainer` for models that take `num_steps` and `initial_state`.

    The depth of a micro-batch is drawn from (seed, global step, micro-batch) and the initial state of a row from (seed,
    global step, row in the global batch), so that all ranks run the same number of steps (ZeRO-3 gathers weights in
    each of them and would wait forever otherwise), a resumed run repeats the uninterrupted one, and the spread of a
    batch over ranks and micro-batches does not matter.

    Where the model writes media (its config has written_NAME_token_id), their losses are means over all latents of an
    accumulation window, on all ranks, and their noise is drawn from the same keys as the states.

    A batch may say in `modality_ids`, (batch, sequence), what the document of each label contains. Its losses are then
    logged by modality, and weighted, if the arguments say so.

    Raises:
        ValueError: The libraries refuse an option; nothing is written then.
    """

    has_token_batches = smooths_labels = True

    def __init__(self, *args: Any, train_dataset: Dataset | None = None, **kwargs: Any):
        self.train_dataset = train_dataset  # of which batches are made before `Trainer` makes a folder
        self.token_batches: TokenBatchSampler | None = None
        super().__init__(*args, train_dataset=train_dataset, **kwargs)
        self.label_smoother = None  # transformers' would not shift labels of classes that it does not know
        self.modalities = ModalityLosses(self.args.modality_weights)
        self.text_config = self.model.config.get_text_config()
        self.has_media = isinstance(self.model.config, MediaConfig)
        if self.has_media and self.args.accelerator_config.dispatch_batches is None:
            # Of a stream, accelerate would join the batches of all ranks and cut them by rows, which media are not.
            self.accelerator.dataloader_config.dispatch_batches = False
        self.is_recurrent = self.text_config.num_core_layers > 0
        self.is_encoder_decoder = self.model.config.is_encoder_decoder
        self.last_num_steps: tuple[int, int] | None = None
        self.targets = TargetLosses(self.model.config)
        self._position = (-1, -1)  # (global step, micro-batch within it) of the forward pass in progress
        self._gathered: dict[str, list[float | torch.Tensor]] = defaultdict(list)  # until the next log

    def create_accelerator_and_postprocess(self) -> None:
        """Also builds the objective and the batches by tokens, and refuses what model or data cannot have, before there
        is a folder.
        """
        self.objective = build_objective(self.args.objective)
        check_model(self.objective, unwrap_peft_model(self.model), has_autocast=self.args.bf16 or self.args.fp16)
        super().create_accelerator_and_postprocess()
        base = unwrap_peft_model(self.model).base_model
        untrained = [base.exit_gate, None if self.objective.trains_exit_probe else base.exit_probe]
        if self.built_optimizer is not None:
            for part in filter(None, untrained):
                # DDP would wait for its gradients. The optimizer has it all the same, as that of checkpoints.
                part.requires_grad_(False)
        if self.args.max_tokens_per_batch is not None:
            self.token_batches = build_token_batches(self.train_dataset, self.args)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch=None) -> torch.Tensor:
        """One micro-batch. `Trainer` does not say which of the step's micro-batches it is, so they are counted here; a
        checkpoint always stands between steps, where the count starts again.
        """
        step, micro_batch = self._position
        self._position = (self.state.global_step, micro_batch + 1 if step == self.state.global_step else 0)
        self.modalities.num_windows += self._position[1] == 0
        every = self.args.recurrence_logging_steps
        if self.text_config.has_depths and every > 0 and self._position[0] % every == 0 and self._position[1] == 0:
            self._probe_recurrence(model, inputs_of_model(self._prepare_inputs(inputs)))
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any):
        """Adds depth, initial state and weights of the labels in training, where nobody looks at the logits; evaluation
        runs at the mean depth from the fixed state, without weights of labels, and its outputs get `target_sums`, where
        the model generates media.
        """
        modality_ids, inputs = inputs.get("modality_ids"), inputs_of_model(inputs)
        if not model.training:
            found = super().compute_loss(model, inputs, return_outputs, **kwargs)
            if return_outputs and self.targets.token_ids:
                found[1]["target_sums"] = target_sums(found[1].get("target_losses") or {}, inputs["input_ids"])
            return found
        inputs["skip_logits"] = True
        if self.args.label_smoothing_factor:
            inputs["label_smoothing"] = self.args.label_smoothing_factor
        if self.is_recurrent:
            inputs |= self._draw_recurrence(*inputs["labels" if self.is_encoder_decoder else "input_ids"].shape)
        if self.is_encoder_decoder and (encoder := self.model.config.get_text_config(encoder=True)).num_core_layers:
            inputs["encoder_num_steps"] = sample_depth(encoder.recurrence, self.args.seed, *self._position, "encoder")
        if self.targets.token_ids:
            inputs["flow_seeds"] = flow_seeds(self._keys(len(inputs["input_ids"])))
            inputs["num_targets_in_batch"] = self.targets.num_in_window
        if modality_ids is not None and self.modalities.are_weighted:
            inputs["loss_weights"] = self.modalities.loss_weights(modality_ids)
        is_read = self.objective.is_read_after_steps
        if not (return_outputs or modality_ids is not None or self.targets.token_ids or is_read):
            return super().compute_loss(model, inputs, **kwargs)
        inputs |= {"output_states": True} if is_read else {}
        with self.objective.around_forward():
            loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if is_read:
            with self.accelerator.autocast():
                loss = self.objective.loss(loss, self._training_pass(inputs, outputs, **kwargs))
        if modality_ids is not None:
            self.modalities.add(outputs["token_losses"], inputs["labels"], modality_ids)
        self.targets.add(outputs.get("target_losses") or {})
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple:
        """The step of `Trainer`, of which the logits become a pair of them and `target_sums`, where the model generates
        media; labels hold the codes of images, where these are tokens.
        """
        with_codes = getattr(self.model, "with_codes", dict)  # models of text alone have none
        return super().prediction_step(model, with_codes(self._prepare_inputs(inputs)), *args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds the means of what was gathered since the last log of training, which until then stays on the device."""
        if "loss" in logs:
            means = {name: sum(values) / len(values) for name, values in self._gathered.items()}
            measured = {name: mean for name, mean in means.items() if isinstance(mean, torch.Tensor)}
            if measured:
                found = self.accelerator.reduce(torch.stack(list(measured.values())), "mean").tolist()
                means |= zip(measured, found, strict=True)
            logs = {**logs, **means}
            self._gathered.clear()
            logs |= self.modalities.flush(lambda sums: self.accelerator.reduce(sums, "sum"))
            if self.targets.token_ids:
                logs |= self.targets.flush(lambda sums: self.accelerator.reduce(sums.to(self.args.device), "sum"))
        super().log(logs, *args, **kwargs)

    # ------------------------------------------------------------------------------------------------- rows and windows

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], torch.Tensor | int | None]:
        """The batches of an accumulation window, and what the sum of their losses is divided by: the labels of all
        ranks or, where modalities are weighted, the weights of those labels.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.modalities.are_weighted and batches and "modality_ids" in batches[0]:
            num_items = sum(self.modalities.sum_of_weights(batch) for batch in batches).to(device)
            if self.args.average_tokens_across_devices:
                num_items = self.accelerator.reduce(num_items, "sum")
        if self.targets.token_ids and batches:
            share = self.args.average_tokens_across_devices
            self.targets.count(batches, lambda it: self.accelerator.reduce(it.to(device), "sum") if share else it)
        return batches, num_items

    def get_train_dataloader(self) -> DataLoader:
        """Groups by the lengths that a dataset knows; transformers would read all of it to find them out."""
        if self.token_batches is not None:
            return sheltered(self.accelerator.prepare_data_loader(self._loader_of_token_batches()))
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        return self._grouped(super().get_train_dataloader, self.train_dataset, rows)

    def _loader_of_token_batches(self) -> DataLoader:
        """The loader of all ranks, among which accelerate deals its batches out."""
        args = self.args
        return DataLoader(
            self.train_dataset,
            batch_sampler=self.token_batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """The loader, grouped as in training."""
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        dataset = self.eval_dataset[dataset] if isinstance(dataset, str) else dataset
        build = functools.partial(super().get_eval_dataloader, eval_dataset)
        return self._grouped(build, dataset, self.args.eval_batch_size * self.args.world_size)

    def _grouped(self, build: Callable[[], DataLoader], dataset: Dataset, rows: int) -> DataLoader:
        """The loader that is built, with its batches made of `rows` rows of similar length, where that is asked for."""
        if self.args.train_sampling_strategy != "group_by_length" or not hasattr(dataset, "lengths"):
            return build()
        self.args.train_sampling_strategy = "sequential"
        try:
            loader = build()
        finally:
            self.args.train_sampling_strategy = "group_by_length"
        loader.set_sampler(LengthSampler(rows, dataset.lengths, self.args.data_seed))
        return loader

    # -------------------------------------------------------------------------------------------------------- objective

    def _training_pass(
        self, inputs: dict[str, Any], outputs: ModelOutput, num_items_in_batch: torch.Tensor | int | None = None
    ) -> TrainingPass:
        """What the objective sees of a forward pass; its sums are divided as `Trainer` has that of the model."""
        num_items = count_labels(inputs["labels"], num_items_in_batch, inputs.get("loss_weights"))
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            num_items = num_items / self.accelerator.num_processes
        key = (self.args.seed, *self._position)
        row_keys = self._keys(len(inputs["input_ids"]))
        return TrainingPass(unwrap_peft_model(self.model), inputs, outputs, num_items, key, row_keys)

    # -------------------------------------------------------------------------------------------------- depth and state

    def _draw_recurrence(self, batch: int, sequence: int) -> dict[str, Any]:
        """`num_steps` and `initial_state` of the current micro-batch."""
        config, options, key = self.text_config, self.args.objective, (self.args.seed, *self._position)
        recurrence = copy.copy(config.recurrence)
        recurrence.mean_steps = scheduled_mean(
            recurrence.mean_steps, options.step_schedule, self.state.global_step, self.state.max_steps
        )
        self.last_num_steps = self.objective.depth(*sample_depth(recurrence, *key))
        if options.loop_dropout:
            adapter = unwrap_peft_model(self.model).base_model.core.step_lora
            adapter.dropped = dropped_steps(options.loop_dropout, adapter.num_steps, *key)
        self._gathered["steps_without_gradient"].append(self.last_num_steps[0])
        self._gathered["steps_with_gradient"].append(self.last_num_steps[1])
        states = draw_training_states(config, sequence, self._keys(batch), self.args.device)
        return {"num_steps": self.last_num_steps, "initial_state": states}

    def _keys(self, batch: int) -> list[tuple[int, int, int]]:
        """(seed, global step, row in the global batch) of each row of the current micro-batch, in the order in which
        accelerate assigns batches: those of the ranks side by side, micro-batch after micro-batch.
        """
        step, micro_batch = self._position
        first = (micro_batch * self.args.world_size + self.args.process_index) * self.args.per_device_train_batch_size
        return [(self.args.seed, step, first + row) for row in range(batch)]

    # ------------------------------------------------------------------------------------------------- is depth in use?

    @torch.no_grad()
    def _probe_recurrence(self, model: nn.Module, inputs: dict[str, Any]) -> None:
        """Runs the next batch, on which the model has not been trained yet, at one step and at the mean depth."""
        model.eval()
        self.optimizer.eval()  # the weights of evaluations; those of training come back with the step
        with self.compute_loss_context_manager():
            shallow = model(**inputs, num_steps=1, skip_logits=True).loss
            mean_steps = self.text_config.recurrence.mean_steps
            deep = model(**inputs, num_steps=mean_steps, output_states=True, skip_logits=True)
        if self.is_encoder_decoder:
            is_real = inputs["labels"] != -100
        else:
            is_real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        values = {
            "loss_at_1_step": shallow,
            "loss_at_mean_steps": deep.loss,
            "depth_gap": shallow - deep.loss,
            "token_correlation": token_correlation(deep.state, is_real),
        }
        for step, change in enumerate(state_changes(deep.states, is_real), start=1):
            values[f"state_change_{step:02d}"] = change
        norms = [state_norm(state, is_real) for state in (deep.states[1], deep.states[-1])]
        values |= {"state_norm": norms[1], "state_growth": norms[1] / norms[0]}
        for name, value in values.items():
            self._gathered[name].append(value.float())
        model.train()


class LengthSampler(LengthGroupedSampler):
    """Rows of similar length side by side, in an order that follows from seed and epoch alone, so that a resumed run
    goes on with it; transformers draws it from wherever the global generator stands.

    Args:
        batch_size: Rows that should be of similar length.
        lengths: Lengths of all rows, known in advance.
        seed: Seed of the orders, at least 0.
    """

    def __init__(self, batch_size: int, lengths: Sequence[int], seed: int):
        super().__init__(batch_size, lengths=list(lengths), generator=torch.Generator())
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator.manual_seed(self.seed + self.epoch)
        return super().__iter__()


def inputs_of_model(inputs: dict[str, Any]) -> dict[str, Any]:
    """A batch without what only the trainer reads."""
    return {name: value for name, value in inputs.items() if name != "modality_ids"}


def state_changes(states: tuple[torch.Tensor, ...], is_real: torch.Tensor) -> list[torch.Tensor]:
    """|s_i - s_{i-1}| / |s_i| for i = 1 .. r, mean over all tokens but padding.

    Args:
        states: (batch, sequence, hidden) each.
        is_real: (batch, sequence), False where there is padding.
    """
    tokens = [state[is_real] for state in states]  # (tokens, hidden)
    return [((after - before).norm(dim=-1) / after.norm(dim=-1)).mean() for before, after in pairwise(tokens)]


def state_norm(state: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """The root mean square of the features of a token, mean over all tokens but padding.

    Args:
        state: (batch, sequence, hidden).
        is_real: (batch, sequence), False where there is padding.
    """
    return state[is_real].float().square().mean(dim=-1).sqrt().mean()


def token_correlation(state: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
    """Mean correlation (cosine after each token's mean over features is taken off) between the states of different
    tokens of a row, over all pairs of all rows; 1 if all tokens have collapsed to one state. Source: Geiping et al.
    2025, section 4.3. Ours leaves out padding, whose states are alike.

    Args:
        state: (batch, sequence, hidden).
        is_real: (batch, sequence), False where there is padding; True more than once in some row.
    """
    state = state.float()
    directions = nn.functional.normalize(state - state.mean(dim=-1, keepdim=True), dim=-1)
    directions = directions.masked_fill(~is_real.unsqueeze(-1), 0)
    tokens = is_real.sum(dim=1)  # (batch,)
    # The sum over all pairs is the squared norm of the sum; the pairs of a token with itself are 1 each.
    pairs = directions.sum(dim=1).square().sum() - directions.square().sum()
    return pairs / (tokens * (tokens - 1)).sum()
