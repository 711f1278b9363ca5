"""`deepspeed pretrain.py` with two processes: ZeRO stages, ranks, resuming. A run goes through the real launcher; the
others are forked ranks in the environment that it would give them. An error through it is in tests/test_config.py.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import free_port, run_ranks
from tests.test_callbacks import events, texts
from tests.test_pretrain import losses, write_config

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

REPOSITORY = Path(__file__).parents[1]
QUICKSTART = REPOSITORY / "configs" / "recurrent_lm.yaml"
FEW_ROWS = """
data:
  train:
    - {kind: generated, task: addition, num_rows: 400, difficulty: [1, 2], loss_on: answer, weight: 2}
    - {kind: generated, task: stories, num_rows: 200, difficulty: [1, 2]}
  validation:
    - {kind: generated, task: stories, num_rows: 8, difficulty: [1, 2]}
"""
PICTURES = ("attention", "activations", "gradients", "exits", "trajectories")


def launch(*arguments):
    """Runs `deepspeed --num_accelerators 2 pretrain.py ARGUMENTS` on the CPU; returns the finished process."""
    command = [
        *(str(Path(sys.executable).with_name("deepspeed")), "--num_accelerators", "2"),
        *("--master_port", str(free_port()), str(REPOSITORY / "pretrain.py"), *map(str, arguments)),
    ]
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)


def trained(folder, *arguments, processes=2, script="pretrain.py"):
    """The losses of a run that must succeed."""
    ranks = run_ranks(script, *arguments, "--training.output_dir", folder, count=processes)
    assert [rank.returncode for rank in ranks] == [0] * processes, "".join(rank.stderr[-4000:] for rank in ranks)
    return losses(folder)


def refused(folder, *arguments):
    """The one line with which the first rank refuses a run; the other waits to be ended."""
    ranks = run_ranks("pretrain.py", *arguments, "--training.output_dir", folder, count=2)
    assert ranks[0].returncode == 2 and ranks[1].returncode != 0
    (line,) = [line for rank in ranks for line in rank.stderr.splitlines() if line.startswith("error: ")]
    return line


def quickstart(folder, *arguments):
    """The quickstart's config, ten steps, few rows."""
    (folder / "few.yaml").write_text(FEW_ROWS)
    return (
        *("--config", QUICKSTART, "--config", folder / "few.yaml"),
        *("--training.max_steps", "10", "--training.logging_steps", "1"),
        *(
            "--training.save_strategy",
            "no",
            "--training.eval_strategy",
            "no",
            "--callbacks.samples.max_new_tokens",
            "2",
        ),
        *(word for name in PICTURES for word in (f"--callbacks.pictures.{name}_every_steps", "6")),
        *arguments,
    )


def samples(folder):
    """What the quickstart's model writes at the end of the run, at its mean depth."""
    (text,) = texts(folder, "samples/num_steps_8").values()
    return text


def pictures(folder):
    """Names of pictures, and the smallest and the largest of the last states in the histogram of step 6."""
    (states,) = events(folder).Histograms("train/pictures/activations/core")
    names = {name.split("/")[-1] for name in events(folder).Tags()["images"]}
    return names, (states.step, states.histogram_value.min, states.histogram_value.max)


@pytest.fixture(scope="module")
def without_deepspeed(tmp_path_factory):
    """Ten steps of the quickstart on two ranks without ZeRO: their losses, what the model writes after them, and what
    pictures show of it.
    """
    folder = tmp_path_factory.mktemp("plain")
    return trained(folder / "out", *quickstart(folder)), samples(folder / "out"), pictures(folder / "out")


@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_zero_stages_agree(stage, without_deepspeed, tmp_path):
    """Invariant 6: ZeRO 0 = 1 = 2 = 3 over ten steps of varying depth, with steps without gradient before; and
    generation and pictures, for which ZeRO-3 gathers the weights step by step on both ranks. Of gradients it has none.
    """
    out = tmp_path / "out"
    ours = trained(out, *quickstart(tmp_path, "--training.deepspeed", stage))
    expected, text, (names, states) = without_deepspeed
    assert len(ours) == 10
    assert ours == pytest.approx(expected, abs=1e-4)
    assert samples(out) == text
    assert names == {"attention", "exits", "trajectories", "gradient_flow"}
    assert pictures(out) == (names - {"gradient_flow"}, pytest.approx(states, abs=1e-3))
    assert (out / "model.safetensors").is_file()


def test_two_ranks_equal_one(tmp_path):
    """Invariant 6: at a fixed depth, with like-init noise, two ranks of 2 rows = one rank of 4 rows."""
    config = write_config(tmp_path)
    flags = ("--config", config, "--model.recurrence.step_distribution", "fixed")
    two = trained(tmp_path / "two", *flags, "--training.per_device_train_batch_size", 2)
    one = trained(tmp_path / "one", *flags, "--training.per_device_train_batch_size", 4, processes=1)
    assert two == pytest.approx(one, abs=1e-5)
    evaluated = [json.loads((tmp_path / name / "eval_results.json").read_text()) for name in ("one", "two")]
    for metric in ("eval_addition_loss", "eval_addition_bits_per_byte"):
        assert evaluated[0][metric] == pytest.approx(evaluated[1][metric], abs=1e-5)


def test_resuming_on_two_ranks_with_zero_continues_exactly(tmp_path):
    """What the launcher has begun goes on without it."""
    config, out = write_config(tmp_path), tmp_path / "out"
    flags = ("--config", config, "--training.deepspeed", "zero2", "--training.gradient_accumulation_steps", 2)
    process = launch(*flags, "--training.output_dir", out)
    assert process.returncode == 0, process.stdout[-2000:] + process.stderr[-4000:]
    whole = losses(out)
    assert list((out / "checkpoint-3").glob("global_step3/*optim_states.pt"))  # DeepSpeed was there
    shutil.rmtree(out / "checkpoint-6")
    (out / "trainer_state.json").unlink()  # with it, the run would be finished
    assert trained(out, *flags, "--training.resume_from_checkpoint", "true") == whole
