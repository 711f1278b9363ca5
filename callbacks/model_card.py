"""A model card in each saved folder: what the model is and was trained on, how well it does, and how to load it."""

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData
from torch import nn
from transformers import PreTrainedConfig, TrainerCallback, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, unwrap_peft_model

from .model_size import parameter_count

FILE = "README.md"
LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "safetensors")
ADAPTER, STEP_ADAPTER = "adapter_config.json", "step_lora.json"
# Of how long something took, and not of how well.
NO_RESULTS = ("_runtime", "_per_second", "_preparation_time")

TEXT = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "{folder}"
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer(tokenizer.bos_token + "Once", return_tensors="pt", add_special_tokens=False).input_ids
ids = model.generate(ids, {depth}max_new_tokens=20)
print(tokenizer.decode(ids[0], skip_special_tokens=True))
"""
MEDIA = """\
from transformers import AutoModelForMultimodalLM, AutoProcessor

folder = "{folder}"
model = AutoModelForMultimodalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
messages = [{{"role": "user", "content": "Hello"}}]
options = {{"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}}
ids = model.generate(**processor.apply_chat_template(messages, **options), {depth}max_new_tokens=20)
print(processor.decode(ids[0], skip_special_tokens=True))
"""
IMAGES = """\
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("{folder}", trust_remote_code=True).eval()
images = torch.zeros(1, {channels}, {side}, {side})  # from -1 to 1
images = model.decode(model.encode(images))
"""
AUDIO = """\
import torch
from transformers import AutoModel

model = AutoModel.from_pretrained("{folder}", trust_remote_code=True).eval()
waveforms = torch.zeros(1, {rate})  # from -1 to 1, {rate} samples a second
waveforms = model.decode(model.log_mel(waveforms))
"""
LORA = """\
from peft import PeftModel
from transformers import {auto}

base = {auto}.from_pretrained("{base}", trust_remote_code=True)
model = PeftModel.from_pretrained(base, "{folder}")
"""
STEPS = """\
from inference.loading import load_model  # of the repository that the model was trained in

model, processor = load_model("{folder}")
"""


class ModelCardWriter(TrainerCallback):
    """Writes the model card of a run and of each of its checkpoints.

    Args:
        resolved: All options of the run, as in its config.yaml.
        sources: What was read, by role ("train", "validation"), a line for each source.
    """

    def __init__(self, resolved: Mapping[str, Any], sources: Mapping[str, Sequence[str]]) -> None:
        self.resolved, self.sources = resolved, sources

    def on_save(self, args: Any, state: TrainerState, control: Any, model: nn.Module, **kwargs: Any) -> None:
        """Write it into the checkpoint."""
        if state.is_world_process_zero:
            self.write(Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", model, state)

    def write(self, folder: str | os.PathLike, model: nn.Module, state: TrainerState) -> None:
        """Write it into a folder that a model was saved in.

        Args:
            state: State of its training: what was logged last stands in the card.
        """
        card = model_card(Path(folder), model, self.resolved, self.sources, results_of(state))
        card.save(Path(folder) / FILE)


def sources_of(data: Any) -> dict[str, list[str]]:
    """A line for each source of a run's data, by role: its name, kind, and what it holds."""
    return {role: [source_line(source) for source in getattr(data, role)] for role in ("train", "validation")}


def source_line(source: Any) -> str:
    """Name and kind of a source; of generated data the task, of the hub's the name there."""
    details = {"generated": f", task {source.task}, {source.num_rows} rows", "hub": f", {source.path}"}
    return f"{source.label} ({source.kind}{details.get(source.kind, '')})"


def results_of(state: TrainerState) -> dict[str, float]:
    """The last training loss and the last of each metric of evaluation, by name."""
    last: dict[str, float] = {}
    for logged in state.log_history:
        last |= {name: value for name, value in logged.items() if name == "loss" or name.startswith("eval_")}
    return {name: value for name, value in last.items() if not name.endswith(NO_RESULTS)} | {"steps": state.global_step}


def model_card(
    folder: Path,
    model: nn.Module,
    resolved: Mapping[str, Any] | None = None,
    sources: Mapping[str, Sequence[str]] | None = None,
    results: Mapping[str, float] | None = None,
) -> ModelCard:
    """The card of a folder that holds a model, or adapters for one.

    Args:
        folder: Where the model was saved.
        model: The model with its adapters, if there are any.
        resolved: Options of its training.
        sources: What it was trained and evaluated on, by role.
        results: What was measured, by name.
    """
    folder, resolved, config = folder.absolute(), resolved or {}, unwrap_peft_model(model).config
    parts = [
        f"# {folder.name}",
        description(folder, model, resolved),
        f"## How to load it\n\n```python\n{loading_code(folder, config, resolved)}```",
        f"## Configuration\n\n```yaml\n{configuration(config, resolved)}```",
    ]
    if sources:
        lists = [f"{role}:\n\n" + "\n".join(f"- {line}" for line in lines) for role, lines in sources.items() if lines]
        parts.append("## Data\n\n" + "\n\n".join(lists))
    if results:
        rows = [f"| {name} | {value:.6g} |" for name, value in results.items() if isinstance(value, int | float)]
        parts.append("## Results\n\n" + "\n".join(["| | last value |", "|---|---:|", *rows]))
    found = {"python": platform.python_version(), **{name: version(name) for name in LIBRARIES}}
    parts.append("## Versions\n\n" + "\n".join(f"- {name} {number}" for name, number in found.items()))
    data = card_data(folder, config, resolved)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def card_data(folder: Path, config: PreTrainedConfig, resolved: Mapping[str, Any]) -> ModelCardData:
    """The part of a card that the hub reads: kind of model and names of data sets."""
    train = (resolved.get("data") or {}).get("train") or []
    names = [source["path"] for source in train if source["kind"] == "hub" and not os.path.isabs(source["path"])]
    tasks = {"megatransformer_text": "text-generation", "megatransformer": "any-to-any"}
    return ModelCardData(
        library_name="peft" if (folder / ADAPTER).is_file() else "transformers",
        pipeline_tag=tasks.get(config.model_type),
        tags=["megatransformer"],
        datasets=names or None,
    )


def description(folder: Path, model: nn.Module, resolved: Mapping[str, Any]) -> str:
    """A sentence or two on the model: what it reads and writes, and its size."""
    if (folder / ADAPTER).is_file() or (folder / STEP_ADAPTER).is_file():
        count = sum(parameter_count(parameter) for parameter in model.parameters() if parameter.requires_grad)
        return f"Low-rank adapters of {count:,} parameters for the model in `{resolved['model']['path']}`."
    config = model.config
    count = f"It has {sum(map(parameter_count, model.parameters())):,} parameters"
    if config.model_type == "megatransformer_image_autoencoder":
        return f"An autoencoder of images: pixels to a few numbers for each patch, and back. {count}."
    if config.model_type == "megatransformer_vocoder":
        return f"A vocoder: log-mel spectrograms to sound. {count}."
    text = config.get_text_config()
    read = modalities(config, images="vision_config", sound="audio_config")
    written = modalities(config, images="image_writer_config", sound="audio_writer_config")
    numbers = (text.num_prelude_layers, text.num_core_layers, text.num_coda_layers)
    layers = "layers: {} of prelude, {} of core, {} of coda".format(*numbers)
    if text.num_unique_layers < text.num_layers_of_one_step:
        layers += f" ({text.num_unique_layers} with weights of their own)"
    steps = text.num_steps or text.recurrence.mean_steps
    depth = f"; the core runs {steps} times unless `num_steps` says otherwise" if text.num_core_layers else ""
    return f"A recurrent-depth transformer that reads {read} and writes {written}. {count}, in {layers}{depth}."


def modalities(config: PreTrainedConfig, **parts: str) -> str:
    """Text, and what the parts that the model has are for."""
    return ", ".join(["text", *(name for name, part in parts.items() if getattr(config, part, None) is not None)])


def loading_code(folder: Path, config: PreTrainedConfig, resolved: Mapping[str, Any]) -> str:
    """A few lines of Python that load what is in the folder; they run in the folder above."""
    has_media = config.model_type == "megatransformer"
    if (folder / STEP_ADAPTER).is_file():
        return STEPS.format(folder=folder.name)
    if (folder / ADAPTER).is_file():
        auto = "AutoModelForMultimodalLM" if has_media else "AutoModelForCausalLM"
        return LORA.format(folder=folder.name, auto=auto, base=resolved["model"]["path"])
    if config.model_type == "megatransformer_image_autoencoder":
        return IMAGES.format(folder=folder.name, channels=config.num_channels, side=config.image_size)
    if config.model_type == "megatransformer_vocoder":
        return AUDIO.format(folder=folder.name, rate=config.sampling_rate)
    text = config.get_text_config()
    depth = f"num_steps={text.num_steps or text.recurrence.mean_steps}, " if text.num_core_layers else ""
    return (MEDIA if has_media else TEXT).format(folder=folder.name, depth=depth)


def configuration(config: PreTrainedConfig, resolved: Mapping[str, Any]) -> str:
    """The model, and what says most about its training, as YAML; all of it is in config.yaml and config.json."""
    training = resolved.get("training") or {}
    names = ("max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps")
    names += ("learning_rate", "lr_scheduler_type", "optim", "seed", "bf16")
    chosen = {name: training[name] for name in names if training.get(name) is not None}
    sections = {name: resolved[name] for name in ("trainer", "model", "peft", "step_lora") if resolved.get(name)}
    if chosen:
        sections["training"] = chosen
    return yaml.safe_dump(without_empty(sections or {"model": config.to_diff_dict()}), sort_keys=False)


def without_empty(tree: Any) -> Any:
    """The tree without what is None."""
    if isinstance(tree, Mapping):
        return {name: without_empty(value) for name, value in tree.items() if value is not None}
    return tree
