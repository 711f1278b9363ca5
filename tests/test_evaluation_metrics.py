"""Exact loss, perplexity and bits per byte, against closed forms and plain loops."""

import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from torch.utils.data import Dataset
from transformers import AddedToken, EvalPrediction, PreTrainedTokenizerFast, Trainer, TrainingArguments

from evaluation.metrics import compute_metrics, metrics_from_sums, token_byte_lengths, token_nll, trainer_metrics
from tests.tiny_language_model import tiny_model, tiny_tokenizer


def test_byte_lengths_add_up_to_the_bytes_of_any_text():
    tokenizer = tiny_tokenizer()
    lengths = token_byte_lengths(tokenizer)
    assert lengths.shape == (len(tokenizer),) and lengths.dtype == torch.long
    for text in ("the cat sat", "naïve — 日本語 😀\n\n\t x", "\x00\x7f", "ﷺ" * 3):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert lengths[ids].sum().item() == len(text.encode("utf-8"))
    assert lengths[[0, 1, 2]].tolist() == [0, 0, 0]
    assert lengths.max() > 1  # merges happened, so the sums above were no count of tokens


def test_byte_lengths_of_added_tokens_are_those_of_their_text():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["été"])
    tokenizer.add_tokens([AddedToken("<|tool|>", special=True)], special_tokens=True)
    lengths = token_byte_lengths(tokenizer)
    assert lengths[tokenizer.convert_tokens_to_ids("été")] == 5
    assert lengths[tokenizer.convert_tokens_to_ids("<|tool|>")] == 0


def test_byte_lengths_of_other_tokenizers_are_approximate():
    vocabulary = {"<unk>": 0, "\u2581caf\u00e9": 1, "<0xE3>": 2, "##ing": 3, "a": 4}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.decoder = decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    assert token_byte_lengths(tokenizer).tolist() == [0, 6, 1, 3, 1]


def test_token_nll_is_the_plain_loop():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 5, 7), torch.randint(0, 7, (3, 5))
    labels[0, :3] = -100
    labels[2, :] = -100
    byte_lengths = torch.tensor([9, 1, 2, 3, 4, 5, 6])
    sums = token_nll(logits, labels, byte_lengths)
    assert sums.shape == (3, 3) and sums.dtype == torch.float64
    for row in range(3):
        nll = tokens = num_bytes = 0.0
        for t in range(4):
            target = labels[row, t + 1].item()
            if target != -100:
                nll -= math.log(math.exp(logits[row, t, target]) / sum(math.exp(z) for z in logits[row, t].tolist()))
                tokens += 1
                num_bytes += byte_lengths[target].item()
        assert sums[row].tolist() == pytest.approx([nll, tokens, num_bytes], abs=1e-5)
    assert torch.equal(token_nll(logits, labels), sums[:, :2])


def test_uniform_logits_give_log_vocabulary_whatever_the_batch():
    """256 equally likely byte tokens are 8 bits per byte and a perplexity of 256."""
    labels = torch.randint(0, 256, (4, 9), generator=torch.Generator().manual_seed(0))
    sums = token_nll(torch.zeros(4, 9, 256), labels, torch.ones(256, dtype=torch.long)).sum(dim=0)
    metrics = metrics_from_sums(*sums.tolist())
    assert metrics == pytest.approx({"loss": math.log(256), "perplexity": 256.0, "bits_per_byte": 8.0})


def test_each_token_weighs_the_same():
    """Rows of 1 and 9 tokens with losses of 10 and 0 per token: 1, not the 5 of a mean over rows."""
    rows = np.array([[10.0, 1, 1], [0.0, 9, 9]])
    metrics = compute_metrics(EvalPrediction(predictions=rows, label_ids=None))
    assert metrics["loss"] == 1.0
    assert metrics["perplexity"] == pytest.approx(math.e)
    assert metrics["bits_per_byte"] == pytest.approx(1 / math.log(2))


def test_nothing_scored_is_an_error_and_a_huge_loss_is_not():
    with pytest.raises(ValueError, match="0 tokens were scored: every label is -100"):
        metrics_from_sums(0.0, 0.0)
    assert metrics_from_sums(1e6, 1)["perplexity"] == math.inf


class Rows(Dataset):
    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


def test_trainer_reports_the_exact_loss(tmp_path):
    """Five rows in batches of two, the last with a single scored token: the trainer's own mean would be off."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    ids = torch.randint(3, 300, (5, 12), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[4, :-1] = -100
    rows = Rows([{"input_ids": row, "labels": label} for row, label in zip(ids, labels, strict=True)])
    arguments = TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=2, report_to="none", use_cpu=True, disable_tqdm=True
    )
    trainer = Trainer(model, arguments, eval_dataset=rows, **trainer_metrics(tokenizer))
    found = trainer.evaluate()

    with torch.no_grad():
        probabilities = model(ids).logits.log_softmax(-1)
    chosen = [(r, t) for r in range(5) for t in range(1, 12) if labels[r, t] != -100]
    nll = -sum(probabilities[r, t - 1, ids[r, t]].item() for r, t in chosen)
    num_bytes = sum(token_byte_lengths(tokenizer)[ids[r, t]].item() for r, t in chosen)
    assert len(chosen) == 45
    assert found["eval_loss"] == pytest.approx(nll / 45, rel=1e-5)
    assert found["eval_perplexity"] == pytest.approx(math.exp(nll / 45), rel=1e-4)
    assert found["eval_bits_per_byte"] == pytest.approx(nll / math.log(2) / num_bytes, rel=1e-5)
