"""Wavefront decoding against plain decoding: the same tokens, in which time. Of a checkpoint with prompts from its
validation texts, or of a random model, whose drafts are made to hold as often as is asked for.

python -m benchmarks.wavefront runs/recurrent_lm
python -m benchmarks.wavefront runs/recurrent_lm --check 500          # and no times: differences, and the smallest gaps
python -m benchmarks.wavefront runs/recurrent_vlm --check 500         # the same of answers to questions with media
python -m benchmarks.wavefront runs/any_to_any --tolerances 0 0.1 0.3  # latents of images as drafts
python -m benchmarks.wavefront --held 0.5 0.8 0.95                    # random weights
python -m benchmarks.wavefront runs/recurrent_lm --beside ../before runs/recurrent_lm   # and plain, by other code
"""

from __future__ import annotations

import inference.logs  # noqa: F401  first: it sets up what libraries say while they are imported

# isort: split
import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import PreTrainedModel, ProcessorMixin

from benchmarks import timing
from configs import read_run_config
from dataset_loading import build_examples
from evaluation.__main__ import split_by_answer, validation_texts
from evaluation.answers import AnswerGenerator, to_model
from inference.devices import choose_device, choose_threads
from inference.loading import find_checkpoint, load_model
from model import length_before
from model.generation_wavefront import WavefrontRun
from model.scheduler import Counts, Item, Scheduler

PLAIN, ONE = "plain", "waves of one"
NEVER = 10**6
"""Draft steps of which no draft comes."""
MODES = {
    "greedy": {},
    "sampled": {"do_sample": True, "temperature": 0.8, "top_k": 0, "sampling_seed": 0},
    "exits": {"exit_criterion": "kl_divergence", "exit_threshold": 0.01},
}
WORKER = """
import json, sys, time
import torch
from model import MegaTransformerForCausalLM
torch.set_num_threads(int(sys.argv[2]))
model = MegaTransformerForCausalLM.from_pretrained(sys.argv[1]).eval()
model.generation_config.eos_token_id = None
for line in sys.stdin:
    ids, mask, options = json.loads(line)
    start = time.perf_counter()
    model.generate(torch.tensor(ids), attention_mask=torch.tensor(mask), **options)
    sys.stdout.write(f"{time.perf_counter() - start}\\n")
    sys.stdout.flush()
"""

GOLDEN = (5**0.5 - 1) / 2
"""Its multiples, less their whole parts, lie evenly between 0 and 1."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write tables to standard output.

    Raises:
        SystemExit: with code 2 after one line on standard error, for bad input.
    """
    parser = build_parser()
    args = timing.parsed(parser, argv)
    try:
        device = choose_device(args.device)
        if args.check:
            model, batches = load_batches(args, device)
        elif args.tolerances:
            model, batches = load_drawings(args, device)
        else:
            model, prompts = (load if args.checkpoint else build)(args, device)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    choose_threads(model, args.threads)
    if args.check:
        sys.stdout.write(report_check({name: check(model, batches, args, mode) for name, mode in MODES.items()}))
        return 0
    if args.tolerances:
        sys.stdout.write(report_drawings([measure_drawings(model, batch, args) for batch in batches]))
        return 0
    sys.stdout.write(f"{args.new_tokens} new tokens; {timing.describe_setting(args, device)}.\n\n")
    for held in args.held or [None]:
        found = {batch: measure(model, prompts[:batch], held, args, device) for batch in args.batch_sizes}
        sys.stdout.write(report(found, args.new_tokens, held))
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = timing.build_parser("wavefront", "Wavefront decoding against plain decoding.")
    parser.add_argument("checkpoint", nargs="?", help="folder of a checkpoint, or of a run; else weights are random")
    parser.add_argument("--check", type=timing.count, help="prompts whose texts are compared; nothing is timed")
    parser.add_argument("--held", type=float, nargs="+", help="shares of drafts that are made to hold")
    what = "relative errors of drafts of latents that are kept; images are drawn in place of texts"
    parser.add_argument("--tolerances", type=float, nargs="+", help=what)
    parser.add_argument("--batch-sizes", type=timing.count, nargs="+", default=[1, 4, 8], help="rows")
    parser.add_argument("--draft-steps", nargs="+", default=["1", "2", "4", "auto"], help="steps before a draft")
    parser.add_argument("--new-tokens", type=timing.count, default=48, help="tokens written behind a prompt")
    parser.add_argument("--beside", nargs=2, metavar=("CHECKOUT", "CHECKPOINT"), help="other code and what it reads")
    return parser


def load(args: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, list[torch.LongTensor]]:
    """The model of a checkpoint, and the beginnings of its validation texts, of different lengths."""
    checkpoint = find_checkpoint(args.checkpoint)
    model, processor = load_model(checkpoint, device)
    texts = validation_texts(read_run_config(checkpoint, ["--data.packing", "false"]), processor, None)
    rows = [row["input_ids"] for source in texts.values() for row in source if not row.get("media")]
    draw = torch.Generator().manual_seed(0)
    wanted = max(args.check or 0, *args.batch_sizes)
    if args.check:
        chosen = [rows[index] for index in torch.randperm(len(rows), generator=draw)[:wanted].tolist()]
    else:  # behind the end of a text a small model says what is like nothing that it has seen
        chosen = sorted(rows, key=len, reverse=True)[:wanted]
        model.generation_config.eos_token_id = None
    lengths = [int(torch.randint(2, max(3, len(row) // 4), (), generator=draw)) for row in chosen]
    return model.eval(), [torch.as_tensor(row[:length]) for row, length in zip(chosen, lengths, strict=True)]


def build(args: argparse.Namespace, device: torch.device) -> tuple[PreTrainedModel, list[torch.LongTensor]]:
    """A random model, and random prompts."""
    model = timing.build_ours(args, "sandwich").to(device).eval()
    model.generation_config.eos_token_id = None
    draw = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 32, (max(args.check or 0, *args.batch_sizes),), generator=draw).tolist()
    return model, [torch.randint(3, args.vocab_size, (length,), generator=draw) for length in lengths]


def padded(prompts: Sequence[torch.LongTensor]) -> dict[str, torch.LongTensor]:
    """Prompts as a batch, with padding on the left."""
    longest = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (longest - len(prompt), 0)) for prompt in prompts])
    masks = [torch.arange(longest) >= longest - len(prompt) for prompt in prompts]
    return {"input_ids": ids, "attention_mask": torch.stack(masks).long()}


# ------------------------------------------------------------------------------------------------------------ equality


def load_batches(
    args: argparse.Namespace, device: torch.device
) -> tuple[PreTrainedModel, list[dict[str, torch.Tensor]]]:
    """A model and ragged batches of 1 to 8 prompts: of one that reads media, the questions of its validation sources
    that are answered by text.
    """
    if args.checkpoint is None:
        model, prompts = build(args, device)
        return model, ragged(prompts, padded)
    checkpoint = find_checkpoint(args.checkpoint)
    model, processor = load_model(checkpoint, device)
    if not isinstance(processor, ProcessorMixin):
        model, prompts = load(args, device)
        return model, ragged(prompts, padded)
    run = read_run_config(checkpoint, [])
    given = run.data.validation or run.data.train
    sources = [source for source in given if source.is_media and source.has_answers]
    sources = [replace(it, num_rows=args.check) if it.kind == "generated" else it for it in sources]
    found, _ = split_by_answer({it.label: build_examples(it, run.data, processor, args.check, 0) for it in sources})
    share = -(-args.check // len(found))
    rows = [rows[number] for number in range(share) for rows in found.values() if number < len(rows)]
    prompts_of = AnswerGenerator(processor).prompts
    return model.eval(), ragged(rows[: args.check], lambda rows: to_model(prompts_of(rows), model))


def ragged(rows: Sequence[Any], batch_of: Callable[[Sequence[Any]], dict]) -> list[dict[str, torch.Tensor]]:
    """Batches of 1, 2, ... 8, 1, 2, ... rows."""
    batches, left = [], list(rows)
    while left:
        count = 1 + len(batches) % 8
        batches.append(batch_of(left[:count]))
        left = left[count:]
    return batches


def check(
    model: PreTrainedModel, batches: Sequence[dict[str, torch.Tensor]], args: argparse.Namespace, mode: dict[str, Any]
) -> dict[str, Any]:
    """Texts of batches, both ways: how many differ, the gap between the two likeliest tokens where the first difference
    is, and the smallest of all gaps.
    """
    options = {"max_new_tokens": args.new_tokens, "return_dict_in_generate": True, "do_sample": False, **mode}
    different, smallest, steps = [], float("inf"), 0
    for count, batch in enumerate(batches):
        rows, draft_steps = len(batch["input_ids"]), args.draft_steps[count % len(args.draft_steps)]
        draft_steps = draft_steps if draft_steps == "auto" else int(draft_steps)
        plain = model.generate(**batch, **options, output_logits=True)
        wave = model.generate(**batch, **options, decoding="wavefront", draft_steps=draft_steps)
        start = length_before(model, batch["input_ids"])
        best = torch.stack(plain.logits, dim=1).topk(2).values  # (rows, new tokens, 2)
        gaps = best[..., 0] - best[..., 1]
        is_text = torch.zeros_like(gaps, dtype=torch.bool)
        is_text[:, : plain.exit_steps.shape[1]] = plain.exit_steps.to(gaps.device) > 0
        smallest = min(smallest, gaps[is_text].min().item())
        for row in range(rows):
            ours, theirs = wave.sequences[row, start:], plain.sequences[row, start:]
            if ours.tolist() != theirs.tolist():
                common = min(len(ours), len(theirs))
                first = int((ours[:common] != theirs[:common]).int().argmax())
                different.append(gaps[row, first].item())
        same = plain.exit_steps.shape == wave.exit_steps.shape and torch.equal(plain.exit_steps, wave.exit_steps)
        steps += rows if not same else 0
    prompts = sum(len(batch["input_ids"]) for batch in batches)
    return {"prompts": prompts, "different": different, "smallest": smallest, "batches with other steps": steps}


# -------------------------------------------------------------------------------------------------------------- images


def load_drawings(
    args: argparse.Namespace, device: torch.device
) -> tuple[PreTrainedModel, list[dict[str, torch.Tensor]]]:
    """A model and a batch of each size of prompts whose answers are images. ValueError: it has none."""
    checkpoint = find_checkpoint(args.checkpoint or "")
    model, processor = load_model(checkpoint, device)
    run, most = read_run_config(checkpoint, []), max(args.batch_sizes)
    sources = [source for source in run.data.validation or run.data.train if source.is_media and source.has_answers]
    _, found = split_by_answer({it.label: build_examples(it, run.data, processor, most, 0) for it in sources})
    rows = [row for rows in found.values() for row in rows if row["modality"] == "written_image"]
    if not rows:
        raise ValueError(f"{checkpoint} has no validation source whose answers are images; take another run")
    prompts_of = AnswerGenerator(processor).prompts
    return model.eval(), [to_model(prompts_of(rows[:count]), model) for count in args.batch_sizes]


def measure_drawings(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], args: argparse.Namespace
) -> list[dict[str, Any]]:
    """Plain decoding, and a wavefront with each tolerance and number of draft steps: speed, drafts that were kept, and
    how far latents are from those of plain decoding, as a share of the length of these.
    """
    count, given = len(batch["input_ids"]), {"generation_mode": "image", "guidance_scale": 1}
    given |= {"flow_seeds": list(range(count)), **batch}
    ways: dict[tuple, dict[str, Any]] = {(PLAIN, "-"): {}}
    for steps in (step for step in args.draft_steps if step != "auto"):
        for tolerance in args.tolerances:
            options = {"decoding": "wavefront", "draft_steps": int(steps), "latent_tolerance": tolerance}
            ways[f"d = {steps}", f"{tolerance:g}"] = options
    counts: dict[tuple, Counts] = {}
    latents: dict[tuple, torch.Tensor] = {}

    def draw(way: tuple) -> None:
        make = Scheduler.__init__

        def noted(scheduler: Scheduler, *made: Any) -> None:
            make(scheduler, *made)
            counts[way] = scheduler.counts

        with mock.patch.object(Scheduler, "__init__", noted):
            latents[way] = torch.stack(model.generate(**given, **ways[way]).latents["image"])

    runs = {way: partial(draw, way) for way in ways}
    seconds = timing.interleave(runs, args.rounds, args.warmup, model.device)
    ratios, plain = timing.speed_ratios(seconds, (PLAIN, "-")), latents[PLAIN, "-"]
    rows = []
    for way in ways:
        error = (latents[way] - plain).norm(dim=-1) / plain.norm(dim=-1)
        kept = f"{counts[way].kept_drafts / max(1, counts[way].drafts):.2f}" if way in counts else "-"
        rows.append([*way, str(count), timing.describe_ratio(ratios[way]), kept, f"{error.mean():.1e}"])
    return rows


def report_drawings(found: Sequence[Sequence[Sequence[str]]]) -> str:
    header = ["decoding", "tolerance", "rows", "speed / plain", "drafts that are kept", "mean error of latents"]
    return timing.markdown_table(header, [row for rows in found for row in rows])


def report_check(found: dict[str, dict[str, Any]]) -> str:
    rows = [
        [
            name,
            str(each["prompts"]),
            str(len(each["different"])),
            ", ".join(f"{gap:.1e}" for gap in each["different"]) or "-",
            str(each["batches with other steps"]),
            f"{each['smallest']:.1e}",
        ]
        for name, each in found.items()
    ]
    header = ["decoding", "prompts", "texts that differ", "gaps there", "rows of batches with other steps"]
    return timing.markdown_table([*header, "smallest gap of all"], rows)


# ---------------------------------------------------------------------------------------------------------------- time


def measure(
    model: PreTrainedModel,
    prompts: Sequence[torch.LongTensor],
    held: float | None,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """The seconds of every round, and the counts of the scheduler, by the name of a way."""
    batch = padded(prompts)
    options = {"max_new_tokens": args.new_tokens, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(**batch, **options)
    ways = {ONE: NEVER} | {f"d = {steps}": steps if steps == "auto" else int(steps) for steps in args.draft_steps}
    runs: dict[str, Callable[[], Any]] = {PLAIN: partial(model.generate, **batch, **options)}
    counts: dict[str, Counts] = {}
    for name, steps in ways.items():
        runs[name] = partial(decode, model, batch, {**options, "draft_steps": steps}, held, expected, counts, name)
    clock = None if args.beside is None else Beside(*args.beside, batch, options)
    seconds: dict[str, list[float]] = {name: [] for name in runs} | ({} if clock is None else {"beside": []})
    for index in range(-args.warmup, args.rounds):
        found = {name: timing.seconds_of(run, device) for name, run in runs.items()}
        found |= {} if clock is None else {"beside": clock.seconds()}
        for name, value in found.items() if index >= 0 else ():
            seconds[name].append(value)
    return {name: {"seconds": seconds[name], "counts": counts.get(name)} for name in seconds}


def decode(
    model: PreTrainedModel,
    batch: dict[str, torch.Tensor],
    options: dict[str, Any],
    held: float | None,
    expected: torch.LongTensor,
    counts: dict[str, Counts],
    name: str,
) -> None:
    """One wavefront, whose tokens must be those that are expected."""
    kept = None

    def choose(run: WavefrontRun, items: Sequence[Item], logits: torch.Tensor) -> list[int]:
        """Tokens that are final are read off; of drafts so many are right."""
        chosen = []
        for item, token in zip(items, logits.argmax(-1).tolist(), strict=True):
            place = item.place + 1
            if not item.is_done and place < expected.shape[1]:
                is_right = GOLDEN * (place + 7 * item.row.index) % 1 < held  # evenly spread
                token = int(expected[item.row.index, place]) if is_right else (token + 1) % logits.shape[-1]
            chosen.append(token)
        return chosen

    make = Scheduler.__init__

    def note(scheduler: Scheduler, *arguments: Any) -> None:
        nonlocal kept
        make(scheduler, *arguments)
        kept = scheduler.counts

    forced = WavefrontRun.choose if held is None else choose
    with mock.patch.object(Scheduler, "__init__", note), mock.patch.object(WavefrontRun, "choose", forced):
        found = model.generate(**batch, **options, decoding="wavefront")
    assert torch.equal(found, expected), "the tokens are not those of plain decoding"
    counts[name] = kept


class Beside:
    """Plain decoding by the code of another checkout, in its own environment if it has one, in a process that stays."""

    def __init__(self, checkout: str, checkpoint: str, batch: dict[str, torch.Tensor], options: dict[str, Any]):
        own = Path(checkout).resolve() / ".venv/bin/python"
        python = str(own) if own.exists() else sys.executable
        command = [python, "-c", WORKER, str(Path(checkpoint).resolve()), str(torch.get_num_threads())]
        self.process = subprocess.Popen(
            command, cwd=checkout, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        self.line = json.dumps([batch["input_ids"].tolist(), batch["attention_mask"].tolist(), options]) + "\n"

    def seconds(self) -> float:
        """Those of one run."""
        self.process.stdin.write(self.line)
        self.process.stdin.flush()
        return float(self.process.stdout.readline())


def report(found: dict[int, dict[str, dict[str, Any]]], new_tokens: int, held: float | None) -> str:
    header = ["decoding", "rows", "tokens per second", "speed / plain", "/ waves of one", "/ beside"]
    header += ["ticks a token", "items a tick", "drafts that hold"]
    rows = []
    for batch, ways in found.items():
        seconds = {name: each["seconds"] for name, each in ways.items()}
        ratios = [timing.speed_ratios(seconds, name) if name in seconds else None for name in (PLAIN, ONE, "beside")]
        for name, each in ways.items():
            counts: Counts | None = each["counts"]
            of_waves = ["-"] * 3
            if counts is not None:
                share = f"{counts.kept_drafts / counts.drafts:.2f}" if counts.drafts else "-"
                of_waves = [f"{counts.ticks / new_tokens:.2f}", f"{counts.items / counts.ticks:.2f}", share]
            speed = batch * new_tokens / timing.quartiles(seconds[name])[1]
            compared = ["-" if of is None else timing.describe_ratio(of[name]) for of in ratios]
            rows.append([name, str(batch), f"{speed:.1f}", *compared, *of_waves])
    title = "" if held is None else f"Drafts made to hold in {held:.0%}.\n\n"
    return title + timing.markdown_table(header, rows) + "\n"


if __name__ == "__main__":
    sys.exit(main())
