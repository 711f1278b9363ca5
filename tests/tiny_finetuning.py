"""The configuration of a run that tunes a tiny checkpoint, small enough for tests."""

from pathlib import Path

import yaml

TINY_TUNING = {
    "trainer": "sft",
    "peft": {
        "rank": 2,
        "alpha": 6,
        "dropout": 0.1,
        "target_modules": {"prelude": ["qkv_proj"], "core": "all-linear", "coda": ["down_proj"]},
    },
    "data": {
        "block_size": 48,
        "train": [
            {"kind": "generated", "task": "addition", "num_rows": 120, "difficulty": [3, 3], "loss_on": "answer"},
            {"kind": "generated", "task": "reversal", "num_rows": 60, "prompt": "Reverse {prompt}."},
        ],
        "validation": [{"kind": "generated", "task": "addition", "num_rows": 20, "difficulty": [3, 3]}],
    },
    "training": {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "recurrence_logging_steps": 0,
        "use_cpu": True,
        "disable_tqdm": True,
    },
}


def write_tuning_config(folder: Path, base: Path, **sections) -> Path:
    """TINY_TUNING for a base, with parts of its sections replaced, or a section that is none, as a YAML file."""
    tree = {"model": {"path": str(base)}, **TINY_TUNING}
    for name, section in sections.items():
        there = tree.get(name)
        tree[name] = {**there, **section} if isinstance(there, dict) and isinstance(section, dict) else section
    path = Path(folder) / "tuning.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path
