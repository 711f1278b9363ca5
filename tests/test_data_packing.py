"""Packing, documents apart, and batches: each against a few lines that do the same token by token."""

import numpy as np
import pytest
import torch

from dataset_loading import Collator, PackedDataset, train_tokenizer
from dataset_loading.packing.documents import Documents, encode_batch

PAD, BEGIN, END = 0, 1, 2


def make_documents(lengths, loss_starts=None, seed=0):
    generator = np.random.default_rng(seed)
    parts = [np.concatenate([[BEGIN], generator.integers(3, 100, length - 2), [END]]) for length in lengths]
    starts = np.ones(len(lengths), dtype=np.int32) if loss_starts is None else np.array(loss_starts, dtype=np.int32)
    tokens = np.concatenate(parts).astype(np.int32)
    return Documents(tokens, np.array(lengths), starts, tokens)


def reference_rows(documents, block_size):
    """Packing token by token: a list of (token, label, position) rows."""
    rows, row, position = [], [], 0
    for tokens, _, loss_start in documents:
        for place, token in enumerate(tokens.tolist()):
            if len(row) == block_size:
                rows.append(row)
                row, position = [], 0
                if place > 0:
                    row, position = [(int(tokens[place - 1]), -100, 0)], 1
            position = 0 if place == 0 else position
            row.append((token, token if place >= loss_start else -100, position))
            position += 1
    padding = block_size - len(row)
    return [*rows, row + [(PAD, -100, number) for number in range(padding)]]


@pytest.mark.parametrize("block_size", [2, 3, 8, 17, 64])
def test_packed_rows_equal_the_token_by_token_reference(block_size):
    generator = np.random.default_rng(block_size)
    for seed in range(20):
        lengths = generator.integers(3, 40, 12)
        loss_starts = [generator.integers(1, length) for length in lengths]
        documents = make_documents(lengths, loss_starts, seed)
        packed = PackedDataset(documents, block_size, PAD)
        expected = reference_rows(documents, block_size)
        assert len(packed) == len(expected)
        for row, wanted in zip((packed[index] for index in range(len(packed))), expected, strict=True):
            got = zip(*(row[name].tolist() for name in ("input_ids", "labels", "position_ids")), strict=True)
            assert list(got) == wanted


def test_documents_that_end_on_a_block_leave_nothing_to_repeat():
    packed = PackedDataset(make_documents([4, 4, 8]), 8, PAD)
    assert len(packed) == 2
    assert packed[1]["input_ids"].tolist()[0] == BEGIN
    assert packed[0]["position_ids"].tolist() == [0, 1, 2, 3, 0, 1, 2, 3]


@pytest.mark.parametrize("packing", [True, False])
def test_every_byte_is_a_label_exactly_once(packing):
    """The sum of the byte lengths of all shifted labels is the size of the texts (what validation measures)."""
    texts = ["héllo wörld " * 30, "\r\n\ttabs\n", "日本語のテキスト" * 11, "🙂" * 50, "a"]
    tokenizer = train_tokenizer(texts, 300)
    encoded = encode_batch({"text": texts}, tokenizer, " ", "all")
    tokens = np.concatenate([np.array(part, dtype=np.int32) for part in encoded["tokens"]])
    lengths = np.array([len(part) for part in encoded["tokens"]])
    documents = Documents(tokens, lengths, np.array(encoded["loss_start"]), tokens)
    rows = PackedDataset(documents, 16, tokenizer.pad_token_id, packing)
    labels = torch.cat([rows[index]["labels"][1:] for index in range(len(rows))])  # [1:]: what the model's shift scores
    labels = labels[labels != -100]
    assert torch.equal(labels, torch.from_numpy(tokens[tokens != tokenizer.bos_token_id]).long())
    assert (labels == tokenizer.eos_token_id).sum() == len(texts)
    spelled = tokenizer.convert_ids_to_tokens(labels[labels != tokenizer.eos_token_id].tolist())
    # a byte-level token has one character for each byte that it stands for
    assert sum(map(len, spelled)) == sum(len(text.encode()) for text in texts)


@pytest.mark.parametrize("block_size", [2, 5, 16])
def test_documents_apart_never_share_a_row_and_lose_no_label(block_size):
    documents = make_documents([3, 16, 17, 31, 32, 33, 5])
    rows = PackedDataset(documents, block_size, PAD, packing=False)
    labels, begins = [], 0
    for index in range(len(rows)):
        row = rows[index]
        assert 2 <= len(row["input_ids"]) <= block_size
        assert row["position_ids"].tolist() == list(range(len(row["input_ids"])))
        begins += row["input_ids"].tolist().count(BEGIN)
        assert row["labels"][0] == -100
        labels += row["labels"][1:].tolist()
    assert begins == 7
    assert labels == [token for token in documents.tokens.tolist() if token != BEGIN]


def test_labels_of_padding_are_ignored_and_of_the_end_token_never():
    """The end token is a label in every row that holds one, padding in none."""
    packed = PackedDataset(make_documents([5, 6]), 8, PAD)
    rows = [packed[index] for index in range(len(packed))]
    for row in rows:
        ends, padding = row["input_ids"] == END, row["input_ids"] == PAD
        assert (row["labels"][padding] == -100).all()
        assert (row["labels"][ends] == END).all()
    assert rows[-1]["input_ids"].tolist().count(PAD) == 16 - 11 - 1  # one token is repeated


class _Pads:
    pad_token_id = 7


def test_collator_stacks_packed_rows_without_a_mask():
    packed = PackedDataset(make_documents([5, 6, 9]), 8, PAD)
    batch = Collator(_Pads)([packed[0], packed[1]])
    assert sorted(batch) == ["input_ids", "labels", "position_ids"]
    for name, values in batch.items():
        assert values.dtype == torch.int64
        assert values.tolist() == [packed[0][name].tolist(), packed[1][name].tolist()]


def test_collator_pads_on_the_right():
    """Labels of padding are -100."""
    rows = [
        {"input_ids": [1, 4, 2], "labels": [-100, 4, 2], "prompt": "left out", "difficulty": 3},
        {"input_ids": [1, 4, 5, 6, 2], "labels": [-100, -100, 5, 6, 2]},
    ]
    batch = Collator(_Pads)(rows)
    assert {name: values.tolist() for name, values in batch.items()} == {
        "input_ids": [[1, 4, 2, 7, 7], [1, 4, 5, 6, 2]],
        "labels": [[-100, 4, 2, -100, -100], [-100, -100, 5, 6, 2]],
        "attention_mask": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]],
    }


def test_collator_refuses_to_pad_rows_of_several_documents():
    rows = [
        {"input_ids": [1, 2, 1, 2], "position_ids": [0, 1, 0, 1]},
        {"input_ids": [1, 2], "position_ids": [0, 1]},
    ]
    with pytest.raises(ValueError, match=r"lengths \[2, 4\]"):
        Collator(_Pads)(rows)
