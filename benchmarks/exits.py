"""What exits save, on a trained checkpoint: agreement with full depth, steps, and time against the ideal.

python -m benchmarks.exits runs/recurrent_lm
python -m benchmarks.exits runs/recurrent_lm --criterion latent_difference --thresholds 0.01 0.03 0.1
"""

from __future__ import annotations

import inference.logs  # noqa: F401  first: it sets up what libraries say while they are imported

# isort: split
import argparse
import copy
import math
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel

from benchmarks import timing
from configs import read_run_config
from dataset_loading import Collator
from evaluation.__main__ import validation_texts
from inference import arguments
from inference.devices import choose_device, choose_threads
from inference.loading import find_checkpoint, load_model
from model import RecurrentCache
from model.exit_criteria import EXIT_CRITERIA, ExitOptions

THRESHOLDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
NEVER = {"argmax_stability": 1e9}  # thresholds that nothing passes; of the others one that nothing falls below
PROMPT = 4  # tokens
POLICIES = {
    "full": {"policy": "full"},
    "ring of 2": {"policy": "ring", "num_kept_steps": 2},
    "ring of 4": {"policy": "ring", "num_kept_steps": 4},
    "last": {"policy": "last"},
    "first, 4 tokens": {"policy": "first", "num_kept_tokens": 4},
    "first, 16 tokens": {"policy": "first", "num_kept_tokens": 16},
    "residual": {"policy": "residual"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write two tables to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = timing.parsed(parser, argv)
    try:
        device = choose_device(args.device)
        checkpoint = find_checkpoint(args.checkpoint)
        model, tokenizer = load_model(checkpoint, device)
        texts = validation_texts(read_run_config(checkpoint, ["--data.packing", "false"]), tokenizer, args.limit)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    choose_threads(model, args.threads)
    model.eval()
    full = args.num_steps or model.config.num_steps or model.config.recurrence.mean_steps
    rows = [row for source in texts.values() for row in source]
    batches = [Collator(tokenizer)(rows[i : i + args.rows]) for i in range(0, len(rows), args.rows)]
    sys.stdout.write(f"Read token by token, texts given, against one pass of {full} steps.\n\n")
    policies = {name: agreement(model, batches, full, ExitOptions(), options) for name, options in POLICIES.items()}
    sys.stdout.write(report_agreement("cache policy", full, policies) + "\n")
    by_threshold = {
        threshold: agreement(model, batches, full, ExitOptions(args.criterion, threshold), {})
        for threshold in args.thresholds
    }
    sys.stdout.write(report_agreement(args.criterion, full, by_threshold))
    good = [threshold for threshold, each in by_threshold.items() if each["agreement"] >= args.agreement]
    chosen = min(good, key=lambda threshold: by_threshold[threshold]["steps"], default=None)
    if chosen is None:
        sys.stdout.write(f"\nNo threshold agrees in {args.agreement:.0%} of the tokens; nothing is timed.\n")
        return 0
    longest = sorted((row["input_ids"] for row in rows), key=len, reverse=True)[:8]
    if len(longest[-1]) < PROMPT + 2:
        parser.error(f"texts of {len(longest[-1])} tokens are too short to be timed; at least {PROMPT + 2} are needed")
    model.generation_config.eos_token_id = None  # equally many tokens in all runs
    results = {batch: measure(model, longest[:batch], full, chosen, args, device) for batch in (1, 8)}
    timing.save(args.output, args, policies=policies, thresholds=by_threshold, timing=results)
    sys.stdout.write(report_time(args, full, chosen, results, device))
    return 0


def build_parser() -> arguments.OneLineParser:
    parser = arguments.OneLineParser(prog="benchmarks.exits", description="What exits save on a trained checkpoint.")
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    parser.add_argument("--criterion", choices=list(EXIT_CRITERIA), default="kl_divergence", help="of the exits")
    parser.add_argument(
        "--thresholds", type=arguments.finite, nargs="+", default=list(THRESHOLDS), help="tried one by one"
    )
    parser.add_argument(
        "--agreement", type=arguments.finite, default=0.99, help="share of tokens that the chosen threshold keeps"
    )
    parser.add_argument("--num-steps", type=timing.count, help="full depth; default: the checkpoint's mean")
    parser.add_argument("--limit", type=timing.count, default=64, help="validation texts of each source")
    parser.add_argument("--rows", type=timing.count, default=64, help="texts decoded together for the agreement")
    parser.add_argument("--new-tokens", type=timing.count, default=96, help="most tokens written in a timed round")
    parser.add_argument("--rounds", type=timing.count, default=11, help="timed rounds; in each, every run has its turn")
    parser.add_argument("--warmup", type=timing.count, default=1, help="rounds before them that do not count")
    parser.add_argument(
        "--threads", type=timing.count, help="threads of torch on the CPU; default: by the size of the model"
    )
    parser.add_argument("--device", help="for example cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--output", type=timing.output_file, help="JSON file for the figures")
    return parser


# ----------------------------------------------------------------------------------------------------------- agreement


def agreement(
    model: PreTrainedModel, batches: Sequence[dict], full: int, exits: ExitOptions, cache: dict[str, Any]
) -> dict[str, float]:
    """Teacher-forced: every text is read token by token, each exiting where it may, over the cache that the tokens
    before it have left.

    Args:
        exits: Of all tokens but the first.
        cache: Arguments of `RecurrentCache`.

    Returns:
        Of the tokens whose successor counts in the loss (a prompt that is not trained on is answered at random):
        agreement: share whose likeliest successor is that of one pass at full depth; steps: their mean; divergence:
        KL(pass || this), the mean in nats; bytes: of the cache at the end of the texts, for each token that there is
        room for.
    """
    same, steps, divergence, count, held, room = 0, 0, 0.0, 0, 0, 0
    for batch in batches:
        ids = batch["input_ids"].to(model.device)
        mask = batch.get("attention_mask", torch.ones_like(ids)).to(model.device).bool()
        learned = (batch["labels"][:, 1:] != -100).to(model.device)  # whether what follows a token is trained on
        with torch.no_grad():
            expected = model(ids, attention_mask=mask.long(), num_steps=full, use_cache=False).logits.log_softmax(-1)
        kept = RecurrentCache(model.config, **cache)
        for i in range(ids.shape[1] - 1):
            with torch.no_grad():  # the first token is the prompt
                out = model(ids[:, i : i + 1], cache=kept, num_steps=full, exits=exits if i else None)
            counts = learned[:, i] & (i > 0)
            ours, theirs = out.logits[counts, -1].log_softmax(-1), expected[counts, i]
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            divergence += float((theirs.exp() * (theirs - ours)).sum())
            steps += int(out.exit_steps[counts.cpu()].sum())
            count += int(counts.sum())
        held, room = held + kept.num_bytes, room + len(ids) * kept.layers[0].capacity
    found = {"agreement": same / count, "divergence": divergence / count, "steps": steps / count}
    return found | {"bytes": held / room}


# ---------------------------------------------------------------------------------------------------------------- time


def measure(
    model: PreTrainedModel,
    texts: Sequence[Sequence[int]],
    full: int,
    threshold: float,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    """Seconds of one run at full depth and with exits, and the ideal: what its steps and looks cost by themselves.

    Every run is a call of `generate` that is made to write a text behind its first tokens: what a small model says by
    itself after the end of a text is like nothing that it has seen, and takes other numbers of steps. The cache holds
    the first tokens already, so that what is timed are passes of one token.

    Cost of a step at n rows: the difference of two fixed depths, per step. Cost of a look at n rows: full depth with
    looks that never pass, less full depth without. Both contain what goes on around a step.
    """
    batch, length = len(texts), min(PROMPT + args.new_tokens, *map(len, texts))
    tokens = length - PROMPT
    ids = torch.stack([torch.as_tensor(text[:length]) for text in texts]).to(device)
    few = max(1, full // 3)
    exits = {"exit_criterion": args.criterion, "exit_threshold": threshold}
    never = {"exit_criterion": args.criterion, "exit_threshold": NEVER.get(args.criterion, 1e-30)}
    runs = {"exits": (batch, full, exits)}
    for n in range(1, batch + 1):
        runs |= {f"full {n}": (n, full, {}), f"few {n}": (n, few, {}), f"looks {n}": (n, full, never)}
    seconds, steps = time_runs(model, ids, runs, args, device)

    looks = max(1, full - 1)  # after the last step there is none
    step = {n: (seconds[f"full {n}"] - seconds[f"few {n}"]) / tokens / (full - few) for n in range(1, batch + 1)}
    look = {n: (seconds[f"looks {n}"] - seconds[f"full {n}"]) / (tokens - 1) / looks for n in range(1, batch + 1)}
    ideal = seconds[f"full {batch}"] - (tokens - 1) * full * step[batch]  # the first token takes all steps
    for token in steps.T:
        rows = [int((token > i).sum()) for i in range(full)]
        ideal += sum(step[n] for n in rows if n) + sum(look[n] for n in rows[:looks] if n)
    return {
        "full": seconds[f"full {batch}"],
        "exits": seconds["exits"],
        "ideal": ideal,
        "new_tokens": tokens,
        "mean_steps": steps.float().mean().item(),
        "ms_per_step": {n: 1000 * value for n, value in step.items()},
        "ms_per_look": {n: 1000 * value for n, value in look.items()},
    }


def time_runs(
    model: PreTrainedModel,
    ids: torch.LongTensor,
    runs: dict[str, tuple[int, int, dict[str, Any]]],
    args: argparse.Namespace,
    device: torch.device,
) -> tuple[dict[str, float], torch.LongTensor]:
    """Each run, of so many rows, at most so many steps, and with these exits, behind a cache that holds the prompt.

    They take turns, so that what slows the machine down for a while slows all of them down.

    Returns:
        The median of the seconds of each; and the steps of run "exits", (rows, new tokens but the first).
    """
    caches = {}
    for rows, num_steps, _ in runs.values():
        if (rows, num_steps) not in caches:
            caches[rows, num_steps] = RecurrentCache(model.config)
            with torch.no_grad():
                model(ids[:rows, : PROMPT - 1], num_steps=num_steps, cache=caches[rows, num_steps])
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for index in range(-args.warmup, args.rounds):
        for name, (rows, num_steps, exits) in runs.items():
            run = partial(write, model, ids[:rows], num_steps, exits, copy.deepcopy(caches[rows, num_steps]))
            elapsed = timing.seconds_of(run, device)
            if index >= 0:
                seconds[name].append(elapsed)
    rows, num_steps, exits = runs["exits"]
    out = write(model, ids[:rows], num_steps, exits, copy.deepcopy(caches[rows, num_steps]))
    return {name: statistics.median(values) for name, values in seconds.items()}, out.exit_steps[:, 1:]


def write(
    model: PreTrainedModel, ids: torch.Tensor, num_steps: int, exits: dict[str, Any], cache: RecurrentCache
) -> Any:
    """What `generate` returns for the first tokens of these texts, (batch, tokens), made to write the others."""
    prompt = ids[:, :PROMPT]
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=ids.shape[1] - PROMPT,
        num_steps=num_steps,
        cache=cache,
        return_dict_in_generate=True,
        logits_processor=[Dictation(ids)],
        **exits,
    )


class Dictation(LogitsProcessor):
    """Makes `generate` write given texts, (batch, tokens)."""

    def __init__(self, ids: torch.LongTensor):
        self.ids = ids

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        """(batch, vocab) -> the same, with the next token of each text above all others."""
        return torch.full_like(scores, -math.inf).scatter_(1, self.ids[:, input_ids.shape[1], None], 0.0)


# -------------------------------------------------------------------------------------------------------------- report


def report_agreement(what: str, full: int, found: dict[Any, dict[str, float]]) -> str:
    """A table with a line for each setting."""
    rows = [
        [
            f"{name:g}" if isinstance(name, float) else name,
            f"{each['agreement']:.2%}",
            f"{each['divergence']:.2e}",
            f"{each['steps']:.2f}",
            f"{each['steps'] / full:.0%}",
            f"{each['bytes']:.0f}",
        ]
        for name, each in found.items()
    ]
    header = [what, "likeliest token as in the pass", "KL, nats", "mean steps", "of full depth", "bytes of a token"]
    return timing.markdown_table(header, rows)


def report_time(
    args: argparse.Namespace, full: int, threshold: float, results: dict[int, dict], device: torch.device
) -> str:
    """The setting, a table of times, and one of what a step and a look cost."""
    header = [
        "batch x tokens",
        "full depth, s",
        "exits, s",
        "ideal, s",
        "mean steps",
        "speed-up",
        "of the ideal saving",
        "ideal / realised",
    ]
    rows = []
    for batch, each in results.items():
        saving = (each["full"] - each["exits"]) / (each["full"] - each["ideal"])
        rows.append(
            [
                f"{batch} x {each['new_tokens']}",
                *(f"{each[name]:.3f}" for name in ("full", "exits", "ideal")),
                f"{each['mean_steps']:.2f}",
                f"{each['full'] / each['exits']:.2f}",
                f"{saving:.0%}",
                f"{each['ideal'] / each['exits']:.0%}",
            ]
        )
    costs = ["rows", "ms per step", "ms per look"]
    last = results[max(results)]
    cost_rows = [
        [str(n), f"{last['ms_per_step'][n]:.3f}", f"{last['ms_per_look'][n]:.3f}"] for n in last["ms_per_step"]
    ]
    return (
        f"\n{args.criterion}, threshold {threshold:g}, {full} steps at most; {device}.\n\n"
        f"{timing.markdown_table(header, rows)}\n{timing.markdown_table(costs, cost_rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
