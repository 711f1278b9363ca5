"""Word problems: products by matrices, one token an element, and tags, which are labels at the tokens of the prompt."""

from itertools import combinations

import numpy as np
import pytest
import torch
from datasets import Dataset

from dataset_loading import (
    TASKS,
    Collator,
    DataConfig,
    PackedDataset,
    SourceConfig,
    TokenizerConfig,
    build_examples,
    build_tokenizer,
    train_tokenizer,
)
from dataset_loading.packing.documents import tokenize_rows
from dataset_loading.tasks.registry import generate_row
from dataset_loading.tasks.word_problems import A5, BYTES, S5, WORDS
from evaluation.__main__ import examples_to_say
from evaluation.answers import AnswerGenerator
from evaluation.depth import DepthEvaluator
from tests.tiny_language_model import tiny_model, tiny_tokenizer

BYTE_SIZE = 259
NAMES = ["a5_word", "a5_prefixes", "s5_word", "s5_prefixes"]


def matrix(permutation):
    """The matrix that brings the unit vector of place k to that of place p[k]."""
    return np.eye(5, dtype=int)[:, list(permutation)]


def products_of(name: str, elements: str) -> list[str]:
    """The product up to each element, by matrices: the first one acts first, and so stands right of the others."""
    letters, group = (list(BYTES), A5) if name.startswith("a5") else (WORDS, S5)
    width, product, found = len(letters[0]), np.eye(5, dtype=int), []
    matrices = [matrix(permutation) for permutation in group]
    for start in range(0, len(elements), width):
        product = matrices[letters.index(elements[start : start + width])] @ product
        found.append(next(letters[n] for n, other in enumerate(matrices) if (other == product).all()))
    return found


def test_the_groups_are_closed_and_a5_is_the_even_half():
    assert (len(set(A5)), len(set(S5)), len(set(BYTES)), len(set(WORDS))) == (60, 120, 60, 120)
    assert {tuple(one[place] for place in other) for one in A5 for other in A5} == set(A5) < set(S5)
    determinants = [round(np.linalg.det(matrix(permutation))) for permutation in S5]
    assert {it for it, sign in zip(S5, determinants, strict=True) if sign == 1} == set(A5)
    commuting = sum(tuple(one[k] for k in other) == tuple(other[k] for k in one) for one, other in combinations(A5, 2))
    assert commuting < 60 * 59 / 2 / 4


@pytest.mark.parametrize("name", NAMES)
def test_answers_are_products_of_matrices(name):
    task = TASKS[name]
    for index in range(60):
        row = generate_row(task, (1, 12), "train", (0, 0), index)
        elements = row["prompt"].removesuffix(task.end)
        products = products_of(name, elements)
        assert len(products) == row["difficulty"]
        assert row["answer"] == "".join(products[-1:] if name.endswith("word") else products)
        assert task.check(row["prompt"], row["answer"])


def test_products_computed_by_hand():
    """A letter twice, and back: (0 1 2) is a cycle of three, whose square is its inverse."""
    cycle, back = (BYTES[A5.index(it)] for it in ((1, 2, 0, 3, 4), (2, 0, 1, 3, 4)))
    one = BYTES[A5.index((0, 1, 2, 3, 4))]
    assert TASKS["a5_prefixes"].check(cycle * 4, cycle + back + one + cycle)
    assert TASKS["a5_word"].check(f"{cycle}{cycle}=", back) and not TASKS["a5_word"].check(f"{cycle}{cycle}=", cycle)
    assert TASKS["a5_prefixes"].check("qMb", "qke")  # as in docs/data.md
    # First 0 <-> 1, then 1 <-> 2: what is at 0 goes to 1, then to 2.
    first, second, both = (WORDS[S5.index(it)] for it in ((1, 0, 2, 3, 4), (0, 2, 1, 3, 4), (2, 0, 1, 3, 4)))
    assert TASKS["s5_word"].check(f"{first}{second} =", both) and not TASKS["s5_word"].check(f"{second}{first} =", both)


@pytest.mark.parametrize("name", NAMES)
def test_wrong_answers_are_refused(name):
    """One product wrong, one too many, one too few, and what is no element."""
    task = TASKS[name]
    row = generate_row(task, (4, 4), "train", (0, 0), 0)
    width = len(next(iter(task.symbols)))
    answer, other = row["answer"], next(it for it in task.symbols if it not in row["answer"])
    wrong = [answer[:at] + other + answer[at + width :] for at in range(0, len(answer), width)]
    for text in (*wrong, answer + other, answer[width:], answer + "?", "", "?" * len(answer)):
        assert not task.check(row["prompt"], text)
    assert not task.check("?" * 4 + task.end, answer)


@pytest.mark.parametrize("name", NAMES)
def test_each_element_is_a_token(name):
    """A byte, or a word of a vocabulary that the run trains."""
    size = BYTE_SIZE if name.startswith("a5") else 382
    source = SourceConfig("generated", task=name, num_rows=2000, separator="")
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=size), DataConfig(train=[source]))
    assert {len(tokenizer(symbol)["input_ids"]) for symbol in TASKS[name].symbols} == {1}
    row = generate_row(TASKS[name], (5, 5), "test", (0, 0), 0)
    assert len(tokenizer(row["prompt"])["input_ids"]) == 5 + name.endswith("word")


PAIRS = {"prompt": ["abc", "de", "fghij"], "answer": ["xyz", "vw", "stuvw"]}


def tagged(**more) -> SourceConfig:
    return SourceConfig("files", paths=["a.jsonl"], prompt_column="p", answer_column="a", loss_on="tags", **more)


def test_tags_are_labels_at_the_tokens_of_the_prompt():
    """The label behind a token is what it says; the answer is in no input, and a document that is cut goes on."""
    tokenizer = train_tokenizer(["abc"], BYTE_SIZE)
    documents = tokenize_rows(tagged(), Dataset.from_dict(PAIRS), tokenizer)
    for block_size, packing in ((64, True), (4, True), (64, False)):
        said, read = "", []
        rows = PackedDataset(documents, block_size, tokenizer.pad_token_id, packing)
        for row in (rows[index] for index in range(len(rows))):
            ids, labels = row["input_ids"].tolist(), row["labels"].tolist()
            assert labels[0] == -100
            pairs = [(ids[at - 1], label) for at, label in enumerate(labels) if label != -100]
            said += tokenizer.decode([label for _, label in pairs])
            read += [token for token, _ in pairs]
        assert said == "xyzvwstuvw" and tokenizer.decode(read) == "abcdefghij"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"loss_on": "tag"}, "'tag', unknown; choose 'all', 'answer' or 'tags'"),
        ({"loss_on": "tags"}, "loss_on is 'tags', but the source has no answers"),
        ({"loss_on": "tags", "prompt": "{q}", "answer_column": "a"}, "is of conversations or streams; choose 'answer'"),
    ],
)
def test_sources_without_tags_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        SourceConfig("files", paths=["a.jsonl"], **options)


def test_prompts_with_other_numbers_of_tokens_are_refused():
    rows = Dataset.from_dict({"prompt": ["ab", "abc"], "answer": ["xy", "xy"]})
    with pytest.raises(ValueError, match="prompt 'abc' has 3 tokens, and its answer 'xy' 2; loss_on: tags needs as"):
        tokenize_rows(tagged(), rows, train_tokenizer(["abc"], BYTE_SIZE))


def test_tags_are_not_said_behind_their_prompts():
    """For `--efficiency`, which lets `generate` say answers."""
    tagged_rows, others = [{"is_tagged": True}], [{"is_tagged": False}]
    assert examples_to_say({"tags": tagged_rows, "sums": others}, None, None, None) == {"sums": others}
    with pytest.raises(ValueError, match="all sources have loss_on: tags; leave it out"):
        examples_to_say({"tags": tagged_rows}, None, None, None)


def test_tags_are_evaluated_in_one_pass():
    """Right where all tags are the likeliest; what is written is the likeliest tokens at their places."""
    tokenizer, model = tiny_tokenizer(260), tiny_model()
    source = SourceConfig("generated", task="a5_prefixes", num_rows=6, difficulty=[2, 4], loss_on="tags")
    examples = build_examples(source, DataConfig(), tokenizer)
    said = []
    for example in examples:
        ids = tokenizer(example["prompt"])["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([[tokenizer.bos_token_id, *ids]]), num_steps=2).logits[0]
        said.append(logits[1:].argmax(-1).tolist())
    for example, ids in zip(examples[:3], said[:3], strict=True):
        example["labels"][2:] = ids  # so that some are right
    evaluator = DepthEvaluator(model, Collator(tokenizer), None, 4, AnswerGenerator(tokenizer))
    answers = evaluator.answer(examples, 2)
    assert [answer.is_right for answer in answers] == [True] * 3 + [False] * 3
    assert [answer.generated for answer in answers] == [tokenizer.decode(ids).strip() for ids in said]
