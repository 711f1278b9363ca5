"""Fields that some clients send in ways of their own, as fields of a request."""

import json
from typing import Any

_NAMES = {"max_new_tokens": "max_tokens", "repetition_penalty": "repetition_penalty"}
_NAMES |= {name: name for name in ("num_steps", "exit_criterion", "exit_threshold", "decoding")}
_OF_SAMPLING = {name: name for name in ("temperature", "top_p", "top_k")}
_NOTHING = {"num_beams": 1, "max_length": 20}
"""Values that ask for what happens anyway."""


def fields_of_generation_config(text: str) -> dict[str, Any]:
    """The fields of a request for a generation config of transformers in JSON, which `transformers chat` sends. As
    there, tokens are the likeliest unless it says `do_sample`.

    Raises:
        ValueError: it is no JSON object, or asks for what is not supported.
    """
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError("generation_config is no JSON; give what GenerationConfig.to_json_string gives") from error
    if not isinstance(config, dict):
        raise ValueError("generation_config is no object; give what GenerationConfig.to_json_string gives")
    is_sampled = bool(config.get("do_sample"))
    names = _NAMES | _OF_SAMPLING if is_sampled else _NAMES
    fields = {} if is_sampled else {"temperature": 0.0}
    for name, value in config.items():
        if name in ("do_sample", "transformers_version") or name in _OF_SAMPLING.keys() - names.keys():
            continue
        if name in names and value is not None:
            fields[names[name]] = value
        elif value not in (None, False, _NOTHING.get(name)):
            raise ValueError(f"generation_config has {name!r:.60}, which is not supported by this server; leave it out")
    return fields
