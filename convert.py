"""Makes a checkpoint out of others (`python convert.py merge runs/finetune_lora --output runs/merged`), of several the
mean of their weights (`python convert.py average runs/lm/checkpoint-800 runs/lm/checkpoint-850 runs/mean`), out of one
that older code has written (`python convert.py refresh runs/old`), out of one a folder that engines such as vLLM run
at one depth (`python convert.py serve runs/lm served/lm --num-steps 8`), out of one of another project
(`python convert.py huginn huginn-0125 runs/huginn`, likewise `ouro`), or a recurrent model out of the layers of a plain
one (`python convert.py retrofit Qwen3-0.6B runs/qwen3 --prelude 0:4 --core 4:24 --coda 24:28`). `python convert.py onnx
runs/lm served/onnx --num-steps 8` writes a text model for ONNX Runtime.
"""

from inference.logs import LOG_LEVELS, set_up_logging  # first: it sets up what libraries say while they are imported

# isort: split
import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from callbacks import model_card, sources_of
from configs import load_run_config
from configs.runs import find_run_config
from inference import arguments
from inference.averages import average
from inference.checkpoints import find_checkpoint, is_adapter
from inference.converters import CONVERTERS, foreign, onnx, retrofit
from inference.engine_folder import write_engine_folder
from inference.loading import load_model
from inference.output import whole_file, whole_folder, write_result
from inference.refresh import refresh, skeleton
from model.step_lora import CONFIG as STEP_LORA

Processor = PreTrainedTokenizerBase | ProcessorMixin


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    Raises:
        SystemExit: the input is bad; the code is 2, after one line on standard error, and nothing is written.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    set_up_logging(args.log_level)
    with parser.one_line_errors():
        if args.command == "merge":
            merge(args.adapter, args.base, args.output)
        elif args.command == "average":
            check_empty(args.output, "output")
            save(*average(args.checkpoints), args.checkpoints[0], args.output)
        elif args.command == "serve":
            config = write_engine_folder(args.checkpoint, args.output, args.num_steps)
            write_result(
                f"written to {args.output}: {config.num_hidden_layers} layers executed at {config.num_steps} steps\n"
            )
        elif args.command == "onnx":
            check_empty(args.output, "output")
            difference = onnx.write_onnx(args.checkpoint, args.output, args.num_steps)
            write_result(f"written to {args.output}: logits are torch's, up to {difference:.1e}\n")
        elif args.command in (*CONVERTERS, "retrofit"):
            check_empty(args.output, "output")
            source = foreign.ForeignCheckpoint(args.source)
            if args.command == "retrofit":
                parts = {"prelude": args.prelude, "core": args.core, "coda": args.coda}
                model = retrofit.retrofit(source, parts, args.mean_steps)
            else:
                model = CONVERTERS[args.command](source)
            save(model, source.tokenizer(model.config), source.folder, args.output)
        else:
            written, folder = refresh(args.folder, args.output), args.output or args.folder
            if not (folder / "README.md").is_file():
                with whole_file(folder / "README.md") as beside:
                    model_card(folder, skeleton(folder)).save(beside)
            write_result(f"{len(written)} files written to {folder}\n")
    return 0


def build_parser() -> arguments.OneLineParser:
    parser = arguments.OneLineParser(prog="convert.py", description="Make a checkpoint out of others.")
    commands = parser.add_subparsers(dest="command", required=True)
    again = {"conflict_handler": "resolve"}  # for --log-level
    merging = commands.add_parser("merge", help="add the LoRA of an adapter to its base", **again)
    merging.add_argument("adapter", type=Path, help="folder of a run of finetune.py, or of a checkpoint in it")
    merging.add_argument("--base", type=Path, help="folder of its base; default: where it was in training")
    merging.add_argument("--output", type=Path, required=True, help="folder for the model; empty or new")
    refreshing = commands.add_parser("refresh", help="write today's code beside a checkpoint's weights", **again)
    refreshing.add_argument("folder", type=Path, help="folder of the checkpoint")
    refreshing.add_argument("output", type=Path, nargs="?", help="folder for it, empty or new; default: in place")
    averaging = commands.add_parser("average", help="write the mean of the weights of several checkpoints", **again)
    averaging.add_argument("checkpoints", type=Path, nargs="+", help="folders of checkpoints of one model, at least 2")
    averaging.add_argument("output", type=Path, help="folder for the mean; empty or new")
    serving = commands.add_parser("serve", help="write a folder that engines run at one depth", **again)
    serving.add_argument("checkpoint", type=Path, help="folder of a checkpoint, or of a run, of a model with a core")
    serving.add_argument("output", type=Path, help="folder for engines; empty or new")
    serving.add_argument(
        "--num-steps", type=arguments.core_steps, required=True, help="core steps of every token, 1 or more"
    )
    exporting = commands.add_parser("onnx", help="write a text model for ONNX Runtime, at one depth", **again)
    exporting.add_argument("checkpoint", type=Path, help="folder of a checkpoint, or of a run")
    exporting.add_argument("output", type=Path, help="folder for model.onnx and the tokenizer; empty or new")
    exporting.add_argument(
        "--num-steps", type=arguments.core_steps, help="core steps of every token, 1 or more; default: the model's"
    )
    of_others = []
    for name, model in (("huginn", "Huginn (huginn_raven)"), ("ouro", "Ouro"), ("retrofit", "a plain language model")):
        verb = "make a recurrent model of the layers of" if name == "retrofit" else "make ours of"
        of_others.append(commands.add_parser(name, help=f"{verb} a checkpoint of {model}", **again))
        of_others[-1].add_argument("source", help="folder of the checkpoint, or its name on the hub")
        of_others[-1].add_argument("output", type=Path, help="folder for the model; empty or new")
    for part, executed in (("prelude", "before the core"), ("core", "in every step"), ("coda", "after the core")):
        of_others[-1].add_argument(
            f"--{part}",
            type=arguments.layer_range,
            required=True,
            metavar="BEGIN:END",
            help=f"layers that are executed {executed}, counted from 0, END not among them",
        )
    of_others[-1].add_argument(
        "--mean-steps", type=arguments.core_steps, default=4, help="core steps on average in training; default: 4"
    )
    for command in (merging, refreshing, averaging, serving, exporting, *of_others):
        # It may stand before the command as well, and is then not to be reset to its default.
        command.add_argument(
            "--log-level", choices=LOG_LEVELS, default=argparse.SUPPRESS, help="least severe message to show"
        )
    return parser


def merge(adapter: Path, base: Path | None, output: Path) -> None:
    """Write the model with an adapter in its weights: a checkpoint like any other.

    Args:
        base: folder of the adapter's model; None: where it was in training.

    Raises:
        ValueError: the folder holds no LoRA, or one of another base, or of a base that is saved in 8 or 4 bits; or the
            output folder holds something.
    """
    folder = find_checkpoint(adapter)
    if not is_adapter(folder):
        raise ValueError(f"{folder} holds a whole model, and no adapter: there is nothing to merge.")
    if (folder / STEP_LORA).is_file():
        raise ValueError(
            f"{folder} has deltas for single steps ({STEP_LORA}), which cannot be merged: the core has one set of "
            "weights for all steps. Load it as it is."
        )
    check_empty(output, "--output")
    model, processor = load_model(folder, base=base)
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(
            f"The base of {folder} is saved in 8 or 4 bits, in which most of what was learned would be lost: load the "
            "adapter as it is."
        )
    save(model, processor, folder, output)


def check_empty(output: Path, name: str) -> None:
    """Raises ValueError for a folder that holds something, under the name of its option."""
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise ValueError(f"{name}: {output} is not empty; name another folder.")


def save(model: PreTrainedModel, processor: Processor | None, folder: Path, output: Path) -> None:
    """Write a model that was made of the checkpoint in a folder, with a card that says where its data came from, and
    its processor, if it has one.
    """
    path = find_run_config(folder)
    run = path and load_run_config(path)
    with whole_folder(output) as made:
        model.save_pretrained(made)
        if processor is not None:
            processor.save_pretrained(made)
        model_card(output, model, run and run.resolved, run and sources_of(run.data)).save(made / "README.md")
    write_result(f"written to {output}\n")


if __name__ == "__main__":
    sys.exit(main())
