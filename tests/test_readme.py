"""The commands of the README, and of the pages that it sends its reader to first, run: each `bash` block as it stands,
with few steps and rows, and folders of the test.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import free_port, run_python, run_ranks
from tests.serving import server
from tests.test_launch import REPOSITORY
from tests.tiny_language_model import save_checkpoint
from tests.tiny_processor import audio_file, image_file, picture, sound

README = (REPOSITORY / "README.md").read_text()
PAGES = [README, *((REPOSITORY / "docs" / f"{name}.md").read_text() for name in ("training", "generation"))]
DOCS = sorted((REPOSITORY / "docs").glob("*.md"))
FEW_STEPS = ["--training.max_steps", "2", "--training.warmup_steps", "1"]
FEW_STEPS += ["--callbacks.samples.max_new_tokens", "2", "--callbacks.media_samples.max_new_tokens", "2"]
FEW_ROWS = """
data:
  train:
    - {kind: generated, task: scenes, num_rows: 200}
    - {kind: generated, task: melodies, num_rows: 100}
    - {kind: generated, task: stories, num_rows: 100}
  validation:
    - {kind: generated, task: scenes, num_rows: 8}
    - {kind: generated, task: melodies, num_rows: 8}
    - {kind: generated, task: stories, num_rows: 8}
"""
FEW_DRAWINGS = """
data:
  train:
    - {name: drawn, kind: generated, task: drawings, direction: text -> image, num_rows: 100}
    - {name: played, kind: generated, task: tunes, direction: text -> audio, num_rows: 100}
  validation:
    - {name: drawn, kind: generated, task: drawings, direction: text -> image, num_rows: 8}
    - {name: played, kind: generated, task: tunes, direction: text -> audio, num_rows: 8}
"""
FEW_SUMS = """
data:
  train:
    - {kind: generated, task: addition, num_rows: 400, loss_on: answer}
    - {kind: generated, task: stories, num_rows: 200}
  validation:
    - {kind: generated, task: addition, num_rows: 8, loss_on: answer}
"""
FEW_DIFFERENCES = """
data:
  train:
    - {kind: generated, task: subtraction, num_rows: 400, prompt: "{prompt}"}
  validation:
    - {kind: generated, task: subtraction, num_rows: 8, prompt: "{prompt}"}
"""
FEW = {"recurrent_vlm.yaml": FEW_ROWS, "any_to_any.yaml": FEW_DRAWINGS}
FEW |= {"recurrent_lm.yaml": FEW_SUMS, "finetune_lora.yaml": FEW_DIFFERENCES}


def commands(language: str, *pages: str) -> list[str]:
    """The contents of the fenced blocks of a language; of bash, line by line."""
    blocks = [block for page in pages for block in re.findall(rf"```{language}\n(.*?)```", page, flags=re.DOTALL)]
    return [line for block in blocks for line in block.splitlines() if line] if language == "bash" else blocks


def prepared(command: str, folder: Path) -> list[str]:
    """The command's words, in the test's folders, short, on the CPU, and with a port of its own."""
    words = [re.sub(r"\b(runs|my)/", rf"{folder}/\1/", word) for word in shlex.split(command)]
    words = [re.sub(r"num_rows: \d+", "num_rows: 400", word) for word in words]
    for name in FEW:
        if f"configs/{name}" in words:
            place = words.index(f"configs/{name}") + 1
            words[place:place] = ["--config", str(folder / name)]
    if words[0] == "deepspeed":
        words[1:1] = ["--master_port", str(free_port())]
        if "--training.output_dir" not in words:
            name = Path(words[words.index("--config") + 1]).stem
            words += ["--training.output_dir", str(folder / "runs" / name)]
        words += FEW_STEPS
        if "finetune.py" in words:
            words += ["--model.path", str(folder / "runs" / "recurrent_lm")]
    if words[:2] == ["python", "pretrain.py"]:
        words += ["--training.output_dir", str(folder / "runs" / "looked_at")]
    if words[:3] == ["python", "-m", "evaluation"]:
        words += ["--limit", "4", "--max-new-tokens", "4"]
    return [str(Path(sys.executable).with_name(words[0])), *words[1:]]


def run(words: list[str], **kwargs) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        words,
        cwd=REPOSITORY,
        env={**os.environ, "PATH": path},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        **kwargs,
    )


def forked(words: list[str]) -> subprocess.CompletedProcess:
    """What a command of the launcher starts, without it: the first rank, finished, or the first that has failed."""
    count = int(words[words.index("--num_accelerators") + 1]) if "--num_accelerators" in words else 1
    place = next(index for index, word in enumerate(words) if word.endswith(".py"))
    ranks = run_ranks(*words[place:], count=count)
    return next((rank for rank in ranks if rank.returncode), ranks[0])


def write_files(folder: Path) -> None:
    """Texts, photos and recordings of one's own, as the README has them, and what `make quickstart-lm` leaves."""
    save_checkpoint(folder / "runs" / "recurrent_lm")
    for name, content in FEW.items():
        (folder / name).write_text(content)
    names = ["a", *map(str, range(99))]
    files = {
        "photos": {f"{name}.jpg": image_file(picture(seed=seed), "JPEG") for seed, name in enumerate(names)},
        "recordings": {f"{name}.wav": audio_file(sound(3000, seed=seed)) for seed, name in enumerate(names)},
    }
    files["speech"] = files["recordings"]
    for kind, contents in files.items():
        (folder / "my" / kind).mkdir(parents=True)
        words = {"text": "this is it", "speaker": "jackson"}
        lines = [json.dumps({"file_name": name, **words}) for name in contents]
        (folder / "my" / kind / "metadata.jsonl").write_text("\n".join(lines))
        for name, content in contents.items():
            (folder / "my" / kind / name).write_bytes(content)
    (folder / "my" / "a.txt").write_text("It was a bright cold day in April. " * 400)
    (folder / "my" / "b.txt").write_text("The clocks were striking thirteen. " * 400)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_command_runs(tmp_path):
    """In order, as a reader would type them; those of Python begin with the libraries imported. Of those of the
    launcher, it runs the first of each script and number of ranks, and what has quotes within quotes; the others are
    the ranks that it would start.
    """
    write_files(tmp_path)
    ran, launched = [], []
    for command in commands("bash", *PAGES):
        if command.startswith(("make ", "source ", "tensorboard ")):
            continue
        ran.append(command)
        first, *words = prepared(command, tmp_path)
        if words[:2] == ["-m", "inference.serve"]:
            with server(*words[2:]) as client:
                assert client.send("/")[0] == client.send("/health")[0] == 200
            continue
        if Path(first).name == "python":
            process = run_python(*words)
        elif (form := command.partition(".py")[0]) in launched and '"' not in command:
            process = forked(words)
        else:
            launched.append(form)
            process = run([first, *words])
        assert process.returncode == 0, f"{command}\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}"
    assert len(ran) >= 24
    forms = ["pretrain", "finetune", "--num_accelerators 2 pretrain", "pretrain"]
    assert launched == [f"deepspeed {form}" for form in forms]
    scripts = commands("python", *PAGES)
    for script in scripts:
        process = run([sys.executable, "-c", script.replace('"runs/', f'"{tmp_path}/runs/')])
        assert process.returncode == 0, process.stderr[-3000:]
        assert ("tensor([[" in process.stdout) == ("exit_steps" in script)
        assert "Do you wish to run the custom code?" not in process.stdout + process.stderr
    assert len(scripts) == 3


def test_the_environment_is_entered_before_its_commands():
    """`make` sets it up and needs nothing entered; all other commands follow the one that enters it."""
    is_make = [command.startswith("make ") for command in commands("bash", README)]
    entered = commands("bash", README).index("source .venv/bin/activate")
    assert all(is_make[:entered]) and not any(is_make[entered:])


def test_make_targets_of_the_readme_exist():
    makefile = (REPOSITORY / "Makefile").read_text()
    for command in commands("bash", *PAGES):
        if command.startswith("make "):
            assert re.search(rf"^{command.split()[1]}:", makefile, flags=re.MULTILINE), command


def test_files_named_in_the_tree_exist():
    tree = README.split("## The tree")[1].split("```")[1]
    names = re.findall(r"[\w/*]+\.(?:py|yaml|json)|^\w+/", tree, flags=re.MULTILINE)
    for name in names:
        assert (REPOSITORY / name).exists() or list(REPOSITORY.glob(f"[!.]*/**/{name}")), name
    assert len(names) > 15


def test_the_readme_is_short():
    """What a stranger reads before the first command; all else is on a page of its own."""
    assert len(README.splitlines()) <= 250


def test_every_page_is_linked_from_the_readme():
    linked = set(re.findall(r"\]\((docs/\w+\.md)", README))
    assert linked == {f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md")}


def anchors(page: str) -> set[str]:
    """The names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in DOCS)])
def test_links_lead_to_files_and_headings(name):
    path = REPOSITORY / name
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", path.read_text(encoding="utf-8")):
        file, _, anchor = link.partition("#")
        target = path.parent / file if file else path
        assert target.exists(), f"{name}: {link}"
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), f"{name}: {link}"
