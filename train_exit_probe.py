"""Trains the head by which a model exits without reading its output: `python train_exit_probe.py runs/recurrent_lm`."""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import logging
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import datasets
import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import set_seed

from callbacks import model_card, sources_of
from configs import RunConfig
from configs.runs import find_run_config, read_run_config
from dataset_loading import Collator, build_datasets
from inference import arguments
from inference.devices import choose_device, choose_threads, device_report
from inference.loading import find_checkpoint, load_model
from inference.output import whole_folder, writable_folder
from inference.terminal import write_result
from model import MegaTransformerForCausalLM
from model.exit_criteria import relative_change

logger = logging.getLogger("train_exit_probe")


def main(argv: Sequence[str] | None = None) -> int:
    """Train a probe on the data of a run, its model frozen, and save model and probe.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    datasets.disable_progress_bars()
    logger.info("%s", device_report())
    try:
        checkpoint = find_checkpoint(args.checkpoint)
        run = read_run_config(checkpoint, [])
        model, tokenizer = load_model(checkpoint, choose_device(args.device))
        choose_threads(model)
        if model.text_config.num_core_layers == 0:
            raise ValueError(f"{checkpoint} has no core (num_core_layers is 0), so there is nothing to exit from")
        output = writable_folder(args.output or Path(args.checkpoint) / "exit_probe")
        set_seed(args.seed)
        loader = training_batches(run, tokenizer, args)
    except (ValueError, OSError) as error:
        logger.debug("Where it failed:", exc_info=True)
        parser.error(str(error))
    share = train(model, loader, args)
    try:
        with whole_folder(output) as made:
            model.save_pretrained(made)
            tokenizer.save_pretrained(made)
            model_card(output, model, run.resolved, sources_of(run.data)).save(made / "README.md")
            shutil.copy(find_run_config(checkpoint), made / "config.yaml")
    except ValueError as error:
        parser.error(str(error))
    write_result(f"{share:.1%} of the decisions of the last updates were right; written to {output}\n")
    return 0


def build_parser() -> arguments.OneLineParser:
    """The command line."""
    parser = arguments.OneLineParser(
        prog="train_exit_probe.py",
        description="A head that says from the state whether the output distribution is that of full depth, for "
        'exit_criterion "probe". The model stays as it is; the data are those of its run.',
    )
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of a run (its newest complete checkpoint)")
    parser.add_argument("--output", type=Path, help="folder for model and probe; default: exit_probe in the given one")
    parser.add_argument("--num-steps", type=arguments.core_steps, help="full depth; default: the checkpoint's mean")
    parser.add_argument(
        "--epsilon", type=arguments.finite, default=1e-4, help="nats: KL(full depth || exit) that counts as equal"
    )
    parser.add_argument(
        "--distance",
        type=arguments.finite,
        default=0.05,
        help="|s_full - s_i| / |s_full| that counts as equal, for the cache's sake",
    )
    parser.add_argument("--updates", type=arguments.new_tokens, default=300, help="of the probe")
    parser.add_argument("--batch-size", type=arguments.batch_rows, default=8, help="rows in an update")
    parser.add_argument("--learning-rate", type=arguments.finite, default=1e-2, help="of AdamW, at its highest")
    parser.add_argument("--seed", type=arguments.seed, default=0, help="of the probe's weights and the order of rows")
    parser.add_argument("--device", help="for example cpu, cuda, cuda:1; default: a GPU if there is one")
    return parser


def training_batches(run: RunConfig, tokenizer, args) -> Iterator[dict[str, torch.Tensor]]:
    """Batches of the run's training data, again and again."""
    data = build_datasets(
        run.data,
        tokenizer,
        seed=args.seed,
        vocab_size=run.model.get_text_config().vocab_size,
        batch_size=args.batch_size,
    ).train
    shuffle = not isinstance(data, torch.utils.data.IterableDataset)
    loader = DataLoader(data, args.batch_size, shuffle=shuffle, collate_fn=Collator(tokenizer), drop_last=True)
    while True:
        yield from loader


def train(model: MegaTransformerForCausalLM, batches: Iterator[dict[str, torch.Tensor]], args) -> float:
    """Binary cross-entropy of the probe's decision after each step. Returns the share of right ones at the end."""
    model.requires_grad_(False).eval()
    probe = model.model.add_exit_probe().float().requires_grad_(True)
    full = args.num_steps or model.text_config.num_steps or model.text_config.recurrence.mean_steps
    optimizer = torch.optim.AdamW(probe.parameters(), lr=args.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.learning_rate, total_steps=args.updates)
    right = []
    for update in range(args.updates):
        states, is_final, counts = observe(model, next(batches), full, args.epsilon, args.distance)
        logits = torch.stack([probe(now, before) for before, now in pairwise(states)])
        losses = nn.functional.binary_cross_entropy_with_logits(logits, is_final.float(), reduction="none")
        loss = losses[:, counts].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        right.append(((logits > 0) == is_final)[:, counts].float().mean().item())
        if (update + 1) % 50 == 0:
            logger.info("update %d: loss %.4f, right %.1f %%", update + 1, loss.item(), 100 * right[-1])
    return sum(right[-20:]) / len(right[-20:])


@torch.no_grad()
def observe(
    model: MegaTransformerForCausalLM, batch: dict[str, torch.Tensor], full: int, epsilon: float, distance: float
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor, torch.Tensor]:
    """What the probe learns from.

    A token is final after a step if from there on KL(P_full || P_i) is below epsilon, and |s_full - s_i| / |s_full|
    below `distance`: a distribution that passes by the last one leaves keys and values unlike those of full depth.

    Returns:
        s_0 .. s_full, each (batch, sequence, hidden); (full, batch, sequence) of bool: whether the token is final after
        step 1 .. full; (batch, sequence) of bool: tokens whose successor counts in the loss.
    """
    given = {name: value.to(model.device) for name, value in batch.items() if name != "labels"}
    states = model(**given, num_steps=full, output_states=True, use_cache=False).states
    log_p = [  # one more step from each state, in place of all steps again
        model(**given, num_steps=1, initial_state=state, use_cache=False).logits.float().log_softmax(-1)
        for state in states[:-1]
    ]
    divergence = torch.stack([(log_p[-1].exp() * (log_p[-1] - each)).sum(-1) for each in log_p])
    learned = nn.functional.pad(batch["labels"][:, 1:] != -100, (0, 1)).to(model.device)
    is_close = torch.stack([relative_change(states[-1], state) < distance for state in states[1:]])
    is_final = (divergence < epsilon) & is_close
    return states, is_final.flip(0).cumprod(0).flip(0).bool(), learned


if __name__ == "__main__":
    sys.exit(main())
