"""Code that comes with a checkpoint or a backbone is never run, whatever stands on standard input."""

import io
import json

import pytest
import torch
from transformers import SiglipConfig, SiglipModel

from dataset_loading.tokenizer import load_tokenizer
from inference.generate import main
from inference.loading import load_model
from model import MegaTransformerConfig, MegaTransformerForConditionalGeneration, MegaTransformerProcessor
from tests.tiny_artist import artist_config, artist_tokenizer, save_artist
from tests.tiny_language_model import save_checkpoint

SMALL = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CODE = """
from pathlib import Path

Path({mark!r}).touch()

from transformers import (
    PreTrainedConfig as EvilConfig, PreTrainedModel as EvilModel, PreTrainedTokenizerFast as EvilTokenizer,
    ProcessorMixin as EvilProcessor,
)
"""
AUTO_MAP = {
    "AutoConfig": "evil.EvilConfig",
    **dict.fromkeys(("AutoModel", "AutoModelForCausalLM", "AutoModelForMultimodalLM"), "evil.EvilModel"),
    **dict.fromkeys(("AutoProcessor", "AutoImageProcessor", "AutoFeatureExtractor"), "evil.EvilProcessor"),
    "AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"],
}


@pytest.fixture
def mark(tmp_path, monkeypatch):
    """A file that the code would write, had it been run; whoever is asked says yes."""
    monkeypatch.setattr("sys.stdin", io.StringIO("y\n" * 20))
    path = tmp_path / "it was run"
    yield path
    assert not path.exists()


def infect(folder, mark, **changes):
    """Puts code into a folder, and an `auto_map` into its JSON files that leads to it."""
    (folder / "evil.py").write_text(CODE.format(mark=str(mark)))
    (folder / "custom_generate").mkdir(exist_ok=True)
    (folder / "custom_generate" / "generate.py").write_text(CODE.format(mark=str(mark)))
    for path in folder.glob("*.json"):
        content = json.loads(path.read_text())
        if path.name in ("config.json", "tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
            path.write_text(json.dumps({**content, "auto_map": AUTO_MAP, **changes}))
    return folder


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(0)
    vision = {**SMALL, "image_size": 16, "patch_size": 8}
    folder = tmp_path / "siglip"
    SiglipModel(SiglipConfig(vision_config=vision, text_config={**SMALL, "vocab_size": 30})).save_pretrained(folder)
    return folder


def with_backbone(folder, **options) -> MegaTransformerConfig:
    values = artist_config().to_dict()
    values["vision_config"] |= {"backbone": str(folder), **options}
    return MegaTransformerConfig.from_dict(values)


def refusal(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("part", ["vision_config", "audio_config"])
def test_a_backbone_with_code_of_its_own_is_refused(backbone, mark, part):
    infect(backbone, mark, model_type="evil")
    values = artist_config().to_dict()
    values[part] |= {"backbone": str(backbone)}
    config = MegaTransformerConfig.from_dict(values)
    error = refusal(lambda: MegaTransformerForConditionalGeneration(config))
    assert error == (
        f"backbone {str(backbone)!r} cannot be loaded: it needs code that comes with it, which is not run; give a name "
        "or folder that can"
    )


def test_of_a_backbone_that_transformers_has_its_own_class_is_taken(backbone, mark):
    model = MegaTransformerForConditionalGeneration(with_backbone(infect(backbone, mark)))
    model.model.load_backbones()
    assert type(model.model.readers["image"].encoder.model).__module__.startswith("transformers.models.siglip")


@pytest.mark.parametrize(
    "options", [{"model_type": "evil"}, {"model_type": None}, {"model_type": ["siglip_vision_model"]}, {}]
)
def test_a_backbone_config_of_no_known_model_is_refused(backbone, mark, options):
    infect(backbone, mark)
    content = {"_name_or_path": str(backbone), "auto_map": AUTO_MAP, **SMALL, **options}
    config = with_backbone(backbone, backbone_config=content)
    assert "which transformers does not have" in refusal(lambda: MegaTransformerForConditionalGeneration(config))


def test_code_beside_the_processor_of_a_backbone_is_not_run(backbone, mark):
    from model import build_processor

    (backbone / "preprocessor_config.json").write_text('{"image_processor_type": "EvilProcessor"}')
    infect(backbone, mark)
    error = refusal(lambda: build_processor(with_backbone(backbone), artist_tokenizer(), num_image_tokens=4))
    assert "it needs code that comes with it, which is not run" in error


def test_our_own_checkpoints_are_loaded_by_the_classes_that_are_here(tmp_path, mark):
    """Their `auto_map` leads to copies of our files; neither these nor others in their place are run."""
    model, _ = load_model(infect(save_checkpoint(tmp_path / "text"), mark))
    assert type(model).__module__ == "model.modeling_megatransformer_text"
    model, processor = load_model(infect(save_artist(tmp_path / "artist"), mark))
    assert type(processor) is MegaTransformerProcessor
    assert type(model).__module__ == "model.modeling_megatransformer"


@pytest.mark.parametrize("part", ["image_processor", "feature_extractor"])
def test_parts_of_a_processor_with_code_of_their_own_are_refused(tmp_path, mark, part):
    folder = infect(save_artist(tmp_path / "artist"), mark)
    path = folder / "processor_config.json"
    content = json.loads(path.read_text())
    content[part] |= {f"{part}_type": "EvilProcessor", "auto_map": AUTO_MAP}
    path.write_text(json.dumps(content))
    assert "is damaged" in refusal(lambda: load_model(folder))
    with pytest.raises(ValueError, match="trust_remote_code"):  # as a library would load it, saying nothing
        MegaTransformerProcessor.from_pretrained(folder)


def test_a_tokenizer_with_code_of_its_own_is_refused(tmp_path, mark):
    folder = infect(save_checkpoint(tmp_path / "text"), mark, tokenizer_class="EvilTokenizer")
    assert "it needs code that comes with it, which is not run" in refusal(lambda: load_model(folder))
    assert "trust_remote_code=True" in refusal(lambda: load_tokenizer(str(folder)))


def test_the_command_refuses_a_foreign_model_in_one_line(tmp_path, mark, capsys):
    folder = infect(save_checkpoint(tmp_path / "text"), mark, model_type="evil")
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(folder), "--prompt", "the"])
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and "model of type 'evil'" in captured.err


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "someone/kernel"},
        {"attn_implementation": {"": "someone/kernel:forward"}},
        {"experts_implementation": "someone/kernel"},
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        {"quantization_config": "x"},
    ],
)
def test_formats_and_kernels_from_elsewhere_are_refused(tmp_path, mark, changes):
    folder = save_checkpoint(tmp_path / "text")
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    assert f"{path} is wrong ({next(iter(changes))} " in refusal(lambda: load_model(folder))
