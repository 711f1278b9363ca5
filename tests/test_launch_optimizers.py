"""Each optimizer under each way to share a model among two ranks: it trains, or is refused in one line."""

import json

import pytest

from tests.processes import ROOT, run_ranks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STRATEGIES = {
    "DDP": {},
    **{f"ZeRO-{stage}": {"deepspeed": str(ROOT / f"configs/deepspeed/zero{stage}.json")} for stage in range(4)},
    "FSDP2": {"fsdp": True},
}
# The options of each, and where it is refused.
OPTIMIZERS = {
    "adamw_torch": ({"optim": "adamw_torch"}, ()),
    "adamw_torch_fused": ({"optim": "adamw_torch_fused"}, ()),
    "adafactor": ({"optim": "adafactor"}, ("FSDP2",)),
    "adamw_bnb_8bit": ({"optim": "adamw_bnb_8bit"}, ("FSDP2",)),
    "muon": ({"muon_learning_rate": 0.01, "max_grad_norm": 0.0}, ("ZeRO-0", "FSDP2")),
}

# Three updates with each of several sets of options, one after another: the losses, or what it was refused with.
SCRIPT = """
import json, sys
from inference.shutdown import end_process
from tests.test_trainer import build, rows
from tests.tiny import tiny_model

found = {}
for name, options in json.loads(sys.argv[2]).items():
    try:
        trainer = build(
            sys.argv[1], seed=1, model=tiny_model(), max_steps=3, per_device_train_batch_size=2, **options
        )
        trainer.train()
        found[name] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    except ValueError as error:
        found[name] = str(error)
print("FOUND", json.dumps(found))
end_process(0)
"""


def train(folder, cells):
    """What came of each set of options, the same on both ranks."""
    processes = run_ranks("-c", SCRIPT, folder, json.dumps(cells), count=2)
    assert [process.returncode for process in processes] == [0, 0], processes[0].stderr[-3000:]
    lines = [next(it for it in process.stdout.splitlines() if it.startswith("FOUND ")) for process in processes]
    found, of_second = (json.loads(line.removeprefix("FOUND ")) for line in lines)
    assert found == of_second
    return found


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_optimizer_trains_or_is_refused(tmp_path, strategy):
    """The loss falls on both ranks alike; a refusal is the same on both, and one line that says what to do."""
    cells = {name: options | STRATEGIES[strategy] for name, (options, _) in OPTIMIZERS.items()}
    muon = {"muon": cells.pop("muon")}  # DeepSpeed's file is read once in a process, and says another optimizer here
    found = train(tmp_path, cells) | train(tmp_path, muon)
    for name, (_, refused) in OPTIMIZERS.items():
        if strategy in refused:
            assert isinstance(found[name], str) and "\n" not in found[name] and "; " in found[name], (name, found[name])
        else:
            assert len(found[name]) == 3 and 4 < found[name][-1] < found[name][0], (name, found[name])
