"""A model that knows a conversation by heart, in which it calls the calculator."""

import json
from pathlib import Path

import torch

from dataset_loading import DataConfig, SourceConfig, build_datasets, train_tokenizer
from model.chat import prepare_tokenizer
from tests.tiny_language_model import tiny_model

TOWER = "calculator(9**9**9**9)"
TALK = [
    {"role": "user", "content": "What is 2*21?"},
    {"role": "assistant", "content": "calculator(2*21)"},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "It is 42"},
    {"role": "user", "content": "A tower!"},
    {"role": "assistant", "content": TOWER},
    {"role": "tool", "content": "error: a number of more than 100 digits"},
    {"role": "assistant", "content": "No"},
]


def save_talker(folder: Path) -> Path:
    """What is saved of a model that has learned `TALK`."""
    tokenizer = train_tokenizer([], 259)
    prepare_tokenizer(tokenizer, 320)
    (folder / "talk.jsonl").write_text(json.dumps({"messages": TALK}) + "\n")
    source, held_out = (
        SourceConfig("chat", paths=[str(folder / "talk.jsonl")]),
        SourceConfig("generated", task="calculator", num_rows=2),
    )
    (row,) = build_datasets(DataConfig([source], [held_out], block_size=200, packing=False), tokenizer).train
    batch = {name: values[None] for name, values in row.items() if name in ("input_ids", "labels")}
    model = tiny_model(max_position_embeddings=256).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(300):
        loss = model(**batch, num_steps=3).loss
        if loss < 0.01:
            break
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
