"""The results of the shipped runs, to the last bit: written before the code is rearranged, and compared after it.

    export OMP_NUM_THREADS=1
    python -m benchmarks.same_results results.json                # before
    python -m benchmarks.same_results results.json --compare      # after: exit code 1 and the differences, if there are

Each YAML of configs/ that runs on a CPU is trained for 20 steps on a few rows. The losses are kept as they are, and
what is evaluated and generated as text, or as digests of files. Another processor, or another release of a library, may
give other bits: both runs belong on one machine.
"""

import argparse
import contextlib
import hashlib
import importlib
import io
import json
import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import soundfile
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from configs.renamed import REMOVED, RENAMED

ROOT = Path(__file__).parents[1]
STEPS = 20
ROWS = 48  # of each generated source
COMMANDS = {  # what is run, and the module whose `main` runs it
    "train": "pretrain",
    "tune": "finetune",
    "evaluate": "evaluation.__main__",
    "generate": "inference.generate",
}
# Each file, the command that trains it, and what it is asked to write then.
RUNS: dict[str, tuple[str, tuple[str, ...]]] = {
    "plain_lm": ("train", ("text",)),
    "recurrent_lm": ("train", ("text", "exits")),
    "speedrun": ("train", ("text",)),
    "recurrent_cups": ("train", ("text",)),
    "recurrent_lm_files": ("train", ("text",)),
    "seq2seq": ("train", ("text",)),
    "recurrent_vlm": ("train", ("text", "of_image", "of_audio")),
    "recurrent_photos": ("train", ("of_image",)),
    "recurrent_speech": ("train", ("of_audio",)),
    "recurrent_mixture": ("train", ("text", "of_image", "of_audio")),
    "any_to_any": ("train", ("text", "of_image", "of_audio", "image", "audio")),
    "any_to_any_depth": ("train", ("image", "audio")),
    "speech_digits": ("train", ("audio",)),
    "seq2seq_recognition": ("train", ("of_audio",)),
    "seq2seq_synthesis": ("train", ("audio",)),
    "image_autoencoder": ("train", ()),
    "vocoder": ("train", ()),
    "finetune_lora": ("tune", ("text",)),
    "finetune_qlora": ("tune", ("text",)),
    "finetune_dpo": ("tune", ()),
    "finetune_grpo": ("tune", ()),
    "finetune_exit_probe": ("tune", ()),
    "finetune_speedrun": ("tune", ()),
}
WRITINGS: dict[str, tuple[str, ...]] = {  # arguments of a writing; {media} is the folder of the data
    "text": ("--prompt", "12+34=", "--greedy"),
    "exits": ("--prompt", "The wind", "--exit-criterion", "kl_divergence", "--num-steps", "16", "--sample"),
    "of_image": ("--image", "{media}/photos/train/0.png", "--greedy"),
    "of_audio": ("--audio", "{media}/recordings/train/0.wav", "--greedy"),
    "image": ("--mode", "image", "--prompt", "a large green square", "--out", "{out}/written.png"),
    "audio": ("--mode", "audio", "--prompt", "C4 E4", "--out", "{out}/written.wav"),
}
TIMES = ("seconds", "milliseconds", "runtime", "per_second", "throughput", "tokens_per", "time", "memory", "MiB")
NEWER = ("media_columns", "cut_long_audio")
"""Options that the code did not have which wrote the results; an evaluation repeats all of them."""
OLD_NAMES = {new: old.split(".")[-1] for old, new in RENAMED.items()}
OLD_NAMES |= {"generated": "written", "classified": "judged", "round_trip": "read_back", "modality": "medium"}
OLD_NAMES |= {"classifiers": "judges"}
"""The names that options and results had then."""


def main(argv: list[str] | None = None) -> int:
    """Run, and write or compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.same_results", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON file with the results")
    parser.add_argument("--compare", action="store_true", help="The file is read and compared instead of written.")
    parser.add_argument(
        "--runs", nargs="+", choices=RUNS, default=list(RUNS), help="Only these; others read their runs."
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = results_of(args.runs, Path(folder))
    if not args.compare:
        args.file.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return 0
    wanted = json.loads(args.file.read_text(encoding="utf-8"))
    found = json.loads(json.dumps(found))
    different = [line for name in args.runs for line in differences(wanted.get(name), found[name], name)]
    sys.stdout.write("".join(f"{line}\n" for line in different) or f"{len(found)} runs: all equal\n")
    return int(bool(different))


def differences(wanted: Any, found: Any, where: str) -> Iterator[str]:
    """A line for each leaf that differs."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in wanted | found:
            yield from differences(wanted.get(key), found.get(key), f"{where}.{key}")
    elif wanted != found:
        yield f"{where}: {wanted} before, {found} now"


def results_of(names: list[str], folder: Path) -> dict[str, dict[str, Any]]:
    """All that is kept, by run."""
    write_media(folder)
    results = {}
    for name in RUNS:
        if name in names or (name == "recurrent_lm" and any(RUNS[other][0] == "tune" for other in names)):
            results[name] = result_of(name, folder)
            sys.stderr.write(f"{name}: loss {results[name]['losses'][-1]}\n")
    return {name: results[name] for name in names}


def result_of(name: str, folder: Path) -> dict[str, Any]:
    """Train, evaluate and write; `folder` has the data, and gets the runs."""
    command, writings = RUNS[name]
    config, out = folder / "configs" / f"{name}.yaml", folder / "runs" / name
    config.parent.mkdir(exist_ok=True)
    config.write_text(yaml.safe_dump(reduced(name, out)), encoding="utf-8")
    run(command, "--config", str(config))
    history = json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    result: dict[str, Any] = {
        "losses": [repr(entry["loss"]) for entry in history if "loss" in entry],
        "weights": weights_of(out),
    }
    if command != "tune":
        result["evaluation"] = evaluation_of(out, is_codec=name in ("image_autoencoder", "vocoder"))
    for writing in writings:
        arguments = [word.format(media=folder, out=out) for word in WRITINGS[writing]]
        result[writing] = writing_of(out, arguments)
    return result


def reduced(name: str, out: Path) -> dict[str, Any]:
    """The YAML of a run with few steps, few rows, and no samples."""
    tree = yaml.safe_load((ROOT / "configs" / f"{name}.yaml").read_text(encoding="utf-8"))
    for source in (source for role in ("train", "validation") for source in tree["data"].get(role, [])):
        if "num_rows" in source:
            source["num_rows"] = ROWS if source in tree["data"]["train"] else 4
    if name == "recurrent_mixture":
        tree["data"]["train"][-1]["paths"] = ["../data/*.txt"]
    if "path" in tree["model"]:
        tree["model"]["path"] = str(out.parent / "recurrent_lm")
    tree.pop("callbacks", None)
    training = tree["training"]
    training |= {"output_dir": str(out), "max_steps": STEPS, "per_device_train_batch_size": 2, "logging_steps": 1}
    training |= {"per_device_eval_batch_size": 2, "save_strategy": "no", "eval_strategy": "no", "warmup_steps": 2}
    training |= {"use_cpu": True, "disable_tqdm": True, "recurrence_logging_steps": 0, "dataloader_num_workers": 0}
    if tree["trainer"] == "grpo":
        training |= {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}
    if tree["trainer"] in ("grpo", "exit_probe"):
        del training["recurrence_logging_steps"]
    return tree


def write_media(folder: Path) -> None:
    """Pictures of noise about a grey, tones, and lines of words, each with its text."""
    dice, words = numpy.random.default_rng(0), random.Random(0)
    for kind in ("photos", "recordings"):
        (folder / kind / "train").mkdir(parents=True)
    rows: dict[str, list[dict[str, str]]] = {"photos": [], "recordings": []}
    for index in range(420):  # more than the principal components that the autoencoder is compared with
        pixels = dice.integers(0, 256, (40, 48, 3), dtype=numpy.uint8)
        Image.fromarray(pixels // 2 + index % 24 * 5).save(folder / f"photos/train/{index}.png")
        rows["photos"].append({"file_name": f"{index}.png", "text": f"a picture of number {index % 24}"})
    for index in range(24):
        tone = 0.3 * numpy.sin(numpy.arange(4800) * (0.1 + 0.02 * index)) + 0.01 * dice.normal(size=4800)
        soundfile.write(folder / f"recordings/train/{index}.wav", tone, 8000)
        rows["recordings"].append({"file_name": f"{index}.wav", "text": f"tone {index}", "speaker": "abc"[index % 3]})
    for kind, entries in rows.items():
        lines = "".join(json.dumps(entry) + "\n" for entry in entries)
        (folder / kind / "train/metadata.jsonl").write_text(lines, encoding="utf-8")
    (folder / "data").mkdir()
    text = " ".join(words.choice(["the", "sea", "a", "wind", "of", "night", "and", "falls."]) for _ in range(20000))
    (folder / "data/text.txt").write_text(text.replace(". ", ".\n\n"), encoding="utf-8")


def run(command: str, *arguments: str) -> str:
    """The standard output of a command."""
    main: Callable[[list[str]], int] = importlib.import_module(COMMANDS[command]).main
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        code = main(list(arguments))
    if code != 0:
        raise RuntimeError(f"{command} {' '.join(arguments)} ended with {code}")
    return output.getvalue()


def weights_of(folder: Path) -> str:
    """A digest of all weights that a run has left, in the order of their names."""
    digest = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in sorted(load_file(path).items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def evaluation_of(folder: Path, is_codec: bool) -> Any:
    """The numbers of an evaluation at two depths, or, of a codec, its table."""
    if is_codec:
        table = [line.split("|") for line in run("evaluate", str(folder), "--limit", "4").splitlines()]
        timed = [index for index, title in enumerate(table[0]) if title.strip() in ("milliseconds", "x real time")]
        return ["|".join(cell for index, cell in enumerate(row) if index not in timed) for row in table]
    output = folder / "evaluation"
    shutil.rmtree(output, ignore_errors=True)
    run("evaluate", str(folder), "--num-steps", "1", "3", "--limit", "4", "--max-new-tokens", "4", "--device", "cpu")
    files = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(output.glob("*.json"))}
    return {name: hashed(without_times(with_removed(it), str(folder.parents[1]))) for name, it in files.items()}


def with_removed(content: Any) -> Any:
    """The content of a file of results with the options of augmentation that are gone since, which it repeated then."""
    for key, left in REMOVED.items():
        if key.startswith("augmentation."):
            _, part, name = key.split(".")
            content["data"]["augmentation"][part][name] = left
    return content


def without_times(content: Any, folder: str) -> Any:
    """The content of a file of results without what clock and place say, newer options, and new names of options."""
    if isinstance(content, dict):
        kept = {key: value for key, value in content.items() if not any(word in key for word in (*TIMES, *NEWER))}
        return {OLD_NAMES.get(key, key): without_times(value, folder) for key, value in kept.items()}
    if isinstance(content, list):
        return [without_times(value, folder) for value in content]
    return content.replace(folder, "") if isinstance(content, str) else content


def hashed(content: Any) -> str:
    """A short digest of what JSON can say."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def writing_of(folder: Path, arguments: list[str]) -> str:
    """The text that is written, or a digest of the file."""
    flags = () if "--mode" in arguments else ("--max-new-tokens", "12", "--no-stream")
    text = run("generate", str(folder), *arguments, *flags, "--seed", "0", "--device", "cpu")
    files = [path for path in map(Path, arguments) if path.parent == folder]
    return text if not files else hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


if __name__ == "__main__":
    raise SystemExit(main())
