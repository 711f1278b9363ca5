"""Checkpoints: finished, damaged, hostile, kept and deleted."""

import errno
import json
import logging
import os
import pickle
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from tests.test_output import full_disk
from tests.test_trainer import build, resume_point, save_whole
from trainers import checkpoints
from trainers.checkpoints import (
    CheckpointKeeper,
    NoSpaceError,
    bytes_of_checkpoint,
    checkpoints_in,
    lack_of_space,
    rotate,
)
from trainers.gradient_filters import GradientFilterOptions
from trainers.regrouping import to_universal
from trainers.resuming import damage


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The folder of a run of four steps, with checkpoints of steps 2 and 4, and what the keeper left of the limit."""
    folder = tmp_path_factory.mktemp("trained")
    trainer = build(folder, max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=5)
    trainer.train()
    assert trainer.args.save_total_limit == 5
    return folder


@pytest.fixture
def run(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "run")


def flip(path):
    """Turns one bit in the middle of a file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def end_in_zeros(path):
    """What a file system leaves where a page was not written."""
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(len(content) - len(content) // 2))


def cut(path):
    path.write_bytes(path.read_bytes()[:-20])


def empty(path):
    path.write_bytes(b"")


def test_a_manifest_names_all_that_training_reads(trained):
    """Against a listing of the folder and the `sha256sum` of coreutils."""
    folder = trained / "checkpoint-4"
    written = json.loads((folder / "manifest.json").read_text())
    names = {path.name for path in folder.iterdir() if path.suffix != ".py"} - {"manifest.json", "README.md"}
    assert written["format"] == 1 and written["problem"] is None and set(written["files"]) == names
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"} <= names
    for name, entry in written["files"].items():
        assert entry["size"] == (folder / name).stat().st_size
        assert os.popen(f"sha256sum {folder / name}").read().split()[0] == entry["sha256"]


@pytest.mark.parametrize("change", [flip, end_in_zeros, cut, empty, Path.unlink])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "trainer_state.json"]
)
def test_any_damage_leads_to_the_checkpoint_before(run, caplog, name, change):
    change(run / "checkpoint-4" / name)
    with caplog.at_level(logging.WARNING):
        assert resume_point("true", run) == str(run / "checkpoint-2")
    (warning,) = [record.getMessage() for record in caplog.records if record.name == "trainers.resuming"]
    said = f"lacks {name}" if change is Path.unlink else f"has a damaged {name} ("
    assert warning.startswith(f"{run / 'checkpoint-4'} is passed over: it {said}") and "\n" not in warning
    with pytest.raises(ValueError, match="give a checkpoint-N folder of a run") as error:
        resume_point(str(run / "checkpoint-4"), run)
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_does_no_harm(run):
    """Foreign files, empty folders, notes in the card, code that was refreshed."""
    folder = run / "checkpoint-4"
    (folder / "notes.txt").write_text("mine")
    (folder / "empty").mkdir()
    (folder / "README.md").write_text("edited")
    (folder / "modeling_megatransformer_text.py").write_text("# of another version")
    assert resume_point("true", run) == str(folder)


MANIFESTS = {
    "cut off": ('{"format": 1, "files"', "has a damaged manifest.json ("),
    "no object": ("[]", "has a damaged manifest.json (no JSON object)"),
    "another format": ('{"format": 2, "files": {}}', "has a damaged manifest.json (its format is 2, and known is 1)"),
    "no files": ('{"format": 1, "files": {}}', "has a damaged manifest.json (it names no files)"),
    "outside": ('{"format": 1, "files": {"../a": {"size": 1, "sha256": ""}}}', "'../a' is outside of the folder"),
    "no size": ('{"format": 1, "files": {"config.json": {"sha256": ""}}}', "'config.json' has no size and sha256"),
    "unfinished": ('{"format": 1, "files": null}', "was not finished, its saving was cut off"),
    "not even text": (b"\xff\xfe\x00", "has a damaged manifest.json ("),
}


@pytest.mark.parametrize("content, reason", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_none(run, content, reason):
    path = run / "checkpoint-4" / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert reason in damage(run / "checkpoint-4")
    assert resume_point("true", run) == str(run / "checkpoint-2")


def test_without_a_manifest_all_parts_are_looked_for(run):
    """As older code saved them: whole, and then with each part missing or damaged in turn."""
    folder = run / "checkpoint-4"
    (folder / "manifest.json").unlink()
    assert damage(folder) is None
    for name, change, reason in (
        ("scheduler.pt", Path.unlink, "has no scheduler.pt"),
        ("rng_state.pth", Path.unlink, "has no rng_state*.pth"),
        ("config.json", Path.unlink, "has no config.json"),
        ("config.json", cut, "has a damaged config.json"),
        ("optimizer.pt", flip, "has a damaged optimizer.pt"),
        ("scheduler.pt", empty, "has a damaged scheduler.pt"),
    ):
        broken = shutil.copytree(folder, run / "broken")
        change(broken / name)
        assert damage(broken).startswith(reason), name
        shutil.rmtree(broken)


# ------------------------------------------------------------------------------------------------- not finite, hostile


def test_a_checkpoint_with_weights_that_are_not_finite_is_none(tmp_path, caplog):
    """It is kept to be looked at, no run goes on from it, and it pushes out no whole one."""

    class Poison(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    next(iter(model.parameters()))[0, 0] = float("nan")

    trainer = build(tmp_path, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.add_callback(Poison())
    trainer.train()
    kept = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert kept == ["checkpoint-1", "checkpoint-2", "checkpoint-4"]
    assert resume_point("true", tmp_path) == str(tmp_path / "checkpoint-2")
    assert "checkpoint-4 is passed over: it has weights that are not finite (" in caplog.text
    (tmp_path / "checkpoint-4" / "manifest.json").unlink()  # as of older code
    assert damage(tmp_path / "checkpoint-4").startswith("has weights that are not finite (")


def test_states_of_an_optimizer_that_are_not_finite(run):
    folder = run / "checkpoint-4"
    state = torch.load(folder / "optimizer.pt")
    state["state"][0]["exp_avg_sq"].fill_(float("inf"))
    torch.save(state, folder / "optimizer.pt")
    (folder / "manifest.json").unlink()
    assert damage(folder) == "has states that are not finite (state.0.exp_avg_sq in optimizer.pt)"


class Hostile:
    """What a pickle may be: loading it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "name",
    [
        "optimizer.pt",
        "scheduler.pt",
        "rng_state.pth",
        "scaler.pt",
        "global_step4/mp_rank_00_model_states.pt",
        "global_step4/zero_pp_rank_0_mp_rank_00_optim_states.pt",
    ],
)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_no_file_of_a_checkpoint_runs_code(run, name, has_manifest):
    """With a manifest that fits, so that nothing but the content says it."""
    folder, made = run / "checkpoint-4", run / "made by the pickle"
    (folder / "global_step4").mkdir()
    torch.save({}, folder / "global_step4" / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("global_step4")
    assert damage_of_new(folder, has_manifest) is None
    torch.save({"state": Hostile(made)}, folder / name)
    reason = damage_of_new(folder, has_manifest)
    assert reason == f"has a {name} that holds posix.mkdir; such a file may run code when it is loaded"
    assert not made.exists()
    torch.load(folder / name, weights_only=False)
    assert made.is_dir()  # it was no harmless file


def damage_of_new(folder, has_manifest):
    """Of a folder whose files are as they should be, for all that a manifest can say."""
    if has_manifest:
        checkpoints.complete_checkpoint(folder)
    else:
        (folder / "manifest.json").unlink(missing_ok=True)
    return damage(folder)


def test_old_kinds_of_pickles_are_not_read_at_all(run):
    """`torch.load` would read them too."""
    folder = run / "checkpoint-4"
    (folder / "scheduler.pt").write_bytes(pickle.dumps(Hostile(run / "made")))
    assert damage_of_new(folder, True) == "has a damaged scheduler.pt"
    assert not (run / "made").exists()


@pytest.mark.parametrize("name", ["../elsewhere", "/elsewhere", "global_step9", "", "global_step4/../../elsewhere"])
def test_deepspeed_is_sent_nowhere_else(run, name):
    """Its `latest` names the folder that it unpickles."""
    folder = run / "checkpoint-4"
    for place in (folder / "global_step4", run / "elsewhere"):
        place.mkdir()
        torch.save({}, place / "mp_rank_00_model_states.pt")
    (folder / "latest").write_text("global_step4\n")
    assert damage_of_new(folder, True) is None
    (folder / "latest").write_text(name)
    assert damage_of_new(folder, True).startswith("has a damaged latest (")


def test_a_best_checkpoint_that_is_damaged_is_not_loaded(tmp_path, caplog):
    """The weights stay those of the last step."""
    weights = {}

    class Spoil(TrainerCallback):
        def on_log(self, args, state, control, logs=None, model=None, **kwargs):
            if "train_runtime" in logs:  # what is logged last, before the best is loaded
                flip(Path(state.best_model_checkpoint) / "model.safetensors")
                weights.update({name: weight.clone() for name, weight in model.state_dict().items()})

    both = {
        f"{name}_{what}": value for name in ("save", "eval") for what, value in (("strategy", "steps"), ("steps", 1))
    }
    trainer = build(tmp_path, max_steps=2, load_best_model_at_end=True, metric_for_best_model="loss", **both)
    trainer.add_callback(Spoil())
    trainer.train()
    assert ", the best checkpoint, has a damaged model.safetensors" in caplog.text
    assert weights and all(torch.equal(weight, weights[name]) for name, weight in trainer.model.state_dict().items())


# -------------------------------------------------------------------------------------------------------- kept, deleted


def saved(folder, *steps, unfinished=()):
    """Checkpoints with a manifest, of which some were cut off; the newest of them is touched first."""
    for step in sorted(steps, reverse=True):
        save_whole(folder / f"checkpoint-{step}", step)
        checkpoints.complete_checkpoint(folder / f"checkpoint-{step}")
    for step in unfinished:
        checkpoints.begin_checkpoint(folder / f"checkpoint-{step}")


def left(folder):
    return sorted((path.name for path in folder.iterdir()), key=lambda name: (len(name), name))


def test_the_oldest_by_step_go(tmp_path):
    """Whatever the times of the folders are."""
    saved(tmp_path, 1, 2, 9, 10, 11)
    rotate(tmp_path / "checkpoint-11", 2)
    assert left(tmp_path) == ["checkpoint-10", "checkpoint-11"]


def test_wrecks_are_not_counted_and_go(tmp_path):
    """One of a half deletion, which had the newest time, one that was cut off, one that lost a file."""
    saved(tmp_path, 1, 2, 3, 4, 5, unfinished=[6])
    (tmp_path / "checkpoint-1" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-4" / "optimizer.pt").unlink()
    saved(tmp_path, 7)
    (tmp_path / "deleted-checkpoint-0").mkdir()
    rotate(tmp_path / "checkpoint-7", 3)
    assert left(tmp_path) == ["checkpoint-3", "checkpoint-5", "checkpoint-7"]


def test_the_best_stays_and_so_does_what_is_of_later_steps(tmp_path):
    saved(tmp_path, 1, 2, 3, 4, 8, unfinished=[9])
    rotate(tmp_path / "checkpoint-4", 1, best=str(tmp_path / "checkpoint-2"))
    assert left(tmp_path) == ["checkpoint-2", "checkpoint-4", "checkpoint-8", "checkpoint-9"]


def test_without_a_limit_only_what_was_cut_off_goes(tmp_path):
    saved(tmp_path, 1, 2, 4, unfinished=[3])
    (tmp_path / "checkpoint-1" / "optimizer.pt").unlink()
    (tmp_path / "checkpoint-mine").mkdir()
    rotate(tmp_path / "checkpoint-4", None)
    assert left(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-4", "checkpoint-mine"]


def test_one_that_was_saved_not_finite_pushes_out_none(tmp_path):
    saved(tmp_path, 1, 2)
    save_whole(tmp_path / "checkpoint-3", 3)
    checkpoints.complete_checkpoint(tmp_path / "checkpoint-3", "has weights that are not finite (a)")
    rotate(tmp_path / "checkpoint-3", 2)
    assert left(tmp_path) == ["checkpoint-1", "checkpoint-2", "checkpoint-3"]


def test_a_kill_within_a_deletion_leaves_no_checkpoint_of_that_name(tmp_path, monkeypatch):
    """The moment after the first file is gone."""
    saved(tmp_path, 1, 2, 3)

    def killed(path, ignore_errors):
        if path.exists():
            (path / "model.safetensors").unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr("trainers.checkpoints.shutil.rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        rotate(tmp_path / "checkpoint-3", 1)
    assert left(tmp_path) == ["checkpoint-2", "checkpoint-3", "deleted-checkpoint-1"]
    monkeypatch.undo()
    rotate(tmp_path / "checkpoint-3", 1)
    assert left(tmp_path) == ["checkpoint-3"]


def test_a_save_replaces_what_was_cut_off_there(tmp_path):
    """Files of the older attempt, here of another rank, are not mixed with the new ones."""
    saved(tmp_path, 3)
    checkpoints.begin_checkpoint(tmp_path / "checkpoint-3")
    keeper, args = CheckpointKeeper(), SimpleNamespace(save_total_limit=2, should_save=True, output_dir=str(tmp_path))
    keeper.begin(tmp_path / "checkpoint-3", args, num_bytes=0)
    assert left(tmp_path / "checkpoint-3") == ["manifest.json"]
    assert damage(tmp_path / "checkpoint-3") == "was not finished, its saving was cut off"
    assert args.save_total_limit is None  # transformers' own rotation has nothing to do
    save_whole(tmp_path / "new", 3)
    for path in (tmp_path / "new").iterdir():
        path.rename(tmp_path / "checkpoint-3" / path.name)
    keeper.on_save(args, SimpleNamespace(global_step=3, best_model_checkpoint=None), None)
    assert damage(tmp_path / "checkpoint-3") is None and args.save_total_limit == 2
    assert list(load_file(tmp_path / "checkpoint-3" / "model.safetensors")) == ["weight"]


def test_every_moment_of_a_save_is_seen_as_unfinished(trained, tmp_path, monkeypatch):
    """A look after each file that is written."""
    seen = []
    real = torch.save

    def looking(content, path, *args, **kwargs):
        real(content, path, *args, **kwargs)
        seen.append((Path(path).name, damage(Path(path).parent)))

    monkeypatch.setattr(torch, "save", looking)
    build(tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    names = [name for name, _ in seen]
    assert {"training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= set(names)
    assert {reason for _, reason in seen} == {"was not finished, its saving was cut off"}
    assert damage(tmp_path / "checkpoint-1") is None


def test_saving_tensors_of_all_kinds(tmp_path):
    """Whole numbers, halves and eighths of a float: what is finite is found so."""
    kinds = (torch.int64, torch.bool, torch.bfloat16, torch.float16, torch.float8_e4m3fn)
    save_whole(tmp_path / "checkpoint-1", 1)
    weights = {str(kind): torch.ones(4).to(kind) for kind in kinds}
    save_file(weights, tmp_path / "checkpoint-1" / "model.safetensors")
    assert damage(tmp_path / "checkpoint-1") is None
    weights["torch.float16"][1] = float("inf")
    save_file(weights, tmp_path / "checkpoint-1" / "model.safetensors")
    assert damage(tmp_path / "checkpoint-1") == "has weights that are not finite (torch.float16 in model.safetensors)"


# ----------------------------------------------------------------------------------------------------- room on the disk


def test_a_checkpoint_without_room_is_refused_with_its_numbers(tmp_path, monkeypatch):
    """Weights of float32 and two moments each before the first one, and the size of the newest one after that. What is
    there stays, and nothing of the new one is written.
    """
    trainer = build(tmp_path, max_steps=4, save_strategy="steps", save_steps=1)
    count = sum(parameter.numel() for parameter in trainer.model.parameters())
    free = [12 * count - 1]
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda place: SimpleNamespace(free=free[0]))
    needed = f"{12 * count / 2**20:.1f} MiB"
    with pytest.raises(
        NoSpaceError, match=f"checkpoint-1 needs about {needed}, and {needed} are free there; make room"
    ):
        trainer.train()
    assert not list(tmp_path.iterdir())
    free[0] = 12 * count
    trainer = build(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    with pytest.raises(NoSpaceError, match="checkpoint-4 needs about"):  # a checkpoint has more than weights and states
        trainer.train()
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-2"] and damage(
        tmp_path / "checkpoint-2"
    ) is None


@pytest.mark.parametrize(
    ("options", "num_bytes"),
    [
        ({"save_only_model": True}, 4),
        ({"ema_decay": 0.9}, 12 + 4),
        ({"gradient_filter": GradientFilterOptions(name="ema")}, 12 + 4),
        ({"gradient_filter": GradientFilterOptions(name="ma", window=3)}, 12 + 4 * (3 + 1)),
    ],
)
def test_the_first_checkpoint_takes_what_the_options_keep(tmp_path, monkeypatch, options, num_bytes):
    """Bytes of each weight."""
    monkeypatch.setattr(checkpoints, "lack_of_space", lambda folder, num_bytes: str(num_bytes))
    trainer = build(tmp_path, max_steps=1, save_strategy="steps", save_steps=1, **options)
    with pytest.raises(NoSpaceError) as asked:
        trainer.train()
    weights = list(trainer.model.parameters())
    counts = 8 * len(weights) if num_bytes == 28 else 0  # of updates, one for each mean
    assert int(str(asked.value)) == num_bytes * sum(weight.numel() for weight in weights) + counts


def test_the_newest_whole_checkpoint_alone_says_what_the_next_one_takes(tmp_path, monkeypatch):
    """Smaller than Adam's states would be; one of the same name makes room, and one that was cut off says nothing."""
    save_whole(tmp_path / "checkpoint-2", 2)
    size = sum(path.stat().st_size for path in (tmp_path / "checkpoint-2").iterdir())
    free = [size]
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda place: SimpleNamespace(free=free[0]))
    checkpoints.begin_checkpoint(tmp_path / "checkpoint-3")
    assert lack_of_space(tmp_path / "checkpoint-4", 100 * size) is None
    free[0] = size - 1
    assert f"checkpoint-4 needs about {size / 2**20:.1f} MiB" in lack_of_space(tmp_path / "checkpoint-4", 0)
    free[0] = 0
    assert lack_of_space(tmp_path / "checkpoint-2", 100 * size) is None


@pytest.mark.parametrize("share", [0.9, 1.5])
def test_of_a_checkpoint_that_cannot_be_written_nothing_is_left(run, share):
    """Neither where its weights do not fit, nor where the states do not, which are twice as large."""
    before = sorted(run.rglob("*"))
    trainer = build(run, max_steps=6, save_strategy="steps", save_steps=2)
    size = (run / "checkpoint-4" / "model.safetensors").stat().st_size
    with full_disk(int(share * size)), pytest.raises(OSError, match=r"checkpoint-6 cannot be written .*; make room"):
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert sorted(run.rglob("*")) == before


def test_of_a_conversion_that_cannot_be_written_nothing_is_left(tmp_path, monkeypatch):
    def convert(options):
        Path(options.output_folder).mkdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setitem(
        sys.modules, "deepspeed.checkpoint", SimpleNamespace(ds_to_universal=SimpleNamespace(main=convert))
    )
    (tmp_path / "latest").write_text("global_step2")
    assert to_universal(tmp_path).endswith("cannot be written ([Errno 28] No space left on device)")
    assert [path.name for path in tmp_path.iterdir()] == ["latest"]


def test_frozen_weights_take_no_moments():
    model = torch.nn.Linear(10, 10, bias=False)
    assert bytes_of_checkpoint(model.parameters()) == 100 * 12
    assert bytes_of_checkpoint(model.to(torch.bfloat16).requires_grad_(False).parameters()) == 100 * 2
