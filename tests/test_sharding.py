"""FSDP2 that a run has asked for and does not get; two ranks that get it are in tests/test_launch_ranks.py."""

import pytest
from accelerate import PartialState
from accelerate.utils import DistributedType

from tests.test_trainer import build
from tests.tiny import tiny_model
from trainers.sharding import NotShardedError, ShardingCallback, let_cpus_shard


def test_a_model_that_is_whole_on_each_rank_is_an_error():
    model = tiny_model()
    count = sum(1 for _ in model.parameters())
    with pytest.raises(
        NotShardedError, match=rf"fsdp is on, but {count} parameters are whole on each rank, such as mod"
    ):
        ShardingCallback().on_train_begin(None, None, None, model=model)
    assert type(model).__name__ == "MegaTransformerForCausalLM"


def test_a_trainer_looks_at_what_it_was_given(tmp_path, monkeypatch):
    """Also where accelerate shards nothing, as on one process without a launcher, which transformers refuses first."""
    with pytest.raises(ValueError, match="fsdp only works in distributed training"):
        build(tmp_path, fsdp=True)
    trainer = build(tmp_path)
    assert not any(isinstance(callback, ShardingCallback) for callback in trainer.callback_handler.callbacks)


def test_only_several_cpus_pass_for_accelerators(monkeypatch):
    state = PartialState()
    for there, then in (
        (DistributedType.MULTI_CPU, DistributedType.MULTI_GPU),
        (DistributedType.NO, DistributedType.NO),
        (DistributedType.MULTI_GPU, DistributedType.MULTI_GPU),
    ):
        monkeypatch.setattr(state, "distributed_type", there)
        let_cpus_shard()
        assert state.distributed_type == then
