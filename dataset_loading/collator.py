"""Rows of tokens to batches."""

from collections.abc import Mapping, Sequence

import torch
from transformers import PreTrainedTokenizerBase


class Collator:
    """Stacks rows of one length as they are, and pads rows of different lengths on the right.

    Padded batches get an attention_mask (1 = real) and lose position_ids, which the model counts itself; labels are
    -100 on padding. Columns other than input_ids, labels and position_ids are left out.

    Args:
        tokenizer: gives the id of the pad token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.pad_id = tokenizer.pad_token_id

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """Batch of int64 tensors (rows, longest row).

        Raises:
            ValueError: rows of different lengths hold more than one document, which padding would let see each other.
        """
        columns = [name for name in ("input_ids", "labels", "position_ids") if name in rows[0]]
        rows = [{name: torch.as_tensor(row[name], dtype=torch.int64) for name in columns} for row in rows]
        lengths = [len(row["input_ids"]) for row in rows]
        longest = max(lengths)
        if min(lengths) == longest:
            return {name: torch.stack([row[name] for row in rows]) for name in columns}
        if any("position_ids" in row and (row["position_ids"] == 0).sum() > 1 for row in rows):
            raise ValueError(
                f"packed rows have lengths {sorted(set(lengths))}, but need the same; use packing: false to pad"
            )
        batch = {"attention_mask": torch.zeros(len(rows), longest, dtype=torch.int64)}
        for name, filler in (("input_ids", self.pad_id), ("labels", -100)):
            if name in columns:
                batch[name] = torch.full((len(rows), longest), filler, dtype=torch.int64)
        for number, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            batch["attention_mask"][number, :length] = 1
            for name in batch.keys() & row.keys():
                batch[name][number, :length] = row[name]
        return batch
