"""Loss, perplexity and bits per byte, exact over a whole set.

The Hugging Face trainer averages the loss over batches, so a short last batch weighs as much as a full one. Here every
row is reduced to sums on the device, and the sums are divided once at the end.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from tokenizers import decoders
from transformers import EvalPrediction, PreTrainedConfig, PreTrainedTokenizerBase

from model import TARGET_MODALITIES, MediaConfig
from model.output_heads import output_head_configs

METRICS = ("loss", "perplexity", "bits_per_byte")  # of `metrics_from_sums`; each is better when it is smaller
BYTE_FALLBACK_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def token_byte_lengths(tokenizer: PreTrainedTokenizerBase) -> torch.LongTensor:
    """UTF-8 bytes that each token id stands for, shape (len(tokenizer),); special tokens stand for none.

    Exact for byte-level BPE, where each character of a token's string is one byte. For other tokenizers an
    approximation: a SentencePiece word mark counts as one space, a byte-fallback token as one byte, the continuation
    mark of WordPiece as nothing, all else as its own UTF-8 length; bytes that normalisation removed are not seen.
    """
    special = set(tokenizer.all_special_ids)
    added = tokenizer.added_tokens_decoder
    # Whether the vocabulary is written in the byte-level alphabet, GPT-2's way.
    byte_level = tokenizer.is_fast and isinstance(tokenizer.backend_tokenizer.decoder, decoders.ByteLevel)
    lengths = torch.zeros(len(tokenizer), dtype=torch.long)
    for token, index in tokenizer.get_vocab().items():
        if index in added:  # stored as plain text by every kind of tokenizer
            is_special = index in special or added[index].special
            lengths[index] = 0 if is_special else len(added[index].content.encode("utf-8"))
        elif index not in special:
            lengths[index] = len(token) if byte_level else approximate_byte_length(token)
    return lengths


def approximate_byte_length(token: str) -> int:
    """Bytes of a token's string after removing the marks of SentencePiece and WordPiece."""
    if BYTE_FALLBACK_TOKEN.fullmatch(token):
        return 1
    return len(token.removeprefix("##").replace("\u2581", " ").encode("utf-8"))


@torch.no_grad()
def token_nll(
    logits: torch.Tensor, labels: torch.LongTensor, byte_lengths: torch.LongTensor | None = None
) -> torch.Tensor:
    """Sums of `token_scores` over the tokens of each row, (batch, 2 or 3)."""
    return token_scores(logits, labels, byte_lengths).sum(dim=1)


@torch.no_grad()
def token_scores(
    logits: torch.Tensor, labels: torch.LongTensor, byte_lengths: torch.LongTensor | None = None
) -> torch.Tensor:
    """What is known of each token that is predicted, in float64 and on the device of the logits.

    Args:
        logits: (batch, sequence, vocabulary).
        labels: (batch, sequence), not shifted: the logits at t are scored against the label at t + 1; -100 is not
            scored.
        byte_lengths: (tokens,) of `token_byte_lengths`, or None; ids behind them, such as codes of images, have none.

    Returns:
        (batch, sequence - 1, 2): negative log-likelihood in nats, and 1; (batch, sequence - 1, 3) with the number of
        bytes as well where `byte_lengths` is given. All 0 where a token is not scored.
    """
    targets = labels[:, 1:]
    nll = F.cross_entropy(
        logits[:, :-1].float().transpose(1, 2), targets, ignore_index=-100, reduction="none"
    )  # (batch, sequence - 1)
    scored = targets != -100
    scores = [nll.double(), scored.double()]
    if byte_lengths is not None:
        lengths = F.pad(byte_lengths, (0, max(0, logits.shape[-1] - len(byte_lengths))))
        lengths = lengths.to(targets.device)[targets.clamp(min=0)]
        scores.append((lengths * scored).double())
    return torch.stack(scores, dim=-1)


def as_causal(logits: torch.Tensor, labels: torch.LongTensor) -> tuple[torch.Tensor, torch.LongTensor]:
    """Logits and labels of a decoder behind an encoder, of which position i predicts label i, as those of a causal
    model, of which it predicts label i + 1: both are a position longer.
    """
    return F.pad(logits, (0, 0, 0, 1)), F.pad(labels, (1, 0), value=-100)


def metrics_from_sums(nll: float, tokens: float, num_bytes: float | None = None) -> dict[str, float]:
    """Mean loss in nats per token, perplexity, and bits per byte where the bytes are known.

    Raises:
        ValueError: no token was scored.
    """
    if tokens == 0:
        raise ValueError("0 tokens were scored: every label is -100; check the data's loss_on and answer columns.")
    loss = nll / tokens
    metrics = {"loss": loss, "perplexity": torch.tensor(loss, dtype=torch.float64).exp().item()}
    if num_bytes:
        metrics["bits_per_byte"] = nll / math.log(2) / num_bytes
    return metrics


def with_flow_losses(
    metrics: Mapping[str, float], sums: Mapping[str, Sequence[float]], weights: Mapping[str, float]
) -> dict[str, float]:
    """Metrics of tokens with `flow_loss_NAME`, the mean over the latents of each modality that has any. Their sum, each
    times its weight, is added to `loss`, as in training; perplexity and bits per byte stay those of the tokens.

    Args:
        metrics: Those of `metrics_from_sums`.
        sums: The sum of the losses of latents, and their number, by modality.
        weights: Those of the model (`flow_weights`).
    """
    means = {name: total / count for name, (total, count) in sums.items() if count}
    loss = metrics["loss"] + sum(weights[name] * mean for name, mean in means.items())
    return {**metrics, "loss": loss} | {f"flow_loss_{name}": mean for name, mean in means.items()}


def flow_weights(config: PreTrainedConfig | None) -> dict[str, float]:
    """The weight of the loss of latents in that of a model, by modality; none where it generates text alone."""
    heads = output_head_configs(config) if isinstance(config, MediaConfig) else {}
    return {name: head.loss_weight for name, head in heads.items()}


def row_sums(
    outputs: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
    labels: torch.LongTensor,
    byte_lengths: torch.LongTensor,
    is_encoder_decoder: bool = False,
) -> torch.Tensor:
    """`token_nll` of each row, and behind it what the trainer counts of its latents, (batch, 3 + 2 x modalities).

    Args:
        outputs: Logits; or a pair of them and (batch, 2 x modalities), in the order of `TARGET_MODALITIES`.
        labels, byte_lengths: See `token_scores`.
        is_encoder_decoder: Whether position i predicts label i.
    """
    logits, *of_latents = outputs if isinstance(outputs, tuple) else (outputs,)
    if is_encoder_decoder:
        logits, labels = as_causal(logits, labels)
    return torch.cat([token_nll(logits, labels, byte_lengths), *of_latents], dim=1)


def compute_metrics(prediction: EvalPrediction, weights: Mapping[str, float] | None = None) -> dict[str, float]:
    """`compute_metrics` for the trainer, from the gathered rows of `row_sums`, or of `token_nll`.

    Its "loss" takes the place of the trainer's mean over batches.

    Args:
        weights: `flow_weights` of the model.
    """
    totals = prediction.predictions.sum(axis=0).tolist()
    sums = list(zip(totals[3::2], totals[4::2], strict=True))  # none of a model that generates no media
    of_latents = dict(zip(TARGET_MODALITIES[: len(sums)], sums, strict=True))
    return with_flow_losses(metrics_from_sums(*totals[:3]), of_latents, weights or {})


def trainer_metrics(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig | None = None) -> dict[str, Callable]:
    """The two keyword arguments of the Hugging Face trainer that give exact metrics for texts of this tokenizer.

    Args:
        config: Configuration of the model, which it needs where it generates media.
    """
    options = {"is_encoder_decoder": config is not None and config.is_encoder_decoder}
    return {
        "preprocess_logits_for_metrics": partial(row_sums, byte_lengths=token_byte_lengths(tokenizer), **options),
        "compute_metrics": partial(compute_metrics, weights=flow_weights(config)),
    }
