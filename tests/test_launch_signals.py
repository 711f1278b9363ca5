"""SIGTERM to the launcher: its ranks save, and all processes end."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import free_port
from tests.test_launch import REPOSITORY
from tests.test_pretrain import write_config
from trainers.resuming import damage

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

COMMANDS = {
    "deepspeed": ["--num_accelerators", "2", "--master_port"],
    "torchrun": ["--nproc_per_node", "2", "--master_port"],
}


@pytest.mark.parametrize("launcher", COMMANDS)
def test_sigterm_to_the_launcher_ends_all_with_one_checkpoint(launcher, tmp_path):
    """DeepSpeed's launcher forwards no signal, torchrun's does; workers that read the data get it, too. The pipe ends
    when the last process that could write to it has ended.
    """
    config, out = write_config(tmp_path, training={"max_steps": 5000, "save_steps": 5000}), tmp_path / "out"
    command = [
        *(str(Path(sys.executable).with_name(launcher)), *COMMANDS[launcher], str(free_port()), "pretrain.py"),
        *("--config", str(config), "--training.output_dir", str(out), "--training.dataloader_num_workers", "1"),
        *(("--training.deepspeed", "zero2") if launcher == "deepspeed" else ()),
    ]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command, cwd=REPOSITORY, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    said = ""
    for line in process.stdout:
        if "grad_norm" in line and "grad_norm" not in said:
            process.send_signal(signal.SIGTERM)
        said += line
    assert process.wait() != 0
    assert said.count("stopped by SIGTERM behind step") == 1, said
    (checkpoint,) = out.glob("checkpoint-*")
    assert damage(checkpoint) is None and not (out / "trainer_state.json").exists()
