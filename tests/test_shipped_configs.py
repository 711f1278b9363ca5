"""Every YAML in configs/: it loads, its model can be built (on the meta device, where billions of parameters cost
nothing), and its parts fit together. Pretrained encoders have the shapes that they have on the hub.
"""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from configs import RunConfig, load_config
from configs.finetuning import FinetuningConfig
from model import CODEC_CONFIGS, MODELS, MegaTransformerConfig, codec_media
from tests.hub_encoders import local_encoders
from trainers.parameter_groups import assign, freeze

FOLDER = Path(__file__).parent.parent / "configs"
TUNING_FILES = sorted(FOLDER.glob("finetune_*.yaml"))
FILES = sorted(set(FOLDER.glob("*.yaml")) - set(TUNING_FILES))
OTHER_SOURCES = "[{kind: files, paths: [/rows/*.jsonl], prompt_column: asked, answer_column: said, loss_on: answer}]"


@pytest.fixture(scope="module")
def run(request, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """The run of a file, planned: so bf16 and DeepSpeed need no GPU. Read only."""
    encoders = local_encoders(request.param, tmp_path_factory.mktemp("encoders"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORLD_SIZE", "4")
        return load_config(["--config", str(request.param), "--dry-run", *encoders])


def build(run: RunConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return MODELS[type(run.model)](run.model)


def count(run: RunConfig) -> int:
    return sum(parameter.numel() for parameter in build(run).parameters())


def is_codec(path: Path) -> bool:
    return "trainer: reconstruction" in path.read_text(encoding="utf-8")


def each_of(files: list[Path]):
    return pytest.mark.parametrize("run", files, ids=lambda path: path.stem, indirect=True)


every_file = each_of([path for path in FILES if not is_codec(path)])
every_codec = each_of([path for path in FILES if is_codec(path)])


def one_file(name: str):
    return pytest.mark.parametrize("run", [FOLDER / f"{name}.yaml"], ids=[name], indirect=True)


def test_the_files_are_found():
    assert {"image_autoencoder", "vocoder"} == {path.stem for path in FILES if is_codec(path)}
    names = {"recurrent_lm", "recurrent_lm_100m", "recurrent_lm_3b", "recurrent_vlm", "recurrent_vlm_base"}
    assert names <= {path.stem for path in FILES}


@pytest.mark.parametrize("path", TUNING_FILES, ids=lambda path: path.stem)
def test_files_of_fine_tuning_load(path):
    """From a run into a run."""
    run = load_config(["--config", str(path)], FinetuningConfig)
    assert Path(run.model.path).parent.name == "runs" and run.training.output_dir == f"runs/{path.stem}"


@every_file
def test_its_model_can_be_built(run: RunConfig):
    model = build(run)
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert len(model.model.core.layers if model.model.core else []) == run.model.get_text_config().num_core_layers


@every_file
def test_its_parts_fit_together(run: RunConfig):
    """Rows within the positions that the model is meant for, a trained vocabulary of the model's size."""
    assert run.data.block_size <= run.model.get_text_config().max_position_embeddings
    if run.tokenizer.path is None:
        assert run.tokenizer.vocab_size == run.model.get_text_config().vocab_size
    assert run.training.max_steps > run.training.warmup_steps


@every_codec
def test_a_codec_can_be_built_and_fits_its_data(run: RunConfig):
    """Small enough for two cores, and data of the kind that it takes."""
    model = build(run)
    assert isinstance(run.model, CODEC_CONFIGS) and count(run) < 5e6
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    kind = codec_media(run.model).name
    assert all(kind in source.media_columns.values() for source in run.data.train)
    assert run.training.max_steps > run.training.warmup_steps


@every_file
def test_its_patterns_match_parameters(run: RunConfig):
    """They raise an error where one matches none."""
    model = build(run)
    freeze(model, run.training.freeze)
    assign(model, run.training.parameter_groups)


@every_file
def test_a_picture_and_a_recording_fit_into_a_row(run: RunConfig):
    """Of those that a pretrained encoder makes all the same, with the tokens around them and a few to learn."""
    if isinstance(run.model, MegaTransformerConfig):
        assert all(count + 32 < run.data.block_size for count in build(run).model.count_tokens().values())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_comment_says_what_it_is_for(path: Path):
    assert path.read_text(encoding="utf-8").startswith("# ")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_its_sources_can_be_replaced_whole(path: Path):
    """Nothing of a source in the file is left in one given by a flag, not even where there is one of each."""
    given = load_config(["--data.train", OTHER_SOURCES, "--dry-run"]).data.train
    assert load_config(["--config", str(path), "--data.train", OTHER_SOURCES, "--dry-run"]).data.train == given


def projector(width: int, hidden: int) -> int:
    """A norm, two linear maps with biases, a norm."""
    return width + (width + 1) * hidden + (hidden + 1) * hidden + hidden


def closed_form(layers: int, width: int, inner: int, vocabulary: int, bias: int = 0) -> int:
    """Tied embedding, equal layers (four attention matrices, three of a gated feed-forward layer, four norms, biases of
    queries and keys), the adapter 2h x h and the last norm.
    """
    layer = 4 * width**2 + 3 * width * inner + 4 * width + bias
    return vocabulary * width + layers * layer + 2 * width**2 + width


@one_file("recurrent_lm_100m")
def test_the_size_of_recurrent_lm_100m(run: RunConfig):
    assert count(run) == closed_form(8, 768, 2304, 50304) == pytest.approx(100e6, rel=0.02)
    assert run.training.bf16 and run.training.compile_units and run.training.deepspeed is None
    tokens = 8 * 2048 * 32
    assert tokens == 2**19 and tokens * run.training.max_steps < 10e9  # the sample is not read twice


@one_file("tinystories")
def test_the_size_of_tinystories(run: RunConfig):
    assert count(run) == closed_form(4, 512, 1536, 8192) == pytest.approx(18e6, rel=0.03)
    assert run.training.bf16 and run.training.compile_units and run.training.deepspeed is None


@one_file("recurrent_lm_3b")
def test_the_size_of_recurrent_lm_3b(run: RunConfig):
    """The paper's shape, 2 + 4 + 2 layers and 3.5 billion parameters; l = 132 layers executed at the mean depth."""
    assert count(run) == closed_form(8, 5280, 17920, 65536, bias=2 * 55 * 96) == pytest.approx(3.5e9, rel=0.02)
    assert run.model.mean_executed_layers == 132
    assert run.training.activation_checkpointing and run.training.bf16
    assert run.training.deepspeed_settings["zero_optimization"]["stage"] == 3


@one_file("recurrent_vlm_base")
def test_the_size_of_recurrent_vlm_base(run: RunConfig):
    """Encoders as large as published, which are not trained; the rest from its shapes. One GPU."""
    ours = closed_form(8, 1280, 3840, 50304) + 2 * projector(768, 1280)
    assert sum(parameter.numel() for parameter in build(run).parameters() if parameter.requires_grad) == ours
    assert count(run) - ours == pytest.approx(93e6 + 88e6, rel=0.01)
    assert 0.3e9 < count(run) < 0.6e9
    assert run.training.activation_checkpointing and run.training.bf16 and run.training.deepspeed is None


@one_file("recurrent_vlm_zero3")
def test_the_size_of_recurrent_vlm_zero3(run: RunConfig):
    """Encoders as large as published, which are trained at a rate of their own; the rest from its shapes."""
    ours = closed_form(8, 3072, 8192, 50304) + projector(1152, 3072) + projector(1280, 3072)
    model = build(run)
    freeze(model, run.training.freeze)
    owned = assign(model, run.training.parameter_groups)
    assert sum(parameter.numel() for parameter in model.parameters() if parameter not in owned) - ours < 20e6
    assert count(run) - ours == pytest.approx(428e6 + 637e6, rel=0.01)
    assert 2e9 < count(run) < 3e9
    assert run.training.activation_checkpointing and run.training.bf16
    assert run.training.deepspeed_settings["zero_optimization"]["stage"] == 3
