"""Text models as ONNX: `python convert.py onnx RUN FOLDER --num-steps R`, at one depth, for any batch and length."""

import importlib.util
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.export import Dim
from transformers import PreTrainedTokenizerBase

from model import MegaTransformerForCausalLM
from model.depth import resolve_depth

from ..loading import load_model
from ..output import whole_folder

NEEDED = ("onnx", "onnxscript", "onnxruntime")
SHAPES = ((1, 1), (2, 7), (3, 12))
"""Rows and tokens with which a program is tried."""
CLOSE = 1e-4


class Program(nn.Module):
    """The function that is exported: ids and mask, (batch, sequence) of int64, to logits, (batch, sequence, vocab)."""

    def __init__(self, model: MegaTransformerForCausalLM, num_steps: int | None):
        super().__init__()
        self.model, self.depth = model, {} if num_steps is None else {"num_steps": num_steps}

    def forward(self, input_ids: torch.LongTensor, attention_mask: torch.LongTensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **self.depth).logits


def write_onnx(checkpoint: Path, output: Path, num_steps: int | None) -> float:
    """Write `model.onnx`, the tokenizer and the configuration of a text model. The program has the inputs `input_ids`
    and `attention_mask` and the output `logits`, no cache, and the weights inside, or beside it where they are large.

    Args:
        checkpoint: Folder of a checkpoint, or of a run, or the name of one on the hub.
        output: Folder for the program, empty or new.
        num_steps: Core steps of each token; None: the model's.

    Returns:
        The largest difference between logits of ONNX Runtime and of torch, with padding and without.

    Raises:
        ValueError: The model is no text model, or has a backend whose masks cannot be exported; a package is missing;
            or the program gives other numbers. Nothing is written then.
    """
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"{' and '.join(missing)} are needed to export ONNX; install them: make extra")
    model, tokenizer = load_model(checkpoint, dtype=torch.float32)
    if not isinstance(tokenizer, PreTrainedTokenizerBase) or not isinstance(model, MegaTransformerForCausalLM):
        raise ValueError(
            f"{checkpoint} holds a {type(model).__name__}, which reads or writes more than text; ONNX is possible for "
            "language models of text alone"
        )
    if getattr(model.config, "quantization_config", None) is not None:
        raise ValueError(f"{checkpoint} has weights of 8 or 4 bits; export what they were made of")
    has_core = model.config.num_core_layers > 0
    if num_steps is not None and not has_core:
        raise ValueError(f"{checkpoint} holds a model without a core, which takes no steps; leave out --num-steps")
    resolve_depth(num_steps, model.config, 1)
    program = Program(model, num_steps).eval()
    with whole_folder(output) as made, torch.no_grad():
        shape = {0: Dim.DYNAMIC, 1: Dim.DYNAMIC}
        exported = torch.onnx.export(
            program,
            example(2, 6, model.config.vocab_size),
            input_names=["input_ids", "attention_mask"],
            output_names=["logits"],
            dynamic_shapes={"input_ids": shape, "attention_mask": shape},
            dynamo=True,
            verbose=False,
        )
        exported.save(made / "model.onnx")
        difference = largest_difference(program, made / "model.onnx", model.config.vocab_size)
        if difference > CLOSE:
            raise ValueError(f"ONNX Runtime gives logits that differ by {difference:.2g} from torch's")
        model.config.save_pretrained(made)
        tokenizer.save_pretrained(made)
    return difference


def example(rows: int, tokens: int, vocab_size: int) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Random ids, and a mask that hides the first token of the first row, if it is not the only one."""
    ids = torch.randint(vocab_size, (rows, tokens), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, : int(tokens > 1)] = 0
    return ids, mask


def largest_difference(program: Program, path: Path, vocab_size: int) -> float:
    """How far logits of ONNX Runtime are from torch's at most, padding left out."""
    import onnxruntime  # here, since most commands do without

    session, found = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]), 0.0
    for shape in SHAPES:
        ids, mask = example(*shape, vocab_size)
        (theirs,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
        ours = program(ids, mask).numpy()
        found = max(found, float(np.abs(theirs - ours)[mask.numpy().astype(bool)].max()))
    return found
