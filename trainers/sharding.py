"""FSDP2: weights, gradients and states of the optimizer divided among the ranks by torch's `fully_shard`."""

import io
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from model.recurrence import RecurrentCore

SHARDED, WHOLE = "SHARDED_STATE_DICT", "FULL_STATE_DICT"
METADATA_NAME = ".metadata"  # the index of a folder of torch's distributed checkpoint, a pickle
# All that such an index is made of.
CLASSES_OF_METADATA = {
    "pathlib.PosixPath",
    "torch.Size",
    "torch.serialization._get_layout",
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    *(
        f"torch.distributed.checkpoint.metadata.{name}"
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    *(str(dtype) for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)),
}


def let_cpus_shard() -> None:
    """Make accelerate shard on CPUs: it does so where ranks have accelerators, and would copy the whole model to all
    ranks of CPUs without a word, as DDP does.
    """
    if PartialState().distributed_type == DistributedType.MULTI_CPU:
        PartialState().distributed_type = DistributedType.MULTI_GPU  # the state of the accelerator makes FSDP of it


class NotShardedError(ValueError):
    """A run that has asked for FSDP and would train whole copies of its model."""


class ShardingCallback(TrainerCallback):
    """Looks at the model that a run has asked to be sharded, when training begins.

    The layers of the core stay whole from their first step in a forward pass until the backward pass, instead of being
    gathered anew in each step.
    """

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Check it, and make it save itself as the model that it was.

        Raises:
            NotShardedError: Some parameters are whole on each rank.
        """
        whole = [name for name, parameter in model.named_parameters() if not isinstance(parameter, DTensor)]
        if whole:
            raise NotShardedError(
                f"training.fsdp is on, but {len(whole)} parameters are whole on each rank, such as {whole[0]}; set "
                "fsdp to false, or start with a launcher that gives each rank a process"
            )
        # torch gives a sharded model a class of its own, whose file transformers would save as the model's code.
        sharded, original = type(model), type(model).__mro__[2]
        sharded.__module__, sharded.__name__ = original.__module__, original.__name__
        # Gathered, tied weights are tensors of their own, which transformers would save twice.
        model._keys_to_ignore_on_save = [*(model._keys_to_ignore_on_save or ()), *model.all_tied_weights_keys]
        for core in (module for module in model.modules() if isinstance(module, RecurrentCore)):
            for unit in (module for module in core.modules() if isinstance(module, FSDPModule)):
                unit.set_reshard_after_forward(False, recurse=False)


@contextmanager
def saving_whole(accelerator: Accelerator) -> Iterator[None]:
    """A context in which a model is saved with whole weights, and after which states are divided among the ranks."""
    plugin = accelerator.state.fsdp_plugin
    plugin.set_state_dict_type(WHOLE)
    try:
        yield
    finally:
        plugin.set_state_dict_type(SHARDED)


# ------------------------------------------------------------------------------------- files of distributed checkpoints


class MetadataUnpickler(pickle.Unpickler):
    """Reads the index of a distributed checkpoint; pickle.UnpicklingError for anything that it is not made of."""

    def find_class(self, module: str, name: str) -> Any:
        """One of the known classes."""
        if f"{module}.{name}" not in CLASSES_OF_METADATA:
            raise pickle.UnpicklingError(f"{module}.{name}")
        return super().find_class(module, name)


def read_metadata(folder: Path) -> Metadata:
    """The index of a folder of a distributed checkpoint.

    Raises:
        pickle.UnpicklingError: It holds something else.
    """
    with (folder / METADATA_NAME).open("rb") as file:
        metadata = MetadataUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(type(metadata).__name__)
    return metadata


def entries_of(folder: Path, metadata: Metadata, only_values: bool = False) -> Iterator[tuple[str, Any]]:
    """What is in the files of a distributed checkpoint, with its names: parts of tensors, and values that are none.

    Args:
        only_values: Whether tensors are left out, which torch loads without running code.

    Raises:
        pickle.UnpicklingError: A value is more than plain.
    """
    for index, place in metadata.storage_data.items():
        if only_values and not isinstance(metadata.state_dict_metadata[index.fqn], BytesStorageMetadata):
            continue
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            content = io.BytesIO(file.read(place.length))
        try:
            value = torch.load(content, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise pickle.UnpicklingError(f"more than tensors and plain values ({index.fqn})") from error
        yield index.fqn, value
