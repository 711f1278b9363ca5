"""transformers' own tests on our models: `python -m tests.library_suite` runs them and prints which fail.

They come with the source distribution of the installed version, which pip fetches once into `.cache`. `EXCEPTIONS`
names the tests that fail, and why they cannot apply.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import transformers

ROOT = Path(__file__).parents[1]
CACHE = ROOT / ".cache" / "library_tests"
TESTERS = ("test_modeling_common.py", "test_training_mixin.py")
# Bases of the testers whose files the source distribution leaves out. What `generate` does is in tests of our own.
MISSING_BASES = {"exporters/test_export.py": "ExportTesterMixin", "generation/test_utils.py": "GenerationTesterMixin"}
TEST_REQUIREMENT = "parameterized==0.9.0"  # imported by the testers, and by nothing else here


@dataclass(frozen=True)
class Inapplicable:
    """A test of the library that cannot hold for some of our models.

    Args:
        models: The cases in `library_cases`, without "Test".
        reason: Why, in a sentence for the documentation.
    """

    models: frozenset[str]
    reason: str


NO_AUDIO = Inapplicable(
    frozenset({"Image"}),
    "One class reads whatever its config names. The test asks the class whether it reads sound, and this model, which "
    "reads images alone, refuses it.",
)

EXCEPTIONS: dict[str, Inapplicable] = {
    "test_attention_outputs": Inapplicable(
        frozenset({"Seq2Seq"}),
        "It counts the outputs of an encoder with a decoder. Ours also has the state and the steps; "
        "`tests/test_seq2seq.py` looks at the attentions.",
    ),
    "test_can_set_attention_dynamically_composite_model": Inapplicable(
        frozenset({"Image", "ImageAudio", "Seq2Seq"}),
        'It wants "" in a dict of backends to leave the language model alone, for which others have a module. Ours is '
        'one with the whole, so that "" is its backend where "text_config" names no other.',
    ),
    "test_get_audio_features_attentions": NO_AUDIO,
    "test_get_audio_features_hidden_states": NO_AUDIO,
    "test_get_audio_features_output": NO_AUDIO,
    "test_get_image_features_output": Inapplicable(
        frozenset({"Image", "ImageAudio"}),
        "The test takes the width from `vision_config.backbone_config`, which is empty where the encoder is our own; "
        "`tests/test_media_model.py` compares shape and values.",
    ),
    "test_num_layers_is_small": Inapplicable(
        frozenset({"Rope", "Alibi", "Image", "ImageAudio", "Seq2Seq"}),
        "It allows two layers, by the number by which others count attentions. Ours is that of executed layers, four "
        "here: prelude, two steps of the core, and coda, each of one.",
    ),
    "test_training_gradient_checkpointing_use_reentrant_true": Inapplicable(
        frozenset({"Seq2Seq"}),
        "Reentrant checkpointing goes back through what layers share once for each of them, and they share keys and "
        "values of the source; asking for it is an error.",
    ),
}


@dataclass(frozen=True)
class Outcome:
    """How one test ended for one model: with all its parameters and subtests, of which the worst counts.

    Args:
        kind: "passed", "failed" or "skipped".
        reason: Of a failure the last line, of a skip what the library says.
    """

    kind: str
    reason: str


def fetch_testers(version: str, cache: Path = CACHE) -> Path:
    """The folder that has the library's testers as the package `transformers_tests`, and what else they import.

    Args:
        version: Of transformers.
        cache: Where the folder is kept.

    Raises:
        ValueError: If pip cannot fetch them.
    """
    folder = cache / version
    if folder.exists():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        scratch = Path(name)
        run_pip("download", "--no-deps", "--no-binary", "transformers", "--dest", name, f"transformers=={version}")
        run_pip("install", "--no-deps", "--target", str(scratch / "ready"), TEST_REQUIREMENT)
        extract_testers(next(scratch.glob("transformers-*.tar.gz")), scratch / "ready" / "transformers_tests")
        (scratch / "ready").rename(folder)
    return folder


def run_pip(*arguments: str) -> None:
    """Runs pip, without its questions and progress.

    Raises:
        ValueError: With pip's last line, if it fails.
    """
    command = [sys.executable, "-m", "pip", *arguments, "--quiet", "--disable-pip-version-check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(
            f"pip cannot get {arguments[-1]} ({reason}); the tests of transformers need a package index once, and are "
            f"kept in {CACHE}"
        )


def extract_testers(archive: Path, package: Path) -> None:
    """Makes a package of the testers in a source distribution, with empty classes for the bases that it lacks."""
    package.mkdir()
    (package / "__init__.py").touch()
    with tarfile.open(archive) as source:
        for name in TESTERS:
            member = next(each for each in source if each.name.endswith(f"/tests/{name}"))
            (package / name).write_bytes(source.extractfile(member).read())
    for name, base in MISSING_BASES.items():
        path = package / name
        path.parent.mkdir()
        (path.parent / "__init__.py").touch()
        path.write_text(f"class {base}:\n    pass\n", encoding="utf-8")


def run_suite(testers: Path, names: list[str] | None = None) -> dict[str, dict[str, Outcome]]:
    """Runs the tests in a process of their own, on one thread, without network.

    Args:
        testers: The folder of `fetch_testers`.
        names: Of the tests to run. Default: all.

    Returns:
        By model and test.

    Raises:
        RuntimeError: If the process dies.
    """
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT), str(testers)])),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "tests.library_cases", str(report), *(names or [])]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"the tests of transformers cannot run:\n{done.stderr[-4000:]}")
        models = json.loads(report.read_text(encoding="utf-8"))
    return {model: {name: Outcome(*each) for name, each in tests.items()} for model, tests in models.items()}


def failures(models: dict[str, dict[str, Outcome]]) -> dict[str, dict[str, str]]:
    """By test, the models for which it fails, each with the reason."""
    found: dict[str, dict[str, str]] = {}
    for model, tests in models.items():
        for name, outcome in tests.items():
            if outcome.kind == "failed":
                found.setdefault(name, {})[model] = outcome.reason
    return found


def summary(models: dict[str, dict[str, Outcome]]) -> str:
    """A Markdown table with how many tests passed, failed, and were skipped by the library itself."""
    lines = ["| model | passed | failed | skipped by the library |", "|---|---:|---:|---:|"]
    for model, tests in models.items():
        kinds = [outcome.kind for outcome in tests.values()]
        lines.append(f"| {model} | {kinds.count('passed')} | {kinds.count('failed')} | {kinds.count('skipped')} |")
    return "\n".join(lines)


def exceptions_table() -> str:
    """A Markdown table of `EXCEPTIONS`."""
    lines = ["| test | models | why it cannot apply |", "|---|---|---|"]
    for name, each in sorted(EXCEPTIONS.items()):
        lines.append(f"| `{name}` | {', '.join(sorted(each.models))} | {each.reason} |")
    return "\n".join(lines)


def main() -> None:
    """Runs the tests and prints what fails, with the reason; then the tables of the documentation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", nargs="*", metavar="TEST", help="Only tests of these names.")
    parser.add_argument("--cache", type=Path, default=CACHE, help="Folder in which the library's tests are kept.")
    arguments = parser.parse_args()
    models = run_suite(fetch_testers(transformers.__version__, arguments.cache), arguments.names)
    lines = [f"transformers {transformers.__version__}", summary(models), exceptions_table()]
    for name, of_models in sorted(failures(models).items()):
        lines += [f"{name}, {model}: {reason}" for model, reason in of_models.items()]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
