"""The private names of libraries that our code depends on: the whole list.

A private name may change with any release of its library, and nobody says so. `tests/test_private_names.py` compares
this list with the libraries that are installed and with our code: what is gone or changed fails there with its name,
and so does a use that is not listed here, and an entry that nothing uses any more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class PrivateName:
    """One name.

    Args:
        owner: Import path of the class or module that has it.
        kind: "override", a method of ours in its place; "call"; "read", of a value; "set", an assignment, also in the
            body of a class; or "test", any use that only tests make.
        why: What we need it for, where no public way leads.
        relies_on: Of a function, the parameters that we give or take, in their order; of anything else, the attributes
            of it that we use.
    """

    owner: str
    name: str
    kind: str
    why: str
    relies_on: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.owner}.{self.name} ({self.kind})"


GENERATION = "transformers.generation.GenerationMixin"
MODEL = "transformers.PreTrainedModel"
TRAINER = "transformers.Trainer"
GRPO = "trl.GRPOTrainer"

# The most there may be of each kind; overrides are counted by the methods of ours.
LIMITS: Mapping[str, int] = MappingProxyType({"override": 11, "call": 4, "read": 7, "set": 10, "test": 4})

PRIVATE_NAMES = (
    # ------------------------------------------------------------------------------------------- overrides, generation
    PrivateName(
        GENERATION,
        "_get_logits_processor",
        "override",
        "the pass of classifier-free guidance takes as many steps; placeholders are no text",
        ("generation_config", "model_kwargs"),
    ),
    PrivateName(
        GENERATION,
        "_get_candidate_generator",
        "override",
        "a model that drafts has a depth of its own",
        ("generation_config", "model_kwargs", "assistant_model"),
    ),
    PrivateName(
        GENERATION,
        "_expand_multimodal_outputs",
        "override",
        "features are repeated with the rows that they belong to",
        ("input_ids", "mm_encoder_output", "expand_size"),
    ),
    PrivateName(
        GENERATION,
        "_update_model_kwargs_for_generation",
        "override",
        "transformers 5.23 takes an output named `state` for a cache; goes with that version",
        ("outputs", "model_kwargs"),
    ),
    # ------------------------------------------------------------------------------------------------ overrides, model
    PrivateName(MODEL, "_init_weights", "override", "the table of initialisation", ("module",)),
    # --------------------------------------------------------------------------------------------- overrides, trainers
    PrivateName(
        TRAINER,
        "_load_from_checkpoint",
        "override",
        "weights that are missing or unexpected are errors",
        ("resume_from_checkpoint", "model"),
    ),
    PrivateName(TRAINER, "_load_best_model", "override", "parts beside the model are loaded with it"),
    PrivateName(
        "trl.trainer.base_trainer._BaseTrainer", "_send_telemetry", "override", "TRL would tell the hub of each run"
    ),
    PrivateName(
        "trl.DPOTrainer",
        "_prepare_dataset",
        "override",
        "rows are tokenised already, as in pretraining",
        ("dataset", "processing_class", "args", "dataset_name"),
    ),
    PrivateName(GRPO, "_tokenize_prompts", "override", "prompts begin as documents in training do", ("prompts",)),
    PrivateName(
        GRPO,
        "_generate_and_score_completions",
        "override",
        "chooses the depths of completions, and records them beside these",
        ("inputs",),
    ),
    # ----------------------------------------------------------------------------------------------------------- calls
    PrivateName(TRAINER, "_prepare_inputs", "call", "moves a batch to the device of the model", ("inputs",)),
    PrivateName("torch", "_dynamo", "read", "CUDA graphs write to a cache of static size", ("mark_static_address",)),
    PrivateName("os", "_exit", "call", "documented: the end of a process without taking the interpreter apart"),
    PrivateName("threading", "_shutdown", "call", "waits for threads, as Python does at its end"),
    PrivateName("atexit", "_run_exitfuncs", "call", "what was registered still runs before `os._exit`"),
    # ----------------------------------------------------------------------------------------------------------- reads
    PrivateName(
        "transformers.PreTrainedConfig",
        "_attn_implementation",
        "read",
        "the name of the attention backend, as transformers' own models read it",
    ),
    PrivateName(MODEL, "_keys_to_ignore_on_save", "read", "deltas of steps are no part of the model's file"),
    PrivateName("argparse.ArgumentParser", "_actions", "read", "the options of a parser, for their table"),
    PrivateName("torch.nn.Module", "_forward_hooks", "read", "a module with hooks is called as ever"),
    PrivateName("torch.nn.Module", "_forward_pre_hooks", "read", "a module with hooks is called as ever"),
    PrivateName("torch.nn.Module", "_compiled_call_impl", "read", "a module that is compiled is called as ever"),
    # ------------------------------------------------------------------------------------------------------------ sets
    PrivateName(
        "transformers.PreTrainedConfig", "_attn_implementation", "set", "the part has the backend of the whole"
    ),
    PrivateName(MODEL, "_auto_class", "set", "`save_pretrained` copies the code of classes that have it"),
    PrivateName(MODEL, "_keys_to_ignore_on_save", "set", "deltas of steps are no part of the model's file"),
    PrivateName(MODEL, "_no_split_modules", "set", "blocks that accelerate keeps on one device"),
    PrivateName(MODEL, "_skip_keys_device_placement", "set", "the cache has devices of its own"),
    PrivateName(MODEL, "_supports_attention_backend", "set", "attention backends by name"),
    PrivateName(MODEL, "_supports_flash_attn", "set", "attention backends by name"),
    PrivateName(MODEL, "_supports_flex_attn", "set", "attention backends by name"),
    PrivateName(MODEL, "_supports_sdpa", "set", "attention backends by name"),
    PrivateName(MODEL, "_tied_weights_keys", "set", "the head is the embedding"),
    # ----------------------------------------------------------------------------------------------------------- tests
    PrivateName("torch", "_dynamo", "test", "counts and forgets graphs", ("reset", "utils.counters")),
    PrivateName("torch.nn.Module", "_compiled_call_impl", "test", "forgets that a unit is compiled"),
    PrivateName("torch.nn.Module", "_forward_hooks", "test", "no hook is left behind"),
    PrivateName("torch.nn.Module", "_forward_pre_hooks", "test", "no hook is left behind"),
)
