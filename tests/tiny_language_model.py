"""A tokenizer and a model small enough for tests, made on the spot."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from model import MegaTransformerForCausalLM, MegaTransformerTextConfig, RecurrenceConfig

TEXT = "the cat sat on the mat. a naïve café — 日本語 😀\n" * 4


def tiny_tokenizer(vocab_size: int = 300) -> PreTrainedTokenizerFast:
    """Byte-level BPE with <|pad|>, <|begin|> and <|end|> as ids 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|pad|>", "<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", bos_token="<|begin|>", eos_token="<|end|>"
    )


def tiny_model(num_core_layers: int = 1, seed: int = 0, **options) -> MegaTransformerForCausalLM:
    """A model of a few thousand parameters for `tiny_tokenizer`."""
    torch.manual_seed(seed)
    config = MegaTransformerTextConfig(
        **{
            "vocab_size": 320,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_prelude_layers": 1,
            "num_core_layers": num_core_layers,
            "num_coda_layers": 1,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "recurrence": RecurrenceConfig(mean_steps=3, backprop_steps=2),
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **options,
        }
    )
    return MegaTransformerForCausalLM(config).eval()


def save_checkpoint(folder: Path, **options) -> Path:
    """A checkpoint folder with weights, config and tokenizer."""
    tiny_model(**options).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def one_update(folder, rate: float, **others) -> dict:
    """Training arguments of one update of plain gradient descent, so that the gradient can be read off the weights."""
    return {
        "output_dir": str(folder),
        "max_steps": 1,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        **others,
    }
