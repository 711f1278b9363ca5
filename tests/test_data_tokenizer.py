"""Tokenizers trained on the run's documents and loaded ones."""

import pytest
from transformers import AutoTokenizer

from dataset_loading import DataConfig, SourceConfig, TokenizerConfig, build_tokenizer, load_tokenizer, train_tokenizer
from dataset_loading.documents import encode_batch

TEXTS = ["the cat sat on the mat, 1234 times", "a cat and a hat 12", "the hat sat 34"] * 5
ODD_TEXTS = [
    "",
    " leading and trailing  ",
    "a .b ,c 's n't don 't  !",  # what clean_up_tokenization_spaces would change
    "\r\n\t\x00\x7f",
    "naïve café e\u0301",
    "日本語 العربية 🙂👩\u200d👩\u200d👧",
    "<|end|> and <|begin|><|pad|>",
    "".join(map(chr, range(1, 0x2000, 7))),
]


def encode(tokenizer, text):
    return encode_batch({"text": [text]}, tokenizer, " ", "all")["tokens"][0][1:-1]


@pytest.mark.parametrize("vocab_size", [259, 300])
@pytest.mark.parametrize("split_digits", [False, True])
def test_any_text_comes_back_unchanged(vocab_size, split_digits, tmp_path):
    """C7: also after saving and loading elsewhere."""
    tokenizer = train_tokenizer(TEXTS, vocab_size, split_digits)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in ODD_TEXTS + TEXTS:
        ids = encode(tokenizer, text)
        assert tokenizer.decode(ids) == text
        assert loaded.decode(ids) == text
        assert encode(loaded, text) == ids
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def test_259_tokens_are_bytes():
    tokenizer = train_tokenizer(TEXTS, 259)
    assert len(tokenizer) == 259
    assert [len(encode(tokenizer, text)) for text in ODD_TEXTS] == [len(text.encode()) for text in ODD_TEXTS]


def test_special_tokens_are_distinct_and_never_added_silently():
    """T2: pad is not the end token."""
    tokenizer = train_tokenizer(TEXTS, 300)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer("cat")["input_ids"] == encode(tokenizer, "cat")


def test_special_tokens_written_in_a_text_are_text():
    tokenizer = train_tokenizer(TEXTS, 259)
    assert min(encode(tokenizer, "<|end|>")) > 2
    assert tokenizer("<|end|>")["input_ids"] == [2]  # the tokenizer's own call still reads them


def test_digits_stay_single_tokens_when_asked():
    merged, split = train_tokenizer(TEXTS * 20, 300), train_tokenizer(TEXTS * 20, 300, split_digits=True)
    assert len(encode(merged, "1234")) < 4
    assert len(encode(split, "1234")) == 4


def test_vocabulary_is_learned_from_train_documents_only(tmp_path):
    """A word that only validation has stays in bytes."""
    (tmp_path / "train.txt").write_text("common words " * 50)
    (tmp_path / "valid.txt").write_text("zzzyzx " * 50)
    data = DataConfig(
        train=[SourceConfig("files", paths=[str(tmp_path / "train.txt")])],
        validation=[SourceConfig("files", paths=[str(tmp_path / "valid.txt")])],
    )
    tokenizer = build_tokenizer(TokenizerConfig(vocab_size=290), data)
    assert len(encode(tokenizer, "zzzyzx")) == 6
    assert len(encode(tokenizer, "common")) < 6


def test_same_texts_give_the_same_vocabulary():
    first, second = (train_tokenizer(TEXTS, 290).get_vocab() for _ in range(2))
    assert first == second


def test_missing_special_tokens_are_added_to_a_loaded_tokenizer(tmp_path):
    """T2: a tokenizer that pads with its end token gets a pad token of its own."""
    tokenizer = train_tokenizer(TEXTS, 270)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id != loaded.eos_token_id == 2
    assert loaded.pad_token == "<|pad|>"


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    """D8."""
    with pytest.raises(ValueError, match="nowhere' cannot be loaded"):
        load_tokenizer(str(tmp_path / "nowhere"))
