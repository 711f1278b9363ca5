"""lm-evaluation-harness on saved folders of tiny models, with tasks made here: what it measures is what they say."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.tiny_language_model import save_checkpoint, tiny_model, tiny_tokenizer
from tests.tiny_processor import image_file, picture, tiny_processor
from tests.tiny_reader import save_reader, tiny_reader

pytestmark = pytest.mark.slow

QUESTIONS = [
    {"question": "the cat sat on the", "choices": ["mat", "cat", "naïve café"], "answer": 0},
    {"question": "a naïve", "choices": ["café", "the mat sat on the cat", "on"], "answer": 0},
    {"question": "on", "choices": ["mat.", "the mat", "cat"], "answer": 1},
]
NEW_TOKENS = 6
GENERATION = {"until": ["<|end|>"], "max_gen_toks": NEW_TOKENS, "do_sample": False}


def write_rows(folder: Path, rows: list[dict]) -> dict:
    """The entries of a task that say where its rows are."""
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}


def evaluate(task: dict, model: str, arguments: dict, **options) -> list[dict]:
    """What was recorded of each row, in order."""
    import lm_eval  # here, since the fast tests are collected without it
    from lm_eval.tasks import TaskManager

    results = lm_eval.simple_evaluate(
        model=model,
        model_args={"trust_remote_code": True, **arguments},
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        bootstrap_iters=0,
        **options,
    )
    (samples,) = results["samples"].values()
    return sorted(samples, key=lambda sample: sample["doc_id"])


def log_likelihood(context: str, continuation: str, begin: bool, **depth) -> float:
    """Of a continuation that the model is given at once."""
    tokenizer, model = tiny_tokenizer(), tiny_model()
    first = [tokenizer.bos_token_id] if begin else []
    before, whole = (first + tokenizer(text)["input_ids"] for text in (context, context + continuation))
    with torch.no_grad():
        scores = model(torch.tensor([whole]), **depth).logits[0].log_softmax(-1)
    return sum(scores[place - 1, whole[place]].item() for place in range(len(before), len(whole)))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(save_checkpoint(tmp_path_factory.mktemp("checkpoint")))


@pytest.mark.parametrize(
    ("arguments", "begin", "depth"),
    [
        ({}, False, {}),
        ({"num_steps": 6}, False, {"num_steps": 6}),
        ({"mean_steps": 6, "exit_criterion": "cosine"}, False, {"num_steps": 6}),  # likelihoods know no exits
        ({"add_bos_token": True}, True, {}),
    ],
    ids=["as_it_is", "another_depth", "another_mean", "with_begin_token"],
)
def test_multiple_choice(tmp_path, checkpoint, arguments, begin, depth):
    """Log-likelihoods of the choices, in batches of rows of different lengths."""
    task = {
        "task": "choices",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
        **write_rows(tmp_path, QUESTIONS),
    }
    samples = evaluate(task, "hf", {"pretrained": checkpoint, **arguments}, batch_size=4)
    for row, sample in zip(QUESTIONS, samples, strict=True):
        ours = [log_likelihood(row["question"], f" {choice}", begin, **depth) for choice in row["choices"]]
        assert [value for value, _ in sample["filtered_resps"]] == pytest.approx(ours, abs=1e-4)
        assert sample["acc"] == float(ours.index(max(ours)) == row["answer"])


EXITS = {"exit_criterion": "latent_difference", "exit_threshold": 0.5}


@pytest.mark.parametrize(
    ("arguments", "options", "depth"),
    [
        ({}, {}, {}),
        ({}, {"num_steps": 8, **EXITS}, {"num_steps": 8, **EXITS}),
        ({"mean_steps": 8, **EXITS}, {}, {"num_steps": 8, **EXITS}),
    ],
    ids=["mean", "exits", "exits_of_the_model"],
)
def test_generation(tmp_path, checkpoint, arguments, options, depth):
    task = {
        "task": "continuations",
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": dict(GENERATION),  # the harness writes into it
        "metric_list": [{"metric": "exact_match"}],
        **write_rows(tmp_path, QUESTIONS),
    }
    samples = evaluate(task, "hf", {"pretrained": checkpoint, **arguments}, gen_kwargs=options, batch_size=3)
    tokenizer, model = tiny_tokenizer(), tiny_model()
    for row, sample in zip(QUESTIONS, samples, strict=True):
        ids = torch.tensor([tokenizer(row["question"])["input_ids"]])
        ours = model.generate(ids, max_new_tokens=NEW_TOKENS, do_sample=False, **depth)[0, ids.shape[1] :]
        assert sample["resps"][0][0] == tokenizer.decode(ours, skip_special_tokens=True).split("<|end|>")[0]


@pytest.mark.parametrize("mean_steps", [3, 6])
def test_likelihoods_of_continuations_and_of_whole_texts(tmp_path, checkpoint, mean_steps):
    """A whole text stands behind a begin token anyway: `add_bos_token` puts another one in, and scores it."""
    task = {"task": "told", "doc_to_text": "{{question}}", "doc_to_target": " {{choices[1]}}"}
    task |= {"output_type": "loglikelihood", "metric_list": [{"metric": "acc"}], **write_rows(tmp_path, QUESTIONS)}
    usual = {"pretrained": checkpoint, "mean_steps": mean_steps}
    found = evaluate(task, "hf", {**usual, "add_bos_token": True}, batch_size=3)
    for row, sample in zip(QUESTIONS, found, strict=True):
        ours = log_likelihood(row["question"], f" {row['choices'][1]}", True, num_steps=mean_steps)
        assert sample["filtered_resps"][0][0] == pytest.approx(ours, abs=1e-4)
    task |= {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "bits_per_byte"}]}
    task |= {"doc_to_text": "", "doc_to_target": "{{question}}"}
    for begin in (False, True):
        found = evaluate(task, "hf", {**usual, **({"add_bos_token": True} if begin else {})}, batch_size=3)
        for row, sample in zip(QUESTIONS, found, strict=True):
            ours = log_likelihood("", "<|begin|>" * begin + row["question"], True, num_steps=mean_steps)
            assert sample["filtered_resps"][0] == pytest.approx(ours, abs=1e-4)


def test_generation_about_images(tmp_path):
    """`hf-multimodal`: pictures of several sizes, as conversations or in texts with placeholders."""
    folder = str(save_reader(tmp_path / "reader", scale=2.0))
    sizes = [(32, 16), (16, 16), (24, 40)]
    rows = []
    for number, size in enumerate(sizes):
        path = tmp_path / f"{number}.png"
        path.write_bytes(image_file(picture(*size, seed=number)))
        rows.append({"question": f"what is {number}?", "path": str(path)})
    task = {
        "task": "pictures",
        "output_type": "generate_until",
        "doc_to_text": "<image>{{question}}",
        "doc_to_image": lambda row: [Image.open(row["path"])],
        "doc_to_target": "{{question}}",
        "generation_kwargs": dict(GENERATION),  # the harness writes into it
        "metric_list": [{"metric": "exact_match"}],
        **write_rows(tmp_path, rows),
    }
    model, processor = tiny_reader(scale=2.0), tiny_processor()
    for chat in (False, True):
        samples = evaluate(
            task, "hf-multimodal", {"pretrained": folder, "max_length": 512}, apply_chat_template=chat, batch_size=3
        )
        for row, sample in zip(rows, samples, strict=True):
            image = Image.open(row["path"])
            if chat:
                content = [{"type": "image", "image": image}, {"type": "text", "text": row["question"]}]
                inputs = processor.apply_chat_template(
                    [{"role": "user", "content": content}],
                    add_generation_prompt=True,
                    tokenize=True,
                    return_dict=True,
                    return_tensors="pt",
                )
            else:
                inputs = processor(images=image, text="<|image|>" + row["question"], return_tensors="pt")
            ours = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            text = processor.tokenizer.decode(ours[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            assert sample["resps"][0][0] == text
