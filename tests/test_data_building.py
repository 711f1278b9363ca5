"""From a config to datasets: splits, mixture, sizes, vocabulary, examples; the same in every process."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pytest
import torch
from torch.utils.data import Dataset

from dataset_loading import (
    TASKS,
    Collator,
    DataConfig,
    MixtureDataset,
    SourceConfig,
    TokenizerConfig,
    build_datasets,
    build_examples,
    build_tokenizer,
    build_validation,
    train_tokenizer,
)
from dataset_loading.bad_rows import BadRows
from dataset_loading.splits import iterate_training_texts, load_split

BYTES = train_tokenizer([], 259)


def generated(task="addition", **fields):
    return SourceConfig("generated", task=task, **{"num_rows": 200, **fields})


def files(path, **fields):
    return SourceConfig("files", paths=[str(path)], **fields)


def write_texts(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def split_texts(config, seed=0):
    split = load_split(config, seed, BadRows(0))
    return [[text for _, rows in part for text in rows["text"]] for part in (split.train, split.validation)]


def test_validation_is_split_off_by_document_and_seed(tmp_path):
    """It is there without asking; equal documents, here every text twice, stay on one side."""
    texts = [f"text {number // 2}" for number in range(2000)]
    config = DataConfig(train=[files(write_texts(tmp_path / "a.jsonl", texts))], validation_fraction=0.1)
    train, validation = split_texts(config)
    assert 140 < len(validation) < 260
    assert not set(train) & set(validation)
    assert Counter(train + validation) == Counter(texts)
    assert [train, validation] == split_texts(config)
    assert [train, validation] != split_texts(config, seed=1)


def test_more_documents_move_none_to_the_other_side(tmp_path):
    """Short ones are whole, long ones cut, and both stay where they were, wherever the new ones stand."""
    short = [f"text {number}" for number in range(100)]
    long = ["".join(f"line {number} of {name}\n" for number in range(800)) for name in "abc"]
    config = DataConfig(train=[files(write_texts(tmp_path / "b.jsonl", [*short[:50], long[0]]))])
    before = split_texts(config)
    write_texts(tmp_path / "a.jsonl", [long[1], *short[50:]])  # a source is called after its first file
    (tmp_path / "c.txt").write_text(long[2])
    config = DataConfig(train=[files(tmp_path / "[abc].*")])
    after = split_texts(config)
    assert config.train[0].label != "b"
    for old, new, count in zip(before, after, (40, 3), strict=True):
        assert len(old) >= count and set(old) < set(new)
    assert len(before[0]) + len(before[1]) == 52 and len(after[0]) + len(after[1]) == 106


@pytest.mark.parametrize("line", ["line {}\n", "word {} "])
def test_a_long_document_is_split_by_size_at_the_start_of_a_line(tmp_path, line):
    """Its tail is validation, one document or a few; where there are no lines, it is cut in the middle."""
    text = "".join(line.format(number) for number in range(3000))
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text.upper() + "X")
    (tmp_path / "c.txt").write_text("a few words " * 20)
    for name, count in (("a.txt", 1), ("*.txt", 2)):
        train, validation = split_texts(DataConfig(train=[files(tmp_path / name)], validation_fraction=0.1))
        assert len(validation) == count
        for head, tail, whole in zip(train, validation, (text, text.upper() + "X"), strict=False):
            assert head + tail == whole
            assert head.endswith("\n") == ("\n" in text) and 0.099 < len(tail) / len(whole) < 0.102
    assert train[2] == "a few words " * 20


def test_documents_too_few_and_too_short_to_split_are_an_error(tmp_path):
    """With the counts, instead of a run without validation, or without training."""
    (tmp_path / "a.txt").write_text("x")
    message = r"validation_fraction {} of source 'a', which has 1 short documents, leaves {} to train on and {} for val"
    for fraction, counts in ((0.001, (1, 0)), (0.999, (0, 1))):
        with pytest.raises(ValueError, match=message.format(fraction, *counts)):
            split_texts(DataConfig(train=[files(tmp_path / "a.txt")], validation_fraction=fraction))
    (tmp_path / "a.txt").write_text("a line\n" * 2000 + "\n" * 2000)  # nothing to evaluate in its tail
    with pytest.raises(ValueError, match="leaves 1 to train on and 0 for val"):
        split_texts(DataConfig(train=[files(tmp_path / "a.txt")]))


def test_train_documents_that_validation_has_are_dropped(tmp_path):
    """Whichever source they come from."""
    config = DataConfig(
        train=[files(write_texts(tmp_path / "a.jsonl", ["one", "two", "three"]))],
        validation=[files(write_texts(tmp_path / "b.jsonl", ["two", "four"]))],
    )
    assert split_texts(config) == [["one", "three"], ["two", "four"]]


def test_one_file_cannot_be_train_and_validation(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    config = DataConfig(train=[files(tmp_path / "*.txt", name="all")], validation=[files(tmp_path / "a.txt")])
    with pytest.raises(ValueError, match=r"a.txt' is in data.train \(all\) and in data.validation"):
        build_datasets(config, BYTES)


def test_generated_roles_are_set_by_the_list(tmp_path):
    config = DataConfig(train=[generated(), generated("stories")], validation_fraction=0.1)
    split = load_split(config, 0, BadRows(0))
    assert [len(rows) for _, rows in split.validation] == [20, 20]
    for (source, train), (_, validation) in zip(split.train, split.validation, strict=True):
        assert source.role is None
        assert not set(train["prompt"]) & set(validation["prompt"])


def test_validation_keeps_the_order_of_the_file_and_scores_each_byte_once(tmp_path):
    """Never shuffled; bits per byte are over the whole file."""
    text = "".join(f"zeile {number} größer\n" for number in range(300))
    (tmp_path / "valid.txt").write_text(text)
    config = DataConfig(train=[generated()], validation=[files(tmp_path / "valid.txt")], block_size=32)
    rows = build_datasets(config, BYTES).validation["valid"]
    labels = torch.cat([rows[index]["labels"][1:] for index in range(len(rows))])
    labels = labels[labels != -100]
    assert labels[-1] == BYTES.eos_token_id
    assert BYTES.decode(labels[:-1]) == text
    assert len(labels) - 1 == len(text.encode())


@pytest.mark.parametrize("configured", [False, True])
def test_validation_alone_is_that_of_the_whole_run(tmp_path, configured):
    (tmp_path / "a.txt").write_text("some line\n" * 1100)
    train = [generated(), files(write_texts(tmp_path / "b.jsonl", [f"text {number}" for number in range(50)]))]
    other = files(tmp_path / "a.txt")
    config = DataConfig(*([train, [other]] if configured else [[*train, other]]), block_size=16)
    whole, alone = build_datasets(config, BYTES, seed=3).validation, build_validation(config, BYTES, seed=3)
    assert list(whole) == list(alone) == (["a"] if configured else ["addition", "b", "a"])
    for name, rows in whole.items():
        assert rows.tokens.tolist() == alone[name].tokens.tolist()


def test_the_vocabulary_of_a_few_rows_sees_no_validation_document(tmp_path, monkeypatch):
    """The rows are taken after the split, which is that of the whole source."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "hub").mkdir()
    write_texts(tmp_path / "hub" / "train.jsonl", [f"text {number}" for number in range(100)])
    config = DataConfig(train=[SourceConfig("hub", path=str(tmp_path / "hub"))], validation_fraction=0.5)
    train, validation = split_texts(config)
    assert list(iterate_training_texts(config, 0, limit=10)) == train[:10]
    assert 30 < len(validation) < 70


def test_report_counts(tmp_path):
    write_texts(tmp_path / "a.jsonl", ["abc", "", "defg"])
    config = DataConfig(
        train=[files(tmp_path / "a.jsonl")], validation=[generated(num_rows=7)], block_size=4, max_invalid_rows=1
    )
    validation, train = build_datasets(config, BYTES).report
    assert (train.role, train.name, train.documents, train.tokens, train.rows, train.bad_rows) == (
        *("train", "a", 2, 11),
        4,  # 11 tokens, one repeated at each of the cuts inside a document: 4 + 3 + 3 + 1, the first cut after "abc"
        1,
    )
    assert (validation.role, validation.name, validation.documents) == ("validation", "addition", 7)


class Numbers(Dataset):
    def __init__(self, name, size):
        self.name, self.size = name, size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return self.name, int(index)


def test_mixture_keeps_the_proportions_and_repeats_nothing_early():
    """Every row of every part is read, equally often up to one, in the shares of the weights."""
    mixture = MixtureDataset([Numbers("a", 30), Numbers("b", 7), Numbers("c", 100)], [1, 1, 2], seed=3)
    counts = Counter(mixture[index] for index in range(len(mixture)))
    assert len(mixture) == 200
    for name, size, drawn in (("a", 30, 50), ("b", 7, 50), ("c", 100, 100)):
        of_part = [counts[name, index] for index in range(size)]
        assert sum(of_part) == drawn
        assert max(of_part) - min(of_part) <= 1
    firsts = Counter(mixture[index][0] for index in range(100))
    assert abs(firsts["c"] - 50) < 15 and abs(firsts["a"] - 25) < 15  # mixed throughout


def test_a_weight_that_makes_an_endless_epoch_is_refused():
    """Before anything of its length is allocated."""
    assert len(MixtureDataset([Numbers("a", 10), Numbers("b", 1000)], [99.5, 1], seed=0)) == 100_500
    message = (
        "weight 1e-09 of a source of 1000 rows makes an epoch of 1000000001000 rows, more than 100 times the 1010 rows "
        "there are; raise the weight, or read less of the source"
    )
    with pytest.raises(ValueError, match=message):
        MixtureDataset([Numbers("a", 10), Numbers("b", 1000)], [1, 1e-9], seed=0)


def test_mixture_row_is_a_function_of_seed_and_index():
    """Random access gives what iterating gives; another seed another order."""
    first, second, other = (MixtureDataset([Numbers("a", 9), Numbers("b", 9)], [1, 3], seed) for seed in (0, 0, 1))
    order = [first[index] for index in range(len(first))]
    assert [second[index] for index in reversed(range(len(second)))][::-1] == order
    assert [other[index] for index in range(len(other))] != order
    with pytest.raises(IndexError):
        first[len(first)]


def test_too_little_to_train_on_is_an_error_with_the_counts(tmp_path):
    """An empty list, less than a block, less than a batch."""
    with pytest.raises(ValueError, match=r"data\.train is empty"):
        build_datasets(DataConfig(), BYTES)
    path = write_texts(tmp_path / "a.jsonl", ["abcdef", "ghi"])
    config = DataConfig(train=[files(path)], validation=[generated()], block_size=32)
    with pytest.raises(ValueError, match=r"2 documents with 13 tokens, less than one row of data\.block_size 32"):
        build_datasets(config, BYTES)
    config.block_size = 4
    assert len(build_datasets(config, BYTES, batch_size=4).train) == 4
    with pytest.raises(ValueError, match="has 4 rows of 4 tokens, less than one batch of 5"):
        build_datasets(config, BYTES, batch_size=5)


def test_a_tokenizer_larger_than_the_model_is_refused():
    """Whichever of its ids occur in the data; here 258, the last byte, does not."""
    config = DataConfig(train=[generated()], block_size=16)
    assert max(build_datasets(config, BYTES, vocab_size=259).train.tokens) < 258
    for build in (build_datasets, build_validation):
        with pytest.raises(ValueError) as error:
            build(config, BYTES, vocab_size=258)
        assert str(error.value) == (
            "the tokenizer has token id 258, but the model's vocab_size is 258; "
            "use the model's own tokenizer or raise vocab_size to at least 259"
        )


def test_workers_change_nothing():
    sources = [generated("stories"), generated("chained_lookup", loss_on="answer")]
    one = build_datasets(DataConfig(train=sources, preprocessing_workers=1), BYTES)
    two = build_datasets(DataConfig(train=sources, preprocessing_workers=2), BYTES)
    assert one.report == two.report
    for index in range(len(one.train)):
        assert all(torch.equal(one.train[index][name], two.train[index][name]) for name in one.train[index])


def test_loss_on_answer_labels_answers_and_end_tokens_only(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "one?", "a": "1"}\n{"q": "two?", "a": "22"}\n')
    source = files(path, prompt_column="q", answer_column="a", separator=" = ", loss_on="answer")
    config = DataConfig(train=[source], validation=[generated()], block_size=30)
    config.block_size = 22  # begin + "one? = 1" + end, begin + "two? = 22" + end: 10 + 11 tokens, and padding
    with pytest.raises(ValueError, match="21 tokens"):
        build_datasets(config, BYTES)
    config.block_size = 21
    row = build_datasets(config, BYTES).train[0]
    learned = BYTES.convert_ids_to_tokens(row["labels"][row["labels"] != -100].tolist())
    assert learned == ["Ġ", "=", "Ġ", "1", "<|end|>", "Ġ", "=", "Ġ", "2", "2", "<|end|>"]
    assert BYTES.decode(row["input_ids"]) == "<|begin|>one? = 1<|end|><|begin|>two? = 22<|end|>"


def test_examples_come_from_the_test_role_and_end_in_their_answers():
    """Labels are the answer with its separator and the end token; prompts are begin + the prompt alone."""
    config = DataConfig(train=[generated()])
    examples = build_examples(generated(difficulty=[2, 5]), config, BYTES, limit=30)
    trained_on = set(load_split(config, 0, BadRows(0)).train[0][1]["prompt"])
    assert len(examples) == 30
    for example in examples:
        prompt, answer = example["prompt"], example["answer"]
        assert BYTES.decode(example["input_ids"]) == f"<|begin|>{prompt} {answer}<|end|>"
        first = 1 + len(prompt)
        assert example["labels"] == [-100] * first + example["input_ids"][first:]
        assert example["input_ids"][1:first] == BYTES(prompt)["input_ids"]
        assert 2 <= example["difficulty"] <= 5 and prompt not in trained_on
    batch = Collator(BYTES)(examples)
    assert batch["attention_mask"].sum() == sum(len(example["input_ids"]) for example in examples)


def test_examples_need_answers(tmp_path):
    path = write_texts(tmp_path / "a.jsonl", ["x"])
    with pytest.raises(ValueError, match="source 'a' has no answers to check"):
        build_examples(files(path), DataConfig(), BYTES)


def test_examples_of_files_have_no_difficulty(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"q": "one?", "a": "1"}\n')
    (example,) = build_examples(files(path, prompt_column="q", answer_column="a"), DataConfig(), BYTES)
    assert (example["prompt"], example["answer"], example["difficulty"]) == ("one?", "1", None)


def test_nothing_is_written(tmp_path, monkeypatch):
    """Building leaves no file behind, where a cache could not be written either (D5)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("some text\n" * 1100)
    config = DataConfig(train=[files("a.txt"), generated()], block_size=32, preprocessing_workers=2)
    build_datasets(config, build_tokenizer(TokenizerConfig(vocab_size=280), config))
    assert os.listdir(tmp_path) == ["a.txt"]


_IN_A_PROCESS = """
import hashlib, sys
import torch
from dataset_loading import *

files = SourceConfig("files", paths=[sys.argv[1]])
hub = SourceConfig("hub", name="hub", path=sys.argv[2], streaming=True)
tasks = [SourceConfig("generated", task=name, num_rows=300) for name in TASKS]
tokenizer = None
for train in ([files, *tasks], [hub, files, *tasks]):
    config = DataConfig(train=train, block_size=128, streaming_validation_rows=5)
    tokenizer = tokenizer or build_tokenizer(TokenizerConfig(vocab_size=300), config, seed=7)
    built = build_datasets(config, tokenizer, seed=7)
    for rows in [built.train, *built.validation.values()]:
        rows = rows if isinstance(rows, StreamingDataset) else [rows[index] for index in range(len(rows))]
        values = [row[name] for row in rows for name in sorted(row)]
        tokens = [value.tolist() if torch.is_tensor(value) else value for value in values]
        print(len(tokens), hashlib.sha256(repr(tokens).encode()).hexdigest())
print(hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest())
"""


def test_processes_build_the_same_data(tmp_path):
    """With other hash seeds, as two ranks have them, all datasets and the vocabulary are equal."""
    (tmp_path / "hub").mkdir()
    write_texts(tmp_path / "hub" / "train.jsonl", [f"hub text {number}" for number in range(100)])
    texts = write_texts(tmp_path / "a.jsonl", [f"text {number} " * (number % 20 + 1) for number in range(200)])
    runs = []
    for hash_seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": hash_seed, "HF_HOME": str(tmp_path / hash_seed)}
        command = [sys.executable, "-c", _IN_A_PROCESS, str(texts), str(tmp_path / "hub")]
        folder = Path(__file__).parent.parent
        runs.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder))
    first, second = (run.communicate()[0].splitlines() for run in runs)
    assert [run.returncode for run in runs] == [0, 0]
    sources = 1 + len(TASKS)
    assert len(first) == 1 + sources + 1 + (sources + 1) + 1
    assert first == second
