"""The configuration of a run on generated pictures, sounds and stories, small enough for tests."""

from pathlib import Path

import yaml

ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}

TINY_MEDIA_RUN = {
    "model": {
        "model_type": "megatransformer",
        "text_config": {
            "vocab_size": 272,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_core_layers": 1,
            "num_attention_heads": 4,
            "max_position_embeddings": 256,
            "recurrence": {"mean_steps": 3, "backprop_steps": 2, "step_distribution": "fixed"},
        },
        "vision_config": {**ENCODER, "patch_size": 8, "image_size": 32},
        "audio_config": {**ENCODER, "num_mel_bins": 16, "sampling_rate": 8000, "n_fft": 256, "hop_length": 80},
    },
    "tokenizer": {"vocab_size": 272},
    "data": {
        "block_size": 160,
        "packing": False,
        "train": [
            {"kind": "generated", "task": "scenes", "num_rows": 30},
            {"kind": "generated", "task": "melodies", "num_rows": 30, "difficulty": [1, 2]},
            {"kind": "generated", "task": "stories", "num_rows": 30, "difficulty": [1, 1], "weight": 2},
        ],
        "validation": [
            {"kind": "generated", "task": "scenes", "num_rows": 4},
            {"kind": "generated", "task": "melodies", "num_rows": 4, "difficulty": [1, 2]},
        ],
    },
    "callbacks": {
        "samples": {"prompts": ["Once"], "num_steps": [2], "max_new_tokens": 3},
        "media_samples": {"num_examples": 1, "num_steps": [2], "max_new_tokens": 3},
    },
    "training": {
        "max_steps": 6,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "recurrence_logging_steps": 4,
        "save_strategy": "no",
        "train_sampling_strategy": "sequential",
        "modality_weights": {"image": 2.0, "audio": 0.5},
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
    },
}


def write_media_config(folder: Path, **sections: dict) -> Path:
    """TINY_MEDIA_RUN with parts of its sections replaced, as a YAML file in `folder`."""
    merged = {name: {**section, **sections.get(name, {})} for name, section in TINY_MEDIA_RUN.items()}
    path = Path(folder) / "run.yaml"
    path.write_text(yaml.safe_dump(merged))
    return path
