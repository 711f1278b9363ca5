"""Tokenizers: one that exists, or a byte-level BPE trained on the run's own documents."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from model.text_encoding import cut_text

from .configuration import DataConfig, TokenizerConfig
from .splits import iterate_training_texts

logger = logging.getLogger(__name__)
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
TRAINING_ROWS = 10_000
"""Rows of each hub or generated source that a vocabulary is trained on; files are read whole."""


def build_tokenizer(
    config: TokenizerConfig,
    data_config: DataConfig,
    seed: int = 0,
    resume_point: str | Path | None = None,
    media_tokens: Sequence[str] = (),
) -> PreTrainedTokenizerFast:
    """The tokenizer of a run, with pad, begin and end tokens of which pad is neither of the others.

    It never adds a begin or end token by itself: packing does, once per document, and whoever continues a prompt puts
    `tokenizer.bos_token_id` in front.

    Args:
        seed: Seed of the run, which decides what is split off for validation and so not trained on.
        resume_point: The checkpoint folder that the run goes on from, which then has the tokenizer, or its run folder:
            one trained anew would differ if the documents have changed, and the model would not know its tokens.
        media_tokens: Special tokens of roles and media, if the model reads media.

    Raises:
        ValueError: `config.path` is no tokenizer, the train sources have no usable document, the vocabulary has no room
            for the special tokens, or the tokenizer that the run began with is gone.
    """
    if resume_point is not None:
        checkpoint = Path(resume_point)  # a run saves it with its model: in each, and at the end in the folder above
        for folder in (checkpoint, checkpoint.absolute().parent):
            if (folder / "tokenizer.json").is_file():
                return load_tokenizer(str(folder), media_tokens)
        raise ValueError(
            f"neither {checkpoint} nor the folder above has the tokenizer.json that its model was trained with; "
            "copy it there, or start afresh"
        )
    if config.path is not None:
        return load_tokenizer(config.path, media_tokens)
    texts = iterate_training_texts(data_config, seed, TRAINING_ROWS)
    return train_tokenizer(texts, config.vocab_size, config.split_digits, media_tokens)


def load_tokenizer(path: str, media_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A pretrained tokenizer by name or folder; tokens it lacks (or an end token that is also its pad token) are added.

    Args:
        media_tokens: Further special tokens, at the end of the vocabulary where it lacks them.

    Raises:
        ValueError: Nothing can be loaded from `path`, or it has no fast version.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # the library of tokenizers raises nothing narrower for a damaged file
        reason = " ".join(str(error).split())
        raise ValueError(f"tokenizer.path {path!r} cannot be loaded: {reason}") from error
    if not tokenizer.is_fast:
        raise ValueError(f"tokenizer.path {path!r} has no fast version; choose one with a tokenizer.json")
    missing: dict[str, str | list[str]] = {}
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in (tokenizer.eos_token_id, tokenizer.bos_token_id):
        missing["pad_token"] = PAD  # the label of the end token is learned, the label of padding is not
    if tokenizer.bos_token_id is None:
        missing["bos_token"] = BEGIN
    if tokenizer.eos_token_id is None:
        missing["eos_token"] = END
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    if not special.issuperset(media_tokens):
        missing["extra_special_tokens"] = [token for token in media_tokens if token not in special]
    if missing:
        tokenizer.add_special_tokens(missing, replace_extra_special_tokens=False)
        logger.info("tokenizer %s: added %s, the vocabulary has %d tokens", path, missing, len(tokenizer))
    return tokenizer


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, split_digits: bool = False, media_tokens: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: lossless for any Unicode text, the same for the same texts.

    Ids are pad 0, begin 1, end 2, then `media_tokens`, the 256 bytes, and merges; few texts give a vocabulary below
    `vocab_size`.

    Raises:
        ValueError: `vocab_size` has no room for the special tokens and the bytes.
    """
    special_tokens = [PAD, BEGIN, END, *media_tokens]
    if vocab_size < len(special_tokens) + 256:
        raise ValueError(
            f"tokenizer vocab_size is {vocab_size}, but bytes and special tokens, with those of media, are "
            f"{len(special_tokens) + 256}; give at least those"
        )
    tokenizer = Tokenizer(models.BPE())
    splitters = [pre_tokenizers.Digits(individual_digits=True)] if split_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splitters, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((piece for text in texts for piece in cut_text(text)), trainer)
    trained = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        extra_special_tokens=list(media_tokens),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="right",
    )
    logger.info("trained a byte-level BPE: %d tokens (%d asked for)", len(trained), vocab_size)
    return trained
