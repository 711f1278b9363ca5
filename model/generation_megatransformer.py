"""What `generate` needs to know about recurrent depth."""

from typing import Any

from transformers import GenerationConfig

from .cache import RecurrentCache


class RecurrentGenerationMixin:
    """Goes before `GenerationMixin`: depth from keyword or generation config, and the cache with a slot per step."""

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict]:
        """Depth: the keyword, then `generation_config.num_steps`; where both are silent, `forward` takes
        `config.num_steps`, then the mean. A keyword that the generation config has an entry for lands there, not in the
        arguments of the model, so it is taken back.
        """
        cache = {name: kwargs.pop(name) for name in ("cache_policy", "num_kept_steps") if name in kwargs}
        generation_config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        for name, value in cache.items():
            setattr(generation_config, name, value)
        num_steps = getattr(generation_config, "num_steps", None)
        if model_kwargs.get("num_steps") is None and num_steps is not None:
            model_kwargs["num_steps"] = num_steps
        return generation_config, model_kwargs

    def _prepare_cache_for_generation(self, generation_config: GenerationConfig, model_kwargs: dict, *args) -> None:
        """As the original, with a `RecurrentCache` in place of transformers' dynamic cache. Its policy: the keywords
        `cache_policy` and `num_kept_steps`, then the generation config, then `config.recurrence`.
        """
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache is not False:
            if generation_config.cache_implementation not in (None, "dynamic"):
                raise ValueError(
                    f"cache_implementation {generation_config.cache_implementation!r} is not known here; leave it out"
                )
            chosen = (getattr(generation_config, name, None) for name in ("cache_policy", "num_kept_steps"))
            model_kwargs["past_key_values"] = RecurrentCache(self.config, *chosen)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs: dict, *args: Any, **kwargs: Any) -> dict:
        """As the original, which takes an output named `state` for a cache: ours is none."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        model_kwargs.pop("state", None)
        return model_kwargs
