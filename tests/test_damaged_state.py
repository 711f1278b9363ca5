"""The state of the trainer in a checkpoint without a manifest: what `Trainer` cannot load is passed over."""

import json
import re

import pytest
from transformers import TrainerState

from trainers.resuming import faulty_state

STATE = json.loads(json.dumps(TrainerState(global_step=3, epoch=0.5, max_steps=9).__dict__))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"evil": 1}, "unexpected keyword argument 'evil'"),
        ({"log_history": None}, None),
        ({"log_history": 3}, "log_history is of another type"),
        ({"epoch": "half"}, "epoch is of another type"),
        ({"epoch": None}, None),
        ({"stateful_callbacks": [1]}, "stateful_callbacks|list|int"),
        ({"global_step": "3"}, "no global_step in it"),
        ({"global_step": True}, "no global_step in it"),
        ({}, None),
    ],
)
def test_a_state_is_whole_if_the_trainer_can_load_it(tmp_path, change, reason):
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps(STATE | change))
    if reason is None:
        assert faulty_state(tmp_path) is None
        loaded = TrainerState.load_from_json(str(path))
        assert (loaded.global_step, loaded.log_history) == (3, [])
    else:
        assert re.match(rf"has a damaged {path.name} \(.*({reason})", faulty_state(tmp_path))
