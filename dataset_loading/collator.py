"""Rows of tokens, and their media, to batches."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from model import tokenizer_of

_FILLERS = {"input_ids": None, "labels": -100, "modality_ids": 0}  # None: the pad token


class Collator:
    """Stacks rows of one length as they are, and pads rows of different lengths on the right.

    Padded batches get an attention_mask (1 = real) and lose position_ids, which the model counts itself; labels are
    -100 on padding. Other columns are left out, but those of rows with media: `modality_ids` (0 for rows of text), and
    the media, by modality in the order of their placeholders. `input_ids` stands first.

    Args:
        processor: A tokenizer, which gives the id of the pad token, or a processor, which also joins media.
    """

    def __init__(self, processor: PreTrainedTokenizerBase | ProcessorMixin):
        self.processor = processor if isinstance(processor, ProcessorMixin) else None
        self.pad_id = (processor if self.processor is None else processor.tokenizer).pad_token_id

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """Batch of int64 tensors (rows, longest row), and of tensors of media.

        Raises:
            ValueError: Rows of different lengths hold more than one document, which padding would let see each other.
        """
        columns = [name for name in ("input_ids", "labels", "position_ids") if name in rows[0]]
        tensors = [{name: torch.as_tensor(row[name], dtype=torch.int64) for name in columns} for row in rows]
        if self.processor is not None:
            for row, tensor in zip(rows, tensors, strict=True):
                ids = row.get("modality_ids", torch.zeros_like(tensor["input_ids"]))
                tensor["modality_ids"] = torch.as_tensor(ids, dtype=torch.int64)
        lengths = {len(row["input_ids"]) for row in tensors}
        if len(lengths) == 1:
            batch = {name: torch.stack([row[name] for row in tensors]) for name in tensors[0]}
        else:
            batch = self._pad(tensors, lengths)
        return batch if self.processor is None else batch | media_of_rows(self.processor, rows)

    def _pad(self, rows: list[dict[str, torch.Tensor]], lengths: set[int]) -> dict[str, torch.Tensor]:
        if any("position_ids" in row and (row["position_ids"] == 0).sum() > 1 for row in rows):
            raise ValueError(
                f"packed rows have lengths {sorted(lengths)}, but need the same; use packing: false to pad"
            )
        names = [name for name in _FILLERS if name in rows[0]]
        shape = len(rows), max(lengths)
        fillers = _FILLERS | {"input_ids": self.pad_id}
        batch = {name: torch.full(shape, fillers[name], dtype=torch.int64) for name in names}
        batch["attention_mask"] = torch.zeros(shape, dtype=torch.int64)
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            batch["attention_mask"][number, :length] = 1
            for name in names:
                batch[name][number, :length] = row[name]
        return batch


class Seq2SeqCollator:
    """Makes a source of what stands before the answer of each row, and a target of its answer, each padded on the
    right: `input_ids` and `attention_mask`, (rows, longest source), and, (rows, longest target), `labels`, -100 on
    padding, and `decoder_input_ids`, which are those behind the token that begins a target. Media are those of both.

    Args:
        processor: A tokenizer, which has the ids of the tokens for padding and for the beginning, or a processor, which
            also joins media.
    """

    def __init__(self, processor: PreTrainedTokenizerBase | ProcessorMixin):
        self.processor = processor if isinstance(processor, ProcessorMixin) else None
        tokenizer = tokenizer_of(processor)
        self.pad_id, self.start_id = tokenizer.pad_token_id, tokenizer.bos_token_id
        self.unlearned = torch.zeros(0, dtype=torch.int64)  # what a target may have beside labels
        if self.processor is not None:
            parts = self.processor.modalities.values()
            tokens = [token for part in parts for token in (part.token, part.end_token)]
            self.unlearned = torch.tensor(tokenizer.convert_tokens_to_ids(tokens))

    def __call__(self, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
        """Batch of int64 tensors.

        Raises:
            ValueError: A row has nothing before its answer, or no answer.
        """
        sources, targets, labels = zip(*map(self._divide, rows), strict=True)
        lengths = torch.tensor([len(source) for source in sources])
        target = pad_sequence(targets, batch_first=True, padding_value=self.pad_id)
        batch = {
            "input_ids": pad_sequence(sources, batch_first=True, padding_value=self.pad_id),
            "attention_mask": (torch.arange(int(lengths.max())) < lengths[:, None]).long(),
            "decoder_input_ids": nn.functional.pad(target[:, :-1], (1, 0), value=self.start_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }
        return batch if self.processor is None else batch | media_of_rows(self.processor, rows)

    def _divide(self, row: Mapping) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The source, the target, and the labels of the target."""
        ids, labels = (torch.as_tensor(row[name], dtype=torch.int64) for name in ("input_ids", "labels"))
        is_answer = labels != -100
        first = int(is_answer.long().argmax())
        is_target = is_answer | torch.isin(ids, self.unlearned)
        if ids[:first].tolist() in ([], [self.start_id]) or not is_target[first:].all():
            raise ValueError(
                "a row is no source with one target behind it; give sources with prompt and answer, loss_on: answer, "
                "and packing: false"
            )
        return ids[:first], ids[first:], labels[first:]


def media_of_rows(processor: ProcessorMixin, rows: Sequence[Mapping]) -> dict[str, torch.Tensor]:
    """The media of all rows, by modality in the order of their placeholders, as arguments of the model."""
    media = [row.get("media", {}) for row in rows]
    found = {name: [it for items in media for it in items.get(name, [])] for name in processor.modalities}
    return processor.collate_media(found)


def build_collator(
    processor: PreTrainedTokenizerBase | ProcessorMixin, is_encoder_decoder: bool
) -> Collator | Seq2SeqCollator:
    """The collator of a model."""
    return Seq2SeqCollator(processor) if is_encoder_decoder else Collator(processor)
