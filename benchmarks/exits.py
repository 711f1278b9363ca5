"""What exits save, on a trained checkpoint: agreement with full depth, steps, and time against the ideal.

python -m benchmarks.exits runs/recurrent_lm
python -m benchmarks.exits runs/recurrent_lm --criterion latent_difference --thresholds 0.01 0.03 0.1
"""

from __future__ import annotations

from inference.logs import set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import datasets
import torch
from transformers import PreTrainedModel

from benchmarks import timing
from dataset_loading import Collator
from evaluate import read_run_config, validation_texts
from inference import arguments
from inference.devices import choose_device
from inference.loading import find_checkpoint, load_model
from model import RecurrentCache
from model.exit_criteria import EXIT_CRITERIA

THRESHOLDS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
POLICIES = {
    "full": {"policy": "full"},
    "ring of 2": {"policy": "ring", "num_kept_steps": 2},
    "ring of 4": {"policy": "ring", "num_kept_steps": 4},
    "last": {"policy": "last"},
}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write two tables to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    datasets.disable_progress_bars()
    try:
        device = choose_device(args.device)
        checkpoint = find_checkpoint(args.checkpoint)
        model, tokenizer = load_model(checkpoint, device)
        texts = validation_texts(read_run_config(checkpoint, ["--data.packing", "false"]), tokenizer, args.limit)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.threads:
        torch.set_num_threads(args.threads)
    model.eval()
    full = args.num_steps or model.config.num_steps or model.config.recurrence.mean_steps
    rows = [row for source in texts.values() for row in source]
    batches = [Collator(tokenizer)(rows[i : i + args.rows]) for i in range(0, len(rows), args.rows)]
    sys.stdout.write(f"Read token by token, texts given, against one pass of {full} steps.\n\n")
    policies = {name: agreement(model, batches, full, {}, options) for name, options in POLICIES.items()}
    sys.stdout.write(report_agreement("cache policy", full, policies) + "\n")
    by_threshold = {
        threshold: agreement(model, batches, full, {"exit_criterion": args.criterion, "exit_threshold": threshold}, {})
        for threshold in args.thresholds
    }
    sys.stdout.write(report_agreement(args.criterion, full, by_threshold))
    good = [threshold for threshold, each in by_threshold.items() if each["agreement"] >= args.agreement]
    chosen = min(good, key=lambda threshold: by_threshold[threshold]["steps"], default=None)
    if chosen is None:
        sys.stdout.write(f"\nNo threshold agrees in {args.agreement:.0%} of the tokens; nothing is timed.\n")
        return 0
    model.generation_config.eos_token_id = None  # equally many tokens in all runs
    results = {batch: measure(model, batches[0], batch, full, chosen, args, device) for batch in (1, 8)}
    timing.save(args.output, args, policies=policies, thresholds=by_threshold, timing=results)
    sys.stdout.write(report_time(args, full, chosen, results, device))
    return 0


def build_parser() -> arguments.OneLineParser:
    parser = arguments.OneLineParser(prog="benchmarks.exits", description="What exits save on a trained checkpoint.")
    parser.add_argument("checkpoint", help="folder of a checkpoint, or of a run")
    parser.add_argument("--criterion", choices=list(EXIT_CRITERIA), default="kl_divergence", help="of the exits")
    parser.add_argument("--thresholds", type=float, nargs="+", default=list(THRESHOLDS), help="tried one by one")
    parser.add_argument("--agreement", type=float, default=0.99, help="share of tokens that the chosen threshold keeps")
    parser.add_argument("--num-steps", type=timing.count, help="full depth; default: the checkpoint's mean")
    parser.add_argument("--limit", type=timing.count, default=64, help="validation texts of each source")
    parser.add_argument("--rows", type=timing.count, default=64, help="texts decoded together for the agreement")
    parser.add_argument("--new-tokens", type=timing.count, default=96, help="tokens written in a timed round")
    parser.add_argument("--rounds", type=timing.count, default=5, help="timed rounds; in each, every run has its turn")
    parser.add_argument("--warmup", type=timing.count, default=1, help="rounds before them that do not count")
    parser.add_argument("--threads", type=timing.count, help="threads of torch on the CPU; default: torch's")
    parser.add_argument("--device", help="for example cpu, cuda, cuda:1; default: a GPU if there is one")
    parser.add_argument("--output", type=timing.output_file, help="JSON file for the figures")
    return parser


# ----------------------------------------------------------------------------------------------------------- agreement


def agreement(
    model: PreTrainedModel, batches: Sequence[dict], full: int, exits: dict[str, Any], cache: dict[str, Any]
) -> dict[str, float]:
    """Teacher-forced: every text is read token by token, each exiting where it may, over the cache that the tokens
    before it have left.

    Args:
        exits: Arguments of `forward`.
        cache: Arguments of `RecurrentCache`.

    Returns:
        agreement: share of the tokens whose likeliest successor is that of one pass at full depth; steps: their mean;
        divergence: KL(pass || this), the mean in nats.
    """
    same, steps, divergence, count = 0, 0, 0.0, 0
    for batch in batches:
        ids, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device).bool()
        with torch.no_grad():
            expected = model(ids, attention_mask=mask.long(), num_steps=full, use_cache=False).logits.log_softmax(-1)
        kept = RecurrentCache(model.config, **cache)
        for i in range(ids.shape[1]):
            with torch.no_grad():  # the first token is the prompt
                out = model(ids[:, i : i + 1], past_key_values=kept, num_steps=full, **(exits if i else {}))
            counts = mask[:, i] & (i > 0)
            ours, theirs = out.logits[counts, -1].log_softmax(-1), expected[counts, i]
            same += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
            divergence += float((theirs.exp() * (theirs - ours)).sum())
            steps += int(out.exit_steps[counts.cpu()].sum())
            count += int(counts.sum())
    return {"agreement": same / count, "divergence": divergence / count, "steps": steps / count}


# ---------------------------------------------------------------------------------------------------------------- time


def measure(
    model: PreTrainedModel,
    texts: dict,
    batch: int,
    full: int,
    threshold: float,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, float]:
    """Seconds of one run at full depth and with exits, and the ideal: what its steps and looks cost by themselves.

    Cost of a step at n rows: the difference of two fixed depths, per step. Cost of a look at n rows: full depth with
    looks that never pass, less full depth without. Both from whole calls of `generate`, so that they contain what goes
    on around a step.
    """
    prompt = texts["input_ids"][:batch, :8].to(device)
    few = max(1, full // 3)
    never = {"exit_criterion": args.criterion, "exit_threshold": 1e-30}
    exits = {"exit_criterion": args.criterion, "exit_threshold": threshold}
    runs = {"exits": lambda: generate(model, prompt, args.new_tokens, full, exits)}
    for n in range(1, batch + 1):
        part = prompt[:n]
        runs[f"full {n}"] = lambda part=part: generate(model, part, args.new_tokens, full, {})
        runs[f"few {n}"] = lambda part=part: generate(model, part, args.new_tokens, few, {})
        runs[f"looks {n}"] = lambda part=part: generate(model, part, args.new_tokens, full, never)
    seconds = {
        name: statistics.median(values)
        for name, values in timing.interleave(runs, args.rounds, args.warmup, device).items()
    }
    steps = runs["exits"]().exit_steps[:, 1:]  # the prompt takes all steps
    tokens = args.new_tokens
    step = {n: (seconds[f"full {n}"] - seconds[f"few {n}"]) / tokens / (full - few) for n in range(1, batch + 1)}
    look = {n: (seconds[f"looks {n}"] - seconds[f"full {n}"]) / tokens / full for n in range(1, batch + 1)}
    around = seconds[f"full {batch}"] - tokens * full * step[batch]
    ideal = around + full * step[batch]  # the prompt's pass counts as a token of full depth
    for token in steps.T:
        rows = [int((token > i).sum()) for i in range(full)]
        ideal += sum(step[n] + look[n] for n in rows if n)
    return {
        "full": seconds[f"full {batch}"],
        "exits": seconds["exits"],
        "ideal": ideal,
        "mean_steps": steps.float().mean().item(),
        "ms_per_step": {n: 1000 * value for n, value in step.items()},
        "ms_per_look": {n: 1000 * value for n, value in look.items()},
    }


def generate(model: PreTrainedModel, prompt: torch.Tensor, new_tokens: int, num_steps: int, exits: dict):
    """Greedy generation of exactly `new_tokens` tokens."""
    return model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=new_tokens,
        num_steps=num_steps,
        return_dict_in_generate=True,
        **exits,
    )


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
        ]
        for name, each in found.items()
    ]
    header = [what, "likeliest token as in the pass", "KL, nats", "mean steps", "of full depth"]
    return timing.markdown_table(header, rows)


def report_time(
    args: argparse.Namespace, full: int, threshold: float, results: dict[int, dict], device: torch.device
) -> str:
    """The setting, a table of times, and one of what a step and a look cost."""
    header = [
        "batch",
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
                str(batch),
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
        f"\n{args.new_tokens} tokens, threshold {threshold:g}, {full} steps at most; {device}.\n\n"
        f"{timing.markdown_table(header, rows)}\n{timing.markdown_table(costs, cost_rows)}"
    )


if __name__ == "__main__":
    sys.exit(main())
