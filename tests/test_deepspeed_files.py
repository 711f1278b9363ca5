"""Files of DeepSpeed and other options that are mappings: what nobody would read in them is refused before all else."""

import json
import re

import pytest

from configs.deepspeed_files import DEEPSPEED_FOLDER, deepspeed_content, find_deepspeed
from trainers import RecurrentTrainingArguments

BASE = json.loads((DEEPSPEED_FOLDER / "zero2.json").read_text())
AUTO_PARAMS = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
GOOD = [
    {},
    {"steps_per_print": 2000, "wall_clock_breakdown": True, "gradient_clipping": 0.5, "train_batch_size": 8},
    {"optimizer": {"type": "AdamW", "params": AUTO_PARAMS}},
    {"optimizer": {"type": "Lion", "params": {"lr": 1e-3}}},
    {"scheduler": {"type": "WarmupDecayLR", "params": {"total_num_steps": "auto", "warmup_num_steps": "auto"}}},
    {"zero_optimization": {"stage": 3, "stage3_prefetch_bucket_size": "auto", "offload_param": {"device": "cpu"}}},
    {"bf16": {"enabled": "auto"}, "communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}},
    {"tensorboard": {"enabled": False}, "checkpoint": {"tag_validation": "Warn"}, "flops_profiler": {"enabled": False}},
]
BAD = [
    ({"zero_optimisation": {"stage": 3}}, "unknown key zero_optimisation; did you mean zero_optimization?"),
    ({"stage": 3}, "unknown key stage;"),
    ({"_comment": "mine"}, "unknown key _comment;"),
    ({"zero_optimization": {"stge": 3}}, "unknown key zero_optimization.stge; did you mean stage?"),
    (
        {"zero_optimization": {"stage3_param_persistence_treshold": 1}},
        "unknown key zero_optimization.stage3_param_persistence_treshold; did you mean stage3_param_persist",
    ),
    (
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"devce": "cpu"}}},
        "unknown key zero_optimization.offload_optimizer.devce; did you mean device?",
    ),
    ({"bf16": {"enabeld": True}}, "unknown key bf16.enabeld; did you mean enabled?"),
    ({"tensorboard": {"enabld": True}}, "unknown key tensorboard.enabld; did you mean enabled?"),
    ({"flops_profiler": {"enabld": True}}, "unknown key flops_profiler.enabld; did you mean enabled?"),
    ({"checkpoint": {"tag_validaton": "Warn"}}, "unknown key checkpoint.tag_validaton; did you mean tag_validation?"),
    ({"zero_optimization": {"stage": "three"}}, "zero_optimization.stage is 'three': Input should be 0, 1, 2, 3"),
    ({"zero_optimization": {"stage": 7}}, "zero_optimization.stage is 7: Input should be 0, 1, 2, 3"),
    ({"zero_optimization": 2}, "DeepSpeed refuses zero_optimization = 2: "),
    ({"bf16": True}, "DeepSpeed refuses bf16 = True: "),
    ({"bf16": {"enabled": "yes please"}}, "bf16.enabled is 'yes please': Input should be a valid boolean"),
    ({"communication_data_type": "fp99"}, "DeepSpeed refuses communication_data_type = 'fp99': Invalid"),
    ({"gradient_clipping": "1.0"}, "gradient_clipping is '1.0'; give a number"),
    ({"zero_allow_untested_optimizer": "auto"}, "zero_allow_untested_optimizer is 'auto'; give true or false"),
    ({"train_batch_size": "8"}, "train_batch_size is '8'; give an integer of at least 1"),
    ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu is 0; give an integer of at least 1"),
    ({"optimizer": []}, "optimizer is [], not an object with type and params"),
    ({"optimizer": {"typ": "Adam"}}, "unknown key optimizer.typ; did you mean type?"),
    ({"optimizer": {"type": "AdamWW"}}, "optimizer.type is 'AdamWW', which is unknown; did you mean adam?"),
    ({"optimizer": {"type": "AdamW", "params": {"lrr": 1}}}, "unknown key optimizer.params.lrr; did you mean lr?"),
    (
        {"scheduler": {"type": "WarmupDecay"}},
        "scheduler.type is 'WarmupDecay', which is unknown; did you mean WarmupDec",
    ),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": 3}}},
        "unknown key scheduler.params.warmup_steps; did you mean warmup_num_steps?",
    ),
]
TEXTS = [
    ('{"zero_optimization": {"stage": 2},}', "is not valid JSON: "),
    (
        '{"zero_optimization": {"stage": 2}, "zero_optimization": {"stage": 3}}',
        "key 'zero_optimization' is there twice",
    ),
    ("{'a': 1}", "is not valid JSON: "),
    ("", "is not valid JSON: "),
    ("[]", "holds a list, not an object"),
    ("null", "holds a NoneType, not an object"),
    ("[" * 100000, "is not valid JSON: it is nested too deeply"),
]


@pytest.mark.parametrize("change", GOOD, ids=lambda change: " ".join(change) or "nothing")
def test_what_deepspeed_reads_is_let_through(change):
    find_deepspeed({**BASE, **change})


@pytest.mark.parametrize("path", sorted(DEEPSPEED_FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_our_own_files_are_let_through(path):
    assert find_deepspeed(path.stem) == str(path)


@pytest.mark.parametrize(("change", "words"), BAD, ids=[words[:50] for _, words in BAD])
def test_what_deepspeed_would_not_read_is_one_line(tmp_path, change, words):
    """In a file and given as it is."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**BASE, **change}))
    for value, beginning in (
        (str(path), f"training.deepspeed: {path}: "),
        ({**BASE, **change}, "training.deepspeed: "),
    ):
        with pytest.raises(ValueError, match=re.escape(beginning + words)) as error:
            find_deepspeed(value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("text", "words"), TEXTS, ids=[words[:30] for _, words in TEXTS])
def test_what_is_no_json_object_is_one_line(tmp_path, text, words):
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(f"{path} {words}" if "twice" not in words else words)):
        find_deepspeed(str(path))


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path):
    """Its content is given on, as not every reader knows the mark."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(BASE), encoding="utf-8-sig")
    assert find_deepspeed(str(path)) == BASE == deepspeed_content(str(path))


def test_a_file_that_is_not_there_names_those_that_are():
    with pytest.raises(ValueError, match="zero9 does not exist; give a path or one of zero0, zero1, zero2, zero3"):
        find_deepspeed("zero9")


# ------------------------------------------------------------------------------------------------- other mappings


KEYWORDS = [
    (
        {"activation_checkpointing_kwargs": {"use_reentrnt": False}},
        "kwargs.use_reentrnt is unknown; did you mean use_ree",
    ),
    (
        {"gradient_checkpointing_kwargs": {"use_reentrnt": False}},
        "kwargs.use_reentrnt is unknown; did you mean use_ree",
    ),
    ({"activation_checkpointing_kwargs": {"use_reentrant": "no"}}, "use_reentrant: 'no' is neither true nor false"),
    ({"lr_scheduler_type": "constant", "lr_scheduler_kwargs": {"num_cycles": 1}}, "the schedule constant takes none"),
    ({"optim_args": "momentum=0.9"}, "optim_args: adamw_torch_fused takes none"),
    ({"optim": "sgd", "optim_args": "momentm=0.9"}, "optim_args.momentm is unknown; did you mean momentum?"),
    ({"optim": "sgd", "optim_args": "momentum"}, "optim_args: 'momentum' is no name=value"),
    ({"fsdp_config": {"version": 2}}, "fsdp_config is given, but fsdp is off"),
    (
        {"fsdp": "full_shard", "fsdp_config": {"fsdp_reshard_after_forwrd": True}},
        "fsdp_config.reshard_after_forwrd is unknown; did you mean reshard_after_forward?",
    ),
    ({"fsdp": True, "fsdp_config": {"fsdp_version": 1}}, "fsdp_config.version is 1, but the first version is at the"),
    ({"fsdp": True, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}}, "is 'FULL_STATE_DICT', but whole states"),
    ({"fsdp": True, "fsdp_config": {"activation_checkpointing": True}}, "set training's own; leave it out"),
    (
        {"fsdp": True, "optim": "adafactor"},
        "training.optim is 'adafactor', which cannot compute with the parts",
    ),
    (
        {"fsdp": True, "deepspeed": {"zero_optimization": {"stage": 2}}},
        "deepspeed and fsdp are both set, and each divides the weights",
    ),
    ({"fsdp": "full_shard", "fsdp_config": "{"}, "fsdp_config: '{' is not valid JSON"),
    ({"fsdp": "full_shard", "fsdp_config": "[1]"}, "No such file"),
]


def arguments(folder, **options):
    return RecurrentTrainingArguments(str(folder), use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize(("options", "words"), KEYWORDS, ids=[words[:40] for _, words in KEYWORDS])
def test_keywords_that_nobody_takes_are_one_line(tmp_path, options, words):
    with pytest.raises((ValueError, OSError), match=re.escape(words)) as error:
        arguments(tmp_path / "out", **options)
    assert "\n" not in str(error.value) and not (tmp_path / "out").exists()


def test_keywords_that_are_taken_are_let_through(tmp_path):
    args = arguments(
        tmp_path,
        activation_checkpointing_kwargs={"use_reentrant": False, "preserve_rng_state": True, "every_n_layers": 1},
        lr_scheduler_type="cosine",
        lr_scheduler_kwargs={"num_cycles": 1},
        optim="sgd",
        optim_args="momentum=0.9, nesterov=true",
    )
    assert args.to_dict()["lr_scheduler_kwargs"] == {"num_cycles": 1}
