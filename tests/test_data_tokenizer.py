"""Tokenizers trained on the run's documents and loaded ones."""

import json
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import pretrain
from dataset_loading import (
    DataConfig,
    SourceConfig,
    TokenizerConfig,
    build_tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from dataset_loading.packing.documents import encode_batch
from model import text_encoding
from tests.test_pretrain import write_config

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
    return encode_batch({"text": [text]}, tokenizer, " ", "all")["tokens"][0][1:-1].tolist()


@pytest.mark.parametrize("vocab_size", [259, 300])
@pytest.mark.parametrize("split_digits", [False, True])
def test_any_text_comes_back_unchanged(vocab_size, split_digits, tmp_path):
    """Also after saving and loading elsewhere."""
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
    """Pad is not the end token."""
    tokenizer = train_tokenizer(TEXTS, 300)
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3
    assert tokenizer("cat")["input_ids"] == encode(tokenizer, "cat")


def test_special_tokens_written_in_a_text_are_text():
    tokenizer = train_tokenizer(TEXTS, 259)
    assert min(encode(tokenizer, "<|end|>")) > 2
    assert tokenizer("<|end|>")["input_ids"] == [2]  # the tokenizer's own call still reads them


MEDIA_TOKENS = ("<|user|>", "<|image_start|>", "<|image|>", "<|image_end|>")


def test_special_tokens_of_media_come_first_and_are_text_in_a_text(tmp_path):
    tokenizer = train_tokenizer(TEXTS, 300, media_tokens=MEDIA_TOKENS)
    tokenizer.save_pretrained(tmp_path)
    for saved_or_not in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert saved_or_not.convert_tokens_to_ids(list(MEDIA_TOKENS)) == [3, 4, 5, 6]
        assert saved_or_not("<|image|>cat")["input_ids"][0] == 5
        assert min(encode(saved_or_not, "<|image|>")) > 6
        assert saved_or_not.decode([3, 5, *encode(saved_or_not, "cat"), 2], skip_special_tokens=True) == "cat"
    for text in ODD_TEXTS + TEXTS:
        assert tokenizer.decode(encode(tokenizer, text)) == text


def test_a_vocabulary_has_room_for_the_special_tokens_of_media():
    assert len(train_tokenizer([], 263, media_tokens=MEDIA_TOKENS)) == 263
    with pytest.raises(ValueError, match=r"vocab_size is 262, but bytes and special tokens, .* are 263"):
        train_tokenizer([], 262, media_tokens=MEDIA_TOKENS)


def test_special_tokens_of_media_are_added_to_a_loaded_tokenizer_that_lacks_them(tmp_path):
    """Those it has keep their ids; a token that it has, but takes for ordinary text, becomes special."""
    tokenizer = train_tokenizer(TEXTS, 300, media_tokens=MEDIA_TOKENS[:1])
    tokenizer.add_tokens(["<|image|>"])
    size, id_before = len(tokenizer), tokenizer.convert_tokens_to_ids("<|image|>")
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path), MEDIA_TOKENS)
    assert loaded.convert_tokens_to_ids(list(MEDIA_TOKENS)) == [3, size, id_before, size + 1]
    assert id_before not in encode(loaded, "<|image|>")
    loaded.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path), MEDIA_TOKENS).get_vocab() == loaded.get_vocab()
    assert load_tokenizer(str(tmp_path)).get_vocab() == loaded.get_vocab()


def test_every_way_to_a_tokenizer_of_a_run_has_the_tokens_of_media(tmp_path):
    """Trained, loaded by its path, and taken from a checkpoint."""
    (tmp_path / "train.txt").write_text("common words " * 50)
    (tmp_path / "valid.txt").write_text("rare words " * 50)
    train, validation = (SourceConfig("files", paths=[str(tmp_path / name)]) for name in ("train.txt", "valid.txt"))
    data = DataConfig(train=[train], validation=[validation])
    train_tokenizer(TEXTS, 270).save_pretrained(tmp_path)
    for config, place in (
        (TokenizerConfig(vocab_size=270), None),
        (TokenizerConfig(path=str(tmp_path)), None),
        (TokenizerConfig(), tmp_path / "checkpoint-1"),
    ):
        tokenizer = build_tokenizer(config, data, resume_point=place, media_tokens=MEDIA_TOKENS)
        assert tokenizer.extra_special_tokens == list(MEDIA_TOKENS)


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
    """A tokenizer that pads with its end token gets a pad token of its own."""
    tokenizer = train_tokenizer(TEXTS, 270)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token_id != loaded.eos_token_id == 2
    assert loaded.pad_token == "<|pad|>"


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere' cannot be loaded"):
        load_tokenizer(str(tmp_path / "nowhere"))


def test_a_damaged_tokenizer_is_one_line(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0", "model": {}}')
    with pytest.raises(ValueError, match=r"tokenizer.path '.*' cannot be loaded: ") as error:
        load_tokenizer(str(tmp_path))
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------------- long texts


def whitespace_salad(length, seed=0):
    """Words, digits, signs and every kind of white space, in runs of up to three."""
    generator = random.Random(seed)
    parts = ["the", "cat's", "12", "größer", "日本", "🙂", "...", "<|end|>", " ", "  ", "\n", "\r\n", "\t", "\u2003"]
    weights = [8] * 8 + [30, 3, 8, 4, 2, 1]
    return "".join(generator.choices(parts, weights, k=length))


def like_llama_3():
    """A byte-level vocabulary whose pretokenizer keeps line ends with the signs in front of them."""
    tokenizer = Tokenizer(models.BPE())
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    return tokenizer


def like_llama_2():
    """No pretokenizer, and a mark in front of every text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return tokenizer


def like_t5():
    """Words with a mark in front of each, runs of white space as one mark."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    return tokenizer


def trained(tokenizer):
    """Some merges across signs and white space, where the pretokenizer lets them be."""
    names = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator([whitespace_salad(500, seed) for seed in range(3)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=names[0], bos_token=names[1], eos_token=names[2]
    )


TOKENIZERS = {
    "bytes": (lambda: train_tokenizer([], 259), True),
    "own": (lambda: train_tokenizer([whitespace_salad(2000)], 400), True),
    "own, digits apart": (lambda: train_tokenizer([whitespace_salad(2000)], 400, split_digits=True), True),
    "like Llama 3": (lambda: trained(like_llama_3()), True),
    "like Llama 2": (lambda: trained(like_llama_2()), False),
    "like T5": (lambda: trained(like_t5()), True),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_a_long_text_in_pieces_has_the_tokens_of_the_whole(name, monkeypatch):
    """Whatever the tokenizer; one that marks the beginning of every text gets it whole."""
    make, is_cut = TOKENIZERS[name]
    tokenizer, pieces_encoded = make(), 0
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    monkeypatch.setattr(text_encoding, "PIECE_LENGTH", 50)
    for seed in range(10):
        text = whitespace_salad(1000, seed)
        assert encode(tokenizer, text) == backend.encode(text, add_special_tokens=False).ids
        pieces_encoded += len(list(text_encoding.cut_text(text, backend)))
    assert pieces_encoded > 200 if is_cut else pieces_encoded == 10


def test_a_text_without_white_space_is_one_piece(monkeypatch):
    monkeypatch.setattr(text_encoding, "PIECE_LENGTH", 50)
    assert list(text_encoding.cut_text("x" * 500)) == ["x" * 500]


def test_a_vocabulary_from_pieces_is_that_of_the_whole_texts(monkeypatch):
    texts = [whitespace_salad(3000, seed) for seed in range(3)]
    whole = train_tokenizer(texts, 400).backend_tokenizer.to_str()
    monkeypatch.setattr(text_encoding, "PIECE_LENGTH", 50)
    assert train_tokenizer(texts, 400).backend_tokenizer.to_str() == whole


def test_little_is_encoded_at_a_time(monkeypatch):
    """The encodings of a text take a hundred times its memory and more: a long text, and many short ones."""
    backend, encoded = train_tokenizer(TEXTS, 300).backend_tokenizer, []

    class Watched:
        def __getattr__(self, name):
            return getattr(backend, name)

        def encode_batch_fast(self, texts, **options):
            encoded.append(sum(map(len, texts)))
            return backend.encode_batch_fast(texts, **options)

    monkeypatch.setattr(text_encoding, "PIECE_LENGTH", 1000)
    tokenizer = SimpleNamespace(backend_tokenizer=Watched(), bos_token_id=1, eos_token_id=2)
    texts = [whitespace_salad(9000), *(whitespace_salad(50, seed) for seed in range(200))]
    batch = encode_batch({"text": texts}, tokenizer, " ", "all")
    assert sum(encoded) == sum(map(len, texts)) and max(encoded) < 2100
    for text, tokens in zip(texts, batch["tokens"], strict=True):
        assert tokens.dtype == np.int32
        assert tokens.tolist() == [1, *backend.encode(text).ids, 2]


# ----------------------------------------------------------------------------------------------------------- resuming


@pytest.fixture
def texts(tmp_path):
    """A folder with one text."""
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("the cat sat on the mat\n" * 600)
    return tmp_path / "texts"


def add_text(folder):
    (folder / "b.txt").write_text("quick brown foxes jump over\n" * 6000)


@pytest.mark.parametrize("place", ["checkpoint-3", "."])
def test_a_resumed_run_keeps_the_tokenizer_that_it_began_with(texts, tmp_path, place):
    """From the checkpoint, or the run folder above; whatever the documents are by then, and whatever `path` says."""
    data = DataConfig(train=[SourceConfig("files", paths=[str(texts / "*.txt")])])
    config = TokenizerConfig(vocab_size=275)
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"checkpoint-3 nor the folder above has the tokenizer\.json"):
        build_tokenizer(config, data, resume_point=str(checkpoint))
    first = build_tokenizer(config, data)
    first.save_pretrained(tmp_path / "run" / place)
    add_text(texts)
    assert build_tokenizer(config, data).get_vocab() != first.get_vocab()
    for asked in (config, TokenizerConfig(path=str(tmp_path / "elsewhere"))):
        assert build_tokenizer(asked, data, resume_point=str(checkpoint)).get_vocab() == first.get_vocab()


def test_a_run_goes_on_with_its_tokenizer_after_files_were_added(texts, tmp_path):
    """Through `pretrain.py`; a vocabulary trained anew would be that of the larger file."""
    data = {"train": [{"kind": "files", "paths": ["texts/*.txt"]}], "validation": []}
    sizes = {"model": {"vocab_size": 275}, "tokenizer": {"vocab_size": 275}}
    out = tmp_path / "out"
    flags = ["--config", str(write_config(tmp_path, data=data, **sizes)), "--training.output_dir", str(out)]
    pretrain.main(flags)
    vocabulary = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    shutil.rmtree(out / "checkpoint-6")
    (out / "trainer_state.json").unlink()  # with it, the run would be finished
    add_text(texts)
    pretrain.main([*flags, "--training.resume_from_checkpoint", "true"])
    assert json.loads((out / "tokenizer.json").read_text())["model"]["vocab"] == vocabulary
