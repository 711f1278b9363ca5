"""Our models under the testers of transformers. Only `tests.library_suite` loads this file, since it needs the tests
that come with the library's source, as the package `transformers_tests`.
"""

import inspect
import json
import re
import sys
import traceback
import unittest
from pathlib import Path
from typing import Any

import torch
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_MAPPING_NAMES,
)
from transformers_tests import test_modeling_common, test_training_mixin
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from model import (
    MegaTransformerConfig,
    MegaTransformerForCausalLM,
    MegaTransformerForConditionalGeneration,
    MegaTransformerForSeq2SeqLM,
    MegaTransformerForSequenceClassification,
    MegaTransformerSeq2SeqConfig,
    MegaTransformerSeq2SeqModel,
    MegaTransformerTextConfig,
    MegaTransformerTextModel,
)
from model.modeling_megatransformer import MegaTransformerModel

# The testers look up what kind of head a class has, by its name; the library's own models are in these tables.
MODEL_MAPPING_NAMES["megatransformer_text"] = "MegaTransformerTextModel"
MODEL_MAPPING_NAMES["megatransformer"] = "MegaTransformerModel"
MODEL_MAPPING_NAMES["megatransformer_seq2seq"] = "MegaTransformerSeq2SeqModel"
MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES["megatransformer_seq2seq"] = "MegaTransformerForSeq2SeqLM"
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["megatransformer_text"] = "MegaTransformerForCausalLM"
MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["megatransformer_text"] = "MegaTransformerForSequenceClassification"
MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["megatransformer"] = "MegaTransformerForConditionalGeneration"

STEPS = 2
TEXT = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_prelude_layers": 1,
    "num_core_layers": 1,
    "num_coda_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "recurrence": {"mean_steps": STEPS, "backprop_steps": STEPS, "step_distribution": "fixed"},
}
PLAIN = {"num_core_layers": 0}
ENCODER = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
IMAGE_TOKEN, AUDIO_TOKEN = 20, 21  # above those that the tester trains on, below where vocabularies are cut
FLOW = {"flow_hidden_size": 16, "flow_num_layers": 1, "num_flow_steps": 2}
WRITERS = {
    "image_writer_config": {**FLOW, "image_size": 8, "patch_size": 4},
    "audio_writer_config": {**FLOW, "n_fft": 32, "hop_length": 16, "num_mel_bins": 8},
    "written_image_token_id": 22,
    "written_audio_token_id": 23,
    "image_start_token_id": 24,
    "image_end_token_id": 25,
    "audio_start_token_id": 26,
    "audio_end_token_id": 27,
    "null_token_id": 28,
    "structure_token_ids": [0, 1, *range(20, 28)],
}


class ModelTester:
    """What a tester asks for: a tiny configuration, inputs, and the sizes by which it judges outputs."""

    is_training = True
    batch_size, seq_length = 3, 7

    def __init__(self, parent: unittest.TestCase, **text: Any):
        self.parent, self.text = parent, {**TEXT, **text}
        config = self.get_config().get_text_config()
        self.vocab_size, self.hidden_size = config.vocab_size, config.hidden_size
        self.num_attention_heads = config.num_attention_heads
        self.num_hidden_layers = config.mean_executed_layers  # one entry for each layer that runs

    def get_config(self):
        return MegaTransformerTextConfig(**self.text)

    def prepare_config_and_inputs_for_common(self):
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(30, self.vocab_size, (self.batch_size, self.seq_length), generator=generator)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class ReaderTester(ModelTester):
    """The same with an image, and a sound, in every row."""

    batch_size, seq_length = 7, 12  # as many rows as the comparison of backends has, which invents further ones

    def __init__(self, parent: unittest.TestCase, has_audio: bool):
        self.has_audio = has_audio
        self.vision_config = {**ENCODER, "patch_size": 4, "image_size": 8}
        self.audio_config = {**ENCODER, "num_mel_bins": 8, "n_fft": 32, "hop_length": 16} if has_audio else None
        super().__init__(parent)

    def get_config(self):
        return MegaTransformerConfig(
            text_config=dict(self.text),
            vision_config=self.vision_config,
            audio_config=self.audio_config,
            image_token_id=IMAGE_TOKEN,
            audio_token_id=AUDIO_TOKEN,
            **(WRITERS if self.has_audio else {}),
        )

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        generator = torch.Generator().manual_seed(1)
        inputs["input_ids"][:, 1:5] = IMAGE_TOKEN
        inputs["pixel_values"] = torch.randn(self.batch_size, 3, 8, 8, generator=generator)
        if self.has_audio:
            inputs["input_ids"][:, 6:9] = AUDIO_TOKEN
            inputs["input_features"] = torch.randn(self.batch_size, 8, 12, generator=generator)
        return config, inputs


class TextCase(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin):
    all_model_classes = (
        MegaTransformerTextModel,
        MegaTransformerForCausalLM,
        MegaTransformerForSequenceClassification,
    )
    test_can_init_all_missing_weights_before_2023 = True  # which a file without a copyright line is taken for
    text: dict[str, Any] = {}
    model_tester = None

    def setUp(self):
        self.model_tester = ModelTester(self, **self.text)
        self.model_tester.causal_lm_class = MegaTransformerForCausalLM
        self.model_tester.base_model_class = MegaTransformerTextModel


class RopeTest(TextCase, unittest.TestCase):
    """Recurrent, with RoPE."""


class AlibiTest(TextCase, unittest.TestCase):
    """Recurrent, with ALiBi."""

    text = {"position_embedding": "alibi"}


class PlainTest(TextCase, unittest.TestCase):
    """A plain transformer."""

    text = PLAIN


class ImageTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """Reads images."""

    all_model_classes = (MegaTransformerModel, MegaTransformerForConditionalGeneration)
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True
    has_audio = False
    additional_model_inputs = ["pixel_values", "input_features"]
    model_tester = None

    def setUp(self):
        self.model_tester = ReaderTester(self, self.has_audio)
        self.model_tester.causal_lm_class = MegaTransformerForConditionalGeneration
        self.model_tester.base_model_class = MegaTransformerModel


class ImageAudioTest(ImageTest):
    """Reads and writes images and sound."""

    has_audio = True


class Seq2SeqTester(ModelTester):
    """The same as a source, and a target, of as many tokens as the labels that the tests make up."""

    encoder_seq_length = decoder_seq_length = 7

    def get_config(self):
        shared = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
        part = {name: value for name, value in self.text.items() if name not in shared}
        tokens = {name: self.text[name] for name in shared}
        return MegaTransformerSeq2SeqConfig(encoder_config=part, decoder_config=dict(part), **tokens)

    def prepare_config_and_inputs_for_common(self):
        config, inputs = super().prepare_config_and_inputs_for_common()
        ids = inputs["input_ids"].flip(1)
        return config, inputs | {"decoder_input_ids": ids, "decoder_attention_mask": torch.ones_like(ids)}


class Seq2SeqTest(ModelTesterMixin, GenerationTesterMixin, TrainingTesterMixin, unittest.TestCase):
    """Reads a source and writes a target."""

    all_model_classes = (MegaTransformerSeq2SeqModel, MegaTransformerForSeq2SeqLM)
    is_encoder_decoder = True
    _is_composite = True
    test_can_init_all_missing_weights_before_2023 = True
    model_tester = None

    def setUp(self):
        self.model_tester = Seq2SeqTester(self)
        self.model_tester.causal_lm_class = MegaTransformerForSeq2SeqLM
        self.model_tester.base_model_class = MegaTransformerSeq2SeqModel


class Outcomes(unittest.TestResult):
    """How each test ended, by model and name; of its parameters and subtests the worst counts."""

    SEVERITY = ("skipped", "passed", "failed")

    def __init__(self):
        super().__init__()
        self.models: dict[str, dict[str, tuple[str, str]]] = {}
        sources = (inspect.getsource(module) for module in (test_modeling_common, test_training_mixin))
        self.names = set(re.findall(r"def (test_\w+)\(", "".join(sources)))

    def startTest(self, test: unittest.TestCase) -> None:
        super().startTest(test)
        self.model, self.name = type(test).__name__.removesuffix("Test"), self.name_of(test)

    def addSuccess(self, test: unittest.TestCase) -> None:
        self._note("passed", "")

    def addSkip(self, test: unittest.TestCase, reason: str) -> None:
        self._note("skipped", reason)

    def addFailure(self, test: unittest.TestCase, error: tuple) -> None:
        self._note("failed", "".join(traceback.format_exception_only(*error[:2])).strip())

    addError = addFailure

    def addSubTest(self, test: unittest.TestCase, subtest: unittest.TestCase, error: tuple | None) -> None:
        if error is not None:
            self.addFailure(test, error)

    def _note(self, kind: str, reason: str) -> None:
        tests = self.models.setdefault(self.model, {})
        if self.name not in tests or self.SEVERITY.index(kind) > self.SEVERITY.index(tests[self.name][0]):
            tests[self.name] = kind, reason

    def name_of(self, test: unittest.TestCase) -> str:
        """As the library defines the test, without what `parameterized` puts behind it."""
        method = test.id().rpartition(".")[2]
        return method if method in self.names else max((n for n in self.names if method.startswith(n)), key=len)


def main(report: str, *names: str) -> None:
    """Runs all tests, or those of these names, and writes their outcomes as JSON."""
    outcomes = Outcomes()
    for case in (RopeTest, AlibiTest, PlainTest, ImageTest, ImageAudioTest, Seq2SeqTest):
        for test in unittest.defaultTestLoader.loadTestsFromTestCase(case):
            if not names or outcomes.name_of(test) in names:
                test.run(outcomes)
    Path(report).write_text(json.dumps(outcomes.models), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
