"""The generation_config.json of a checkpoint: what it may say, checked before `generate` reads it."""

import difflib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from model import RecurrenceConfig

from .checkpoints import read_json

GENERATION_CONFIG = "generation_config.json"
LARGEST = 2**31 - 1
MOST_STEPS = 10_000
MOST_ROWS = 1024
"""Beams or answers of one prompt, which are computed at once."""


def whole(least: int, most: int = LARGEST) -> tuple[Callable[[Any], bool], str]:
    """A whole number in a range, and how that is said."""
    return lambda value: is_whole(value) and least <= value <= most, f"a whole number of {least} to {most}"


def real(least: float, most: float = math.inf) -> tuple[Callable[[Any], bool], str]:
    """A finite number in a range, and how that is said."""

    def fits(value: Any) -> bool:
        is_number = isinstance(value, float) or is_whole(value)
        return is_number and math.isfinite(value) and least <= value <= most

    return fits, f"a number of at least {least}" + (f" and at most {most}" if most < math.inf else "")


def is_whole(value: Any) -> bool:
    """Whether it is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


FLAG = (lambda value: isinstance(value, bool), "true or false")
TEXT = (lambda value: isinstance(value, str), "a text")
RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    **dict.fromkeys(("max_length", "max_new_tokens", "max_cache_len", "prefill_chunk_size"), whole(1)),
    **dict.fromkeys(("min_length", "min_new_tokens", "top_k", "no_repeat_ngram_size"), whole(0)),
    **dict.fromkeys(("num_beams", "num_return_sequences"), whole(1, MOST_ROWS)),
    **dict.fromkeys(("num_assistant_tokens", "prompt_lookup_num_tokens", "max_matching_ngram_size"), whole(1, 1024)),
    **dict.fromkeys(("num_steps", "num_kept_steps", "min_steps", "exit_check_interval"), whole(1, MOST_STEPS)),
    "num_kept_tokens": whole(1),
    **dict.fromkeys(("num_flow_steps", *RecurrenceConfig.attribute_map), whole(1, MOST_STEPS)),
    **dict.fromkeys(("temperature", "guidance_scale", "flow_temperature", "noise_level", "max_time"), real(0)),
    **dict.fromkeys(("top_p", "min_p", "typical_p", "top_h"), real(0, 1)),
    **dict.fromkeys(("epsilon_cutoff", "eta_cutoff", "assistant_confidence_threshold"), real(0, 1)),
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty"), real(1e-6)),
    **dict.fromkeys(("length_penalty", "exit_threshold", "velocity_threshold"), real(-math.inf)),
    **dict.fromkeys(("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "token_healing"), FLAG),
    **dict.fromkeys(("output_attentions", "output_hidden_states", "output_scores", "output_logits"), FLAG),
    **dict.fromkeys(("return_dict_in_generate", "is_assistant", "disable_compile", "exit_in_prefill"), FLAG),
    **dict.fromkeys(("state_warm_start", "_from_model_config"), FLAG),
    **dict.fromkeys(("cache_implementation", "cache_policy", "exit_criterion", "noise_schedule", "decoding"), TEXT),
    **dict.fromkeys(("contrast_strength", "contrast_alpha"), real(-math.inf)),
    **dict.fromkeys(("contrast_step", "sampling_seed"), whole(0)),
    "draft_steps": (lambda value: value == "auto" or (is_whole(value) and value >= 1), "a whole number, or auto"),
    **dict.fromkeys(("num_assistant_tokens_schedule", "transformers_version", "_commit_hash"), TEXT),
    "early_stopping": (lambda value: isinstance(value, bool) or value == "never", "true, false or never"),
}
TOKEN = ("pad_token_id", "bos_token_id", "decoder_start_token_id", "forced_bos_token_id")
TOKENS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")
KNOWN = (*RULES, *TOKEN, *TOKENS, "bad_words_ids")


def check_generation_config(folder: Path, vocab_size: int) -> None:
    """Compares what the file says with what `generate` can take, if there is one.

    Raises:
        ValueError: names the file, the first key whose value cannot be, and what it can be; or a key that is not known.
    """
    path = folder / GENERATION_CONFIG
    if not path.exists():
        return
    for name, value in read_json(path).items():
        if value is None:
            continue
        if name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, n=1)
            advice = f"did you mean {near[0]}?" if near else "take it out"
            raise ValueError(f"{path} is wrong: {name[:40]!r} is no setting that is read here; {advice}")
        fits, what = RULES[name] if name in RULES else rule_of_tokens(name, vocab_size)
        if not fits(value):
            raise ValueError(f"{path} is wrong: {name} is {repr(value)[:60]}; give {what}")


def rule_of_tokens(name: str, vocab_size: int) -> tuple[Callable[[Any], bool], str]:
    """What may stand under a name of tokens."""

    def is_token(value: Any) -> bool:
        return is_whole(value) and 0 <= value < vocab_size

    def are_tokens(value: Any) -> bool:
        return isinstance(value, list) and bool(value) and all(map(is_token, value))

    below = f"below {vocab_size}, the size of the vocabulary"
    if name in TOKEN:
        return is_token, f"a token {below}"
    if name in TOKENS:
        return lambda value: is_token(value) or are_tokens(value), f"a token {below}, or a list of some"
    return lambda value: isinstance(value, list) and all(map(are_tokens, value)), f"lists of tokens {below}"
